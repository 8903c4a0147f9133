// The gradient of the gradient of attention over runs: what the backward in run_attention.cpp is differentiated to.
//
//   b  batch entry     i  query in order     j  key in order     h  head     g  key head, h / group     v  vector of queries
//   D, C  head_dim, value_dim, rounded up to whole vectors in copies of rows
//
// Of queries Q, keys K, values V, the gradient dO by the output, weights P and factors of dropout Z the backward makes, with
// r the raw scores s Q.K and f the softcap's curve,
//
//   dP = Z (dO.V)     dS = P (dP - delta)     dR = dS f'(r)     dQ = s dR K     dK = s dR^T Q     dV = (P Z)^T dO
//
// and dS by the bias. Here gQ, gK, gV and gS are given by these. In a row of pairs, with t = delta and the gradient by log_sum
// together,
//
//   A = s (gQ.K + Q.gK)     F = A f' + gS     B = Z (dO.gV)     a = sum of P F     e = sum of dS F + P B     c = e - a t
//   H = P (F (dP - delta) - a dP + B - c)     X = H f' + A dS f''     W = Z P (F - a)
//   by query: s (X K + dR gK)     by key: s (X^T Q + dR^T gQ)     by value: W^T dO     by dO: W V + (P Z) gV
//   by bias: H     by the gradient of log_sum: a
//
// A first pass over a tile's keys sums up a and e, a second one the rest. Where the first pass's products have room until
// the second, they are made once. As in run_attention.cpp numbers of pairs are kept turned, [j][i].

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "anyattention.h"
#include "bias_gradient.h"
#include "pairs.h"
#include "products.h"
#include "run_call.h"
#include "scores_of_tile.h"
#include "simd.h"
#include "tile_bias.h"
#include "tiles.h"

namespace anyattention {
namespace {

constexpr int64_t kPairs = kQueries * kKeys;
// The most numbers of pairs that a thread keeps from the first pass to the second: beyond its second cache, what a core reads
// in the time of a product.
constexpr int64_t kKept = 1 << 21;

// What is given, and where the results go; null for what is not there, or not wanted.
template <class T>
struct SecondArrays {
  const T *output, *largest, *log_sum, *grad_log_sum;
  anyattention_head_rows grad_output, by_query, by_key, by_value;
  anyattention_pairs by_bias;
  T *first_sums, *second_sums;  // a and e of each row
  int64_t pair_arrays;          // numbers of a tile's pairs: the last are those of gV
  T *grad_query, *grad_key, *grad_value, *grad_grad_output;

  SecondArrays(const anyattention_run_attention_double_backward_call &call, void *sums)
      : output(in(call.backward.output)), largest(in(call.backward.largest)), log_sum(in(call.backward.log_sum)),
        grad_log_sum(in(call.backward.grad_log_sum)), grad_output(call.backward.grad_output),
        by_query(call.grad_grad_query), by_key(call.grad_grad_key), by_value(call.grad_grad_value), by_bias(call.grad_grad_bias),
        first_sums(static_cast<T *>(sums)), second_sums(nullptr), pair_arrays(by_value.numbers ? 4 : 3),
        grad_query(nullptr), grad_key(nullptr), grad_value(nullptr), grad_grad_output(nullptr) {
    const anyattention_run_attention_call &inside = call.backward.call;
    second_sums = first_sums + inside.batch * inside.num_queries * inside.heads;
  }

 private:
  static const T *in(const void *numbers) { return static_cast<const T *>(numbers); }
};

// In a thread's own memory: rows of a tile's queries and keys, sums by query, and the numbers of pairs.
template <class T>
struct SecondMemory {
  T *query, *turned_query, *by_query, *turned_by_query, *grad, *turned_grad;
  T *key, *by_key, *value, *by_value;
  T *query_sums, *grad_sums, *earlier_query_sums, *earlier_grad_sums;
  T *bias, *by_bias;
  T *pairs;  // the arrays of a tile, or of all tiles of the queries' keys

