// What attention over edges is made of: products of rows per edge (SDDMM), weighted sums of rows (SpMM), the softmax of
// a row's edges, and totals. Each one's derivatives are again among them.
//
//   i  query     j  key     e  edge, in the caller's order     s  slot     h  head     g  key head, h / group

#include <algorithm>
#include <cmath>
#include <limits>

#include "anyattention.h"
#include "edge_call.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {
namespace {

template <class T, int W>
struct EdgeDot : EdgeCall<T> {
  using EdgeCall<T>::D, EdgeCall<T>::G, EdgeCall<T>::H, EdgeCall<T>::rows;
  const T *query, *key;
  T *result;
  static constexpr bool kWritesEdges = true;

  EdgeDot(const EdgeSizes &c, int64_t b, const void *q, const void *k, void *out)
      : EdgeCall<T>(c, b),
        query(static_cast<const T *>(q) + b * c.graph.num_queries * c.heads * c.width),
        key(static_cast<const T *>(k)),
        result(this->edge_numbers(static_cast<T *>(out))) {}

  int64_t accumulator_size() const { return 1; }
  int64_t scratch_size(int64_t) const { return 1; }
  int64_t slot_size() const { return H * D; }
  void start(T *) const {}
  void combine(T *, const T *) const {}
  void finish(int64_t, const T *) const {}

  bool reduce(int64_t i, int64_t begin, int64_t end, T *, T *) const {
    if (!this->rows.slots_are_valid(begin, end)) return false;
    const T *q = query + i * H * D;
    const int64_t d = channels<W>(D);
    for (int64_t s = begin; s < end; ++s) {
      this->prefetch(key, s);
      const int64_t e = rows.edges[s];
      const T *k = this->row_of_key(key, rows.columns[s]);
      T *out = result + e * H;
      if constexpr (W == 1) {
        each_head(H, [=](int64_t h) { out[h] = q[h] * k[h]; });
        continue;
      }
      for (int64_t h = 0; h < H; ++h) {
        out[h] = dot<W>(q + h * d, k + this->key_head(h) * d, d);
      }
    }
    return true;
  }
};

template <class T, int W>
struct EdgeSum : EdgeCall<T> {
  using EdgeCall<T>::D, EdgeCall<T>::G, EdgeCall<T>::H, EdgeCall<T>::rows;
  const T *weights, *key;
  T *result;

  EdgeSum(const EdgeSizes &c, int64_t b, const void *w, const void *k, void *out)
      : EdgeCall<T>(c, b),
        weights(this->edge_numbers(static_cast<const T *>(w))),
        key(static_cast<const T *>(k)),
        result(static_cast<T *>(out) + b * c.graph.num_queries * c.heads * c.width) {}

  int64_t accumulator_size() const { return H * D; }
  int64_t scratch_size(int64_t) const { return 1; }
  int64_t slot_size() const { return H * D; }
  void start(T *accumulator) const { std::fill_n(accumulator, H * D, T{0}); }
  void combine(T *accumulator, const T *next) const { add(accumulator, next, H * D); }
  void finish(int64_t i, const T *accumulator) const { std::copy_n(accumulator, H * D, result + i * H * D); }

  bool reduce(int64_t, int64_t begin, int64_t end, T *accumulator, T *) const {
    if (!this->rows.slots_are_valid(begin, end)) return false;
    const int64_t d = channels<W>(D);
    for (int64_t s = begin; s < end; ++s) {
      this->prefetch(key, s);
      const T *k = this->row_of_key(key, rows.columns[s]), *weight = weights + rows.edges[s] * H;
      if constexpr (W == 1) {
        each_head(H, [=](int64_t h) { accumulator[h] += weight[h] == 0 ? T{0} : weight[h] * k[h]; });
        continue;
      }
      for (int64_t h = 0; h < H; ++h) {
        if (weight[h] == 0) continue;
        add_scaled<W>(accumulator + h * d, weight[h], k + this->key_head(h) * d, d);
      }
    }
    return true;
  }
};

template <class T>
struct EdgeTotal : EdgeCall<T> {
  using EdgeCall<T>::H, EdgeCall<T>::rows;
  const T *numbers;
  T *result;

