// Attention over the edges of a graph: forward over the rows of queries, backward over the rows of keys (the gradient
// of key, value and score) and then over the rows of queries (the gradient of query). No edge keeps a channel.
//
//   i  query     j  key     e  edge, in the caller's order     s  slot of compressed rows
//   h  head      g  key head, h / group                        H, G, D, C  heads, key heads, head_dim, value_dim
//   p  weight    f  keep factor of dropout

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "anyattention.h"
#include "graph_call.h"
#include "padded_call.h"
#include "pages.h"
#include "prepared_queries.h"
#include "rows.h"
#include "scores.h"
#include "simd.h"

namespace anyattention {
namespace {

// Which of the kernels a call runs.
template <class T, class Score, int DW, int CW>
struct Instance {
  using Number = T;
};

// Accumulator: largest score (H), sum of exponentials (H), output (H, C).
template <class T, class Score, int DW, int CW>
struct Forward : Call<T, Score, DW, CW> {
  using Base = Call<T, Score, DW, CW>;
  using Base::C, Base::H, Base::drops, Base::kSize, Base::key, Base::key_stride, Base::normalize, Base::output_stride,
      Base::query, Base::query_stride, Base::value, Base::value_stride;
  CompressedRows rows;
  T *output, *largest_scores, *log_sums;

  Forward(const anyattention_graph_attention_call &c, int64_t b, T *out, T *l, T *s)
      : Base(c, b),
        rows(rows_of_queries(c.graph)),
        output(out + this->of_query_rows(output_stride)),
        largest_scores(l + this->of_query_rows(H)),
        log_sums(s + this->of_query_rows(H)) {}

  int64_t accumulator_size() const { return 2 * H + H * C; }
  int64_t scratch_size(int64_t slots) const { return slots * H + 3 * H + 64; }
  int64_t slot_size() const { return this->slot_size_of(1, 1, this->fits_registers()); }
  bool takes_rows_together() const { return this->fits_registers(); }

  void start(T *accumulator) const {
    std::fill_n(accumulator, H, kMinusInfinity<T>);
    std::fill_n(accumulator + H, H + H * C, T{0});
  }

  bool reduce(int64_t i, int64_t begin, int64_t end, T *accumulator, T *scratch) const {
    T *largest = accumulator, *sum = accumulator + H, *out = accumulator + 2 * H;
    T *shift = scratch, *ignored = scratch + H, *score = scratch + 3 * H;
    const T *q = query + i * query_stride;
    if (!rows.slots_are_valid(begin, end)) return false;
    if constexpr (Base::kHasRegisters) {
      if (this->fits_registers()) {
        const int64_t bounds[] = {begin, end};
        rows_in_registers(i, 1, bounds, score, [=](int64_t, auto top, auto total, const auto &result) {
          std::memcpy(largest, &top, sizeof top);
          std::memcpy(sum, &total, sizeof total);
          result.write(out);
        });
        return true;
      }
    }
    for (int64_t s = begin; s < end; ++s) {
      if (s + kPrefetch < rows.num_edges) {
        const int64_t next = rows.columns.unchecked(s + kPrefetch);
        this->prefetch_key(next);
        this->prefetch_value(next);
      }
      T *row = score + (s - begin) * H;
      this->template scores<false>(q, key + rows.columns[s] * key_stride, rows.edges[s], row, ignored);
      each_head(H, [=](int64_t h) { largest[h] = row[h] > largest[h] ? row[h] : largest[h]; });
    }
    for (int64_t h = 0; h < H; ++h) shift[h] = largest[h] == kMinusInfinity<T> ? T{0} : largest[h];
    this->weights(score, shift, end - begin);
    for (int64_t s = begin; s < end; ++s) {
      T *row = score + (s - begin) * H;
      each_head(H, [=](int64_t h) { sum[h] += row[h]; });
    }
    if (drops) this->drop(rows, begin, end, score);
    const int64_t c = channels<CW>(C);
    for (int64_t start = begin; start < end; start += kTile) {
      const int64_t count = std::min(kTile, end - start);
      const T *tile[kTile];
      int64_t edges[kTile];
      for (int64_t n = 0; n < count; ++n) {
        tile[n] = value + rows.columns[start + n] * value_stride;
        edges[n] = rows.edges[start + n];
      }
      for (int64_t h = 0; h < H; ++h) {
        const T *weight = score + (start - begin) * H + h;
        this->template add_visible<CW>(h, edges, out + h * c, weight, tile, this->key_head(h) * c, count, c);
      }
    }
    return true;
  }

  bool reduce_together(int64_t first, int64_t count, const int64_t *bounds, T *, T *scratch, T *) const {
    if (!rows.slots_are_valid(bounds[0], bounds[count])) return false;
    if constexpr (Base::kHasRegisters) {
      const auto write = [=](int64_t i, auto top, auto sum, const auto &result) {
        std::memcpy(largest_scores + i * H, &top, sizeof top);
        std::memcpy(log_sums + i * H, &sum, sizeof sum);
        // No visible edge leaves a sum of 0; a NaN anywhere leaves NaN.
        result.write(output + i * output_stride, sum == 0 ? decltype(sum){} : 1 / sum);
      };
      rows_in_registers(first, count, bounds, scratch, write);
      T *const logs = log_sums + first * H;
#pragma omp simd
      for (int64_t n = 0; n < count * H; ++n) logs[n] = logs[n] == 0 ? T{0} : logarithm(logs[n]);
    }
    return true;
  }

