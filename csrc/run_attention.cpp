// Attention over runs of keys: dense products of tiles, in which every query sees some runs of neighbouring keys.
//
//   i  query in order     j  key in order     h  head     g  key head, h / group     v  vector of queries
//   D, C  head_dim, value_dim, rounded up to whole vectors in copies of rows
//   S  scores, P  weights
//
// Scores are kept turned, S[j][i]: a query is a lane of a vector, and its keys come one after the other.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

#include "anyattention.h"
#include "bias_gradient.h"
#include "few_queries.h"
#include "operands.h"
#include "products.h"
#include "rows.h"
#include "run_call.h"
#include "scores_of_tile.h"
#include "simd.h"
#include "tile_bias.h"
#include "tiles.h"

namespace anyattention {
namespace {

// A query's weights are exp(score - base), base near the largest score so far. It follows where that has grown by more,
// since then all sums are scaled anew.
template <class T>
constexpr T kGrowth = 2;

template <class Operands>
struct Forward {
  using T = typename Operands::Sum;
  const Part &part;
  QueryTile &tile;
  Operands memory;
  int64_t b, h, g;
  TileBias<T> bias;
  Lanes<T> largest[kVectors<T>], base[kVectors<T>], sum[kVectors<T>], earlier_sum[kVectors<T>];
  Lanes<T> rounded_sum[kVectors<T>], earlier_rounded_sum[kVectors<T>];  // of the weights that outputs are sums of
  bool has_earlier = false;                                             // blocks of keys

  Forward(const Part &p, QueryTile &t, T *scratch, int64_t batch, int64_t head)
      : part(p), tile(t), memory(scratch, p), b(batch), h(head), g(head / (p.H / p.G)),
        bias(p, t, batch, head, memory.bias) {}

  void run(const RowResults<T> &results) {
    const int64_t C = part.C;
    memory.read_queries(tile, b, h);
    std::fill_n(memory.output, tile.count * C, T{0});
    for (int v = 0; v < kVectors<T>; ++v) {
      largest[v] = base[v] = Lanes<T>{} + kMinusInfinity<T>;
      sum[v] = earlier_sum[v] = rounded_sum[v] = earlier_rounded_sum[v] = Lanes<T>{};
    }
    // Those of the next head, or of the first after the last.
    const int64_t next = g + 1 < part.G ? g + 1 : 0;
    const RowsAhead<T> next_keys(part.c.key, b, next, part.c.head_dim), next_values(part.c.value, b, next, part.c.value_dim);
    tile.start();
    for (std::size_t n = 0; n < tile.keys.size(); ++n) {
      const Range &keys = tile.keys[n];
      if (n > 0 && n % kBlock == 0) begin_block();
      tile.look_at(keys, b, h);
      bias.read();
      const bool finite = memory.read_values(keys, b, g);
      const int64_t count = keys.end - keys.begin;
      memory.find_keys(keys, b, g);
      score_tile(part, tile, memory.scores(), [&](int64_t begin, int64_t end) {
        for (int64_t j = keys.begin + begin; j < keys.begin + end; ++j) {
          const int64_t place = part.key_at(j);
          next_keys.prefetch(place), next_values.prefetch(place);
        }
        return tile.scores_of<T>(begin, end, memory.key_depth());
      });
      for (int64_t v = 0; v * kLane<T> < tile.count; ++v) weigh(v, count);
      if (finite || tile.is_whole()) {
        product<true>(tile.count, memory.outputs(), tile.sums_over_keys(C));
        continue;
      }
      memory.widen_values(keys, b, g);
      each_seen(tile, [&](int64_t i, int64_t j) {
        add_scaled<0>(memory.output + i * C, memory.score[j * kQueries + i], memory.value + j * C, C);
      });
    }
    if (has_earlier) {
      begin_block();
      std::swap(memory.output, memory.earlier);
      std::swap(sum, earlier_sum);
      std::swap(rounded_sum, earlier_rounded_sum);
    }
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t v = i / kLane<T>, lane = i % kLane<T>;
      const T own = sum[v][lane];
      // Outputs are relative to the sum of the weights as they were multiplied; with dropout those are not all.
      const bool is_rounded = Operands::kRounds && part.c.dropout == 0 && own != 0;
      results.write(part, part.query_row(b, tile.first + i, h), memory.output + i * C, base[v][lane], largest[v][lane], own,
                    is_rounded ? own / rounded_sum[v][lane] : T{1});
    }
  }

  void begin_block() {
    put_aside(memory.output, tile.count * part.C, memory.earlier, !has_earlier);
    put_aside(sum, kVectors<T>, earlier_sum, !has_earlier);
    if (Operands::kRounds) put_aside(rounded_sum, kVectors<T>, earlier_rounded_sum, !has_earlier);
    has_earlier = true;
  }