  SecondMemory(T *memory, const Part &part) {
    const auto take = [&memory](int64_t size) { return std::exchange(memory, memory + size); };
    const int64_t wide = kQueries * part.D, wide_value = kQueries * part.C;
    query = take(wide), turned_query = take(wide), by_query = take(wide), turned_by_query = take(wide);
    grad = take(wide_value), turned_grad = take(wide_value);
    key = take(kKeys * part.D), by_key = take(kKeys * part.D);
    value = take(kKeys * part.C), by_value = take(kKeys * part.C);
    query_sums = take(wide), grad_sums = take(wide_value);
    earlier_query_sums = take(wide), earlier_grad_sums = take(wide_value);
    const int64_t biases = part.c.bias.numbers ? kPairs : 0;
    bias = take(biases), by_bias = take(biases), pairs = memory;
  }
  static int64_t size(const Part &part, int64_t pair_arrays) {
    const int64_t arrays = pair_arrays + (part.c.bias.numbers ? 2 : 0);
    return kQueries * (6 * part.D + 4 * part.C) + 2 * kKeys * (part.D + part.C) + arrays * kPairs + kLane<T>;
  }
};

// How many tiles of keys a tile of queries has at most, 0 where the numbers of their pairs are too many to be kept.
inline int64_t kept_tiles(const Part &part, int64_t pair_arrays) {
  QueryTile tile(part);
  int64_t most = 0;
  for (int64_t index = 0; index < part.query_tiles(); ++index) {
    tile.move_to(index);
    most = std::max(most, static_cast<int64_t>(tile.keys.size()));
    if (most * pair_arrays * kPairs > kKept) return 0;
  }
  return most;
}

// What a slice adds to the gradients of the keys and values that it sees, and of the bias, where that is wanted.
template <class T>
struct SliceSums {
  T *keys, *values;
  int64_t first_key;
  BiasTarget<T> bias;
};

template <class T>
struct Second {
  const Part &part;
  QueryTile &tile;
  SecondMemory<T> memory;
  const SecondArrays<T> &arrays;
  int64_t b, h, g;
  const bool keeps, has_query, has_key, has_value, has_bias, has_score;
  TileBias<T> bias, by_bias;
  bool finite = true;  // the rows of queries
  Normalizer<T> normalizer;
  T delta[kQueries], mean[kQueries], first[kQueries], second[kQueries];  // mean: of a row's dP

  Second(const Part &p, QueryTile &t, T *scratch, const SecondArrays<T> &a, int64_t batch, int64_t head, bool keeps_pairs)
      : part(p), tile(t), memory(scratch, p), arrays(a), b(batch), h(head), g(head / (p.H / p.G)), keeps(keeps_pairs),
        has_query(a.by_query.numbers), has_key(a.by_key.numbers), has_value(a.by_value.numbers),
        has_bias(a.by_bias.numbers), has_score(has_query || has_key || has_bias), bias(p, t, batch, head, memory.bias),
        by_bias(p, t, batch, head, memory.by_bias, a.by_bias) {
    read_queries();
  }

  // The first pass: a and e.
  void sum_up(bool adds) {
    constexpr int lane = kLane<T>;
    Lanes<T> sums[2][kVectors<T>]{}, earlier[2][kVectors<T>];
    bool has_earlier = false;
    tile.start();
    for (std::size_t n = 0; n < tile.keys.size(); ++n) {
      if (n > 0 && n % kBlock == 0) {
        for (int k = 0; k < 2; ++k) put_aside(sums[k], kVectors<T>, earlier[k], !has_earlier);
        has_earlier = true;
      }
      look_at(tile.keys[n]);
      read_keys();
      multiply(n);
      for (int64_t v = 0; v * lane < tile.count; ++v) add_up(n, v, sums[0][v], sums[1][v]);
    }
    for (int k = 0; k < 2 && has_earlier; ++k) add(sums[k], earlier[k], kVectors<T>);
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t row = part.query_row(b, tile.first + i, h);
      T &a = arrays.first_sums[row], &e = arrays.second_sums[row];
      a = sums[0][i / lane][i % lane] + (adds ? a : 0), e = sums[1][i / lane][i % lane] + (adds ? e : 0);
    }
  }

