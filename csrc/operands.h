// What the products of a tile multiply, in a thread's own memory: numbers in the type of the sums, or halves.
//
//   query, key, value, grad   rows of the tile     turned_...   depth along the channels, queries side by side
//   score, by_score           of the tile's pairs, turned: [j][i]; weights take the place of scores
//
// Both kinds offer the same products, in the order of a forward and then of a backward.
#ifndef ANYATTENTION_OPERANDS_H
#define ANYATTENTION_OPERANDS_H

#include <algorithm>
#include <cstdint>
#include <utility>

#include "anyattention.h"
#include "halves.h"
#include "products.h"
#include "run_call.h"
#include "tiles.h"

namespace anyattention {

// Numbers in the type of the sums.
template <class T>
struct FullOperands : TileMemory<T> {
  using Sum = T;
  using Memory = TileMemory<T>;
  using Memory::by_query, Memory::by_score, Memory::grad, Memory::key, Memory::output, Memory::query, Memory::score;
  using Memory::turned_grad, Memory::turned_query, Memory::value;

  const Part &part;
  int64_t D, C;
  const T *scored_key = nullptr;  // rows, where they lie or copied
  int64_t scored_key_stride = 0;

  FullOperands(T *memory, const Part &p) : Memory(memory, p), part(p), D(p.D), C(p.C) {}
  static int64_t size(const Part &part) { return Memory::size(part); }

  // The depth of products of queries and keys, and of the output's gradient and values.
  int64_t key_depth() const { return D; }
  int64_t value_depth() const { return C; }

  // Each returns whether all numbers are finite.
  bool read_queries(const QueryTile &tile, int64_t b, int64_t h) {
    const bool finite = copy_queries(part, tile, b, h, part.c.query, part.c.head_dim, D, query);
    const T scale = static_cast<T>(part.c.scale);
    for (int64_t n = 0; n < tile.count * D; ++n) query[n] *= scale;
    turn(tile.count, D, query, T{1}, turned_query);
    return finite;
  }
  bool read_grads(const QueryTile &tile, int64_t b, int64_t h, const anyattention_head_rows &rows) {
    const bool finite = copy_queries(part, tile, b, h, rows, part.c.value_dim, C, grad);
    turn(tile.count, C, grad, T{1}, turned_grad);
    return finite;
  }
  bool read_keys(Range keys, int64_t b, int64_t g) {
    scored_key = key, scored_key_stride = D;
    return copy_keys(part, keys, b, g, part.c.key, part.c.head_dim, D, key);
  }
  // For scores alone.
  void find_keys(Range keys, int64_t b, int64_t g) {
    const KeyRows<T> rows = key_rows(part, keys, b, g, key, false);
    scored_key = rows.numbers, scored_key_stride = rows.stride;
  }
  // For the sums of outputs, and for the gradients by weights.
  bool read_values(Range keys, int64_t b, int64_t g) {
    return copy_keys(part, keys, b, g, part.c.value, part.c.value_dim, C, value);
  }
  bool find_values(Range keys, int64_t b, int64_t g) { return read_values(keys, b, g); }

  // Forward.
  Product<T> scores() const { return {scored_key, scored_key_stride, 1, turned_query, kQueries, score, kQueries}; }
  Product<T> outputs() const { return {score, 1, kQueries, value, C, output, C}; }
  // Backward.
  Product<T> by_weights() const { return {value, C, 1, turned_grad, kQueries, by_score, kQueries}; }
  Product<T> by_values(T *to) const { return {score, kQueries, 1, grad, C, to, C}; }
  Product<T> by_keys(T *to) const { return {by_score, kQueries, 1, query, D, to, D}; }
  Product<T> by_queries() const { return {by_score, 1, kQueries, key, D, by_query, D}; }

  // What halves must do beside.
  static constexpr bool kRounds = false;
  void widen_keys(Range, int64_t, int64_t) {}
  void widen_values(Range, int64_t, int64_t) {}
  void round_weights(int64_t, int64_t) {}
  void round_gradients(int64_t, int64_t) {}
};

#ifdef __AVX512BF16__

// Rows in bfloat16, and weights and their gradients rounded to it; sums, and the numbers of a tile that is not finite, are
// float.
struct HalfOperands : TileMemory<float> {
  using Sum = float;
  using T = float;