  template <class Write>
  void rows_in_registers(int64_t first, int64_t count, const int64_t *bounds, T *score, const Write &write) const {
    with_heads<T, CW>(H, [&](auto n) {
      if (drops) return rows_of_heads<n(), true>(first, count, bounds, score, write);
      rows_of_heads<n(), false>(first, count, bounds, score, write);
    });
  }

  // Some rows from `first`, whose slots begin at `bounds`: write(i, largest, sum, output) for each. With dropout apart:
  // what draws its numbers takes registers.
  template <int Heads, bool Drops, class Write>
  void rows_of_heads(int64_t first, int64_t count, const int64_t *bounds, T *score, const Write &write) const {
    using Numbers = Vector<T, Heads>;
    constexpr int64_t key_bytes = Heads * Base::kHeadDim * kSize, value_bytes = Heads * CW * kSize;
    constexpr int64_t ahead = slots_ahead(key_bytes + value_bytes);
    const int64_t begin = bounds[0];
    T tops[kRowsTogether * Heads];
    for (int64_t n = 0; n < count; ++n) {
      const T *q = query + (first + n) * query_stride;
      Numbers largest = Numbers{} + kMinusInfinity<T>, ignored;
      for (int64_t s = bounds[n]; s < bounds[n + 1]; ++s) {
        if (s + ahead < rows.num_edges) {
          prefetch_row<key_bytes>(address_of(key, rows.columns.unchecked(s + ahead), key_stride));
        }
        const Numbers x = this->template register_scores<Heads>(q, key + rows.columns[s] * key_stride, ignored);
        store<T, Heads>(score + (s - begin) * Heads, x);
        largest = x > largest ? x : largest;
      }
      const Numbers shift = largest == kMinusInfinity<T> ? Numbers{} : largest;
      for (T *x = score + (bounds[n] - begin) * Heads; x < score + (bounds[n + 1] - begin) * Heads; x += Heads) {
        store<T, Heads>(x, load<Heads>(x) - shift);
      }
      store<T, Heads>(tops + n * Heads, largest);
    }
    exponentials(score, (bounds[count] - begin) * Heads);
    for (int64_t n = 0; n < count; ++n) {
      Numbers sum{};
      if constexpr (Drops) {
        for (int64_t s = bounds[n]; s < bounds[n + 1]; ++s) sum += load<Heads>(score + (s - begin) * Heads);
        this->drop(rows, bounds[n], bounds[n + 1], score + (bounds[n] - begin) * Heads);
      }
      auto out = RegisterRow<Heads, CW>::zeros();
      for (int64_t s = bounds[n]; s < bounds[n + 1]; ++s) {
        if (s + ahead < rows.num_edges) {
          prefetch_row<value_bytes>(address_of(value, rows.columns.unchecked(s + ahead), value_stride));
        }
        const Numbers weight = load<Heads>(score + (s - begin) * Heads);
        if (!Drops) sum += weight;
        out.add(weight, value + rows.columns[s] * value_stride);
      }
      write(first + n, load<Heads>(tops + n * Heads), sum, out);
    }
  }

  void combine(T *accumulator, const T *next) const {
    T *out = accumulator + 2 * H;
    const T *out_next = next + 2 * H;
    for (int64_t h = 0; h < H; ++h) {
      T mine = 1, theirs = 1;
      if (normalize) {
        const T both = std::max(accumulator[h], next[h]);
        const T shift = both == kMinusInfinity<T> ? T{0} : both;
        mine = std::exp(accumulator[h] - shift);
        theirs = std::exp(next[h] - shift);
        accumulator[h] = both;
      }
      accumulator[H + h] = accumulator[H + h] * mine + next[H + h] * theirs;
      for (int64_t c = 0; c < C; ++c) out[h * C + c] = out[h * C + c] * mine + out_next[h * C + c] * theirs;
    }
  }

  void finish(int64_t i, const T *accumulator) const {
    const T *largest = accumulator, *sum = accumulator + H, *out = accumulator + 2 * H;
    T *top = largest_scores + i * H, *log_sum = log_sums + i * H;
    each_head(H, [=](int64_t h) { top[h] = largest[h]; });
    each_head(H, [=](int64_t h) { log_sum[h] = sum[h] == 0 ? T{0} : logarithm(sum[h]); });
    for (int64_t h = 0; h < H; ++h) {
      // No visible edge leaves a sum of 0; a NaN anywhere leaves NaN.
      const T inverse = !normalize ? T{1} : sum[h] == 0 ? T{0} : 1 / sum[h];
      T *target = output + i * output_stride + h * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) target[c] = out[h * C + c] * inverse;
    }
  }
};

// Weights from the largest score of each row and the logarithm of its sum; the accumulator is not used.
template <class T, class Score, int DW, int CW>
struct Weights : Call<T, Score, DW, CW> {
  using Base = Call<T, Score, DW, CW>;
  using Base::H, Base::key, Base::query;
  CompressedRows rows;
  const T *largest, *log_sum;
  T *result;
  static constexpr bool kWritesEdges = true;