  // Scores of a vector of queries become weights, 0 where a query does not see a key; the sums so far are scaled anew.
  void weigh(int64_t v, int64_t count) {
    constexpr int lane = kLane<T>;
    T *column = memory.score + v * lane;
    const Range range = range_of(tile.seen_by<T>(v));
    const bool is_whole = range.begin < range.end &&
                          tile.every_of(v * lane, (v + 1) * lane) == bits_of(range.begin, range.end);
    const bool has_bias = part.c.bias.numbers;
    Lanes<T> top = largest[v], broken{};
    if (is_whole && part.c.softcap == 0) {
      for (int64_t j = range.begin; j < range.end; ++j) {
        Lanes<T> x = load<lane>(column + j * kQueries);
        broken += x * 0;
        if (has_bias) {
          x += bias.at(j, v);
          store<T, lane>(column + j * kQueries, x);
        }
        top = x > top ? x : top;
      }
    } else {
      const SeenLanes<T> sees(tile.seen + v * lane);
      const T cap = cap_of<T>(part.c.softcap);
      for (int64_t j = range.begin; j < range.end; ++j) {
        const auto seen = sees.of(j);
        Lanes<T> x = seen ? load<lane>(column + j * kQueries) : Lanes<T>{};
        broken += x * 0;
        if (cap > 0) x = capped<T>(x, cap);
        if (has_bias) x += bias.at(j, v);
        x = seen ? x : Lanes<T>{} + kMinusInfinity<T>;
        store<T, lane>(column + j * kQueries, x);
        top = x > top ? x : top;
      }
    }
    const Lanes<T> before = base[v], now = top > before + kGrowth<T> ? top : before;
    const Lanes<T> shift = now == kMinusInfinity<T> ? Lanes<T>{} : now;
    Lanes<T> total = broken;  // of a score of -inf, too, which would pass for a hidden key
    for (int64_t j = 0; j < range.begin; ++j) store<T, lane>(column + j * kQueries, Lanes<T>{});
    for (int64_t j = range.begin; j < range.end; ++j) {
      const Lanes<T> weight = Exponential<T, lane>::run(load<lane>(column + j * kQueries) - shift);
      store<T, lane>(column + j * kQueries, weight);
      total += weight;
    }
    if (part.c.dropout > 0) {
      Dropout<T> dropout(part, tile, b, h, v, range.begin);
      for (int64_t j = range.begin; j < range.end; ++j) {
        T *weight = column + j * kQueries;
        store<T, lane>(weight, load<lane>(weight) * dropout.next());
      }
    }
    for (int64_t j = range.end; j < count; ++j) store<T, lane>(column + j * kQueries, Lanes<T>{});
    [[maybe_unused]] Lanes<T> rounded{};
    if constexpr (Operands::kRounds) rounded = memory.round_weights(v, count);
    largest[v] = top, base[v] = now;
    if (sum_of<typename SeenLanes<T>::Word, lane>(now != before) != 0) {
      const Lanes<T> factor = Exponential<T, lane>::run(before - shift);
      for (int n = 0; n < lane && v * lane + n < tile.count; ++n) {
        if (now[n] == before[n] || sum[v][n] + earlier_sum[v][n] == 0) continue;
        const int64_t row = (v * lane + n) * part.C;
        for (int64_t d = 0; d < part.C; ++d) memory.output[row + d] *= factor[n];
        for (int64_t d = 0; has_earlier && d < part.C; ++d) memory.earlier[row + d] *= factor[n];
      }
      sum[v] *= factor, earlier_sum[v] *= factor;
      if (Operands::kRounds) rounded_sum[v] *= factor, earlier_rounded_sum[v] *= factor;
    }
    sum[v] += total;
    if (Operands::kRounds) rounded_sum[v] += rounded;
  }
};

// Where the results of a backward pass go, and what it needs of the forward's.
template <class T>
struct BackwardArrays {
  const T *output, *largest, *log_sum;
  anyattention_head_rows grad_output;
  const T *grad_log_sum;
  T *grad_query, *grad_key, *grad_value;
};

// What a slice adds to the gradients of the keys and values that it sees, and of the bias, where that is wanted.
template <class T>
struct SliceGradients {
  T *keys, *values;
  int64_t first_key;
  BiasTarget<T> bias;
};

template <class Operands>
struct Backward {
  using T = typename Operands::Sum;
  const Part &part;
  QueryTile &tile;
  Operands memory;
  int64_t b, h, g;
  TileBias<T> bias;
  Normalizer<T> normalizer;
  T delta[kQueries];

