// One call of graph attention, typed, and what its kernels compute of an edge with any of the scores of scores.h; see
// graph_attention.cpp for the letters.
#ifndef ANYATTENTION_GRAPH_CALL_H
#define ANYATTENTION_GRAPH_CALL_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "anyattention.h"
#include "philox.h"
#include "rows.h"
#include "simd.h"
#include "softcap.h"

namespace anyattention {

constexpr int64_t kTile = 16;  // slots whose rows stay in the first cache while each head reads its part

template <class T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// How many heads of `Width` channels have code that keeps their sums in registers, at most; 0 for none.
template <class T, int Width>
constexpr int64_t kRegisterHeads = sizeof(T) != sizeof(float) || Width == 0 ? 0 : Width <= 16 ? 8 : 128 / Width;

// Calls body(n) with n() the number of heads, known to the compiler.
template <class T, int Width, class Body>
inline void with_heads(int64_t heads, const Body &body) {
  if (heads == 1) return body(std::integral_constant<int, 1>());
  if constexpr (kRegisterHeads<T, Width> >= 2) {
    if (heads == 2) return body(std::integral_constant<int, 2>());
  }
  if constexpr (kRegisterHeads<T, Width> >= 4) {
    if (heads == 4) return body(std::integral_constant<int, 4>());
  }
  if constexpr (kRegisterHeads<T, Width> >= 8) {
    if (heads == 8) return body(std::integral_constant<int, 8>());
  }
}

template <class T>
struct EdgeNumbers {
  const T *data;
  int64_t edge_stride, head_stride;

  EdgeNumbers(const anyattention_edge_numbers &numbers, int64_t batch)
      : data(static_cast<const T *>(numbers.data)),
        edge_stride(numbers.edge_stride),
        head_stride(numbers.head_stride) {
    if (data) data += batch * numbers.batch_stride;
  }
  T at(int64_t e, int64_t h) const { return data[e * edge_stride + h * head_stride]; }
};

// One batch entry of a call. `DW` and `CW` are head_dim and value_dim where they are known at compile time, else 0.
template <class T, class Score, int DW, int CW>
struct Call {
  const anyattention_graph_attention_call &call;
  int64_t b, H, G, D, C, group;
  int64_t query_stride, key_stride, value_stride, output_stride;  // from one node's row to the next
  const T *query, *key, *value, *vector;
  EdgeNumbers<T> term, bias;
  T scale, cap, slope;
  bool normalize, drops;

  Call(const anyattention_graph_attention_call &c, int64_t batch)
      : call(c),
        b(batch),
        H(c.heads),
        G(c.key_heads),
        D(c.head_dim),
        C(c.value_dim),
        group(c.heads / c.key_heads),
        query_stride(c.query_stride),
        key_stride(c.key_stride),
        value_stride(c.value_stride),
        output_stride(c.heads * c.value_dim),
        query(static_cast<const T *>(c.query) + of_query_rows(c.query_stride)),
        key(static_cast<const T *>(c.key) + of_key_rows(c.key_stride)),
        value(static_cast<const T *>(c.value) + of_key_rows(c.value_stride)),
        vector(static_cast<const T *>(c.vector)),
        term(c.term, batch),
        bias(c.bias, batch),
        scale(static_cast<T>(c.scale)),
        cap(cap_of<T>(c.softcap)),
        slope(static_cast<T>(c.negative_slope)),
        normalize(c.normalize != 0),
        drops(c.dropout > 0) {}

  // Where the batch entry's rows begin.
  int64_t of_query_rows(int64_t stride) const { return b * call.graph.num_queries * stride; }
  int64_t of_key_rows(int64_t stride) const { return b * call.graph.num_keys * stride; }
  // Of numbers that nobody has checked.
  ANYATTENTION_INLINE void prefetch_query(int64_t i) const { prefetch_row(address_of(query, i, query_stride), H * D * kSize); }
  ANYATTENTION_INLINE void prefetch_key(int64_t j) const { prefetch_row(address_of(key, j, key_stride), G * D * kSize); }
  ANYATTENTION_INLINE void prefetch_value(int64_t j) const { prefetch_row(address_of(value, j, value_stride), G * C * kSize); }
  static constexpr int64_t kSize = sizeof(T);
  static constexpr int kHeadDim = DW;
  int64_t key_head(int64_t h) const { return G == H ? h : h / group; }
  bool hides(int64_t e, int64_t h) const { return bias.data && bias.at(e, h) == kMinusInfinity<T>; }

  // Infinity becomes NaN: -inf would pass for a hidden edge.
  static T shown(T scaled) { return scaled + scaled * 0; }

