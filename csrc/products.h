// Products of small matrices whose sums stay in registers.
#ifndef ANYATTENTION_PRODUCTS_H
#define ANYATTENTION_PRODUCTS_H

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace anyattention {

constexpr int kLane = 16;
using Lanes = Vector<float, kLane>;

// A matrix by its rows: some numbers apart, or each by a pointer.
struct Rows {
  const float *first;
  int64_t stride;
  const float *at(int64_t row) const { return first + row * stride; }
};
struct Pointers {
  const float *const *rows;
  const float *at(int64_t row) const { return rows[row]; }
};

// How many vectors of sums the registers hold beside what is read.
#ifdef __AVX512F__
constexpr int kSums = 24;
#else
constexpr int kSums = 6;
#endif

template <int Count, int Vectors, bool Adds, class A, class B>
inline void product_block(int64_t depth, const A &a, int64_t a_row, int64_t a_column, const B &b, int64_t b_column, float *c,
                          int64_t c_row) {
  Lanes sums[Count][Vectors];
  const float *rows[Count];
  for (int r = 0; r < Count; ++r) {
    rows[r] = a.at(a_row + r);
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Adds ? load<kLane>(c + r * c_row + v * kLane) : Lanes{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Lanes row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = load<kLane>(b.at(k) + b_column + v * kLane);
    for (int r = 0; r < Count; ++r) {
      const float factor = rows[r][k * a_column];
      for (int v = 0; v < Vectors; ++v) sums[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < Count; ++r) {
    for (int v = 0; v < Vectors; ++v) store<float, kLane>(c + r * c_row + v * kLane, sums[r][v]);
  }
}

template <int Vectors, bool Adds, class A, class B>
inline void product_columns(int64_t count, int64_t depth, const A &a, int64_t a_column, const B &b, int64_t b_column,
                            float *c, int64_t c_row) {
  constexpr int block = kSums / Vectors;
  int64_t r = 0;
  for (; r + block <= count; r += block) {
    product_block<block, Vectors, Adds>(depth, a, r, a_column, b, b_column, c + r * c_row, c_row);
  }
  for (; r + 2 <= count; r += 2) {
    product_block<2, Vectors, Adds>(depth, a, r, a_column, b, b_column, c + r * c_row, c_row);
  }
  if (r < count) product_block<1, Vectors, Adds>(depth, a, r, a_column, b, b_column, c + r * c_row, c_row);
}

// c = a b, or c += a b: (count, columns) from (count, depth) and (depth, columns), columns a multiple of kLane. A number of
// a lies at a.at(row)[column * a_column]; the rows of b and c are contiguous.
template <bool Adds, class A, class B>
inline void product(int64_t count, int64_t columns, int64_t depth, const A &a, int64_t a_column, const B &b, float *c,
                    int64_t c_row) {
  int64_t n = 0;
#ifdef __AVX512F__
  for (; n + 4 * kLane <= columns && columns - n != 6 * kLane; n += 4 * kLane) {
    product_columns<4, Adds>(count, depth, a, a_column, b, n, c + n, c_row);
  }
  for (; n + 3 * kLane <= columns; n += 3 * kLane) product_columns<3, Adds>(count, depth, a, a_column, b, n, c + n, c_row);
  for (; n + 2 * kLane <= columns; n += 2 * kLane) product_columns<2, Adds>(count, depth, a, a_column, b, n, c + n, c_row);
#endif
  for (; n + kLane <= columns; n += kLane) product_columns<1, Adds>(count, depth, a, a_column, b, n, c + n, c_row);
}

}  // namespace anyattention

#endif
