// The weights of attention over runs, from the results of its forward, and their gradients.
//
//   b  batch entry     i  query in order     j  key in order     h  head     g  key head, h / group     v  vector of queries
//   D  head_dim, rounded up to whole vectors in copies of rows
//
// As in run_attention.cpp, numbers of a tile's pairs are kept turned, [j][i]. The heads of a tile come one after the other,
// so that their mean needs room for one tile.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "anyattention.h"
#include "bias_gradient.h"
#include "products.h"
#include "rows.h"
#include "run_call.h"
#include "scores_of_tile.h"
#include "simd.h"
#include "tile_bias.h"
#include "tiles.h"

namespace anyattention {
namespace {

// Where the weights of one batch entry and head, or of the mean of all heads, lie, or their gradients.
template <class T>
struct WeightRows {
  const Part &part;
  T *numbers;
  int64_t heads;  // of the weights

  T *row(int64_t b, int64_t h, int64_t i) const {
    const int64_t query = (b * heads + (heads == 1 ? 0 : h)) * part.c.num_queries + part.query_at(i);
    return numbers + query * part.c.num_keys;
  }
  // Of one head in the mean.
  T share() const { return heads == part.H ? T{1} : 1 / static_cast<T>(part.H); }
};

// The weights of a tile of queries in all heads.
template <class T>
struct Weights {
  const Part &part;
  QueryTile &tile;
  TileMemory<T> memory;
  T *turned;                   // queries of all heads
  Normalizer<T> *normalizers;  // of all heads

  static int64_t size(const Part &p) {
    const auto numbers = static_cast<int64_t>(sizeof(Normalizer<T>) / sizeof(T));
    return TileMemory<T>::size(p) + p.H * (kQueries * p.D + numbers);
  }
  Weights(const Part &p, QueryTile &t, T *scratch)
      : part(p), tile(t), memory(scratch, p), turned(scratch + TileMemory<T>::size(p)),
        normalizers(reinterpret_cast<Normalizer<T> *>(turned + p.H * kQueries * p.D)) {}

  void run(int64_t b, bool adds, const T *largest, const T *log_sum, const WeightRows<T> &rows) {
    const int64_t D = part.D;
    const bool is_mean = rows.heads != part.H;
    for (int64_t h = 0; h < part.H; ++h) {
      copy_queries(part, tile, b, h, part.c.query, part.c.head_dim, D, memory.query);
      turn(tile.count, D, memory.query, static_cast<T>(part.c.scale), turned + h * kQueries * D);
      normalizers[h].read(part, tile, b, h, largest, log_sum);
    }
    // Keys up to here are written; where places of keys are others, all of them are, at first.
    int64_t written = adds ? part.c.num_keys : 0;
    if (!adds && part.c.parts.key_order) clear(b, written, part.c.num_keys, rows), written = part.c.num_keys;
    T *sums = memory.by_score;
    tile.start();
    for (const Range &keys : tile.keys) {
      const int64_t count = keys.end - keys.begin;
      if (written < keys.begin) clear(b, written, keys.begin, rows);
      written = std::max(written, keys.end);
      if (is_mean) std::fill_n(sums, kQueries * count, T{0});
      for (int64_t h = 0; h < part.H; ++h) {
        TileBias<T> bias(part, tile, b, h, memory.bias);
        if (h == 0 || part.c.mask.strides[1] != 0 || part.c.bias.strides[1] != 0) {
          tile.look_at(keys, b, h);
          bias.read();
        }
        if (!is_mean) std::fill_n(sums, kQueries * count, T{0});
        const int64_t g = h / (part.H / part.G);
        const T *query = turned + h * kQueries * D;
        const KeyRows<T> own = key_rows(part, keys, b, g, memory.key, h % (part.H / part.G) != 0);
        const RowsAhead<T> next_keys(part.c.key, b, g + 1 < part.G ? g + 1 : 0, part.c.head_dim);
        score_tile(part, tile, Product<T>{own.numbers, own.stride, 1, query, kQueries, memory.score, kQueries},
                       [&](int64_t begin, int64_t end) {
                         for (int64_t j = begin; j < end; ++j) next_keys.prefetch(part.key_at(keys.begin + j));
                         return tile.scores_of<T>(begin, end, D);
                       });
        for (int64_t v = 0; v * kLane<T> < tile.count; ++v) {
          T *sum = sums + v * kLane<T>;
          each_weight(part, tile, normalizers[h], memory.score, bias, v, [=](int64_t j, auto, auto weight, auto, auto) {
            store<T, kLane<T>>(sum + j * kQueries, load<kLane<T>>(sum + j * kQueries) + weight);
          });
        }
        if (!is_mean) write(b, h, adds, sums, rows);
      }
      if (is_mean) write(b, 0, adds, sums, rows);
    }
    clear(b, written, part.c.num_keys, rows);
  }

