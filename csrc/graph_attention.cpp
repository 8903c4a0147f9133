// Attention over the edges of a graph: forward over the rows of queries, backward over the rows of keys (the gradient
// of key, value and score) and then over the rows of queries (the gradient of query). No edge keeps a channel.
//
//   i  query     j  key     e  edge, in the caller's order     s  slot of compressed rows
//   h  head      g  key head, h / group                        H, G, D, C  heads, key heads, head_dim, value_dim
//   p  weight    f  keep factor of dropout                     l  logsumexp

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "anyattention.h"
#include "graph_call.h"
#include "pages.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {
namespace {

// Accumulator: largest score (H), sum of exponentials (H), output (H, C).
template <class T, int Score, int DW, int CW>
struct Forward : Call<T, Score, DW, CW> {
  using Base = Call<T, Score, DW, CW>;
  using Base::C, Base::D, Base::G, Base::H, Base::bias, Base::drops, Base::group,
      Base::key, Base::key_stride, Base::normalize, Base::output_stride, Base::query, Base::query_stride, Base::value,
      Base::value_stride;
  CompressedRows rows;
  T *output, *logsumexp;

  Forward(const anyattention_graph_attention_call &c, int64_t b, T *out, T *l)
      : Base(c, b),
        rows(rows_of_queries(c.graph)),
        output(out + this->of_query_rows(output_stride)),
        logsumexp(l ? l + this->of_query_rows(H) : nullptr) {}

  int64_t accumulator_size() const { return 2 * H + H * C; }
  int64_t scratch_size() const { return kSlotsPerPiece * H + 3 * H + 64; }

  void start(T *accumulator) const {
    std::fill_n(accumulator, H, kMinusInfinity<T>);
    std::fill_n(accumulator + H, H + H * C, T{0});
  }

  bool reduce(int64_t i, int64_t begin, int64_t end, T *accumulator, T *scratch) const {
    T *largest = accumulator, *sum = accumulator + H, *out = accumulator + 2 * H;
    T *shift = scratch, *factors = scratch + H, *score = scratch + 3 * H;
    const T *q = query + i * query_stride;
    if (!rows.slots_are_valid(begin, end)) return false;
    if constexpr (Base::kHasRegisters) {
      if (this->fits_registers()) {
        with_heads<T, CW>(H, [&](auto n) { reduce_in_registers<n()>(q, begin, end, accumulator, score); });
        return true;
      }
    }
    for (int64_t s = begin; s < end; ++s) {
      if (rows.slot_is_valid(s + kPrefetch)) {
        const int64_t next = rows.columns[s + kPrefetch];
        this->prefetch_key(next);
        this->prefetch_value(next);
      }
      T *row = score + (s - begin) * H;
      this->template scores<false>(q, key + rows.columns[s] * key_stride, rows.edges[s], row, factors);
      each_head(H, [=](int64_t h) { largest[h] = row[h] > largest[h] ? row[h] : largest[h]; });
    }
    for (int64_t h = 0; h < H; ++h) shift[h] = largest[h] == kMinusInfinity<T> ? T{0} : largest[h];
    this->weights(score, shift, end - begin);
    for (int64_t s = begin; s < end; ++s) {
      T *row = score + (s - begin) * H;
      each_head(H, [=](int64_t h) { sum[h] += row[h]; });
      if (drops) {
        this->keep(rows.edges[s], factors);
        each_head(H, [=](int64_t h) { row[h] *= factors[h]; });
      }
    }
    const int64_t c = channels<CW>(C);
    for (int64_t start = begin; start < end; start += kTile) {
      const int64_t count = std::min(kTile, end - start);
      const T *tile[kTile];
      for (int64_t n = 0; n < count; ++n) tile[n] = value + rows.columns[start + n] * value_stride;
      for (int64_t h = 0; h < H; ++h) {
        const T *weight = score + (start - begin) * H + h;
        this->template add_visible<CW>(h, rows.edges + start, out + h * c, weight, tile, (G == H ? h : h / group) * c,
                                       count, c);
      }
    }
    return true;
  }