  // The second pass, of which the sums of all parts are known.
  void run(bool adds, const SliceSums<T> &sums) {
    const int64_t D = part.D, C = part.C;
    std::fill_n(first, kQueries, T{0});
    std::fill_n(second, kQueries, T{0});
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t row = part.query_row(b, tile.first + i, h);
      first[i] = arrays.first_sums[row], second[i] = arrays.second_sums[row] - first[i] * mean[i];
    }
    std::fill_n(memory.query_sums, tile.count * D, T{0});
    std::fill_n(memory.grad_sums, tile.count * C, T{0});
    bool has_earlier = false;
    tile.start();
    for (std::size_t n = 0; n < tile.keys.size(); ++n) {
      if (n > 0 && n % kBlock == 0) {
        put_aside(memory.query_sums, tile.count * D, memory.earlier_query_sums, !has_earlier);
        put_aside(memory.grad_sums, tile.count * C, memory.earlier_grad_sums, !has_earlier);
        has_earlier = true;
      }
      look_at(tile.keys[n]);
      const bool all_finite = read_keys() && finite;
      if (!keeps) multiply(n);
      for (int64_t v = 0; v * kLane<T> < tile.count; ++v) differentiate(n, v, sums.bias.numbers);
      by_bias.add_to(sums.bias);
      const int64_t place = tile.now.begin - sums.first_key;
      add_products(n, sums.keys + place * D, sums.values + place * C, all_finite || tile.is_whole());
    }
    by_bias.finish(sums.bias);
    if (has_earlier) {
      add(memory.query_sums, memory.earlier_query_sums, tile.count * D);
      add(memory.grad_sums, memory.earlier_grad_sums, tile.count * C);
    }
    if (arrays.grad_query) {
      write_queries(part, tile, b, h, memory.query_sums, D, scale(), adds, arrays.grad_query, part.c.head_dim);
    }
    if (arrays.grad_grad_output) {
      write_queries(part, tile, b, h, memory.grad_sums, C, T{1}, adds, arrays.grad_grad_output, part.c.value_dim);
    }
  }

 private:
  T scale() const { return static_cast<T>(part.c.scale); }

  // Raw scores, A, dP and B of the n-th tile of keys, which become W, X, dR and P Z.
  T *pairs_of(std::size_t n, int which) const {
    return memory.pairs + (arrays.pair_arrays * (keeps ? static_cast<int64_t>(n) : 0) + which) * kPairs;
  }

