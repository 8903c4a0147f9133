// One call of graph attention, typed, and the arithmetic of one edge; see graph_attention.cpp for the letters.
#ifndef ANYATTENTION_GRAPH_CALL_H
#define ANYATTENTION_GRAPH_CALL_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "anyattention.h"
#include "philox.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {

constexpr int64_t kTile = 16;  // slots whose rows stay in the first cache while each head reads its part

template <class T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

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

// One batch entry of a call, typed, and the arithmetic of one edge. `DW` and `CW` are head_dim and value_dim where they
// are known at compile time, else 0.
template <class T, int Score, int DW, int CW>
struct Call {
  const anyattention_graph_attention &call;
  int64_t b, H, G, D, C, group;
  const T *query, *key, *value, *vector;
  EdgeNumbers<T> term, bias;
  T scale, cap, slope;
  bool normalize, drops;

  Call(const anyattention_graph_attention &c, int64_t batch)
      : call(c),
        b(batch),
        H(c.heads),
        G(c.key_heads),
        D(c.head_dim),
        C(c.value_dim),
        group(c.heads / c.key_heads),
        query(static_cast<const T *>(c.query) + batch * c.graph.num_queries * H * D),
        key(static_cast<const T *>(c.key) + batch * c.graph.num_keys * G * D),
        value(static_cast<const T *>(c.value) + batch * c.graph.num_keys * G * C),
        vector(static_cast<const T *>(c.vector)),
        term(c.term, batch),
        bias(c.bias, batch),
        scale(static_cast<T>(c.scale)),
        cap(static_cast<T>(c.softcap)),
        slope(static_cast<T>(c.negative_slope)),
        normalize(c.normalize != 0),
        drops(c.dropout > 0) {}

  int64_t query_width() const { return H * D; }
  int64_t key_width() const { return G * D; }
  int64_t value_width() const { return G * C; }
  int64_t output_width() const { return H * C; }
  bool hides(int64_t e, int64_t h) const { return bias.data && bias.at(e, h) == kMinusInfinity<T>; }

  // Infinity becomes NaN: -inf would pass for a hidden edge.
  static T shown(T raw) { return raw + raw * 0; }

  // What the softmax sees, and its derivative by the raw score, for each head.
  template <bool NeedsSlope>
  void scores(const T *q, const T *k, int64_t e, T *score, T *derivative) const {
    raw_scores(q, k, e, score, derivative);
    if (cap != 0) {
      for (int64_t h = 0; h < H; ++h) {
        const T t = std::tanh(scale * shown(score[h]) / cap);
        score[h] = cap * t;
        if (NeedsSlope) derivative[h] *= scale * (1 - t * t);
      }
    } else {
      const T factor = scale;
      each_head(H, [=](int64_t h) { score[h] = shown(score[h]) * factor; });
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

  // The raw scores, and their derivative by what `term` is added to.
  void raw_scores(const T *q, const T *k, int64_t e, T *raw, T *derivative) const {
    if (Score == ANYATTENTION_ADDITIVE) {
      if (G == H) {
        each_head(H, [=](int64_t h) { raw[h] = q[h] + k[h]; });
      } else {
        for (int64_t h = 0; h < H; ++h) raw[h] = q[h] + k[h / group];
      }
      if (term.data) {
        for (int64_t h = 0; h < H; ++h) raw[h] += term.at(e, h);
      }
      const T below = slope;
      each_head(H, [=](int64_t h) { derivative[h] = raw[h] > 0 ? T{1} : below; });
      each_head(H, [=](int64_t h) { raw[h] *= derivative[h]; });
      return;
    }
    const int64_t d = channels<DW>(D);
    if (Score == ANYATTENTION_DOT) {
      head_dots<DW>(q, k, H, group, d, raw);
    } else {
      for (int64_t h = 0; h < H; ++h) {
        raw[h] = rectified_dot<DW>(vector + h * d, q + h * d, k + (G == H ? h : h / group) * d, slope, d);
      }
    }
    each_head(H, [=](int64_t h) { derivative[h] = 1; });
    if (Score == ANYATTENTION_DOT && term.data) {
      for (int64_t h = 0; h < H; ++h) raw[h] += term.at(e, h);
    }
  }

  // Weights from scores less `shift` (the logsumexp, or a row's largest score), for `count` edges of H heads.
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

  // Whether a row's sums stay in registers: eight heads of 8 or 16, and nothing beside the scores.
  static constexpr bool kHasRegisters =
      sizeof(T) == sizeof(float) && (CW == 8 || CW == 16) && (DW == CW || Score == ANYATTENTION_ADDITIVE);
  bool fits_registers() const {
    return kHasRegisters && H == 8 && G == 8 && normalize && !drops && cap == 0 && !bias.data && !term.data;
  }

  // The scores of one edge's eight heads; `slopes` are what the raw score's derivative adds to the scale.
  Vector<T, 8> eight_scores(const T *q, const T *k, Vector<T, 8> &slopes) const {
    const Vector<T, 8> one = Vector<T, 8>{} + T{1};
    Vector<T, 8> raw;
    slopes = one * scale;
    if constexpr (Score == ANYATTENTION_ADDITIVE) {
      raw = load<8>(q) + load<8>(k);
      slopes = raw > 0 ? slopes : slopes * slope;
      return (raw + raw * 0) * slopes;
    } else if constexpr (Score == ANYATTENTION_DOT) {
      raw = EightHeads<T, DW>::at(q).dots(k);
    } else {
      EightHeads<T, DW> parts;
      for (int h = 0; h < 8; ++h) {
        const Vector<T, DW> x = load<DW>(q + h * DW) + load<DW>(k + h * DW);
        parts.head[h] = load<DW>(vector + h * DW) * (x > 0 ? x : x * slope);
      }
      raw = parts.sums();
    }
    return (raw + raw * 0) * scale;
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

  void keep(int64_t e, T *factors) const {
    const auto position = static_cast<uint64_t>((b * call.graph.num_edges + e) * H);
    keep_factors(position, H, static_cast<uint64_t>(call.seed), call.dropout,
                 static_cast<T>(1.0 / (1.0 - call.dropout)), factors);
  }
};

}  // namespace anyattention

#endif