  template <int Heads>
  void reduce_in_registers(const T *q, int64_t begin, int64_t end, T *accumulator, T *score) const {
    using Numbers = Vector<T, Heads>;
    Numbers largest = Numbers{} + kMinusInfinity<T>, ignored;
    for (int64_t s = begin; s < end; ++s) {
      if (rows.slot_is_valid(s + kPrefetch)) this->prefetch_key(rows.columns[s + kPrefetch]);
      const Numbers x = this->template register_scores<Heads>(q, key + rows.columns[s] * key_stride, ignored);
      store<T, Heads>(score + (s - begin) * Heads, x);
      largest = x > largest ? x : largest;
    }
    const Numbers shift = largest == kMinusInfinity<T> ? Numbers{} : largest;
    for (int64_t n = 0; n < end - begin; ++n) store<T, Heads>(score + n * Heads, load<Heads>(score + n * Heads) - shift);
    exponentials(score, (end - begin) * Heads);
    Numbers sum{};
    RegisterRow<Heads, CW> out{};
    for (int64_t s = begin; s < end; ++s) {
      if (rows.slot_is_valid(s + kPrefetch)) this->prefetch_value(rows.columns[s + kPrefetch]);
      Numbers weight = load<Heads>(score + (s - begin) * Heads);
      sum += weight;
      if (drops) weight *= this->template kept<Heads>(rows.edges[s]);
      out.add(weight, value + rows.columns[s] * value_stride);
    }
    store<T, Heads>(accumulator, largest);
    store<T, Heads>(accumulator + Heads, sum);
    out.write(accumulator + 2 * Heads);
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
    if (logsumexp) {
      T *target = logsumexp + i * H;
      each_head(H, [=](int64_t h) { target[h] = sum[h] == 0 ? kMinusInfinity<T> : largest[h] + logarithm(sum[h]); });
    }
    for (int64_t h = 0; h < H; ++h) {
      // No visible edge leaves a sum of 0; a NaN anywhere leaves NaN.
      const T inverse = !normalize ? T{1} : sum[h] == 0 ? T{0} : 1 / sum[h];
      T *target = output + i * output_stride + h * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) target[c] = out[h * C + c] * inverse;
    }
  }
};

// Weights from logsumexp; the accumulator is not used.
template <class T, int Score, int DW>
struct Weights : Call<T, Score, DW, 0> {
  using Base = Call<T, Score, DW, 0>;
  using Base::H, Base::key, Base::query;
  CompressedRows rows;
  const T *logsumexp;
  T *result;

  Weights(const anyattention_graph_attention_call &c, int64_t b, const T *l, T *w)
      : Base(c, b),
        rows(rows_of_queries(c.graph)),
        logsumexp(l + this->of_query_rows(H)),
        result(w + b * c.graph.num_edges * H) {}

  int64_t accumulator_size() const { return 1; }
  int64_t scratch_size() const { return 3 * H + 64; }
  void start(T *) const {}
  void combine(T *, const T *) const {}
  void finish(int64_t, const T *) const {}

  bool reduce(int64_t i, int64_t begin, int64_t end, T *, T *scratch) const {
    T *score = scratch, *ignored = scratch + H + 32, *shift = scratch + 2 * H + 32;
    for (int64_t h = 0; h < H; ++h) {
      const T l = this->normalize ? logsumexp[i * H + h] : T{0};
      shift[h] = l == kMinusInfinity<T> ? T{0} : l;
    }
    for (int64_t s = begin; s < end; ++s) {
      if (!rows.slot_is_valid(s)) return false;
      const int64_t e = rows.edges[s];
      this->template scores<false>(query + i * this->query_stride, key + rows.columns[s] * this->key_stride, e,
                                   score, ignored);
      this->weights(score, shift, 1);
      std::copy_n(score, H, result + e * H);
    }
    return true;
  }
};

// Over the rows of keys. Accumulator: gradient of key (G, D), of value (G, C), of vector (H, D).
template <class T, int Score, int DW, int CW>
struct BackwardKeys : Call<T, Score, DW, CW> {
  using Base = Call<T, Score, DW, CW>;
  using Base::C, Base::D, Base::G, Base::H, Base::drops, Base::group, Base::key,
      Base::key_stride, Base::normalize, Base::output_stride, Base::query, Base::query_stride, Base::slope, Base::value,
      Base::value_stride, Base::vector;
  CompressedRows rows;
  const T *of_query, *grad_output;  // of_query: shift and delta, see prepare_backward
  T *grad_key, *grad_value;         // without grad_value, grad_key is of the key and the value together
  T *grad_raw, *grad_score;

  BackwardKeys(const anyattention_graph_attention_call &c, int64_t b)
      : Base(c, b), rows(rows_of_keys(c.graph)) {}