  Weights(const anyattention_graph_attention_call &c, int64_t b, const T *l, const T *s, T *w)
      : Base(c, b),
        rows(rows_of_queries(c.graph)),
        largest(l + this->of_query_rows(H)),
        log_sum(s + this->of_query_rows(H)),
        result(w + b * c.graph.num_edges * H) {}

  int64_t accumulator_size() const { return 1; }
  int64_t scratch_size(int64_t) const { return 4 * H + 64; }
  int64_t slot_size() const { return this->slot_size_of(1, 0, false); }
  void start(T *) const {}
  void combine(T *, const T *) const {}
  void finish(int64_t, const T *) const {}

  bool reduce(int64_t i, int64_t begin, int64_t end, T *, T *scratch) const {
    T *score = scratch, *ignored = scratch + H + 32, *shift = ignored + H, *log = shift + H;
    for (int64_t h = 0; h < H; ++h) {
      const T top = largest[i * H + h];
      shift[h] = !this->normalize || top == kMinusInfinity<T> ? T{0} : top;
      log[h] = this->normalize ? log_sum[i * H + h] : T{0};
    }
    if (!rows.slots_are_valid(begin, end)) return false;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t e = rows.edges[s];
      const T *q = query + i * this->query_stride, *k = key + rows.columns[s] * this->key_stride;
      if (!in_registers(q, k, score)) this->template scores<false>(q, k, e, score, ignored);
      each_head(H, [=](int64_t h) { score[h] = (score[h] - shift[h]) - log[h]; });
      this->to_weights(score, 1);
      std::copy_n(score, H, result + e * H);
    }
    return true;
  }

  // Sums as the forward has them: in another order a large score would be off by its rounding.
  bool in_registers(const T *q, const T *k, T *score) const {
    if constexpr (Base::kHasRegisters) {
      if (this->fits_registers()) {
        with_heads<T, CW>(H, [&](auto n) {
          Vector<T, n()> ignored;
          store<T, n()>(score, this->template register_scores<n()>(q, k, ignored));
        });
        return true;
      }
    }
    return false;
  }
};

// Over the rows of keys. Accumulator: gradient of key (G, D), of value (G, C), of vector (H, D).
template <class T, class Score, int DW, int CW>
struct BackwardKeys : Call<T, Score, DW, CW> {
  using Base = Call<T, Score, DW, CW>;
  using Base::C, Base::D, Base::G, Base::H, Base::drops, Base::group, Base::kSize, Base::key, Base::key_stride,
      Base::normalize, Base::output_stride, Base::query, Base::query_stride, Base::value, Base::value_stride;
  CompressedRows rows;
  const T *of_query, *grad_output;  // of_query: see prepared_queries.h
  T *grad_key, *grad_value;  // without grad_value, grad_key is of the key and the value together
  T *grad_raw, *grad_score;
  static constexpr bool kWritesEdges = true;  // grad_raw

  BackwardKeys(const anyattention_graph_attention_call &c, int64_t b)
      : Base(c, b), rows(rows_of_keys(c.graph)) {}

  int64_t vector_size() const { return Score::kHasVector ? H * D : 0; }
  int64_t accumulator_size() const { return G * D + G * C + vector_size(); }
  int64_t scratch_size(int64_t slots) const { return 4 * std::min(slots, kTile) * H + 192; }
  int64_t slot_size() const { return this->slot_size_of(2, 2, takes_rows_together()); }
  bool takes_rows_together() const { return this->fits_registers() && !grad_score; }
  void start(T *accumulator) const { std::fill_n(accumulator, accumulator_size(), T{0}); }
  void combine(T *accumulator, const T *next) const { add(accumulator, next, accumulator_size()); }

  bool reduce(int64_t j, int64_t begin, int64_t end, T *accumulator, T *scratch) const {
    if (!rows.slots_are_valid(begin, end)) return false;
    if constexpr (Base::kHasRegisters) {
      if (takes_rows_together()) {
        const int64_t bounds[] = {begin, end};
        T *const gk = accumulator, *const gv = gk + G * D;
        rows_in_registers(j, 1, bounds, [=](int64_t, auto &by_key, const auto &by_value) {
          by_value.write(gv);
          by_key.write(*this, gk, gv + G * C);
        });
        return true;
      }
    }
    for (int64_t start = begin; start < end; start += kTile) {
      add_tile(j, start, std::min(kTile, end - start), accumulator, scratch);
    }
    return true;
  }

