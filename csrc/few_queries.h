// Attention of a few queries, as in decoding: keys and values are read where they lie, once for all heads that share them.
//
//   i  query     j  key in order     g  key head, h / group     r  row: i * group + head of the group
//   D, C  head_dim, value_dim, rounded up to whole vectors
//
// In tiles a query is a lane of a vector, and few queries leave most lanes empty. Here channels are lanes, and of the scores
// keys. The keys of a long row are cut at fixed places, so that they are shared out among threads.
#ifndef ANYATTENTION_FEW_QUERIES_H
#define ANYATTENTION_FEW_QUERIES_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "anyattention.h"
#include "products.h"
#include "run_call.h"
#include "scores_of_tile.h"
#include "simd.h"
#include "tile_bias.h"
#include "tiles.h"
#include "workspace.h"

namespace anyattention {

// So many bytes of rows are asked for before they are read, into the first cache.
constexpr int64_t kAheadBytes = 8192;
constexpr int64_t kKeysTogether = 4;  // whose products with several rows of queries are in registers

// Where a tile's keys or values lie: neighbours a stride apart, or in another order.
template <class Number>
struct NeighbouringRows {
  const Number *first;
  int64_t stride, lines, ahead;  // a row in lines of the cache

  ANYATTENTION_INLINE const Number *operator()(int64_t j) const { return first + j * stride; }
  ANYATTENTION_INLINE void ask_after(int64_t j) const {
    const auto *row = static_cast<const char *>(address_of(first, j + ahead, stride));
    if (lines == 4) return prefetch_row<256>(row);  // a loop of known length
    for (int64_t n = 0; n < lines; ++n) __builtin_prefetch(row + 64 * n, 0, 3);
  }
};
template <class Number>
struct OrderedRows {
  const Part &part;
  const Number *first;
  int64_t stride, lines, begin;

  ANYATTENTION_INLINE const Number *operator()(int64_t j) const { return first + part.key_at(begin + j) * stride; }
  ANYATTENTION_INLINE void ask_after(int64_t j) const {
    const auto later = part.key_at(std::min(begin + j + kAheadBytes / (64 * lines), part.c.num_keys - 1));
    const auto *row = reinterpret_cast<const char *>(first + later * stride);
    for (int64_t n = 0; n < lines; ++n) __builtin_prefetch(row + 64 * n, 0, 3);
  }
};

template <class T>
class FewQueries {
 public:
  explicit FewQueries(const Part &p)
      : part(p), group(p.H / p.G), rows(p.c.num_queries * group), row_size(p.C + 2), tile(p) {
    tile.move_to(0);
    pieces = std::max<int64_t>(1, static_cast<int64_t>((tile.keys.size() + kBlock - 1) / kBlock));
    sees_all = !p.c.mask.numbers && !p.c.bias.numbers && !(p.c.dropout > 0) && !(p.c.softcap > 0);
    for (int64_t i = 0; i < p.c.num_queries; ++i) {
      const int64_t r = p.c.parts.offsets[i];
      sees_all &= p.c.parts.offsets[i + 1] == r + 1 && p.c.parts.begins[r] == 0 && p.c.parts.ends[r] == p.c.num_keys;
    }
  }

  void run(const RowResults<T> &results) {
    const int64_t heads = part.c.batch * part.G, tasks = heads * pieces;
    const Workspace<T> sums(tasks * rows * row_size, false);
    each_task<T>(part, tasks, 1, TileMemory<T>::size(part), nanoseconds(), [&](int64_t n, QueryTile &mine, T *scratch) {
      mine.move_to(0);
      Piece(*this, mine, scratch, n / pieces / part.G, n / pieces % part.G)
          .run(static_cast<std::size_t>(n % pieces) * kBlock, sums.get() + n * rows * row_size);
    });
    for (int64_t n = 0; n < heads * rows; ++n) {
      T *const of_row = sums.get() + (n / rows * pieces * rows + n % rows) * row_size;
      finish(n / rows / part.G, n / rows % part.G, n % rows, of_row, results);
    }
  }