  const Part &part;
  int64_t D, C;
  Halves *rows;                             // of queries or the output's gradient, and then of keys or values, if copied
  Halves *turned_queries, *turned_grads;    // neighbours are channels
  Halves *joined_queries, *joined_grads;    // neighbours are queries
  Halves *joined_keys, *joined_values;      // neighbours are keys
  Halves *joined_scores;                    // [j / 2][i]: weights, backward their gradients; neighbours are keys
  Halves *score_rows, *by_score_rows;       // [j][i / 2]; neighbours are queries
  const Halves *key_rows = nullptr, *value_rows = nullptr;
  int64_t key_stride = 0, value_stride = 0;

  HalfOperands(float *memory, const Part &p) : TileMemory<float>(memory, p), part(p), D(p.D), C(p.C) {
    auto *next = reinterpret_cast<Halves *>(memory + TileMemory<float>::size(p));
    const auto take = [&next](int64_t size) { return std::exchange(next, next + size); };
    rows = take(2 * room_of_rows(p));
    turned_queries = take(kQueries * D / 2), joined_queries = take(kQueries / 2 * D), joined_keys = take(kKeys / 2 * D);
    turned_grads = take(kQueries * C / 2), joined_grads = take(kQueries / 2 * C), joined_values = take(kKeys / 2 * C);
    joined_scores = take(kKeys / 2 * kQueries);
    score_rows = take(kKeys * kQueries / 2), by_score_rows = take(kKeys * kQueries / 2);
  }
  static int64_t room_of_rows(const Part &p) { return kRows * std::max(p.D, p.C) / 2; }
  static int64_t size(const Part &p) {
    return TileMemory<float>::size(p) + 2 * room_of_rows(p) + (kQueries + kKeys / 2) * (p.D + p.C) + 3 * kKeys * kQueries / 2;
  }
  int64_t key_depth() const { return part.c.head_dim; }
  int64_t value_depth() const { return part.c.value_dim; }

  bool read_queries(const QueryTile &tile, int64_t b, int64_t h) {
    copy_queries(part, tile, b, h, part.c.query, part.c.head_dim, D, query);
    const bool finite = round_queries(tile.count, D, query, turned_queries, joined_queries);
    const T scale = static_cast<T>(part.c.scale);
    for (int64_t n = 0; n < tile.count * D; ++n) query[n] *= scale;
    return finite;
  }
  bool read_grads(const QueryTile &tile, int64_t b, int64_t h, const anyattention_head_rows &grads) {
    copy_queries(part, tile, b, h, grads, part.c.value_dim, C, grad);
    return round_queries(tile.count, C, grad, turned_grads, joined_grads);
  }
  bool read_keys(Range keys, int64_t b, int64_t g) {
    find_keys(keys, b, g);
    return join_rows(keys.end - keys.begin, part.c.head_dim, D, KeyRows{part, part.c.key, keys.begin, b, g}, joined_keys);
  }
  void find_keys(Range keys, int64_t b, int64_t g) {
    key_rows = find_rows(part.c.key, part.c.head_dim, keys, b, g, rows, key_stride);
  }
  bool read_values(Range keys, int64_t b, int64_t g) {
    return join_rows(keys.end - keys.begin, part.c.value_dim, C, KeyRows{part, part.c.value, keys.begin, b, g}, joined_values);
  }
  // A value that is not finite shows in gradients by scores that its queries see, and nowhere else.
  bool find_values(Range keys, int64_t b, int64_t g) {
    value_rows = find_rows(part.c.value, part.c.value_dim, keys, b, g, rows + room_of_rows(part), value_stride);
    return true;
  }

  using HalfProduct = Product<float, Halves>;
  HalfProduct scores() const {
    return {key_rows, key_stride, 1, turned_queries, kQueries, score, kQueries, static_cast<T>(part.c.scale)};
  }
  HalfProduct outputs() const { return {joined_scores, 1, kQueries, joined_values, C, output, C}; }
  HalfProduct by_weights() const { return {value_rows, value_stride, 1, turned_grads, kQueries, by_score, kQueries}; }
  HalfProduct by_values(T *to) const { return {score_rows, kQueries / 2, 1, joined_grads, C, to, C}; }
  HalfProduct by_keys(T *to) const {
    return {by_score_rows, kQueries / 2, 1, joined_queries, D, to, D, static_cast<T>(part.c.scale)};
  }
  HalfProduct by_queries() const { return {joined_scores, 1, kQueries, joined_keys, D, by_query, D}; }