  bool reduce_together(int64_t first, int64_t count, const int64_t *bounds, T *accumulator, T *, T *total) const {
    if (!rows.slots_are_valid(bounds[0], bounds[count])) return false;
    if constexpr (Base::kHasRegisters) {
      rows_in_registers(first, count, bounds, [=](int64_t j, auto &by_key, const auto &by_value) {
        T *const by_rows = accumulator + G * D, *const by_vector = by_rows + G * C;
        by_key.write(*this, grad_key + j * key_stride, by_vector);
        if (grad_value) {
          by_value.write(grad_value + j * value_stride);
        } else {
          by_value.write(by_rows);
          add(grad_key + j * key_stride, by_rows, G * C);
        }
        if (total) add(total, by_vector, vector_size());
      });
    }
    return true;
  }

  template <class Write>
  void rows_in_registers(int64_t first, int64_t count, const int64_t *bounds, const Write &write) const {
    with_heads<T, CW>(H, [&](auto n) {
      if (drops) return rows_of_heads<n(), true>(first, count, bounds, write);
      rows_of_heads<n(), false>(first, count, bounds, write);
    });
  }

  // Some rows from `first`, whose slots begin at `bounds`: write(j, by_key, by_value) for each. A tile of slots at a time,
  // of whichever rows: first the weights of all its edges, whose exponentials share vectors, and then the rows of queries.
  template <int Heads, bool Drops, class Write>
  ANYATTENTION_FLATTEN void rows_of_heads(int64_t first, int64_t count, const int64_t *bounds, const Write &write) const {
    using Numbers = Vector<T, Heads>;
    using Row = RegisterRow<Heads, CW>;
    constexpr int64_t key_bytes = Heads * Base::kHeadDim * kSize, value_bytes = Heads * CW * kSize;
    constexpr int64_t ahead = slots_ahead(key_bytes + value_bytes);
    // Queries' rows are read twice, and stay in the first cache meanwhile.
    constexpr int64_t tile = key_bytes <= 64 ? kSlotsTogether : kTile;
    const CompressedRows slots = rows;
    const T *const grads = grad_output, *const numbers = of_query;
    T *const to_raw = grad_raw;
    alignas(64) T weights[tile * Heads];
    T slopes[tile * Heads];
    [[maybe_unused]] T factors[tile * Heads];
    int64_t queries[tile];
    int64_t row = 0;
    const T *k = key + first * key_stride;
    Row v = Row::read(value + first * value_stride), by_value = Row::zeros();
    typename Score::template KeySums<Heads, CW> by_key{};
    for (int64_t start = bounds[0]; start < bounds[count]; start += tile) {
      const int64_t stop = std::min(start + tile, bounds[count]);
      for (int64_t s = start, n = row; s < stop; ++n) {
        const T *own_key = key + (first + n) * key_stride;
        for (const int64_t end = std::min(stop, bounds[n + 1]); s < end; ++s) {
          const int64_t i = queries[s - start] = slots.columns[s];
          if (s + ahead < slots.num_edges) {
            const int64_t next = slots.columns.unchecked(s + ahead);
            prefetch_row<key_bytes>(address_of(query, next, query_stride));
            prefetch_row<2 * Heads * kSize>(address_of(numbers, next, 2 * Heads));
          }
          Numbers slope;
          const Numbers score = this->template register_scores<Heads>(query + i * query_stride, own_key, slope);
          store<T, Heads>(weights + (s - start) * Heads, score - load<Heads>(numbers + i * 2 * Heads));
          store<T, Heads>(slopes + (s - start) * Heads, slope);
        }
      }
      exponentials(weights, (stop - start) * Heads);
      if constexpr (Drops) {
        std::fill_n(factors, tile * Heads, T{1});
        this->drop(slots, start, stop, factors);
      }
      for (int64_t s = start; s < stop;) {
        while (bounds[row + 1] <= s) {
          write(first + row, by_key, by_value);
          ++row;
          k = key + (first + row) * key_stride;
          v = Row::read(value + (first + row) * value_stride);
          by_value = Row::zeros();
          by_key = {};
        }
        for (const int64_t end = std::min(stop, bounds[row + 1]); s < end; ++s) {
          if (s + ahead < slots.num_edges) {
            prefetch_row<value_bytes>(address_of(grads, slots.columns.unchecked(s + ahead), Heads * CW));
            __builtin_prefetch(address_of(to_raw, slots.edges.unchecked(s + ahead), Heads), 1);
          }
          T *const own = weights + (s - start) * Heads;
          const int64_t i = queries[s - start];
          const T *grad = grads + i * Heads * CW;
          const Numbers weight = load<Heads>(own);
          const Numbers delta = load<Heads>(numbers + (i * 2 + 1) * Heads);
          Numbers by_weight = v.dots(grad);
          if constexpr (Drops) {
            const Numbers kept = load<Heads>(factors + (s - start) * Heads);
            by_weight *= kept;
            store<T, Heads>(own, weight * kept);
          }
          const Numbers by_raw = weight * (by_weight - delta) * load<Heads>(slopes + (s - start) * Heads);
          store<T, Heads>(to_raw + slots.edges[s] * Heads, by_raw);
          by_value.add(own, grad);
          by_key.add(*this, by_raw, query + i * query_stride, k);
        }
      }
    }
    for (; row < count; ++row) {
      write(first + row, by_key, by_value);
      by_value = Row::zeros();
      by_key = {};
    }
  }

