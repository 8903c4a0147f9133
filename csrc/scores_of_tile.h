// The products of a tile's queries and keys, each summed up in one order in every kernel: what a backward makes of them it
// relates to the forward's largest score, and exp(score - largest) of a large score knows no small differences.
#ifndef ANYATTENTION_SCORES_OF_TILE_H
#define ANYATTENTION_SCORES_OF_TILE_H

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "products.h"
#include "simd.h"
#include "tiles.h"

namespace anyattention {

// The sum of each of as many vectors as one has lanes.
template <class T>
ANYATTENTION_INLINE Lanes<T> sums_of_lanes(const Lanes<T> *sums) {
  constexpr int lane = kLane<T>;
  if constexpr (sizeof(T) == sizeof(float)) {
    return sums_of<lane, lane>(sums);
  } else {
    Lanes<T> products;
    for (int n = 0; n < lane; ++n) products[n] = sum_of<T, lane>(sums[n]);
    return products;
  }
}

// The products of as many rows as a vector has lanes with one more, whose channels from d on channels(d) gives.
template <class T, class Number, class Channels>
ANYATTENTION_INLINE Lanes<T> products_of(const Number *const *rows, int64_t padded, const Channels &channels) {
  constexpr int lane = kLane<T>;
  Lanes<T> sums[lane]{};
  for (int64_t d = 0; d < padded; d += lane) {
    const Lanes<T> x = channels(d);
    for (int n = 0; n < lane; ++n) sums[n] += x * load_wide<T, lane>(rows[n] + d);
  }
  return sums_of_lanes<T>(sums);
}

// Those of few queries, summed up as few_queries.h does.
template <class T>
void score_few(const Part &part, const QueryTile &tile, const Product<T> &p) {
  constexpr int lane = kLane<T>;
  const int64_t count = tile.now.end - tile.now.begin;
  for (int64_t first = 0; first < count; first += lane) {
    const T *keys[lane];
    for (int64_t n = 0; n < lane; ++n) keys[n] = p.a + std::min(first + n, count - 1) * p.a_row;
    for (int64_t i = 0; i < tile.count; ++i) {
      const Lanes<T> products = products_of<T>(keys, part.D, [&p, i](int64_t d) {
        Lanes<T> channels;
        for (int n = 0; n < lane; ++n) channels[n] = p.b[(d + n) * p.b_row + i];
        return channels;
      });
      for (int64_t n = 0; n < lane && first + n < count; ++n) p.c[(first + n) * p.c_row + i] = products[n];
    }
  }
}

// The scores of a tile, a product whose rows are keys and whose columns are queries; `extent` as `product` takes it.
template <class T, class Factor, class Extents>
void score_tile(const Part &part, const QueryTile &tile, const Product<T, Factor> &p, const Extents &extent) {
  if constexpr (std::is_same_v<T, Factor>) {
    if (part.has_few_queries()) return score_few(part, tile, p);
  }
  product<false>(tile.now.end - tile.now.begin, p, extent);
}

}  // namespace anyattention

#endif