  void read_queries() {
    const int64_t D = part.D, C = part.C;
    const auto read = [&](const anyattention_head_rows &rows, int64_t width, int64_t padded, T factor, T *to, T *turned) {
      finite &= copy_queries(part, tile, b, h, rows, width, padded, to);
      for (int64_t n = 0; n < tile.count * padded; ++n) to[n] *= factor;
      turn(tile.count, padded, to, T{1}, turned);
    };
    read(part.c.query, part.c.head_dim, D, scale(), memory.query, memory.turned_query);
    if (has_query) read(arrays.by_query, part.c.head_dim, D, scale(), memory.by_query, memory.turned_by_query);
    read(arrays.grad_output, part.c.value_dim, C, T{1}, memory.grad, memory.turned_grad);
    normalizer.read(part, tile, b, h, arrays.largest, arrays.log_sum);
    std::fill_n(delta, kQueries, T{0});
    std::fill_n(mean, kQueries, T{0});
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t row = part.query_row(b, tile.first + i, h);
      mean[i] = dot<0>(memory.grad + i * C, arrays.output + row * part.c.value_dim, part.c.value_dim);
      const bool is_empty = arrays.largest[row] == kMinusInfinity<T>;
      delta[i] = mean[i] - (arrays.grad_log_sum && !is_empty ? arrays.grad_log_sum[row] : 0);
    }
  }

  void look_at(Range keys) {
    tile.look_at(keys, b, h);
    bias.read();
    by_bias.read_all();
  }

  // Those of the tile; whether all numbers are finite.
  bool read_keys() {
    const int64_t D = part.D, C = part.C;
    bool all_finite = copy_keys(part, tile.now, b, g, part.c.key, part.c.head_dim, D, memory.key);
    all_finite &= copy_keys(part, tile.now, b, g, part.c.value, part.c.value_dim, C, memory.value);
    if (has_key) all_finite &= copy_keys(part, tile.now, b, g, arrays.by_key, part.c.head_dim, D, memory.by_key);
    if (has_value) all_finite &= copy_keys(part, tile.now, b, g, arrays.by_value, part.c.value_dim, C, memory.by_value);
    return all_finite;
  }

  void multiply(std::size_t n) {
    const int64_t D = part.D, C = part.C, count = tile.now.end - tile.now.begin;
    const auto set = [&](const T *rows, int64_t width, const T *turned, int which) {
      product<false>(count, Product<T>{rows, width, 1, turned, kQueries, pairs_of(n, which), kQueries}, scores_of(width));
    };
    score_tile(part, tile, Product<T>{memory.key, D, 1, memory.turned_query, kQueries, pairs_of(n, 0), kQueries}, scores_of(D));
    if (has_query) set(memory.key, D, memory.turned_by_query, 1);
    if (has_key && !has_query) set(memory.by_key, D, memory.turned_query, 1);
    if (has_key && has_query) {
      product<true>(count, Product<T>{memory.by_key, D, 1, memory.turned_query, kQueries, pairs_of(n, 1), kQueries},
                    scores_of(D));
    }
    set(memory.value, C, memory.turned_grad, 2);
    if (has_value) set(memory.by_value, C, memory.turned_grad, 3);
  }
  auto scores_of(int64_t depth) const {
    return [this, depth](int64_t begin, int64_t end) { return tile.template scores_of<T>(begin, end, depth); };
  }

  // F of a vector of queries, of A.
  Lanes<T> by_score_of(Lanes<T> by_raw, Lanes<T> slope, int64_t j, int64_t v) const {
    return has_bias ? by_raw * slope + by_bias.at(j, v) : by_raw * slope;
  }

  void add_up(std::size_t n, int64_t v, Lanes<T> &a, Lanes<T> &e) const {
    constexpr int lane = kLane<T>;
    const T *raw = pairs_of(n, 1) + v * lane, *by_weight = pairs_of(n, 2) + v * lane, *through = pairs_of(n, 3) + v * lane;
    const Lanes<T> mean_of = load<lane>(delta + v * lane);
    std::optional<Dropout<T>> dropout = dropout_of<T>(part, tile, b, h, v);
    each_weight(part, tile, normalizer, pairs_of(n, 0), bias, v, [&](int64_t j, auto seen, auto weight, auto slope, auto) {
      const Lanes<T> factor = dropout ? dropout->next() : Lanes<T>{} + 1;
      Lanes<T> by_score{}, sum{};
      if (has_score) {
        by_score = by_score_of(has_query || has_key ? load<lane>(raw + j * kQueries) : Lanes<T>{}, slope, j, v);
        sum = by_score * (load<lane>(by_weight + j * kQueries) * factor - mean_of);
      }
      if (has_value) sum += load<lane>(through + j * kQueries) * factor;
      a += seen ? weight * by_score : Lanes<T>{};
      e += seen ? weight * sum : Lanes<T>{};
    });
  }

  // Raw scores, A, dP and B of a vector of queries become W, X, dR and P Z; 0 for what is not seen.
  void differentiate(std::size_t n, int64_t v, bool keeps_bias) const {
    constexpr int lane = kLane<T>;
    T *score = pairs_of(n, 0), *raw = pairs_of(n, 1) + v * lane, *by_weight = pairs_of(n, 2) + v * lane;
    T *through = pairs_of(n, 3) + v * lane, *dropped = score + v * lane;
    const Range range = range_of(tile.seen_by<T>(v));
    const Lanes<T> mean_of = load<lane>(delta + v * lane);
    const Lanes<T> a = load<lane>(first + v * lane), c = load<lane>(second + v * lane);
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        for (T *numbers : {dropped, raw, by_weight}) store<T, lane>(numbers + j * kQueries, Lanes<T>{});
        if (has_value) store<T, lane>(through + j * kQueries, Lanes<T>{});
      }
    };
    clear(0, range.begin);
    std::optional<Dropout<T>> dropout = dropout_of<T>(part, tile, b, h, v);
    each_weight(part, tile, normalizer, score, bias, v,
                [&](int64_t j, auto seen, auto weight, auto slope, auto curvature) {
      const int64_t at = j * kQueries;
      const Lanes<T> factor = dropout ? dropout->next() : Lanes<T>{} + 1, by = load<lane>(by_weight + at) * factor;
      const Lanes<T> by_raw = has_query || has_key ? load<lane>(raw + at) : Lanes<T>{};
      const Lanes<T> by_score = by_score_of(by_raw, slope, j, v);
      const Lanes<T> own = weight * (by - mean_of);
      Lanes<T> sum = by_score * (by - mean_of) - a * by - c;
      if (has_value) sum += load<lane>(through + at) * factor;
      sum *= weight;
      if (keeps_bias) by_bias.set(j, v, seen ? sum : Lanes<T>{});
      store<T, lane>(dropped + at, seen ? weight * factor * (by_score - a) : Lanes<T>{});
      store<T, lane>(raw + at, seen ? sum * slope + by_raw * own * curvature : Lanes<T>{});
      store<T, lane>(by_weight + at, seen ? own * slope : Lanes<T>{});
      if (has_value) store<T, lane>(through + at, seen ? weight * factor : Lanes<T>{});
    });
    clear(range.end, tile.now.end - tile.now.begin);
  }

  // Adds the products of a tile of keys to the gradients.
  void add_products(std::size_t n, T *key_sums, T *value_sums, bool is_whole) {
    const int64_t D = part.D, C = part.C, count = tile.now.end - tile.now.begin;
    const auto by_keys = [&](const T *pairs, const T *rows, int64_t width, T *sums) {
      if (is_whole) {
        product<true>(count, Product<T>{pairs, kQueries, 1, rows, width, sums, width},
                      tile.sums_over_queries<T>(width));
      } else {
        each_seen(tile, [=](int64_t i, int64_t j) {
          add_scaled<0>(sums + j * width, pairs[j * kQueries + i], rows + i * width, width);
        });
      }
    };
    const auto by_queries = [&](const T *pairs, const T *rows, int64_t width, T *sums) {
      if (is_whole) {
        product<true>(tile.count, Product<T>{pairs, 1, kQueries, rows, width, sums, width}, tile.sums_over_keys(width));
      } else {
        each_seen(tile, [=](int64_t i, int64_t j) {
          add_scaled<0>(sums + i * width, pairs[j * kQueries + i], rows + j * width, width);
        });
      }
    };
    const T *dropped = pairs_of(n, 0), *by_raw = pairs_of(n, 1), *own = pairs_of(n, 2), *weight = pairs_of(n, 3);
    if (arrays.grad_key) by_keys(by_raw, memory.query, D, key_sums);
    if (arrays.grad_key && has_query) by_keys(own, memory.by_query, D, key_sums);
    if (arrays.grad_value) by_keys(dropped, memory.grad, C, value_sums);
    if (arrays.grad_query) by_queries(by_raw, memory.key, D, memory.query_sums);
    if (arrays.grad_query && has_key) by_queries(own, memory.by_key, D, memory.query_sums);
    if (arrays.grad_grad_output) by_queries(dropped, memory.value, C, memory.grad_sums);
    if (arrays.grad_grad_output && has_value) by_queries(weight, memory.by_value, C, memory.grad_sums);
  }
};