 private:
  const Part &part;
  const int64_t group, rows, row_size;  // of sums: the channels, the largest score, the sum of weights relative to it
  QueryTile tile;
  int64_t pieces;
  bool sees_all;  // each query each key, and scores are products alone

  double nanoseconds() const {
    const double keys = static_cast<double>(part.c.batch * part.G) * static_cast<double>(part.c.num_keys);
    return keys * static_cast<double>(part.D + part.C) * (0.1 + 0.02 * static_cast<double>(rows));
  }

  // Some neighbouring tiles of keys, for all rows of a key head.
  struct Piece {
    const FewQueries &all;
    const Part &part;
    QueryTile &tile;
    TileMemory<T> memory;
    const int64_t b, g;

    Piece(const FewQueries &a, QueryTile &t, T *scratch, int64_t batch, int64_t key_head)
        : all(a), part(a.part), tile(t), memory(scratch, a.part), b(batch), g(key_head) {}

    void run(std::size_t first, T *sums) {
      for (int64_t h = 0; h < all.group; ++h) copy_head(h);
      for (int64_t r = 0; r < all.rows; ++r) {
        T *const row = sums + r * all.row_size;
        std::fill_n(row, part.C, T{0});
        row[part.C] = kMinusInfinity<T>, row[part.C + 1] = 0;
      }
      const auto last = std::min(first + kBlock, tile.keys.size());
      tile.start(first < last ? tile.keys[first].begin : 0);
      for (std::size_t n = first; n < last; ++n) add_keys(tile.keys[n], sums);
    }

   private:
    // The queries of a head of the group, times the scale, among those of the others.
    void copy_head(int64_t h) {
      T *own = memory.turned_query;
      copy_queries(part, tile, b, g * all.group + h, part.c.query, part.c.head_dim, part.D, own);
      for (int64_t i = 0; i < tile.count; ++i) {
        T *row = memory.query + (i * all.group + h) * part.D;
        for (int64_t d = 0; d < part.D; ++d) row[d] = own[i * part.D + d] * static_cast<T>(part.c.scale);
      }
    }

    void add_keys(Range keys, T *sums) {
      each_row(keys, part.c.key, part.c.head_dim, part.D, memory.key, [&](const auto &row) {
        part.D == 64 ? score<64>(keys, row) : score<0>(keys, row);
      });
      if (all.sees_all && (keys.end - keys.begin) % kLane<T> == 0) {
        for (int64_t r = 0; r < all.rows; ++r) weigh_all(r, keys.end - keys.begin, sums + r * all.row_size);
        return each_row(keys, part.c.value, part.c.value_dim, part.C, memory.value,
                        [&](const auto &row) { add_common({0, keys.end - keys.begin}, row, sums); });
      }
      bool is_common = true;  // whether all rows see the same keys, which are neighbours
      uint64_t seen[kFewRows];
      for (int64_t h = 0; h < all.group; ++h) {
        if (h == 0 || part.c.mask.strides[1] != 0 || part.c.bias.strides[1] != 0) {
          tile.look_at(keys, b, g * all.group + h);
          TileBias<T>(part, tile, b, g * all.group + h, memory.bias).read();
        }
        for (int64_t i = 0; i < tile.count; ++i) {
          const int64_t r = i * all.group + h;
          seen[r] = tile.seen[i];
          is_common &= seen[r] == seen[0];
          if (seen[r]) weigh(i, h, keys, sums + r * all.row_size);
        }
      }
      const Range range = range_of(seen[0]);
      is_common &= range.begin == range.end || seen[0] == bits_of(range.begin, range.end);
      each_row(keys, part.c.value, part.c.value_dim, part.C, memory.value, [&](const auto &row) {
        if (is_common) return add_common(range, row, sums);
        for (int64_t r = 0; r < all.rows; ++r) {  // a hidden value may be NaN
          for (uint64_t left = seen[r]; left; left &= left - 1) {
            const int64_t j = __builtin_ctzll(left);
            add_values<1>(r, {j, j + 1}, row, sums, false);
          }
        }
      });
    }