  void add_tile(int64_t j, int64_t start, int64_t count, T *accumulator, T *scratch) const {
    T *gk = accumulator, *gv = gk + G * D, *ga = gv + G * C;
    T *p = scratch, *gp = p + count * H + 32, *derivative = gp + count * H, *factors = derivative + count * H;
    const T *k = key + j * key_stride, *v = value + j * value_stride;
    const int64_t c = channels<CW>(C);
    int64_t columns[kTile], edges[kTile];
    const T *queries[kTile], *grads[kTile];
    for (int64_t n = 0; n < count; ++n) {
      prefetch(start + n + kPrefetch);
      const int64_t i = columns[n] = rows.columns[start + n];
      edges[n] = rows.edges[start + n];
      queries[n] = query + i * query_stride;
      grads[n] = grad_output + i * output_stride;
      T *score = p + n * H;
      this->template scores<true>(queries[n], k, edges[n], score, derivative + n * H);
      const T *shifts = of_query + i * 2 * H;
      each_head(H, [=](int64_t h) { score[h] -= shifts[h]; });
      head_dots<CW>(grads[n], v, H, group, c, gp + n * H);
    }
    this->to_weights(p, count);
    if (drops) {
      std::fill_n(factors, count * H, T{1});
      this->drop(rows, start, start + count, factors);
      for (int64_t n = 0; n < count * H; ++n) gp[n] *= factors[n];
    }
    for (int64_t n = 0; n < count; ++n) {
      T *g = gp + n * H;
      const T *weight = p + n * H, *slopes = derivative + n * H;
      const T *deltas = of_query + (columns[n] * 2 + 1) * H;
      if (normalize) {
        each_head(H, [=](int64_t h) { g[h] = weight[h] * (g[h] - deltas[h]); });
      } else {
        each_head(H, [=](int64_t h) { g[h] = weight[h] * (1 - weight[h]) * g[h]; });
      }
      if (this->bias.data) {
        for (int64_t h = 0; h < H; ++h) g[h] = this->hides(edges[n], h) ? T{0} : g[h];
      }
      if (grad_score) std::copy_n(g, H, grad_score + edges[n] * H);
      each_head(H, [=](int64_t h) { g[h] *= slopes[h]; });
      std::copy_n(g, H, grad_raw + edges[n] * H);
    }
    if (drops) {
      for (int64_t n = 0; n < count * H; ++n) p[n] *= factors[n];
    }
    const Tile<T> tile{count, edges, queries, gp};
    for (int64_t h = 0; h < H; ++h) {
      this->template add_visible<CW>(h, edges, gv + this->key_head(h) * c, p + h, grads, h * c, count, c);
      Score::add_by_key(*this, h, tile, k, gk, ga);
    }
  }

  ANYATTENTION_INLINE void prefetch(int64_t s) const {
    if (s >= rows.num_edges) return;
    const int64_t i = rows.columns.unchecked(s);
    this->prefetch_query(i);
    prefetch_row(address_of(grad_output, i, output_stride), H * C * Base::kSize);
    prefetch_row(address_of(of_query, i, 2 * H), 2 * H * Base::kSize);
    __builtin_prefetch(address_of(grad_raw, rows.edges.unchecked(s), H), 1);
  }

  void finish(int64_t j, const T *accumulator) const {
    T *target = grad_key + j * key_stride;
    std::copy_n(accumulator, G * D, target);
    if (grad_value) {
      std::copy_n(accumulator + G * D, G * C, grad_value + j * value_stride);
    } else {
      add(target, accumulator + G * D, G * C);
    }
  }
  int64_t total_size() const { return vector_size(); }
  void add_total(const T *accumulator, T *total) const { add(total, accumulator + G * D + G * C, vector_size()); }
};

// Over the rows of queries, from grad_raw. Accumulator: gradient of query (H, D).
template <class T, class Score, int DW, int CW>
struct BackwardQueries : Call<T, Score, DW, CW> {
  using Base = Call<T, Score, DW, CW>;
  using Base::D, Base::H, Base::kSize, Base::key, Base::key_stride, Base::query, Base::query_stride;
  CompressedRows rows;
  const T *grad_raw;
  T *grad_query;

  BackwardQueries(const anyattention_graph_attention_call &c, int64_t b)
      : Base(c, b), rows(rows_of_queries(c.graph)) {}

  int64_t accumulator_size() const { return H * D; }
  int64_t scratch_size(int64_t) const { return 1; }
  int64_t slot_size() const { return this->fits_registers() ? H * D / 2 : H * D; }
  bool takes_rows_together() const { return this->fits_registers(); }
  void start(T *accumulator) const { std::fill_n(accumulator, H * D, T{0}); }
  void combine(T *accumulator, const T *next) const { add(accumulator, next, H * D); }