template <class T>
void sum_up(const Part &part, bool adds, const SecondArrays<T> &arrays) {
  each_query_tile<T>(part, SecondMemory<T>::size(part, arrays.pair_arrays), 2 * part.nanoseconds(),
                     [&](int64_t b, int64_t h, QueryTile &tile, T *scratch) {
                       Second<T>(part, tile, scratch, arrays, b, h, false).sum_up(adds);
                     });
}

template <class T>
void differentiate(const Part &part, bool adds, bool has_sums, const SecondArrays<T> &arrays,
                   const anyattention_pairs *grad_bias) {
  const Slices slices(part, grad_bias);
  const BiasGradient<T> of_bias(part, slices, grad_bias, adds);
  const int64_t group = part.H / part.G, kept = has_sums ? 0 : kept_tiles(part, arrays.pair_arrays);
  const int64_t tiles = std::max<int64_t>(kept, 1);
  const Workspace<T> keys(slices.num_rows() * part.D), values(slices.num_rows() * part.C);
  each_slice<T>(
      part, slices, of_bias, SecondMemory<T>::size(part, tiles * arrays.pair_arrays), 5 * part.nanoseconds(),
      [&](const Slice &slice, int64_t place, int64_t b, int64_t g, const BiasTarget<T> &bias, QueryTile &tile, T *scratch) {
        const SliceSums<T> sums{keys.get() + place * part.D, values.get() + place * part.C, slice.keys.begin, bias};
        for (int64_t index = slice.begin; index < slice.end; ++index) {
          tile.move_to(index);
          for (int64_t h = g * group; h < (g + 1) * group; ++h) {
            Second<T> own(part, tile, scratch, arrays, b, h, kept > 0);
            if (!has_sums) own.sum_up(false);
            own.run(adds, sums);
          }
        }
      },
      [&](int64_t b, int64_t g, int64_t j) {
        if (arrays.grad_key) slices.add_up(b, g, j, keys.get(), part.D, adds, arrays.grad_key, part.c.head_dim);
        if (arrays.grad_value) slices.add_up(b, g, j, values.get(), part.C, adds, arrays.grad_value, part.c.value_dim);
      });
}

