// Products of small matrices whose sums stay in registers.
#ifndef ANYATTENTION_PRODUCTS_H
#define ANYATTENTION_PRODUCTS_H

#include <cstdint>

#include "simd.h"

namespace anyattention {

// A vector is a register, and a block of sums takes most of them: 24 of 32, or 12 of 16.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__)
constexpr int kRegister = 64, kBlockVectors = 4;
#elif defined(__AVX__)
constexpr int kRegister = 32, kBlockVectors = 2;
#else
constexpr int kRegister = 16, kBlockVectors = 2;
#endif
template <class T>
constexpr int kLane = kRegister / static_cast<int>(sizeof(T));
template <class T>
using Lanes = Vector<T, kLane<T>>;
// What a float's multiplication takes in a product of matrices, in nanoseconds: what threads are started by.
constexpr double kPerProduct = 0.3 / kLane<float>;

// c = a b, or c += a b. The rows of b and c are contiguous; a number of a lies at row * a_row + column * a_column.
template <class T>
struct Product {
  const T *a;
  int64_t a_row, a_column;
  const T *b;
  int64_t b_row;
  T *c;
  int64_t c_row;
};

// Where some rows of a product are not 0: which columns, a multiple of kLane, and which part of the depth adds to them.
struct Extent {
  int64_t column, columns, begin, end;
};

template <int Rows, int Vectors, bool Adds, class T>
inline void product_block(const Product<T> &p, int64_t row, int64_t column, const Extent &extent) {
  constexpr int lane = kLane<T>;
  const T *a = p.a + row * p.a_row, *b = p.b + column;
  T *c = p.c + row * p.c_row + column;
  Lanes<T> sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Adds ? load<lane>(c + r * p.c_row + v * lane) : Lanes<T>{};
  }
  for (int64_t k = extent.begin; k < extent.end; ++k) {
    Lanes<T> from[Vectors];
    for (int v = 0; v < Vectors; ++v) from[v] = load<lane>(b + k * p.b_row + v * lane);
    for (int r = 0; r < Rows; ++r) {
      const T factor = a[r * p.a_row + k * p.a_column];
      for (int v = 0; v < Vectors; ++v) sums[r][v] += factor * from[v];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store<T, lane>(c + r * p.c_row + v * lane, sums[r][v]);
  }
}

template <int Rows, bool Adds, class T>
inline void product_rows(const Product<T> &p, int64_t row, const Extent &extent) {
  constexpr int lane = kLane<T>;
  int64_t n = extent.column;
  const int64_t end = n + extent.columns;
  for (; n + kBlockVectors * lane <= end; n += kBlockVectors * lane) {
    product_block<Rows, kBlockVectors, Adds>(p, row, n, extent);
  }
  if constexpr (kBlockVectors == 4) {
    if (n + 2 * lane <= end) {
      product_block<Rows, 2, Adds>(p, row, n, extent);
      n += 2 * lane;
    }
  }
  if (n < end) product_block<Rows, 1, Adds>(p, row, n, extent);
}

// Computes a product block by block; extent(first, last) tells of the rows from first up to last.
template <bool Adds, class T, class Extents>
inline void product(int64_t rows, const Product<T> &p, const Extents &extent) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) product_rows<kBlockRows, Adds>(p, r, extent(r, r + kBlockRows));
  for (; r + 2 <= rows; r += 2) product_rows<2, Adds>(p, r, extent(r, r + 2));
  if (r < rows) product_rows<1, Adds>(p, r, extent(r, r + 1));
}

}  // namespace anyattention

#endif
