// Products of small matrices whose sums stay in registers.
#ifndef ANYATTENTION_PRODUCTS_H
#define ANYATTENTION_PRODUCTS_H

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace anyattention {

constexpr int kLane = 16;
using Lanes = Vector<float, kLane>;

// A block of sums as large as the registers: six rows of 64 numbers where there are 32 registers of 16, else of 16.
#ifdef __AVX512F__
constexpr int kBlockRows = 6, kBlockVectors = 4;
#else
constexpr int kBlockRows = 6, kBlockVectors = 1;
#endif

template <int Rows, int Vectors, bool Adds>
inline void product_block(int64_t depth, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                          float *c, int64_t c_row) {
  Lanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Adds ? load<kLane>(c + r * c_row + v * kLane) : Lanes{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Lanes row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = load<kLane>(b + k * b_row + v * kLane);
    for (int r = 0; r < Rows; ++r) {
      const float factor = a[r * a_row + k * a_column];
      for (int v = 0; v < Vectors; ++v) sums[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store<float, kLane>(c + r * c_row + v * kLane, sums[r][v]);
  }
}

template <int Vectors, bool Adds>
inline void product_columns(int64_t rows, int64_t depth, const float *a, int64_t a_row, int64_t a_column, const float *b,
                            int64_t b_row, float *c, int64_t c_row) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    product_block<kBlockRows, Vectors, Adds>(depth, a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row);
  }
  for (; r + 2 <= rows; r += 2) {
    product_block<2, Vectors, Adds>(depth, a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row);
  }
  if (r < rows) {
    product_block<1, Vectors, Adds>(depth, a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row);
  }
}

// c = a b, or c += a b: (rows, columns) from (rows, depth) and (depth, columns), columns a multiple of kLane. The rows of
// b and c are contiguous; a number of a lies at row * a_row + column * a_column.
template <bool Adds>
inline void product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                    const float *b, int64_t b_row, float *c, int64_t c_row) {
  int64_t n = 0;
  for (; n + kBlockVectors * kLane <= columns; n += kBlockVectors * kLane) {
    product_columns<kBlockVectors, Adds>(rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row);
  }
  for (; n < columns; n += kLane) {
    product_columns<1, Adds>(rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row);
  }
}

}  // namespace anyattention

#endif