  int64_t vector_size() const { return Score == ANYATTENTION_DYNAMIC ? H * D : 0; }
  int64_t accumulator_size() const { return G * D + G * C + vector_size(); }
  int64_t scratch_size() const { return 4 * kTile * H + 192; }
  void start(T *accumulator) const { std::fill_n(accumulator, accumulator_size(), T{0}); }
  void combine(T *accumulator, const T *next) const { add(accumulator, next, accumulator_size()); }

  bool reduce(int64_t j, int64_t begin, int64_t end, T *accumulator, T *scratch) const {
    if (!rows.slots_are_valid(begin, end)) return false;
    if constexpr (Base::kHasRegisters) {
      if (this->fits_registers() && !grad_score) {
        with_heads<T, CW>(H, [&](auto n) { reduce_in_registers<n()>(j, begin, end, accumulator); });
        return true;
      }
    }
    for (int64_t start = begin; start < end; start += kTile) {
      add_tile(j, start, std::min(kTile, end - start), accumulator, scratch);
    }
    return true;
  }

  template <int Heads>
  void reduce_in_registers(int64_t j, int64_t begin, int64_t end, T *accumulator) const {
    using Numbers = Vector<T, Heads>;
    using Row = RegisterRow<Heads, CW>;
    const T *k = key + j * key_stride, *v = value + j * value_stride;
    Row by_value{}, by_key{}, by_vector{};
    Numbers by_term{}, slopes;
    for (int64_t s = begin; s < end; ++s) {
      prefetch(s + kPrefetch);
      const int64_t i = rows.columns[s];
      const T *q = query + i * query_stride, *shift = of_query + i * 2 * Heads, *delta = shift + Heads;
      const T *grad = grad_output + i * output_stride;
      const Numbers score = this->template register_scores<Heads>(q, k, slopes);
      Numbers weight = Exponential<T, Heads>::run(score - load<Heads>(shift));
      Numbers by_weight = Row::dots(grad, v);
      Numbers kept = weight;
      if (drops) {
        const Numbers factors = this->template kept<Heads>(rows.edges[s]);
        by_weight *= factors;
        kept *= factors;
      }
      const Numbers by_raw = weight * (by_weight - load<Heads>(delta)) * slopes;
      store<T, Heads>(grad_raw + rows.edges[s] * Heads, by_raw);
      by_value.add(kept, grad);
      if constexpr (Score == ANYATTENTION_ADDITIVE) {
        by_term += by_raw;
      } else if constexpr (Score == ANYATTENTION_DOT) {
        by_key.add(by_raw, q);
      } else {
        for (int n = 0; n < Heads * Row::kParts; ++n) {
          const auto x = Row::part_of(q, n) + Row::part_of(k, n);
          const typename Row::Part above = typename Row::Part{} + by_raw[n / Row::kParts];
          const typename Row::Part part = x > 0 ? above : above * slope;
          by_key.part[n] += part;
          by_vector.part[n] += part * x;
        }
      }
    }
    T *gk = accumulator, *gv = gk + G * D;
    by_value.write(gv);
    if constexpr (Score == ANYATTENTION_ADDITIVE) {
      store<T, Heads>(gk, by_term);
    } else if constexpr (Score == ANYATTENTION_DOT) {
      by_key.write(gk);
    } else {
      for (int n = 0; n < Heads * Row::kParts; ++n) by_key.part[n] *= Row::part_of(vector, n);
      by_key.write(gk);
      by_vector.write(gv + Heads * CW);
    }
  }

