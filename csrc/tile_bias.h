// The bias of a tile's pairs, and its gradient, kept turned as the scores are.
//
// A bias mostly has a query's keys side by side, and lanes are queries. So the numbers of a tile are turned once, a square of
// vectors at a time; the gradient takes their place pair by pair, and goes back the same way.
#ifndef ANYATTENTION_TILE_BIAS_H
#define ANYATTENTION_TILE_BIAS_H

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "anyattention.h"
#include "pairs.h"
#include "products.h"
#include "simd.h"
#include "tiles.h"

namespace anyattention {

template <class T, int Step, int... Lane>
ANYATTENTION_INLINE void swap_corners(Lanes<T> &a, Lanes<T> &b, std::integer_sequence<int, Lane...>) {
  using Places = typename SeenLanes<T>::Words;
  const Places first = {(Lane & Step ? kLane<T> + Lane - Step : Lane)...};
  const Places second = {(Lane & Step ? kLane<T> + Lane : Lane + Step)...};
  const Lanes<T> low = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = low;
}

// Turns a square of numbers, a vector for each row: by quarters, and each quarter likewise.
template <class T, int Step = kLane<T> / 2>
ANYATTENTION_INLINE void turn_square(Lanes<T> *rows) {
  if constexpr (Step > 0) {
    for (int n = 0; n < kLane<T>; ++n) {
      if (n & Step) continue;
      swap_corners<T, Step>(rows[n], rows[n + Step], std::make_integer_sequence<int, kLane<T>>());
    }
    turn_square<T, Step / 2>(rows);
  }
}

// Whether the numbers of a query's neighbouring keys lie side by side.
inline bool has_rows(const Part &part, const anyattention_pairs &pairs) {
  return pairs.strides[3] == 1 && !part.c.parts.key_order;
}
// Whether each query has such a row of its own, so that a gradient is written where none was.
inline bool is_written_in_rows(const Part &part, const anyattention_pairs &pairs) {
  return has_rows(part, pairs) && pairs.strides[2] != 0;
}

// Where the gradient of a bias goes; numbers null where none is wanted.
template <class T>
struct BiasTarget {
  const anyattention_pairs &pairs;
  T *numbers;
  bool is_first;  // of the tasks that go there, so that nothing is there
  int64_t first_head;

  bool is_unwritten(int64_t h) const { return is_first && (pairs.strides[1] != 0 || h == first_head); }
};

template <class T>
class TileBias {
 public:
  // `room` is the tile's memory for it.
  TileBias(const Part &p, QueryTile &t, int64_t batch, int64_t head, T *memory)
      : TileBias(p, t, batch, head, memory, p.c.bias) {}
  // Of other numbers of pairs.
  TileBias(const Part &p, QueryTile &t, int64_t batch, int64_t head, T *memory, const anyattention_pairs &numbers)
      : part(p), tile(t), pairs(numbers), b(batch), h(head), room(memory) {}

  // Reads the numbers of a tile of keys, after look_at; a pair of -inf is hidden from then on.
  void read() {
    if (!pairs.numbers) return;
    bool hides = false;
    for (int64_t v = 0; v * kLane<T> < tile.count; ++v) {
      if (read(v)) hide(v), hides = true;
    }
    if (hides) tile.join_groups();
  }
  // The same of numbers that hide no pair.
  void read_all() {
    for (int64_t v = 0; pairs.numbers && v * kLane<T> < tile.count; ++v) read(v);
  }

  Lanes<T> at(int64_t j, int64_t v) const { return load<kLane<T>>(room + j * kQueries + v * kLane<T>); }
  // The gradient of a pair that was read, or would have been.
  void set(int64_t j, int64_t v, Lanes<T> gradient) const {
    store<T, kLane<T>>(room + j * kQueries + v * kLane<T>, gradient);
  }
  // Adds the gradients of the tile's pairs.
  void add_to(const BiasTarget<T> &target) {
    if (!target.numbers) return;
    const anyattention_pairs &to = target.pairs;
    T *numbers = target.numbers + place_of_head(to, b, h);
    const bool writes = target.is_unwritten(h) && is_written_in_rows(part, to);
    if (writes) clear(to, numbers, tile.now.begin);
    written = tile.now.end;
    for (int64_t v = 0; v * kLane<T> < tile.count; ++v) {
      const Range range = range_of(tile.seen_by<T>(v));
      if (to.strides[3] == 0) {
        add_over_keys(v, range, to.strides[2], numbers);
      } else if (to.strides[2] == 0) {
        for (int64_t j = range.begin; j < range.end; ++j) {
          numbers[key_at(j) * to.strides[3]] += sum_of<T, kLane<T>>(at(j, v));
        }
      } else if (writes) {
        for (int64_t j = 0; j < range.begin; ++j) set(j, v, Lanes<T>{});
        for (int64_t j = range.end; j < tile.now.end - tile.now.begin; ++j) set(j, v, Lanes<T>{});
        put<false>(v, {0, tile.now.end - tile.now.begin}, to, numbers);
      } else {
        put<true>(v, range, to, numbers);
      }
    }
  }
  // After the last tile of keys.
  void finish(const BiasTarget<T> &target) {
    if (!target.numbers || !target.is_unwritten(h) || !is_written_in_rows(part, target.pairs)) return;
    clear(target.pairs, target.numbers + place_of_head(target.pairs, b, h), part.c.num_keys);
  }