bool is_valid(const anyattention_run_attention_double_backward_call &call) {
  for (const anyattention_head_rows *rows :
       {&call.backward.grad_output, &call.grad_grad_query, &call.grad_grad_key, &call.grad_grad_value}) {
    if (!Part::is_valid(*rows, call.backward.call.is_double)) return false;
  }
  return true;
}

// Whether the gradients by that of the bias, where given, belong to one and lie inside.
bool is_in_range(const anyattention_run_attention_double_backward_call &call) {
  const anyattention_run_attention_call &inside = call.backward.call;
  return !call.grad_grad_bias.numbers || (inside.bias.numbers && is_inside(call.grad_grad_bias, inside));
}

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_run_attention_double_backward_sums(const anyattention_run_attention_double_backward_call *call,
                                                        int32_t adds, void *sums) {
  if (!call || !anyattention::is_valid(*call)) return ANYATTENTION_INVALID_ARGUMENT;
  if (!anyattention::is_in_range(*call)) return ANYATTENTION_OUT_OF_RANGE;
  const auto run = [=](const auto &part, auto zero) {
    anyattention::sum_up(part, adds != 0, anyattention::SecondArrays<decltype(zero)>(*call, sums));
  };
  const anyattention_run_attention_call &inside = call->backward.call;
  return anyattention::guarded(&inside, [&](const auto &part) { inside.is_double ? run(part, 0.0) : run(part, 0.0f); });
}

int32_t anyattention_run_attention_double_backward(const anyattention_run_attention_double_backward_call *call,
                                                   int32_t adds, int32_t has_sums, void *sums, void *grad_query,
                                                   void *grad_key, void *grad_value, void *grad_grad_output,
                                                   const anyattention_pairs *grad_bias) {
  if (!call || !anyattention::is_valid(*call)) return ANYATTENTION_INVALID_ARGUMENT;
  if (!anyattention::is_in_range(*call)) return ANYATTENTION_OUT_OF_RANGE;
  if (grad_bias && !anyattention::is_gradient(*grad_bias, call->backward.call)) return ANYATTENTION_INVALID_ARGUMENT;
  const auto run = [=](const auto &part, auto zero) {
    using T = decltype(zero);
    anyattention::SecondArrays<T> arrays(*call, sums);
    arrays.grad_query = static_cast<T *>(grad_query), arrays.grad_key = static_cast<T *>(grad_key);
    arrays.grad_value = static_cast<T *>(grad_value), arrays.grad_grad_output = static_cast<T *>(grad_grad_output);
    anyattention::differentiate(part, adds != 0, has_sums != 0, arrays, grad_bias);
  };
  const anyattention_run_attention_call &inside = call->backward.call;
  return anyattention::guarded(&inside, [&](const auto &part) { inside.is_double ? run(part, 0.0) : run(part, 0.0f); });
}
}