  bool reduce(int64_t i, int64_t begin, int64_t end, T *accumulator, T *) const {
    const T *q = query + i * query_stride;
    if (!rows.slots_are_valid(begin, end)) return false;
    if constexpr (Base::kHasRegisters) {
      if (this->fits_registers()) {
        with_heads<T, CW>(H, [&](auto n) { reduce_in_registers<n()>(i, begin, end, accumulator); });
        return true;
      }
    }
    for (int64_t s = begin; s < end; ++s) {
      if (s + kPrefetch < rows.num_edges) {
        if (Score::kQueryGradientReadsKeys) this->prefetch_key(rows.columns.unchecked(s + kPrefetch));
        __builtin_prefetch(address_of(grad_raw, rows.edges.unchecked(s + kPrefetch), H));
      }
      const int64_t e = rows.edges[s];
      Score::add_by_query(*this, e, grad_raw + e * H, q, key + rows.columns[s] * key_stride, accumulator);
    }
    return true;
  }

  bool reduce_together(int64_t first, int64_t count, const int64_t *bounds, T *, T *, T *) const {
    if (!rows.slots_are_valid(bounds[0], bounds[count])) return false;
    if constexpr (Base::kHasRegisters) {
      with_heads<T, CW>(H, [&](auto heads) {
        for (int64_t n = 0; n < count; ++n) {
          const int64_t i = first + n;
          reduce_in_registers<heads()>(i, bounds[n], bounds[n + 1], grad_query + i * query_stride);
        }
      });
    }
    return true;
  }

  template <int Heads>
  ANYATTENTION_FLATTEN void reduce_in_registers(int64_t i, int64_t begin, int64_t end, T *sums) const {
    const T *q = query + i * query_stride;
    constexpr int64_t key_bytes = Score::kQueryGradientReadsKeys ? Heads * DW * kSize : 0;
    constexpr int64_t ahead = slots_ahead(key_bytes + Heads * kSize);
    typename Score::template QuerySums<Heads, DW> by_query;
    for (int64_t s = begin; s < end; ++s) {
      if (s + ahead < rows.num_edges) {
        if constexpr (key_bytes > 0) {
          prefetch_row<key_bytes>(address_of(key, rows.columns.unchecked(s + ahead), key_stride));
        }
        __builtin_prefetch(address_of(grad_raw, rows.edges.unchecked(s + ahead), H));
      }
      const Vector<T, Heads> raw = load<Heads>(grad_raw + rows.edges[s] * H);
      by_query.add(*this, raw, q, key + rows.columns[s] * key_stride);
    }
    by_query.write(*this, sums);
  }

  void finish(int64_t i, const T *accumulator) const {
    std::copy_n(accumulator, H * D, grad_query + i * query_stride);
  }
};

template <class T, class Score, int DW, int CW>
bool forward(Instance<T, Score, DW, CW>, const anyattention_graph_attention_call &c, T *output, T *largest,
             T *log_sum) {
  prefer_large_pages(output, c.batch * c.graph.num_queries * c.heads * c.value_dim * static_cast<int64_t>(sizeof(T)));
  bool valid = true;
  for (int64_t b = 0; b < c.batch; ++b) {
    const Forward<T, Score, DW, CW> reduction(c, b, output, largest, log_sum);
    valid &= reduce_rows<T>(reduction.rows, c.num_threads, reduction);
  }
  return valid;
}

template <class T, class Score, int DW, int CW>
bool weights(Instance<T, Score, DW, CW>, const anyattention_graph_attention_call &c, const T *largest,
             const T *log_sum, T *result) {
  bool valid = true;
  for (int64_t b = 0; b < c.batch; ++b) {
    const Weights<T, Score, DW, CW> reduction(c, b, largest, log_sum, result);
    valid &= reduce_rows<T>(reduction.rows, c.num_threads, reduction);
  }
  return valid;
}

