// The edge of each query whose weighted key is the largest, head by head and channel by channel: attention that takes
// the maximum needs to know no more of its edges.
//
//   i  query     j  key     e  edge, in the caller's order     s  slot     h  head     g  key head, h / group

#include <algorithm>
#include <limits>

#include "anyattention.h"
#include "edge_call.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {
namespace {

// An accumulator is (H, D) edges, then as many of T, their messages: counted in int64_t.
template <class T>
struct EdgeArgmax : EdgeCall<T> {
  using EdgeCall<T>::D, EdgeCall<T>::G, EdgeCall<T>::H, EdgeCall<T>::group;
  static constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const T *weights, *key, *features, *feature_weight;
  int64_t F;
  int64_t *result;

  EdgeArgmax(const EdgeSizes &sizes, const anyattention_edge_argmax_call &c, int64_t b, int64_t *out)
      : EdgeCall<T>(sizes, b),
        weights(this->edge_numbers(static_cast<const T *>(c.weights))),
        key(static_cast<const T *>(c.value)),
        features(static_cast<const T *>(c.features)),
        feature_weight(static_cast<const T *>(c.feature_weight)),
        F(c.features ? c.num_features : 0),
        result(out + b * c.graph.num_queries * c.heads * c.width) {}

  static int64_t words(int64_t count) { return (count * static_cast<int64_t>(sizeof(T)) + 7) / 8; }
  static T *numbers(int64_t *words) { return reinterpret_cast<T *>(words); }
  int64_t accumulator_size() const { return H * D + words(H * D); }
  int64_t scratch_size() const { return words(D); }
  void start(int64_t *accumulator) const {
    std::fill_n(accumulator, H * D, int64_t{-1});
    std::fill_n(numbers(accumulator + H * D), H * D, kLowest);
  }
  void finish(int64_t i, const int64_t *accumulator) const { std::copy_n(accumulator, H * D, result + i * H * D); }

  // Whether a message takes the place of the largest before it, or of none.
  static bool wins(T message, T largest, int64_t edge) {
    return (edge < 0) | (!(message <= largest) & (largest == largest));
  }

  void combine(int64_t *accumulator, const int64_t *next) const {
    T *largest = numbers(accumulator + H * D);
    const T *messages = reinterpret_cast<const T *>(next + H * D);
    for (int64_t n = 0; n < H * D; ++n) {
      if (next[n] < 0 || !wins(messages[n], largest[n], accumulator[n])) continue;
      accumulator[n] = next[n];
      largest[n] = messages[n];
    }
  }

  void reduce(int64_t, const Slots &slots, int64_t *accumulator, int64_t *scratch) const {
    for (int64_t s = 0; s < slots.count; ++s) {
      this->prefetch(key, slots.columns[s + kPrefetch]);
      const int64_t e = slots.edges[s];
      const T *k = this->row_of_key(key, slots.columns[s]);
      for (int64_t h = 0; h < H; ++h) {
        const T weight = weights[e * H + h];
        if (weight == kLowest) continue;
        const T *value = k + (G == H ? h : h / group) * D;
        if (F > 0) value = with_features(value, e, h, numbers(scratch));
        take(weight, value, e, accumulator + h * D, numbers(accumulator + H * D) + h * D);
      }
    }
  }

  const T *with_features(const T *value, int64_t e, int64_t h, T *sum) const {
    for (int64_t d = 0; d < D; ++d) {
      sum[d] = value[d] + dot<0>(feature_weight + (h * D + d) * F, features + e * F, F);
    }
    return sum;
  }

  void take(T weight, const T *__restrict value, int64_t e, int64_t *__restrict edge, T *__restrict largest) const {
    // Without a branch: which edge wins is a coin toss.
    for (int64_t d = 0; d < D; ++d) {
      const T message = weight * value[d];
      const bool is_larger = wins(message, largest[d], edge[d]);
      edge[d] = is_larger ? e : edge[d];
      largest[d] = is_larger ? message : largest[d];
    }
  }
};

}  // namespace
}  // namespace anyattention

extern "C" int32_t anyattention_edge_argmax(const anyattention_edge_argmax_call *call, int64_t *result) {
  using namespace anyattention;
  if (!call || call->num_features < 0) return ANYATTENTION_INVALID_ARGUMENT;
  const EdgeSizes sizes = sizes_of(*call, call->key_heads, call->width);
  return run(sizes, [=](auto zero, int64_t b) {
    const EdgeArgmax<decltype(zero)> reduction(sizes, *call, b, result);
    return reduce_rows<int64_t>(reduction.rows, call->num_threads, reduction);
  });
}