 private:
  const Part &part;
  QueryTile &tile;
  const anyattention_pairs &pairs;
  int64_t b, h;
  T *room;
  int64_t written = 0;  // keys up to here have a gradient, where none was

  int64_t key_at(int64_t j) const { return part.key_at(tile.now.begin + j); }
  int64_t query_at(int64_t i) const { return part.query_at(tile.first + i); }
  int64_t end_of(int64_t v) const { return std::min(tile.count, (v + 1) * kLane<T>); }
  // Whether the numbers of a key's neighbouring queries lie side by side.
  bool has_columns(const anyattention_pairs &pairs, int64_t v) const {
    return pairs.strides[2] == 1 && !part.c.parts.query_order && (v + 1) * kLane<T> <= tile.count;
  }

  // Whether there is -inf among those of a vector of queries.
  bool read(int64_t v) {
    constexpr int lane = kLane<T>;
    const T *from = static_cast<const T *>(pairs.numbers) + place_of_head(pairs, b, h);
    const Range range = range_of(tile.seen_by<T>(v));
    Lanes<T> least{};
    int64_t j = range.begin;
    for (; has_rows(part, pairs) && j + lane <= range.end; j += lane) {
      Lanes<T> square[lane]{};
      for (int64_t i = v * lane; i < end_of(v); ++i) {
        const T *row = from + query_at(i) * pairs.strides[2] + tile.now.begin + j;
        __builtin_prefetch(row + kKeys, 0, 2);  // those of the next tile of keys
        const Lanes<T> x = load<lane>(row);
        square[i - v * lane] = x;
        least = x < least ? x : least;
      }
      turn_square<T>(square);
      for (int n = 0; n < lane; ++n) set(j + n, v, square[n]);
    }
    Lanes<T> x{};
    for (const int64_t first = j; j < range.end; ++j) {
      if (j == first || pairs.strides[3] != 0) x = gathered(v, from + key_at(j) * pairs.strides[3]);
      set(j, v, x);
      least = x < least ? x : least;
    }
    return sum_of<Word, lane>(least == -std::numeric_limits<T>::infinity()) != 0;
  }

  Lanes<T> gathered(int64_t v, const T *column) const {
    if (pairs.strides[2] == 0) return Lanes<T>{} + *column;
    if (has_columns(pairs, v)) return load<kLane<T>>(column + tile.first + v * kLane<T>);
    Lanes<T> lanes{};
    for (int64_t i = v * kLane<T>; i < end_of(v); ++i) lanes[i % kLane<T>] = column[query_at(i) * pairs.strides[2]];
    return lanes;
  }

  void hide(int64_t v) {
    constexpr int lane = kLane<T>, bits = 8 * sizeof(Word);
    const Range range = range_of(tile.seen_by<T>(v));
    typename SeenLanes<T>::Words hidden[64 / bits]{};
    for (int64_t j = range.begin; j < range.end; ++j) {
      const auto bit = static_cast<Word>(uint64_t{1} << j % bits);
      hidden[j / bits] |= (at(j, v) == -std::numeric_limits<T>::infinity()) & bit;
    }
    for (int n = 0; n < lane; ++n) {
      for (int word = 0; word < 64 / bits; ++word) {
        tile.seen[v * lane + n] &= ~(uint64_t{static_cast<std::make_unsigned_t<Word>>(hidden[word][n])} << word * bits);
      }
    }
  }

  void add_over_keys(int64_t v, Range range, int64_t stride, T *to) const {
    Lanes<T> sum{};
    for (int64_t j = range.begin; j < range.end; ++j) sum += at(j, v);
    if (stride == 0) {
      *to += sum_of<T, kLane<T>>(sum);
      return;
    }
    for (int64_t i = v * kLane<T>; i < end_of(v); ++i) to[query_at(i) * stride] += sum[i % kLane<T>];
  }

  // Writes 0 for the keys up to one of them.
  void clear(const anyattention_pairs &gradient, T *to, int64_t end) const {
    if (written >= end) return;
    for (int64_t i = 0; i < tile.count; ++i) {
      T *row = to + query_at(i) * gradient.strides[2];
      std::fill(row + written, row + end, T{0});
    }
  }

  template <bool Adds>
  void put(int64_t v, Range range, const anyattention_pairs &gradient, T *to) const {
    constexpr int lane = kLane<T>;
    int64_t j = range.begin;
    for (; has_rows(part, gradient) && j + lane <= range.end; j += lane) {
      Lanes<T> square[lane];
      for (int n = 0; n < lane; ++n) square[n] = at(j + n, v);
      turn_square<T>(square);
      for (int64_t i = v * lane; i < end_of(v); ++i) {
        T *row = to + query_at(i) * gradient.strides[2] + tile.now.begin + j;
        store<T, lane>(row, Adds ? load<lane>(row) + square[i - v * lane] : square[i - v * lane]);
      }
    }
    for (; j < range.end; ++j) {
      T *column = to + key_at(j) * gradient.strides[3];
      const Lanes<T> x = at(j, v);
      if (has_columns(gradient, v)) {
        T *lanes = column + tile.first + v * lane;
        store<T, lane>(lanes, Adds ? load<lane>(lanes) + x : x);
        continue;
      }
      for (int64_t i = v * lane; i < end_of(v); ++i) {
        T &number = column[query_at(i) * gradient.strides[2]];
        number = Adds ? number + x[i % lane] : x[i % lane];
      }
    }
  }

  using Word = typename SeenLanes<T>::Word;
};

}  // namespace anyattention

#endif