template <class T, class Score, int DW, int CW>
bool backward(Instance<T, Score, DW, CW>, const anyattention_graph_attention_call &c, const T *output, const T *largest,
              const T *log_sum, const T *grad_output, const T *grad_log_sum, T *grad_query, T *grad_key, T *grad_value,
              T *grad_vector, T *grad_raw, T *grad_score) {
  const anyattention_graph_arrays &graph = c.graph;
  const int64_t size = static_cast<int64_t>(sizeof(T)), H = c.heads;
  const int64_t queries = c.batch * graph.num_queries, keys = c.batch * graph.num_keys;
  if (c.query_stride == H * c.head_dim) prefer_large_pages(grad_query, queries * c.query_stride * size);
  if (c.key_stride == c.key_heads * c.head_dim) prefer_large_pages(grad_key, keys * c.key_stride * size);
  if (c.value_stride == c.key_heads * c.value_dim) prefer_large_pages(grad_value, keys * c.value_stride * size);
  const Workspace<T> own_raw(grad_raw ? 0 : graph.num_edges * H, false);
  if (grad_raw) prefer_large_pages(grad_raw, c.batch * graph.num_edges * H * size);
  if (grad_score) prefer_large_pages(grad_score, c.batch * graph.num_edges * H * size);
  const Workspace<T> of_query(2 * queries * H, false);
  const bool rest_counts =
      prepare_backward<T, CW>(c, output, largest, log_sum, grad_output, grad_log_sum, of_query.get());
  const Workspace<T> scaled(rest_counts ? queries * H * c.value_dim : 0, false);
  if (rest_counts) {
    scale_by_rest(c, largest, log_sum, grad_output, of_query.get(), scaled.get());
    grad_output = scaled.get();
  }
  const int64_t vector_size = Score::kHasVector ? H * c.head_dim : 0;
  if (vector_size) std::fill_n(grad_vector, vector_size, T{0});
  const Workspace<T> by_vector(vector_size);
  bool valid = true;
  for (int64_t b = 0; b < c.batch; ++b) {
    BackwardKeys<T, Score, DW, CW> by_key(c, b);
    by_key.of_query = of_query.get() + by_key.of_query_rows(2 * H);
    by_key.grad_output = grad_output + by_key.of_query_rows(by_key.output_stride);
    by_key.grad_key = grad_key + by_key.of_key_rows(c.key_stride);
    by_key.grad_value = grad_value ? grad_value + by_key.of_key_rows(c.value_stride) : nullptr;
    by_key.grad_raw = grad_raw ? grad_raw + b * graph.num_edges * H : own_raw.get();
    by_key.grad_score = grad_score ? grad_score + b * graph.num_edges * H : nullptr;
    valid &= reduce_rows<T>(by_key.rows, c.num_threads, by_key, vector_size ? by_vector.get() : nullptr);
    if (vector_size) add(grad_vector, by_vector.get(), vector_size);
    BackwardQueries<T, Score, DW, CW> by_query(c, b);
    by_query.grad_raw = by_key.grad_raw;
    by_query.grad_query = grad_query + by_query.of_query_rows(c.query_stride);
    valid &= reduce_rows<T>(by_query.rows, c.num_threads, by_query);
  }
  return valid;
}

bool is_valid(const anyattention_graph_attention_call *c) {
  if (!c || c->batch < 0 || c->heads < 1 || c->key_heads < 1 || c->heads % c->key_heads) return false;
  if (c->head_dim < 1 || c->value_dim < 1 || c->num_threads < 1) return false;
  const auto fits = [c](auto score) {
    using Score = decltype(score);
    return Score::kHasVector == (c->vector != nullptr) && (Score::kHeadDim == 0 || Score::kHeadDim == c->head_dim);
  };
  if (!Scores::with(c->score, fits)) return false;
  if (c->query_stride < c->heads * c->head_dim || c->key_stride < c->key_heads * c->head_dim) return false;
  if (c->value_stride < c->key_heads * c->value_dim) return false;
  if (!(c->dropout >= 0 && c->dropout < 1)) return false;
  const anyattention_graph_arrays &graph = c->graph;
  if (graph.num_queries < 0 || graph.num_keys < 0 || graph.num_edges < 0) return false;
  return rows_of_queries(graph).has_arrays() && rows_of_keys(graph).has_arrays();
}

// Widths that have code of their own: of head_dim and value_dim where they are the same, or of value_dim where head_dim
// is always the same.
template <class Score, class Body>
bool with_widths(const anyattention_graph_attention_call &c, const Body &body) {
  const auto with_width = [&body](auto width) {
    return body(Instance<float, Score, Score::kHeadDim ? Score::kHeadDim : width(), width()>{});
  };
  switch (Score::kHeadDim || c.head_dim == c.value_dim ? c.value_dim : 0) {
    case 8: return with_width(std::integral_constant<int, 8>{});
    case 16: return with_width(std::integral_constant<int, 16>{});
    case 32: return with_width(std::integral_constant<int, 32>{});
    case 64: return with_width(std::integral_constant<int, 64>{});
    default: return with_width(std::integral_constant<int, 0>{});
  }
}

template <class T>
T *typed(void *array) {
  return static_cast<T *>(array);
}
template <class T>
const T *typed(const void *array) {
  return static_cast<const T *>(array);
}