 private:
  void clear(int64_t b, int64_t begin, int64_t end, const WeightRows<T> &rows) const {
    for (int64_t h = 0; h < rows.heads; ++h) {
      for (int64_t i = 0; i < tile.count; ++i) {
        T *row = rows.row(b, h, tile.first + i);
        std::fill(row + begin, row + end, T{0});
      }
    }
  }

  void write(int64_t b, int64_t h, bool adds, const T *sums, const WeightRows<T> &rows) const {
    const Range &keys = tile.now;
    const T share = rows.share();
    for (int64_t i = 0; i < tile.count; ++i) {
      T *row = rows.row(b, h, tile.first + i);
      if (!adds && !part.c.parts.key_order) {
        gather(sums + i, keys.end - keys.begin, share, row + keys.begin);
        continue;
      }
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        T &weight = row[part.key_at(j)];
        weight = sums[(j - keys.begin) * kQueries + i] * share + (adds ? weight : 0);
      }
    }
  }

  // Numbers kQueries apart times a factor, side by side. A vector at a time is stored: single numbers would take as long as
  // the product.
  static void gather(const T *column, int64_t count, T factor, T *row) {
    int64_t j = 0;
    for (; j + kLane<T> <= count; j += kLane<T>) {
      Lanes<T> numbers;
      for (int n = 0; n < kLane<T>; ++n) numbers[n] = column[(j + n) * kQueries];
      store<T, kLane<T>>(row + j, numbers * factor);
    }
    for (; j < count; ++j) row[j] = column[j * kQueries] * factor;
  }
};

template <class T>
void compute(const Part &part, bool adds, const T *largest, const T *log_sum, const WeightRows<T> &rows) {
  const int64_t tiles = part.query_tiles();
  each_task<T>(part, part.c.batch * tiles, 1, Weights<T>::size(part), part.nanoseconds(),
               [&](int64_t n, QueryTile &tile, T *scratch) {
                 tile.move_to(n % tiles);
                 Weights<T>(part, tile, scratch).run(n / tiles, adds, largest, log_sum, rows);
               });
}

// The results of a forward, and where the gradients of its weights go.
template <class T>
struct GradientArrays {
  const T *largest, *log_sum;
  T *grad_query, *grad_key, *grad_log_sum;
};

// With the largest score as a constant, and log_sum as an input of its own: of the gradients g of weights p the scores get
// p g, and the log of the sum - sum of p g.
template <class T>
struct Gradients {
  const Part &part;
  QueryTile &tile;
  TileMemory<T> memory;
  int64_t b, h, g;
  TileBias<T> bias;
  Normalizer<T> normalizer;
  Lanes<T> total[kVectors<T>], earlier_total[kVectors<T>];

  Gradients(const Part &p, QueryTile &t, T *scratch, int64_t batch, int64_t head)
      : part(p), tile(t), memory(scratch, p), b(batch), h(head), g(head / (p.H / p.G)),
        bias(p, t, batch, head, memory.bias) {}