  static constexpr bool kRounds = true;
  void widen_keys(Range keys, int64_t b, int64_t g) { copy_keys(part, keys, b, g, part.c.key, part.c.head_dim, D, key); }
  void widen_values(Range keys, int64_t b, int64_t g) {
    copy_keys(part, keys, b, g, part.c.value, part.c.value_dim, C, value);
  }
  // Rounds the weights of a vector of queries; their sums.
  Lanes<float> round_weights(int64_t v, int64_t count) {
    const Halves one{{0x3f80}, {0x3f80}};
    Lanes<float> sums{};
    each_two(v, count, [&](int64_t j, int64_t place, int64_t next) {
      const RoundedPair weights = pair_of(score, place, next);
      const HalfFactors joined = weights.joined();
      Multiplication<float, Halves>::add(sums, one, joined);
      store_halves(joined_scores + j / 2 * kQueries + v * kLane<T>, joined);
    });
    return sums;
  }
  // The same of a backward, and the gradients by scores.
  void round_gradients(int64_t v, int64_t count) {
    each_two(v, count, [&](int64_t j, int64_t place, int64_t next) {
      const int64_t row = j * kQueries / 2 + v * kLane<T> / 2;
      pair_of(score, place, next).store_apart(score_rows + row, score_rows + row + kQueries / 2);
      const RoundedPair by = pair_of(by_score, place, next);
      by.store_apart(by_score_rows + row, by_score_rows + row + kQueries / 2);
      store_halves(joined_scores + j / 2 * kQueries + v * kLane<T>, by.joined());
    });
  }

 private:
  // The rows of a tile's keys.
  struct KeyRows {
    const Part &part;
    const anyattention_head_rows &rows;
    int64_t first, b, g;
    const BFloat16 *operator()(int64_t j) const { return row_of<BFloat16>(rows, b, part.key_at(first + j), g); }
  };

  // Rows of keys where they lie, or a copy of them.
  const Halves *find_rows(const anyattention_head_rows &of, int64_t width, Range keys, int64_t b, int64_t g, Halves *copy,
                          int64_t &stride) const {
    const KeyRows row{part, of, keys.begin, b, g};
    if (!part.c.parts.key_order && width % 2 == 0 && of.row_stride % 2 == 0) {
      stride = of.row_stride / 2;
      return reinterpret_cast<const Halves *>(row(0));
    }
    copy_halves(keys.end - keys.begin, width, row, copy);
    stride = (width + 1) / 2;
    return copy;
  }

  bool round_queries(int64_t count, int64_t padded, const float *from, Halves *turned, Halves *joined) {
    auto *rounded = reinterpret_cast<BFloat16 *>(rows);
    round_rows(count, padded, from, rounded);
    turn_halves(count, padded / 2, rows, turned);
    return join_rows(count, padded, padded, [=](int64_t i) { return rounded + i * padded; }, joined);
  }

  // Calls take(j, place of key j, place of key j + 1) for each second key; after the last one comes a key of zeros.
  template <class Take>
  void each_two(int64_t v, int64_t count, const Take &take) {
    const int64_t place = v * kLane<T>;
    for (int64_t j = 0; j < count; j += 2) take(j, place + j * kQueries, j + 1 < count ? place + (j + 1) * kQueries : -1);
  }
  static RoundedPair pair_of(const float *numbers, int64_t place, int64_t next) {
    constexpr int lane = kLane<T>;
    return {load<lane>(numbers + place), next < 0 ? Lanes<T>{} : load<lane>(numbers + next)};
  }
};

#endif

// Runs run(kind), a null pointer to the kind of operands that a call's products take.
template <class Run>
void with_operands(const Part &part, const Run &run) {
  if (part.c.is_double) return run(static_cast<FullOperands<double> *>(nullptr));
#ifdef __AVX512BF16__
  if (part.has_halves()) return run(static_cast<HalfOperands *>(nullptr));
#endif
  run(static_cast<FullOperands<float> *>(nullptr));
}

}  // namespace anyattention

#endif