  EdgeTotal(const EdgeSizes &c, int64_t b, const void *n, void *out)
      : EdgeCall<T>(c, b),
        numbers(this->edge_numbers(static_cast<const T *>(n))),
        result(static_cast<T *>(out) + b * c.graph.num_queries * c.heads) {}

  int64_t accumulator_size() const { return H; }
  int64_t scratch_size(int64_t) const { return 1; }
  int64_t slot_size() const { return H / 2; }
  void start(T *accumulator) const { std::fill_n(accumulator, H, T{0}); }
  void combine(T *accumulator, const T *next) const { add(accumulator, next, H); }
  void finish(int64_t i, const T *accumulator) const { std::copy_n(accumulator, H, result + i * H); }

  bool reduce(int64_t, int64_t begin, int64_t end, T *accumulator, T *) const {
    if (!this->rows.slots_are_valid(begin, end)) return false;
    for (int64_t s = begin; s < end; ++s) {
      const T *row = numbers + rows.edges[s] * H;
      each_head(H, [=](int64_t h) { accumulator[h] += row[h]; });
    }
    return true;
  }
};

// What a row's exponentials take, in multiplications: less than a vector of them waits until its numbers are written.
template <class T>
constexpr int64_t exponential_size(int64_t heads) {
  return heads * static_cast<int64_t>(sizeof(T)) < 64 ? 160 : 5 * heads;
}

// The softmax's denominator: for each row (2, H), the largest score and the inverse of the sum of exponentials less it.
// They stay apart, since their logsumexp would lose the sum beside a large score.
template <class T>
struct EdgeDenominator : EdgeCall<T> {
  using EdgeCall<T>::H, EdgeCall<T>::rows;
  const T *scores;
  T *result;

  EdgeDenominator(const EdgeSizes &c, int64_t b, const void *s, T *out)
      : EdgeCall<T>(c, b), scores(this->edge_numbers(static_cast<const T *>(s))), result(out) {}

  static constexpr T kLowest = -std::numeric_limits<T>::infinity();
  int64_t accumulator_size() const { return 2 * H; }
  int64_t scratch_size(int64_t) const { return H + 32; }
  int64_t slot_size() const { return exponential_size<T>(H); }
  void start(T *accumulator) const {
    std::fill_n(accumulator, H, kLowest);
    std::fill_n(accumulator + H, H, T{0});
  }

  bool reduce(int64_t, int64_t begin, int64_t end, T *accumulator, T *scratch) const {
    if (!this->rows.slots_are_valid(begin, end)) return false;
    T *sum = accumulator + H;
    for (int64_t s = begin; s < end; ++s) {
      const T *row = scores + rows.edges[s] * H;
      each_head(H, [=](int64_t h) { accumulator[h] = row[h] > accumulator[h] ? row[h] : accumulator[h]; });
    }
    for (int64_t s = begin; s < end; ++s) {
      const T *row = scores + rows.edges[s] * H;
      for (int64_t h = 0; h < H; ++h) scratch[h] = row[h] - (accumulator[h] == kLowest ? T{0} : accumulator[h]);
      exponentials(scratch, H);
      each_head(H, [=](int64_t h) { sum[h] += scratch[h]; });
    }
    return true;
  }

  void combine(T *accumulator, const T *next) const {
    for (int64_t h = 0; h < H; ++h) {
      const T both = std::max(accumulator[h], next[h]);
      const T shift = both == kLowest ? T{0} : both;
      accumulator[H + h] = accumulator[H + h] * std::exp(accumulator[h] - shift) +
                           next[H + h] * std::exp(next[h] - shift);
      accumulator[h] = both;
    }
  }

  void finish(int64_t i, const T *accumulator) const {
    T *shift = result + 2 * i * H, *inverse = shift + H;
    for (int64_t h = 0; h < H; ++h) {
      // No visible edge: any finite shift does.
      const T sum = accumulator[H + h];
      shift[h] = sum == 0 ? T{0} : accumulator[h];
      inverse[h] = sum == 0 ? T{0} : 1 / sum;
    }
  }
};

// exp(score - shift) inverse; the accumulator is not used.
template <class T>
struct EdgeNormalize : EdgeCall<T> {
  using EdgeCall<T>::H, EdgeCall<T>::rows;
  const T *scores, *denominator;
  T *result;
  static constexpr bool kWritesEdges = true;