// Runs body(instance, call, arrays...), the arrays typed; it says whether all indices were in range.
template <class Body, class... Arrays>
int32_t run(const anyattention_graph_attention_call *call, const Body &body, Arrays... arrays) {
  if (!is_valid(call)) return ANYATTENTION_INVALID_ARGUMENT;
  const auto with_arrays = [&](auto instance) {
    return body(instance, *call, typed<typename decltype(instance)::Number>(arrays)...);
  };
  const auto of_score = [&](auto score) {
    using Score = decltype(score);
    return call->is_double ? with_arrays(Instance<double, Score, Score::kHeadDim, 0>{})
                           : with_widths<Score>(*call, with_arrays);
  };
  try {
    return Scores::with(call->score, of_score) ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

// Calls padded(call) with a copy of the call whose heads have a width with code of its own, where it has none and is worth
// copying, else plain(). Both answer with a status.
template <class Padded, class Plain>
int32_t with_padded(const anyattention_graph_attention_call *c, const Padded &padded, const Plain &plain) {
  if (!is_valid(c)) return ANYATTENTION_INVALID_ARGUMENT;
  bool has_head_dim = false;
  Scores::with(c->score, [&](auto score) { return has_head_dim = decltype(score)::kHeadDim == 0, true; });
  const int64_t width = padded_width(*c, has_head_dim);
  if (!width) return plain();
  try {
    return padded(PaddedCall(*c, width, has_head_dim));
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

int32_t run_forward(const anyattention_graph_attention_call *c, void *output, void *largest, void *log_sum) {
  const auto body = [](const auto &...arguments) { return forward(arguments...); };
  const auto padded = [&](const PaddedCall &p) {
    const Workspace<float> wide(p.queries() * p.heads_width(), false);
    const int32_t status = run(&p.call, body, static_cast<void *>(wide.get()), largest, log_sum);
    if (status == ANYATTENTION_OK) p.unpad(wide.get(), p.queries(), output, c->heads * c->value_dim, c->value_dim);
    return status;
  };
  return with_padded(c, padded, [&] { return run(c, body, output, largest, log_sum); });
}

int32_t run_weights(const anyattention_graph_attention_weights_call *c, void *weights) {
  const auto of = [&](const anyattention_graph_attention_call *call) {
    const auto body = [](const auto &...arguments) { return anyattention::weights(arguments...); };
    return run(call, body, c->largest, c->log_sum, weights);
  };
  return with_padded(&c->call, [&](const PaddedCall &p) { return of(&p.call); }, [&] { return of(&c->call); });
}

int32_t run_backward(const anyattention_graph_attention_backward_call *record, void *grad_query, void *grad_key,
                     void *grad_value, void *grad_vector, void *grad_term, void *grad_bias) {
  const anyattention_graph_attention_call &c = record->call;
  const auto body = [](const auto &...arguments) { return backward(arguments...); };
  const auto padded = [&](const PaddedCall &p) {
    const int64_t queries = p.queries() * p.heads_width(), keys = p.keys() * p.heads_width();
    const bool pads_keys = p.pads_keys();
    const Workspace<float> output(queries, false), grad_output(queries, false), by_query(pads_keys ? queries : 0, false),
        by_key(pads_keys ? keys : 0, false), by_value(grad_value ? keys : 0, false), by_vector(p.heads_width(), false);
    p.pad(record->output, p.queries(), c.heads * c.value_dim, c.value_dim, output.get());
    p.pad(record->grad_output, p.queries(), c.heads * c.value_dim, c.value_dim, grad_output.get());
    const auto to = [](bool is_padded, const Workspace<float> &wide, void *given) -> void * {
      return is_padded ? wide.get() : given;
    };
    const int32_t status =
        run(&p.call, body, static_cast<const void *>(output.get()), record->largest, record->log_sum,
            static_cast<const void *>(grad_output.get()), record->grad_log_sum, to(pads_keys, by_query, grad_query),
            to(pads_keys, by_key, grad_key), to(grad_value, by_value, nullptr), to(grad_vector, by_vector, nullptr),
            grad_term, grad_bias);
    if (status != ANYATTENTION_OK) return status;
    if (pads_keys) p.unpad(by_query.get(), p.queries(), grad_query, c.query_stride, c.head_dim);
    if (pads_keys) p.unpad(by_key.get(), p.keys(), grad_key, c.key_stride, c.head_dim);
    if (grad_value) p.unpad(by_value.get(), p.keys(), grad_value, c.value_stride, c.value_dim);
    if (grad_vector) p.unpad(by_vector.get(), 1, grad_vector, c.heads * c.head_dim, c.head_dim);
    return status;
  };
  return with_padded(&c, padded, [&] {
    return run(&c, body, record->output, record->largest, record->log_sum, record->grad_output, record->grad_log_sum,
               grad_query, grad_key, grad_value, grad_vector, grad_term, grad_bias);
  });
}

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_score(const char *name) { return anyattention::Scores::number_of(name); }

int32_t anyattention_graph_attention(const anyattention_graph_attention_call *call, void *output, void *largest,
                                     void *log_sum) {
  return anyattention::run_forward(call, output, largest, log_sum);
}

int32_t anyattention_graph_attention_weights(const anyattention_graph_attention_weights_call *call, void *weights) {
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  return anyattention::run_weights(call, weights);
}

int32_t anyattention_graph_attention_backward(const anyattention_graph_attention_backward_call *record, void *grad_query,
                                              void *grad_key, void *grad_value, void *grad_vector, void *grad_term,
                                              void *grad_bias) {
  if (!record) return ANYATTENTION_INVALID_ARGUMENT;
  const anyattention_graph_attention_call *call = &record->call;
  // Without keys there may be no array for their gradients.
  const bool has_keys = call->batch > 0 && call->graph.num_keys > 0;
  if (has_keys && !grad_value && (call->value != call->key || call->value_dim != call->head_dim)) {
    return ANYATTENTION_INVALID_ARGUMENT;
  }
  return anyattention::run_backward(record, grad_query, grad_key, grad_value, grad_vector, grad_term, grad_bias);
}
}