    template <class RowAt>
    void add_common(Range keys, const RowAt &row, T *sums) {
      int64_t r = 0;
      for (; r + 4 <= all.rows; r += 4) add_values<4>(r, keys, row, sums, r == 0);
      for (; r + 2 <= all.rows; r += 2) add_values<2>(r, keys, row, sums, r == 0);
      if (r < all.rows) add_values<1>(r, keys, row, sums, r == 0);
    }

    // Calls with what finds the row of a tile's key: where it lies, or in a copy, if it is no whole number of vectors.
    template <class Take>
    void each_row(Range keys, const anyattention_head_rows &rows, int64_t width, int64_t padded, T *copy, const Take &take) {
      if (width != padded) {
        copy_keys(part, keys, b, g, rows, width, padded, copy);
        take(NeighbouringRows<T>{copy, padded, 0, 0});
        return;
      }
      with_type_of<T>(rows.type, [&](auto zero) {
        using Number = decltype(zero);
        const Number *first = row_of<Number>(rows, b, 0, g);
        const int64_t lines = (width * static_cast<int64_t>(sizeof(Number)) + 63) / 64;
        if (part.c.parts.key_order) {
          take(OrderedRows<Number>{part, first, rows.row_stride, lines, keys.begin});
        } else {
          const Number *own = first + keys.begin * rows.row_stride;
          take(NeighbouringRows<Number>{own, rows.row_stride, lines, std::max<int64_t>(kAheadBytes / (64 * lines), 1)});
        }
      });
    }

    // The scores of all rows, [r][j], up to whole vectors of keys. Some keys meet some rows at a time, so that a number is
    // read less often than it is multiplied; the rows that are left over meet a vector's number of keys.
    template <int Width, class RowAt>
    void score(Range keys, const RowAt &row_at) {
      constexpr int lane = kLane<T>;
      constexpr int together = lane < kKeysTogether ? lane : static_cast<int>(kKeysTogether), few = lane / together;
      const int64_t count = keys.end - keys.begin, D = channels<Width>(part.D);
      for (int64_t first = 0; first < count; first += lane) {
        int64_t begin = 0;
        for (int n = 0; n < lane; n += together) {
          decltype(row_at(0)) key[together];
          for (int m = 0; m < together; ++m) key[m] = row_at(std::min(first + n + m, count - 1));
          for (int m = 0; m < together; ++m) row_at.ask_after(first + n + m);
          for (begin = 0; few > 1 && begin + few <= all.rows; begin += few) {
            const Lanes<T> products = products_of_block<few, together, Width>(key, memory.query + begin * D);
            T *const to = memory.score + begin * kKeys + first + n;
            T numbers[lane];
            store<T, lane>(numbers, products);
            for (int i = 0; i < few; ++i) store<T, together>(to + i * kKeys, load<together>(numbers + i * together));
          }
        }
        if (begin == all.rows) continue;
        decltype(row_at(0)) key[lane];
        for (int64_t n = 0; n < lane; ++n) key[n] = row_at(std::min(first + n, count - 1));
        for (int64_t r = begin; r < all.rows; ++r) {
          const T *query = memory.query + r * D;
          store<T, lane>(memory.score + r * kKeys + first,
                         products_of<T>(key, D, [query](int64_t d) { return load<lane>(query + d); }));
        }
      }
    }

    // The products of some rows of queries, part.D apart, with some keys: [row][key].
    template <int Rows, int Keys, int Width, class Number>
    ANYATTENTION_INLINE Lanes<T> products_of_block(const Number *const *key, const T *query) const {
      constexpr int lane = kLane<T>;
      const int64_t D = channels<Width>(part.D);
      Lanes<T> sums[lane]{};
      for (int64_t d = 0; d < D; d += lane) {
        Lanes<T> row[Rows];
        for (int i = 0; i < Rows; ++i) row[i] = load<lane>(query + i * D + d);
        for (int n = 0; n < Keys; ++n) {
          const Lanes<T> x = load_wide<T, lane>(key[n] + d);
          for (int i = 0; i < Rows; ++i) sums[i * Keys + n] += row[i] * x;
        }
      }
      return sums_of_lanes<T>(sums);
    }