  void add_tile(int64_t j, int64_t start, int64_t count, T *accumulator, T *scratch) const {
    T *gk = accumulator, *gv = gk + G * D, *ga = gv + G * C;
    T *p = scratch, *gp = p + kTile * H + 32, *derivative = gp + kTile * H, *factors = derivative + kTile * H;
    const T *k = key + j * key_stride, *v = value + j * value_stride;
    const int64_t d = channels<DW>(D), c = channels<CW>(C), *edges = rows.edges + start;
    const T *queries[kTile], *grads[kTile];
    for (int64_t n = 0; n < count; ++n) {
      prefetch(start + n + kPrefetch);
      const int64_t i = rows.columns[start + n];
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
      for (int64_t n = 0; n < count; ++n) this->keep(edges[n], factors + n * H);
      for (int64_t n = 0; n < count * H; ++n) gp[n] *= factors[n];
    }
    for (int64_t n = 0; n < count; ++n) {
      T *g = gp + n * H;
      const T *weight = p + n * H, *slopes = derivative + n * H;
      const T *deltas = of_query + (rows.columns[start + n] * 2 + 1) * H;
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
    for (int64_t h = 0; h < H; ++h) {
      const int64_t g = G == H ? h : h / group;
      this->template add_visible<CW>(h, edges, gv + g * c, p + h, grads, h * c, count, c);
      if (Score == ANYATTENTION_ADDITIVE) {
        for (int64_t n = 0; n < count; ++n) gk[g] += gp[n * H + h];
      } else if (Score == ANYATTENTION_DOT) {
        this->template add_visible<DW>(h, edges, gk + g * d, gp + h, queries, h * d, count, d);
      } else {
        for (int64_t n = 0; n < count; ++n) {
          if (this->hides(edges[n], h)) continue;
          add_rectified_gradients<DW>(gp[n * H + h], vector + h * d, queries[n] + h * d, k + g * d, slope, d,
                                      gk + g * d, ga + h * d);
        }
      }
    }
  }

  ANYATTENTION_INLINE void prefetch(int64_t s) const {
    if (!rows.slot_is_valid(s)) return;
    const int64_t i = rows.columns[s];
    this->prefetch_query(i);
    prefetch_row(grad_output + i * output_stride, H * C * Base::kSize);
    prefetch_row(of_query + i * 2 * H, 2 * H * Base::kSize);
    __builtin_prefetch(grad_raw + rows.edges[s] * H, 1);
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
template <class T, int Score, int DW, int CW>
struct BackwardQueries : Call<T, Score, DW, CW> {
  using Base = Call<T, Score, DW, CW>;
  using Base::D, Base::G, Base::H, Base::group, Base::key, Base::key_stride, Base::query, Base::query_stride,
      Base::slope, Base::vector;
  CompressedRows rows;
  const T *grad_raw;
  T *grad_query;

  BackwardQueries(const anyattention_graph_attention_call &c, int64_t b)
      : Base(c, b), rows(rows_of_queries(c.graph)) {}

  int64_t accumulator_size() const { return H * D; }
  int64_t scratch_size() const { return 1; }
  void start(T *accumulator) const { std::fill_n(accumulator, H * D, T{0}); }
  void combine(T *accumulator, const T *next) const { add(accumulator, next, H * D); }

  bool reduce(int64_t i, int64_t begin, int64_t end, T *accumulator, T *) const {
    const int64_t d = channels<DW>(D);
    const T *q = query + i * query_stride;
    if (!rows.slots_are_valid(begin, end)) return false;
    if constexpr (Score != ANYATTENTION_ADDITIVE && Base::kHasRegisters) {
      if (this->fits_registers()) {
        with_heads<T, DW>(H, [&](auto n) { reduce_in_registers<n()>(q, begin, end, accumulator); });
        return true;
      }
    }
    for (int64_t s = begin; s < end; ++s) {
      if (rows.slot_is_valid(s + kPrefetch)) {
        if (Score != ANYATTENTION_ADDITIVE) this->prefetch_key(rows.columns[s + kPrefetch]);
        __builtin_prefetch(grad_raw + rows.edges[s + kPrefetch] * H);
      }
      const T *raw = grad_raw + rows.edges[s] * H;
      if (Score == ANYATTENTION_ADDITIVE) {
        each_head(H, [=](int64_t h) { accumulator[h] += raw[h]; });
        continue;
      }
      const T *k = key + rows.columns[s] * key_stride;
      for (int64_t h = 0; h < H; ++h) {
        if (this->hides(rows.edges[s], h)) continue;
        const T *kh = k + (G == H ? h : h / group) * d;
        if (Score == ANYATTENTION_DOT) {
          add_scaled<DW>(accumulator + h * d, raw[h], kh, d);
        } else {
          add_rectified_gradients<DW>(raw[h], vector + h * d, q + h * d, kh, slope, d, accumulator + h * d,
                                      static_cast<T *>(nullptr));
        }
      }
    }
    return true;
  }

  template <int Heads>
  void reduce_in_registers(const T *q, int64_t begin, int64_t end, T *accumulator) const {
    using Row = RegisterRow<Heads, DW>;
    Row by_query{};
    for (int64_t s = begin; s < end; ++s) {
      if (rows.slot_is_valid(s + kPrefetch)) {
        this->prefetch_key(rows.columns[s + kPrefetch]);
        __builtin_prefetch(grad_raw + rows.edges[s + kPrefetch] * H);
      }
      const Vector<T, Heads> raw = load<Heads>(grad_raw + rows.edges[s] * H);
      const T *k = key + rows.columns[s] * key_stride;
      if constexpr (Score == ANYATTENTION_DOT) {
        by_query.add(raw, k);
      } else {
        for (int n = 0; n < Heads * Row::kParts; ++n) {
          const auto x = Row::part_of(q, n) + Row::part_of(k, n);
          const typename Row::Part above = typename Row::Part{} + raw[n / Row::kParts];
          by_query.part[n] += x > 0 ? above : above * slope;
        }
      }
    }
    if constexpr (Score == ANYATTENTION_DYNAMIC) {
      for (int n = 0; n < Heads * Row::kParts; ++n) by_query.part[n] *= Row::part_of(vector, n);
    }
    by_query.write(accumulator);
  }

  void finish(int64_t i, const T *accumulator) const {
    std::copy_n(accumulator, H * D, grad_query + i * query_stride);
  }
};

// For each query side by side, so that an edge reads one place: shift (H), the logsumexp or 0 where that is -inf, and
// delta (H), sum(grad_output * output) - grad_logsumexp.
template <class T, int CW>
void prepare_backward(const anyattention_graph_attention_call &c, const T *output, const T *logsumexp, const T *grad_output,
                      const T *grad_logsumexp, T *of_query) {
  const int64_t C = c.value_dim, rows = c.batch * c.graph.num_queries, H = c.heads;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(c.num_threads, rows * H * C / 16384)));
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t i = 0; i < rows; ++i) {
    T *shift = of_query + i * 2 * H, *delta = shift + H;
    if (!c.normalize) {
      std::fill_n(shift, 2 * H, T{0});
      continue;
    }
    head_dots<CW>(grad_output + i * H * C, output + i * H * C, H, 1, C, delta);
    for (int64_t h = 0; h < H; ++h) {
      const T l = logsumexp[i * H + h];
      shift[h] = l == kMinusInfinity<T> ? T{0} : l;
      if (grad_logsumexp && l != kMinusInfinity<T>) delta[h] -= grad_logsumexp[i * H + h];
    }
  }
}

