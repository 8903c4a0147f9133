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

// How factors add to sums: numbers, one place of the depth at a time. halves.h has the other kind.
template <class T, class Factor>
struct Multiplication {
  using Factors = Lanes<Factor>;
  static constexpr int kPlaces = 1;  // of the depth, in a factor

  static ANYATTENTION_INLINE Factors load_factors(const Factor *from) { return load<kLane<Factor>>(from); }
  static ANYATTENTION_INLINE void add(Lanes<T> &sums, Factor a, Factors b) { sums += a * b; }
};

// c = a b, or c += a b. The rows of b and c are contiguous; a factor of a lies at row * a_row + column * a_column.
template <class T, class Factor = T>
struct Product {
  const Factor *a;
  int64_t a_row, a_column;
  const Factor *b;
  int64_t b_row;
  T *c;
  int64_t c_row;
  T scale = 1;  // of the result, where a factor has several places
};

// Where some rows of a product are not 0: which columns, a multiple of kLane, and which part of the depth adds to them.
struct Extent {
  int64_t column, columns, begin, end;
};

template <int Rows, int Vectors, bool Adds, class T, class Factor>
inline void product_block(const Product<T, Factor> &p, int64_t row, int64_t column, const Extent &extent) {
  using Multiply = Multiplication<T, Factor>;
  constexpr int lane = kLane<T>, places = Multiply::kPlaces;
  const Factor *a = p.a + row * p.a_row, *b = p.b + column;
  T *c = p.c + row * p.c_row + column;
  constexpr bool adds_first = Adds && places == 1;
  Lanes<T> sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = adds_first ? load<lane>(c + r * p.c_row + v * lane) : Lanes<T>{};
  }
  for (int64_t k = extent.begin / places; k < (extent.end + places - 1) / places; ++k) {
    typename Multiply::Factors from[Vectors];
    for (int v = 0; v < Vectors; ++v) from[v] = Multiply::load_factors(b + k * p.b_row + v * lane);
    for (int r = 0; r < Rows; ++r) {
      const Factor factor = a[r * p.a_row + k * p.a_column];
      for (int v = 0; v < Vectors; ++v) Multiply::add(sums[r][v], factor, from[v]);
    }
  }
  if constexpr (places > 1) {
    const bool is_scaled = p.scale != 1;
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vectors; ++v) {
        if (is_scaled) sums[r][v] *= p.scale;
        if (Adds) sums[r][v] += load<lane>(c + r * p.c_row + v * lane);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store<T, lane>(c + r * p.c_row + v * lane, sums[r][v]);
  }
}

template <int Rows, bool Adds, class T, class Factor>
inline void product_rows(const Product<T, Factor> &p, int64_t row, const Extent &extent) {
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
template <bool Adds, class T, class Factor, class Extents>
inline void product(int64_t rows, const Product<T, Factor> &p, const Extents &extent) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) product_rows<kBlockRows, Adds>(p, r, extent(r, r + kBlockRows));
  for (; r + 2 <= rows; r += 2) product_rows<2, Adds>(p, r, extent(r, r + 2));
  if (r < rows) product_rows<1, Adds>(p, r, extent(r, r + 1));
}

}  // namespace anyattention

#endif