    // Scores of a row become weights relative to its largest score so far; its sums are scaled anew where that has grown.
    void weigh(int64_t i, int64_t h, Range keys, T *sums) {
      const int64_t count = keys.end - keys.begin;
      T *score = memory.score + (i * all.group + h) * kKeys;
      Lanes<T> total{};
      const T shift = raised(largest_lane<kLane<T>>(largest_of_seen(score, i, count, total)), sums);
      weights_of(score, count, shift, total);
      if (part.c.dropout > 0) drop(i, h, count, score);
      sums[part.C + 1] += sum_of<T, kLane<T>>(total);
    }
    // The same where all keys, whole vectors of them, are seen, and scores are products alone.
    void weigh_all(int64_t r, int64_t count, T *sums) {
      constexpr int lane = kLane<T>;
      T *score = memory.score + r * kKeys;
      Lanes<T> total{}, top = Lanes<T>{} + kMinusInfinity<T>;
      for (int64_t j = 0; j < count; j += lane) {
        const Lanes<T> x = load<lane>(score + j);
        total += x * 0;  // of a score of -inf, too, which would pass for a hidden key
        top = x > top ? x : top;
      }
      weights_of(score, count, raised(largest_lane<lane>(top), sums), total);
      sums[part.C + 1] += sum_of<T, lane>(total);
    }

    // Takes a larger score, which sums are relative to from now on; returns what is taken from scores.
    T raised(T top, T *sums) const {
      T &largest = sums[part.C], &sum = sums[part.C + 1];
      const T before = largest;
      if (!(top > before)) return before == kMinusInfinity<T> ? T{0} : before;
      largest = top;
      if (sum != 0) {
        const T factor = std::exp(before - top);
        for (int64_t d = 0; d < part.C; ++d) sums[d] *= factor;
        sum *= factor;
      }
      return top;
    }

    static ANYATTENTION_INLINE void weights_of(T *score, int64_t count, T shift, Lanes<T> &total) {
      constexpr int lane = kLane<T>;
      for (int64_t j = 0; j < count; j += lane) {
        const Lanes<T> weight = Exponential<T, lane>::run(load<lane>(score + j) - shift);
        store<T, lane>(score + j, weight);
        total += weight;
      }
    }

    // By halves, in registers.
    template <int Count>
    static ANYATTENTION_INLINE T largest_lane(Vector<T, Count> vector) {
      if constexpr (Count == 1) {
        return vector[0];
      } else {
        Vector<T, Count / 2> halves[2];
        std::memcpy(halves, &vector, sizeof vector);
        return largest_lane<Count / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
      }
    }

    // The largest scores of those that are seen, which get their cap and bias; the others become -inf.
    Lanes<T> largest_of_seen(T *score, int64_t i, int64_t count, Lanes<T> &total) const {
      constexpr int lane = kLane<T>;
      using Word = typename SeenLanes<T>::Word;
      using Words = typename SeenLanes<T>::Words;
      Words places;
      for (int n = 0; n < lane; ++n) places[n] = n;
      const T cap = cap_of<T>(part.c.softcap);
      Lanes<T> top = Lanes<T>{} + kMinusInfinity<T>;
      for (int64_t j = 0; j < count; j += lane) {
        const Words seen = (Words{} + static_cast<Word>(tile.seen[i] >> j)) >> places & 1;
        Lanes<T> x = seen ? load<lane>(score + j) : Lanes<T>{};
        total += x * 0;  // of a score of -inf, too, which would pass for a hidden key
        if (cap > 0) x = capped<T>(x, cap);
        if (part.c.bias.numbers) x += bias_of(i, j, count);
        x = seen ? x : Lanes<T>{} + kMinusInfinity<T>;
        store<T, lane>(score + j, x);
        top = x > top ? x : top;
      }
      return top;
    }