template <class T, int Score, int DW, int CW>
bool forward(const anyattention_graph_attention_call &c, T *output, T *logsumexp) {
  prefer_large_pages(output, c.batch * c.graph.num_queries * c.heads * c.value_dim * static_cast<int64_t>(sizeof(T)));
  bool valid = true;
  for (int64_t b = 0; b < c.batch; ++b) {
    const Forward<T, Score, DW, CW> reduction(c, b, output, logsumexp);
    valid &= reduce_rows<T>(reduction.rows, c.num_threads, reduction);
  }
  return valid;
}

template <class T, int Score, int DW, int CW>
bool backward(const anyattention_graph_attention_call &c, const T *output, const T *logsumexp, const T *grad_output,
              const T *grad_logsumexp, T *grad_query, T *grad_key, T *grad_value, T *grad_vector, T *grad_raw,
              T *grad_score) {
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
  prepare_backward<T, CW>(c, output, logsumexp, grad_output, grad_logsumexp, of_query.get());
  const int64_t vector_size = Score == ANYATTENTION_DYNAMIC ? H * c.head_dim : 0;
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
  if (c->score < ANYATTENTION_DOT || c->score > ANYATTENTION_DYNAMIC) return false;
  if (c->score == ANYATTENTION_ADDITIVE && c->head_dim != 1) return false;
  if ((c->score == ANYATTENTION_DYNAMIC) != (c->vector != nullptr)) return false;
  if (c->query_stride < c->heads * c->head_dim || c->key_stride < c->key_heads * c->head_dim) return false;
  if (c->value_stride < c->key_heads * c->value_dim) return false;
  if (!(c->dropout >= 0 && c->dropout < 1)) return false;
  const anyattention_graph_arrays &graph = c->graph;
  if (graph.num_queries < 0 || graph.num_keys < 0 || graph.num_edges < 0) return false;
  return rows_of_queries(graph).offsets_are_valid() && rows_of_keys(graph).offsets_are_valid();
}