  Backward(const Part &p, QueryTile &t, T *scratch, int64_t batch, int64_t head)
      : part(p), tile(t), memory(scratch, p), b(batch), h(head), g(head / (p.H / p.G)),
        bias(p, t, batch, head, memory.bias) {}

  void run(bool adds, const BackwardArrays<T> &arrays, SliceGradients<T> grads) {
    const int64_t D = part.D, C = part.C;
    const T scale = static_cast<T>(part.c.scale);
    bool finite = memory.read_queries(tile, b, h);
    finite &= memory.read_grads(tile, b, h, arrays.grad_output);
    std::fill_n(memory.by_query, tile.count * D, T{0});
    normalizer.read(part, tile, b, h, arrays.largest, arrays.log_sum);
    std::fill_n(delta, kQueries, T{0});
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t row = part.query_row(b, tile.first + i, h);
      delta[i] = dot<0>(memory.grad + i * C, arrays.output + row * part.c.value_dim, part.c.value_dim);
      if (arrays.grad_log_sum && arrays.largest[row] != kMinusInfinity<T>) delta[i] -= arrays.grad_log_sum[row];
    }
    tile.start();
    bool has_earlier = false;
    for (std::size_t n = 0; n < tile.keys.size(); ++n) {
      const Range &keys = tile.keys[n];
      if (n > 0 && n % kBlock == 0) {
        put_aside(memory.by_query, tile.count * D, memory.earlier, !has_earlier);
        has_earlier = true;
      }
      tile.look_at(keys, b, h);
      bias.read();
      const bool keys_finite = memory.read_keys(keys, b, g);
      const bool values_finite = memory.find_values(keys, b, g);
      const bool all_finite = finite && keys_finite && values_finite;
      const int64_t count = keys.end - keys.begin, place = keys.begin - grads.first_key;
      T *score = memory.score, *by_score = memory.by_score;
      T *gk = grads.keys + place * D, *gv = grads.values + place * C;
      score_tile(part, tile, memory.scores(),
                 [&](int64_t begin, int64_t end) { return tile.scores_of<T>(begin, end, memory.key_depth()); });
      product<false>(count, memory.by_weights(),
                     [&](int64_t begin, int64_t end) { return tile.scores_of<T>(begin, end, memory.value_depth()); });
      for (int64_t v = 0; v * kLane<T> < tile.count; ++v) differentiate(v, count, grads.bias.numbers);
      bias.add_to(grads.bias);
      if (all_finite || tile.is_whole()) {
        product<true>(count, memory.by_values(gv), tile.sums_over_queries<T>(C));
        product<true>(count, memory.by_keys(gk), tile.sums_over_queries<T>(D));
        product<true>(tile.count, memory.by_queries(), tile.sums_over_keys(D));
        continue;
      }
      memory.widen_keys(keys, b, g);
      each_seen(tile, [&](int64_t i, int64_t j) {
        add_scaled<0>(gv + j * C, score[j * kQueries + i], memory.grad + i * C, C);
        add_scaled<0>(gk + j * D, by_score[j * kQueries + i], memory.query + i * D, D);
        add_scaled<0>(memory.by_query + i * D, by_score[j * kQueries + i], memory.key + j * D, D);
      });
    }
    bias.finish(grads.bias);
    if (has_earlier) add(memory.by_query, memory.earlier, tile.count * D);
    write_queries(part, tile, b, h, memory.by_query, D, scale, adds, arrays.grad_query, part.c.head_dim);
  }

  // Scores of a vector of queries become weights, and gradients by weights those by raw scores; 0 for what is not seen.
  void differentiate(int64_t v, int64_t count, bool keeps) {
    constexpr int lane = kLane<T>;
    T *score = memory.score + v * lane, *by_score = memory.by_score + v * lane;
    const Range range = range_of(tile.seen_by<T>(v));
    const Lanes<T> mean = load<lane>(delta + v * lane);
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        store<T, lane>(score + j * kQueries, Lanes<T>{});
        store<T, lane>(by_score + j * kQueries, Lanes<T>{});
      }
    };
    std::optional<Dropout<T>> dropout = dropout_of<T>(part, tile, b, h, v);
    clear(0, range.begin);
    each_weight(part, tile, normalizer, memory.score, bias, v, [&](int64_t j, auto seen, auto weight, auto slope, auto) {
      const Lanes<T> factor = dropout ? dropout->next() : Lanes<T>{} + 1;
      const Lanes<T> by = seen ? weight * (load<lane>(by_score + j * kQueries) * factor - mean) : Lanes<T>{};
      if (keeps) bias.set(j, v, by);
      store<T, lane>(score + j * kQueries, seen ? weight * factor : Lanes<T>{});
      store<T, lane>(by_score + j * kQueries, seen ? by * slope : Lanes<T>{});
    });
    clear(range.end, count);
    memory.round_gradients(v, count);
  }
};