    void drop(int64_t i, int64_t h, int64_t count, T *weights) const {
      const T factor = static_cast<T>(1 / (1 - part.c.dropout));
      const int64_t v = i / kLane<T>;
      const uint64_t kept = Dropout<T>::kept_of(part, tile, b, g * all.group + h, v, 0)[static_cast<std::size_t>(i % kLane<T>)];
      for (int64_t j = 0; j < count; ++j) weights[j] *= kept >> j & 1 ? factor : 0;
    }

    // The biases of a query and the tile's keys from j on, 0 past the last.
    Lanes<T> bias_of(int64_t i, int64_t j, int64_t count) const {
      Lanes<T> lanes{};
      for (int64_t n = 0; n < std::min<int64_t>(kLane<T>, count - j); ++n) lanes[n] = memory.bias[(j + n) * kQueries + i];
      return lanes;
    }

    // Adds some neighbouring values to the sums of some rows; the first that reads them asks for later ones.
    template <int Rows, class RowAt>
    void add_values(int64_t r, Range keys, const RowAt &row_at, T *sums, bool asks) {
      constexpr int lane = kLane<T>;
      int64_t d = 0;
      for (; d + kBlockVectors * lane <= part.C; d += kBlockVectors * lane) {
        if (asks && d == 0) {
          add_channels<Rows, kBlockVectors, true>(r, d, keys, row_at, sums);
        } else {
          add_channels<Rows, kBlockVectors, false>(r, d, keys, row_at, sums);
        }
      }
      if (asks && d == 0) {
        add_channels<Rows, 1, true>(r, d, keys, row_at, sums);
        d += lane;
      }
      for (; d < part.C; d += lane) add_channels<Rows, 1, false>(r, d, keys, row_at, sums);
    }
    template <int Rows, int Vectors, bool Asks, class RowAt>
    void add_channels(int64_t first, int64_t d, Range keys, const RowAt &row_at, T *all_sums) {
      constexpr int lane = kLane<T>;
      const T *weights = memory.score + first * kKeys;
      T *to = all_sums + first * all.row_size + d;
      Lanes<T> sums[Rows][Vectors];
      for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Vectors; ++v) sums[r][v] = load<lane>(to + r * all.row_size + v * lane);
      }
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        const auto *value = row_at(j) + d;
        if (Asks) row_at.ask_after(j);
        for (int v = 0; v < Vectors; ++v) {
          const Lanes<T> x = load_wide<T, lane>(value + v * lane);
          for (int r = 0; r < Rows; ++r) sums[r][v] += weights[r * kKeys + j] * x;
        }
      }
      for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Vectors; ++v) store<T, lane>(to + r * all.row_size + v * lane, sums[r][v]);
      }
    }
  };

  // Joins the sums of a row's pieces.
  void finish(int64_t b, int64_t g, int64_t r, T *pieces_of_row, const RowResults<T> &results) const {
    T *sums = pieces_of_row, top = kMinusInfinity<T>;
    const auto at = [=](int64_t n) { return pieces_of_row + n * rows * row_size; };
    for (int64_t n = 0; n < pieces; ++n) top = std::max(top, at(n)[part.C]);
    const T shift = top == kMinusInfinity<T> ? T{0} : top;
    T total = 0;
    for (int64_t n = 0; n < pieces; ++n) {
      const T factor = std::exp(at(n)[part.C] - shift);
      total += at(n)[part.C + 1] * factor;
      for (int64_t d = 0; d < part.C; ++d) sums[d] = (n > 0 ? sums[d] : 0) + at(n)[d] * factor;
    }
    results.write(part, part.query_row(b, r / group, g * group + r % group), sums, top, top, total);
  }
};

}  // namespace anyattention

#endif