// Widths that have code of their own: the same for head_dim and value_dim, but for the additive score's 1.
#define ANYATTENTION_WIDTHS(RUN)                                            \
  switch (sizeof(T) == sizeof(float) ? call->value_dim : 0) {               \
    case 8: return RUN(8);                                                 \
    case 16: return RUN(16);                                               \
    case 32: return RUN(32);                                               \
    case 64: return RUN(64);                                               \
    default: return RUN(0);                                                \
  }

template <template <class, int, int, int> class Runner, class T, class... Arguments>
bool with_widths(const anyattention_graph_attention_call *call, Arguments... arguments) {
  if (call->score == ANYATTENTION_ADDITIVE) {
#define RUN(CW) (Runner<T, ANYATTENTION_ADDITIVE, 1, CW>::run(*call, arguments...))
    ANYATTENTION_WIDTHS(RUN)
#undef RUN
  }
  const bool same = call->head_dim == call->value_dim;
  if (call->score == ANYATTENTION_DOT) {
    if (!same) return Runner<T, ANYATTENTION_DOT, 0, 0>::run(*call, arguments...);
#define RUN(W) (Runner<T, ANYATTENTION_DOT, W, W>::run(*call, arguments...))
    ANYATTENTION_WIDTHS(RUN)
#undef RUN
  }
  if (!same) return Runner<T, ANYATTENTION_DYNAMIC, 0, 0>::run(*call, arguments...);
#define RUN(W) (Runner<T, ANYATTENTION_DYNAMIC, W, W>::run(*call, arguments...))
  ANYATTENTION_WIDTHS(RUN)
#undef RUN
}

template <class T, int Score, int DW, int CW>
struct ForwardRunner {
  static bool run(const anyattention_graph_attention_call &c, void *output, void *logsumexp) {
    return forward<T, Score, DW, CW>(c, static_cast<T *>(output), static_cast<T *>(logsumexp));
  }
};

template <class T, int Score, int DW, int CW>
struct WeightsRunner {
  static bool run(const anyattention_graph_attention_call &c, const void *logsumexp, void *weights) {
    bool valid = true;
    for (int64_t b = 0; b < c.batch; ++b) {
      const Weights<T, Score, DW> reduction(c, b, static_cast<const T *>(logsumexp), static_cast<T *>(weights));
      valid &= reduce_rows<T>(reduction.rows, c.num_threads, reduction);
    }
    return valid;
  }
};

template <class T, int Score, int DW, int CW>
struct BackwardRunner {
  static bool run(const anyattention_graph_attention_call &c, const void *output, const void *logsumexp,
                  const void *grad_output, const void *grad_logsumexp, void *grad_query, void *grad_key,
                  void *grad_value, void *grad_vector, void *grad_raw, void *grad_score) {
    return backward<T, Score, DW, CW>(
        c, static_cast<const T *>(output), static_cast<const T *>(logsumexp), static_cast<const T *>(grad_output),
        static_cast<const T *>(grad_logsumexp), static_cast<T *>(grad_query), static_cast<T *>(grad_key),
        static_cast<T *>(grad_value), static_cast<T *>(grad_vector), static_cast<T *>(grad_raw),
        static_cast<T *>(grad_score));
  }
};

template <template <class, int, int, int> class Runner, class... Arguments>
int32_t run(const anyattention_graph_attention_call *call, Arguments... arguments) {
  if (!is_valid(call)) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    const bool valid = call->is_double ? with_widths<Runner, double>(call, arguments...)
                                       : with_widths<Runner, float>(call, arguments...);
    return valid ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_score(const char *name) {
  const char *const names[] = {"Dot", "Additive", "Dynamic"};
  for (int32_t n = 0; n < 3; ++n) {
    if (name && std::strcmp(name, names[n]) == 0) return n;
  }
  return -1;
}

int32_t anyattention_graph_attention(const anyattention_graph_attention_call *call, void *output, void *logsumexp) {
  return anyattention::run<anyattention::ForwardRunner>(call, output, logsumexp);
}

int32_t anyattention_graph_attention_weights(const anyattention_graph_attention_weights_call *call, void *weights) {
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  return anyattention::run<anyattention::WeightsRunner>(&call->call, call->logsumexp, weights);
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
  return anyattention::run<anyattention::BackwardRunner>(call, record->output, record->logsumexp, record->grad_output,
                                                         record->grad_logsumexp, grad_query, grad_key, grad_value,
                                                         grad_vector, grad_term, grad_bias);
}
}
