// What every kernel over edges does with its call: checks it, and goes over its batch entries.
#ifndef ANYATTENTION_EDGE_CALL_H
#define ANYATTENTION_EDGE_CALL_H

#include <cstdint>
#include <new>

#include "anyattention.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {

// One batch entry of a call.
template <class T>
struct EdgeCall {
  CompressedRows rows;
  int64_t b, H, G, D, group;

  EdgeCall(const anyattention_edge_call &c, int64_t batch)
      : rows{c.rows}, b(batch), H(c.heads), G(c.column_heads), D(c.width), group(c.heads / c.column_heads) {}

  template <class Number>
  Number *edge_numbers(Number *numbers) const {
    return numbers + b * rows.num_edges * H;
  }
  // Without a division where there is nothing to divide.
  int64_t column_head(int64_t h) const { return G == H ? h : G == 1 ? 0 : h / group; }
  const T *column(const T *columns, int64_t j) const { return columns + (b * rows.num_columns + j) * G * D; }
  ANYATTENTION_INLINE void prefetch(const T *columns, int64_t s) const {
    if (rows.slot_is_valid(s + kPrefetch)) {
      prefetch_row(column(columns, rows.columns[s + kPrefetch]), G * D * static_cast<int64_t>(sizeof(T)));
    }
  }
};

inline bool is_valid(const anyattention_edge_call *c) {
  if (!c || c->batch < 0 || c->heads < 1 || c->column_heads < 1 || c->heads % c->column_heads) return false;
  if (c->width < 1 || c->num_threads < 1) return false;
  if (c->rows.num_rows < 0 || c->rows.num_columns < 0 || c->rows.num_edges < 0) return false;
  return CompressedRows{c->rows}.offsets_are_valid();
}

template <class T, class Reduction>
bool reduce_call(const anyattention_edge_call &c, const Reduction &reduction) {
  return reduce_rows<T>(reduction.rows, c.num_threads, reduction);
}

// Runs body(T{}) for each batch entry.
template <class Body>
int32_t run(const anyattention_edge_call *call, const Body &body) {
  if (!is_valid(call)) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    bool valid = true;
    for (int64_t b = 0; b < call->batch; ++b) {
      valid &= call->is_double ? body(double{}, b) : body(float{}, b);
    }
    return valid ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

}  // namespace anyattention

#endif
