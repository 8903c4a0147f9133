// Products of bfloat16 numbers, two places of the depth at a time, where the processor multiplies them (AVX512_BF16).
//
// VDPBF16PS adds two products to a float sum. It takes subnormal numbers for 0, rounds to the nearest in its own order, and
// keeps NaN and infinity.
#ifndef ANYATTENTION_HALVES_H
#define ANYATTENTION_HALVES_H

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "products.h"
#include "simd.h"
#include "tiles.h"

namespace anyattention {

#ifdef __AVX512BF16__

// Two neighbours along a product's depth: as they lie in a row, or of two rows.
struct Halves {
  BFloat16 first, second;
};

template <>
struct Multiplication<float, Halves> {
  using Factors = Vector<uint32_t, kLane<Halves>>;
  static constexpr int kPlaces = 2;

  static ANYATTENTION_INLINE Factors load_factors(const Halves *from) {
    Factors factors;
    std::memcpy(&factors, from, sizeof factors);
    return factors;
  }
  static ANYATTENTION_INLINE void add(Lanes<float> &sums, Halves a, Factors b) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    sums = _mm512_dpbf16_ps(sums, (__m512bh)(Factors{} + bits), (__m512bh)b);
  }
};

using HalfFactors = Multiplication<float, Halves>::Factors;

ANYATTENTION_INLINE void store_halves(Halves *to, HalfFactors halves) { std::memcpy(to, &halves, sizeof halves); }

// Rounds rows of whole vectors; those of the result lie as close.
inline void round_rows(int64_t count, int64_t padded, const float *rows, BFloat16 *to) {
  for (int64_t n = 0; n < count * padded; n += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(load<16>(rows + n));
    std::memcpy(to + n, &rounded, sizeof rounded);
  }
}

// Turns rows (padded) into columns kQueries apart; the last vector of queries is filled with 0.
inline void turn_halves(int64_t count, int64_t padded, const Halves *rows, Halves *turned) {
  for (int64_t d = 0; d < padded; ++d) {
    for (int64_t i = 0; i < count; ++i) turned[d * kQueries + i] = rows[i * padded + d];
    for (int64_t i = count; i % kLane<Halves>; ++i) turned[d * kQueries + i] = Halves{};
  }
}

// Copies rows (width) from wherever `row_of` finds them to rows of whole halves, padded with 0.
template <class RowOf>
void copy_halves(int64_t count, int64_t width, const RowOf &row_of, Halves *to) {
  const int64_t padded = (width + 1) / 2;
  for (int64_t n = 0; n < count; ++n, to += padded) {
    to[padded - 1] = Halves{};
    std::memcpy(to, row_of(n), static_cast<std::size_t>(width) * sizeof(BFloat16));
  }
}

// Joins each two rows (width), as neighbours along the depth; what is missing of the last and of whole vectors is 0.
// Whether all numbers are finite.
template <class RowOf>
bool join_rows(int64_t count, int64_t width, int64_t padded, const RowOf &row_of, Halves *to) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 broken = 0;
  for (int64_t n = 0; n < count; n += 2, to += padded) {
    const BFloat16 *first = row_of(n), *second = n + 1 < count ? row_of(n + 1) : nullptr;
    for (int64_t d = 0; d < width; d += 16) {
      const auto there = static_cast<__mmask16>(0xffff >> (16 - std::min<int64_t>(16, width - d)));
      const auto bits = [there, d](const BFloat16 *row) {
        return (HalfFactors)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(there, row + d));
      };
      const HalfFactors joined = bits(first) | (second ? bits(second) : HalfFactors{}) << 16;
      broken |= _mm512_cmpeq_epi16_mask(_mm512_and_si512((__m512i)joined, exponent), exponent);
      store_halves(to + d, joined);
    }
  }
  return broken == 0;
}

// Two vectors of numbers, rounded.
struct RoundedPair {
  __m512bh numbers;  // the first vector's, then the second's

  RoundedPair(Lanes<float> first, Lanes<float> second) : numbers(_mm512_cvtne2ps_pbh(second, first)) {}

  // The two numbers of each lane.
  ANYATTENTION_INLINE HalfFactors joined() const {
    const Vector<uint16_t, 32> order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (HalfFactors)_mm512_maskz_permutexvar_epi16(~__mmask32{0}, (__m512i)order, (__m512i)numbers);
  }
  ANYATTENTION_INLINE void store_apart(Halves *first, Halves *second) const {
    std::memcpy(first, &numbers, 32);
    std::memcpy(second, reinterpret_cast<const char *>(&numbers) + 32, 32);
  }
};

#endif

}  // namespace anyattention

#endif