  // What the softmax sees, and its derivative by the raw score, for each head.
  template <bool NeedsSlope>
  void scores(const T *q, const T *k, int64_t e, T *score, T *derivative) const {
    Score::raw_scores(*this, q, k, e, score, derivative);
    if (cap != 0) {
      for (int64_t h = 0; h < H; ++h) {
        T slope_of_cap;
        score[h] = capped(shown(scale * score[h]), cap, slope_of_cap);
        if (NeedsSlope) derivative[h] *= scale * slope_of_cap;
      }
    } else {
      const T factor = scale;
      each_head(H, [=](int64_t h) { score[h] = shown(score[h] * factor); });
      if (NeedsSlope) each_head(H, [=](int64_t h) { derivative[h] *= factor; });
    }
    if (bias.data) {
      for (int64_t h = 0; h < H; ++h) {
        const T added = bias.at(e, h);
        // A hidden edge may have NaN in its key.
        score[h] = added == kMinusInfinity<T> ? added : score[h] + added;
      }
    }
  }

  // exp(score - shift), shift a row's largest score, for `count` edges of H heads; sigmoids where nothing is normalized.
  void weights(T *score, const T *shift, int64_t count) const {
    for (int64_t n = 0; normalize && n < count; ++n) {
      T *row = score + n * H;
      each_head(H, [=](int64_t h) { row[h] -= shift[h]; });
    }
    to_weights(score, count);
  }

  // Weights from scores that are shifted already.
  void to_weights(T *score, int64_t count) const {
    if (normalize) {
      exponentials(score, count * H);
    } else {
      for (int64_t n = 0; n < count * H; ++n) score[n] = sigmoid(score[n]);
    }
  }

  // Whether a row's sums stay in registers: some heads of a common width, and nothing beside the scores.
  static constexpr bool kHasRegisters = kRegisterHeads<T, CW> > 0 && (DW == CW || Score::kHeadDim > 0);
  bool fits_registers() const {
    return kHasRegisters && H <= kRegisterHeads<T, CW> && (H & (H - 1)) == 0 && G == H && normalize && cap == 0 &&
           !bias.data && !term.data;
  }

  // The slot_size of a pass that makes weights: `by_key` products of the key's numbers, and `by_value` of the value's.
  int64_t slot_size_of(int64_t by_key, int64_t by_value, bool in_registers) const {
    const int64_t dropout = drops ? 45 * H + 100 : 0;
    if (in_registers) return H * (by_key * D + by_value * C + 16) / 2 + dropout;
    if (Score::kHasVector) by_key *= 4;  // LeakyReLU by branches
    return H * (by_key * D + by_value * C + (cap != 0 ? 136 : 16)) + 130 + dropout;
  }

  // The scores of one edge's heads; `slopes` are their derivatives by the raw scores.
  template <int Heads>
  Vector<T, Heads> register_scores(const T *q, const T *k, Vector<T, Heads> &slopes) const {
    slopes = Vector<T, Heads>{} + scale;
    const Vector<T, Heads> scaled = Score::template scaled_scores<Heads>(*this, q, k, slopes);
    return scaled + scaled * 0;
  }

  static T sigmoid(T x) {
    const T small = std::exp(x > 0 ? -x : x);
    return (x > 0 ? T{1} : small) / (1 + small);
  }

  // accumulator += sum over a tile's slots of weights[n * H] * (tile[n] + offset), leaving out hidden edges: 0 x NaN.
  template <int W>
  void add_visible(int64_t h, const int64_t *edges, T *accumulator, const T *weights, const T *const *tile,
                   int64_t offset, int64_t count, int64_t width) const {
    if (!bias.data) {
      add_weighted_rows<W>(accumulator, weights, H, tile, offset, count, width);
      return;
    }
    for (int64_t n = 0; n < count; ++n) {
      if (!hides(edges[n], h)) add_scaled<W>(accumulator, weights[n * H], tile[n] + offset, width);
    }
  }

  // Multiplies numbers of the edges of slots from begin up to end, a row of heads for each, by the factors of dropout.
  void drop(const CompressedRows &rows, int64_t begin, int64_t end, T *numbers) const {
    const Kept kept(call.dropout, call.seed);
    const T factor = static_cast<T>(1 / (1 - call.dropout));
    for (int64_t start = begin; start < end; start += kCounters) {
      const int64_t count = std::min<int64_t>(kCounters, end - start);
      Counters position{};
      for (int64_t n = 0; n < count; ++n) {
        position[n] = static_cast<uint64_t>((b * call.graph.num_edges + rows.edges[start + n]) * H);
      }
      for (int64_t first = 0; first < H; first += 64) {
        const int64_t heads = std::min<int64_t>(64, H - first);
        const Counters bits = kept.neighbours(position + static_cast<uint64_t>(first), heads);
        for (int64_t n = 0; n < count; ++n) {
          const uint64_t own = bits[n];
          T *row = numbers + (start - begin + n) * H + first;
          each_head(heads, [=](int64_t h) { row[h] *= own >> h & 1 ? factor : T{0}; });
        }
      }
    }
  }
};

}  // namespace anyattention

#endif