template <class Operands, class T = typename Operands::Sum>
void forward(const Part &part, const RowResults<T> &results) {
  each_query_tile<T>(
      part, Operands::size(part), part.nanoseconds(),
      [&](int64_t b, int64_t h, QueryTile &tile, T *scratch) { Forward<Operands>(part, tile, scratch, b, h).run(results); });
}

template <class Operands, class T = typename Operands::Sum>
void differentiate(const Part &part, bool adds, const BackwardArrays<T> &arrays, const anyattention_pairs *grad_bias) {
  const Slices slices(part, grad_bias);
  const BiasGradient<T> of_bias(part, slices, grad_bias, adds);
  const int64_t group = part.H / part.G;
  const Workspace<T> keys(slices.num_rows() * part.D), values(slices.num_rows() * part.C);
  each_slice<T>(
      part, slices, of_bias, Operands::size(part), 2 * part.nanoseconds(),
      [&](const Slice &slice, int64_t place, int64_t b, int64_t g, const BiasTarget<T> &bias, QueryTile &tile, T *scratch) {
        for (int64_t index = slice.begin; index < slice.end; ++index) {
          tile.move_to(index);
          for (int64_t h = g * group; h < (g + 1) * group; ++h) {
            Backward<Operands>(part, tile, scratch, b, h)
                .run(adds, arrays, {keys.get() + place * part.D, values.get() + place * part.C, slice.keys.begin, bias});
          }
        }
      },
      [&](int64_t b, int64_t g, int64_t j) {
        slices.add_up(b, g, j, keys.get(), part.D, adds, arrays.grad_key, part.c.head_dim);
        slices.add_up(b, g, j, values.get(), part.C, adds, arrays.grad_value, part.c.value_dim);
      });
}

template <class Operands, class T = typename Operands::Sum>
void differentiate(const Part &part, bool adds, const anyattention_run_attention_backward_call &call,
                   void *const *gradients, const anyattention_pairs *grad_bias) {
  const auto in = [](const void *numbers) { return static_cast<const T *>(numbers); };
  const auto out = [gradients](int n) { return static_cast<T *>(gradients[n]); };
  differentiate<Operands>(part, adds, BackwardArrays<T>{in(call.output), in(call.largest), in(call.log_sum), call.grad_output,
                                                        in(call.grad_log_sum), out(0), out(1), out(2)}, grad_bias);
}

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_run_attention_tiles(const anyattention_run_attention_call *call, int64_t *num_pairs) {
  return anyattention::guarded(call, [=](const auto &part) {
    *num_pairs = 0;
    anyattention::QueryTile tile(part);
    for (int64_t index = 0; index < part.query_tiles(); ++index) {
      tile.move_to(index);
      tile.start();
      for (const anyattention::Range &keys : tile.keys) {
        tile.look_at(keys, 0, 0);
        *num_pairs += tile.template num_pairs<float>();
      }
    }
  });
}

int32_t anyattention_run_attention_forward(const anyattention_run_attention_call *call, int32_t merges, void *output,
                                           void *largest, void *log_sum) {
  return anyattention::guarded(call, [=](const auto &part) {
    anyattention::with_operands(part, [&](auto *kind) {
      using Operands = std::remove_pointer_t<decltype(kind)>;
      using T = typename Operands::Sum;
      const anyattention::RowResults<T> results{merges != 0, static_cast<T *>(output), static_cast<T *>(largest),
                                                static_cast<T *>(log_sum)};
      if (part.has_few_queries()) return anyattention::FewQueries<T>(part).run(results);
      anyattention::forward<Operands>(part, results);
    });
  });
}

int32_t anyattention_run_attention_backward(const anyattention_run_attention_backward_call *call, int32_t adds,
                                            void *grad_query, void *grad_key, void *grad_value,
                                            const anyattention_pairs *grad_bias) {
  if (!call || !anyattention::Part::is_valid(call->grad_output, call->call.is_double)) return ANYATTENTION_INVALID_ARGUMENT;
  if (grad_bias && !anyattention::is_gradient(*grad_bias, call->call)) return ANYATTENTION_INVALID_ARGUMENT;
  void *gradients[] = {grad_query, grad_key, grad_value};
  return anyattention::guarded(&call->call, [&](const auto &part) {
    anyattention::with_operands(part, [&](auto *kind) {
      anyattention::differentiate<std::remove_pointer_t<decltype(kind)>>(part, adds != 0, *call, gradients, grad_bias);
    });
  });
}
}