  EdgeNormalize(const EdgeSizes &c, int64_t b, const void *s, const T *d, void *out)
      : EdgeCall<T>(c, b),
        scores(this->edge_numbers(static_cast<const T *>(s))),
        denominator(d),
        result(this->edge_numbers(static_cast<T *>(out))) {}

  int64_t accumulator_size() const { return 1; }
  int64_t scratch_size(int64_t) const { return H + 32; }
  int64_t slot_size() const { return exponential_size<T>(H); }
  void start(T *) const {}
  void combine(T *, const T *) const {}
  void finish(int64_t, const T *) const {}

  bool reduce(int64_t i, int64_t begin, int64_t end, T *, T *scratch) const {
    if (!this->rows.slots_are_valid(begin, end)) return false;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t e = rows.edges[s];
      const T *row = scores + e * H, *shift = denominator + 2 * i * H, *inverse = shift + H;
      each_head(H, [=](int64_t h) { scratch[h] = row[h] - shift[h]; });
      exponentials(scratch, H);
      T *out = result + e * H;
      each_head(H, [=](int64_t h) { out[h] = scratch[h] * inverse[h]; });
    }
    return true;
  }
};

// W is the width where the compiler is to know it, and 1 where each head has a number and a key of its own.
template <template <class, int> class Reduction, class T>
bool with_width(const EdgeSizes &c, int64_t b, const void *first, const void *second, void *result) {
  if (c.width == 1 && c.heads == c.key_heads) return reduce_call<T>(c, Reduction<T, 1>(c, b, first, second, result));
  switch (sizeof(T) == sizeof(float) ? c.width : 0) {
    case 8: return reduce_call<T>(c, Reduction<T, 8>(c, b, first, second, result));
    case 16: return reduce_call<T>(c, Reduction<T, 16>(c, b, first, second, result));
    case 32: return reduce_call<T>(c, Reduction<T, 32>(c, b, first, second, result));
    case 64: return reduce_call<T>(c, Reduction<T, 64>(c, b, first, second, result));
    default: return reduce_call<T>(c, Reduction<T, 0>(c, b, first, second, result));
  }
}

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_edge_dot(const anyattention_edge_dot_call *call, void *result) {
  using namespace anyattention;
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  const EdgeSizes sizes = sizes_of(*call, call->key_heads, call->width);
  return run(sizes, [=](auto zero, int64_t b) {
    return with_width<EdgeDot, decltype(zero)>(sizes, b, call->query, call->key, result);
  });
}

int32_t anyattention_edge_sum(const anyattention_edge_sum_call *call, void *result) {
  using namespace anyattention;
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  const EdgeSizes sizes = sizes_of(*call, call->key_heads, call->width);
  return run(sizes, [=](auto zero, int64_t b) {
    return with_width<EdgeSum, decltype(zero)>(sizes, b, call->weights, call->key, result);
  });
}

int32_t anyattention_edge_softmax(const anyattention_edge_softmax_call *call, void *result) {
  using namespace anyattention;
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  const EdgeSizes sizes = sizes_of(*call, call->heads, 1);
  return run(sizes, [=](auto zero, int64_t b) {
    using T = decltype(zero);
    const Workspace<T> denominator(call->graph.num_queries * 2 * call->heads);
    return reduce_call<T>(sizes, EdgeDenominator<T>(sizes, b, call->scores, denominator.get())) &&
           reduce_call<T>(sizes, EdgeNormalize<T>(sizes, b, call->scores, denominator.get(), result));
  });
}

int32_t anyattention_edge_total(const anyattention_edge_total_call *call, void *result) {
  using namespace anyattention;
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  const EdgeSizes sizes = sizes_of(*call, call->heads, 1);
  return run(sizes, [=](auto zero, int64_t b) {
    using T = decltype(zero);
    return reduce_call<T>(sizes, EdgeTotal<T>(sizes, b, call->numbers, result));
  });
}
}
