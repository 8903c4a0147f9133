// What every kernel over edges does with its call: checks it, and goes over its batch entries.
#ifndef ANYATTENTION_EDGE_CALL_H
#define ANYATTENTION_EDGE_CALL_H

#include <cstdint>
#include <new>

#include "anyattention.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {

// What the calls of all kernels over edges have; 1 for those that have no key_heads or width.
struct EdgeSizes {
  const anyattention_graph_arrays &graph;
  int64_t batch, heads, key_heads, width, num_threads;
  bool is_double;
};

template <class Call>
EdgeSizes sizes_of(const Call &c, int64_t key_heads, int64_t width) {
  return {c.graph, c.batch, c.heads, key_heads, width, c.num_threads, c.is_double != 0};
}

// One batch entry of a call.
template <class T>
struct EdgeCall {
  CompressedRows rows;
  int64_t b, H, G, D, group;

  EdgeCall(const EdgeSizes &c, int64_t batch)
      : rows(rows_of_queries(c.graph)), b(batch), H(c.heads), G(c.key_heads), D(c.width), group(c.heads / c.key_heads) {}

  template <class Number>
  Number *edge_numbers(Number *numbers) const {
    return numbers + b * rows.num_edges * H;
  }
  // Without a division where there is nothing to divide.
  int64_t key_head(int64_t h) const { return G == H ? h : G == 1 ? 0 : h / group; }
  const T *row_of_key(const T *key, int64_t j) const { return key + (b * rows.num_columns + j) * G * D; }
  ANYATTENTION_INLINE void prefetch(const T *key, int64_t s) const {
    if (s + kPrefetch < rows.num_edges) {
      const int64_t j = rows.columns.unchecked(s + kPrefetch);
      prefetch_row(address_of(row_of_key(key, 0), j, G * D), G * D * static_cast<int64_t>(sizeof(T)));
    }
  }
};

inline bool is_valid(const EdgeSizes &c) {
  if (c.batch < 0 || c.heads < 1 || c.key_heads < 1 || c.heads % c.key_heads) return false;
  if (c.width < 1 || c.num_threads < 1) return false;
  if (c.graph.num_queries < 0 || c.graph.num_keys < 0 || c.graph.num_edges < 0) return false;
  return rows_of_queries(c.graph).has_arrays();
}

template <class T, class Reduction>
bool reduce_call(const EdgeSizes &c, const Reduction &reduction) {
  return reduce_rows<T>(reduction.rows, c.num_threads, reduction);
}

// Runs body(T{}) for each batch entry.
template <class Body>
int32_t run(const EdgeSizes &call, const Body &body) {
  if (!is_valid(call)) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    bool valid = true;
    for (int64_t b = 0; b < call.batch; ++b) {
      valid &= call.is_double ? body(double{}, b) : body(float{}, b);
    }
    return valid ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

}  // namespace anyattention

#endif