  // by_key (padded rows) begins with a key's.
  void run(bool adds, const GradientArrays<T> &arrays, const WeightRows<const T> &rows, T *by_key, int64_t first_key,
           const BiasTarget<T> &by_bias) {
    const int64_t D = part.D;
    const T scale = static_cast<T>(part.c.scale);
    const bool finite = copy_queries(part, tile, b, h, part.c.query, part.c.head_dim, D, memory.query);
    for (int64_t n = 0; n < tile.count * D; ++n) memory.query[n] *= scale;
    turn(tile.count, D, memory.query, T{1}, memory.turned_query);
    normalizer.read(part, tile, b, h, arrays.largest, arrays.log_sum);
    std::fill_n(memory.by_query, tile.count * D, T{0});
    std::fill_n(total, kVectors<T>, Lanes<T>{});
    tile.start();
    bool has_earlier = false;
    for (std::size_t n = 0; n < tile.keys.size(); ++n) {
      const Range &keys = tile.keys[n];
      if (n > 0 && n % kBlock == 0) {
        put_aside(memory.by_query, tile.count * D, memory.earlier, !has_earlier);
        put_aside(total, kVectors<T>, earlier_total, !has_earlier);
        has_earlier = true;
      }
      tile.look_at(keys, b, h);
      bias.read();
      const bool all_finite = copy_keys(part, keys, b, g, part.c.key, part.c.head_dim, D, memory.key) && finite;
      const int64_t count = keys.end - keys.begin;
      T *by_score = memory.by_score, *gk = by_key + (keys.begin - first_key) * D;
      score_tile(part, tile, Product<T>{memory.key, D, 1, memory.turned_query, kQueries, memory.score, kQueries},
                 [&](int64_t begin, int64_t end) { return tile.scores_of<T>(begin, end, D); });
      read(rows);
      for (int64_t v = 0; v * kLane<T> < tile.count; ++v) differentiate(v, count, by_bias.numbers);
      bias.add_to(by_bias);
      if (all_finite || tile.is_whole()) {
        product<true>(count, Product<T>{by_score, kQueries, 1, memory.query, D, gk, D}, tile.sums_over_queries<T>(D));
        product<true>(tile.count, Product<T>{by_score, 1, kQueries, memory.key, D, memory.by_query, D},
                      tile.sums_over_keys(D));
        continue;
      }
      each_seen(tile, [&](int64_t i, int64_t j) {
        add_scaled<0>(gk + j * D, by_score[j * kQueries + i], memory.query + i * D, D);
        add_scaled<0>(memory.by_query + i * D, by_score[j * kQueries + i], memory.key + j * D, D);
      });
    }
    bias.finish(by_bias);
    if (has_earlier) {
      add(memory.by_query, memory.earlier, tile.count * D);
      add(total, earlier_total, kVectors<T>);
    }
    write_queries(part, tile, b, h, memory.by_query, D, scale, adds, arrays.grad_query, part.c.head_dim);
    for (int64_t i = 0; i < tile.count; ++i) {
      T *by_log_sum = arrays.grad_log_sum + part.query_row(b, tile.first + i, h);
      *by_log_sum = (adds ? *by_log_sum : 0) - total[i / kLane<T>][i % kLane<T>];
    }
  }

 private:
  // The gradients of a head's weights, turned.
  void read(const WeightRows<const T> &rows) {
    const Range &keys = tile.now;
    const T share = rows.share();
    for (int64_t i = 0; i < tile.count; ++i) {
      const T *row = rows.row(b, h, tile.first + i);
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        memory.by_score[(j - keys.begin) * kQueries + i] = row[part.key_at(j)] * share;
      }
    }
  }

  // Gradients by weights become those by raw scores; 0 for what is not seen.
  void differentiate(int64_t v, int64_t count, bool keeps) {
    constexpr int lane = kLane<T>;
    T *by_score = memory.by_score + v * lane;
    const Range range = range_of(tile.seen_by<T>(v));
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) store<T, lane>(by_score + j * kQueries, Lanes<T>{});
    };
    clear(0, range.begin);
    Lanes<T> sum{};
    each_weight(part, tile, normalizer, memory.score, bias, v, [&](int64_t j, auto seen, auto weight, auto slope, auto) {
      const Lanes<T> by = seen ? weight * load<lane>(by_score + j * kQueries) : Lanes<T>{};
      sum += by;
      if (keeps) bias.set(j, v, by);
      store<T, lane>(by_score + j * kQueries, seen ? by * slope : Lanes<T>{});
    });
    total[v] += sum;
    clear(range.end, count);
  }
};

template <class T>
void differentiate(const Part &part, bool adds, const GradientArrays<T> &arrays, const WeightRows<const T> &rows,
                   const anyattention_pairs *grad_bias) {
  const Slices slices(part, grad_bias);
  const BiasGradient<T> of_bias(part, slices, grad_bias, adds);
  const int64_t group = part.H / part.G;
  const Workspace<T> keys(slices.num_rows() * part.D);
  each_slice<T>(
      part, slices, of_bias, TileMemory<T>::size(part), 2 * part.nanoseconds(),
      [&](const Slice &slice, int64_t place, int64_t b, int64_t g, const BiasTarget<T> &bias, QueryTile &tile, T *scratch) {
        for (int64_t index = slice.begin; index < slice.end; ++index) {
          tile.move_to(index);
          for (int64_t h = g * group; h < (g + 1) * group; ++h) {
            Gradients<T>(part, tile, scratch, b, h)
                .run(adds, arrays, rows, keys.get() + place * part.D, slice.keys.begin, bias);
          }
        }
      },
      [&](int64_t b, int64_t g, int64_t j) {
        slices.add_up(b, g, j, keys.get(), part.D, adds, arrays.grad_key, part.c.head_dim);
      });
}

bool are_heads(int64_t heads, const anyattention_run_attention_call &call) { return heads == 1 || heads == call.heads; }

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_run_attention_weights(const anyattention_run_attention_weights_call *call, int32_t adds,
                                           void *weights) {
  if (!call || !anyattention::are_heads(call->weight_heads, call->call)) return ANYATTENTION_INVALID_ARGUMENT;
  const auto run = [=](const auto &part, auto zero) {
    using T = decltype(zero);
    anyattention::compute<T>(part, adds != 0, static_cast<const T *>(call->largest), static_cast<const T *>(call->log_sum),
                             {part, static_cast<T *>(weights), call->weight_heads});
  };
  return anyattention::guarded(&call->call,
                               [=](const auto &part) { call->call.is_double ? run(part, 0.0) : run(part, 0.0f); });
}

int32_t anyattention_run_attention_weights_backward(const anyattention_run_attention_weights_backward_call *call,
                                                    int32_t adds, void *grad_query, void *grad_key, void *grad_log_sum,
                                                    const anyattention_pairs *grad_bias) {
  if (!call || !anyattention::are_heads(call->weight_heads, call->call)) return ANYATTENTION_INVALID_ARGUMENT;
  if (grad_bias && !anyattention::is_gradient(*grad_bias, call->call)) return ANYATTENTION_INVALID_ARGUMENT;
  const auto run = [=](const auto &part, auto zero) {
    using T = decltype(zero);
    const anyattention::GradientArrays<T> arrays{static_cast<const T *>(call->largest), static_cast<const T *>(call->log_sum),
                                                 static_cast<T *>(grad_query), static_cast<T *>(grad_key),
                                                 static_cast<T *>(grad_log_sum)};
    anyattention::differentiate<T>(part, adds != 0, arrays,
                                   {part, static_cast<const T *>(call->grad_weights), call->weight_heads}, grad_bias);
  };
  return anyattention::guarded(&call->call,
                               [=](const auto &part) { call->call.is_double ? run(part, 0.0) : run(part, 0.0f); });
}
}
