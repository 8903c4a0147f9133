// Numbers in half precision at rest, which are floats as soon as they are read.
#ifndef ANYATTENTION_HALF_H
#define ANYATTENTION_HALF_H

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "anyattention.h"
#include "simd.h"

namespace anyattention {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <int Count>
ANYATTENTION_INLINE Vector<uint32_t, Count> load_bits(const uint16_t *from) {
  return __builtin_convertvector(load<Count>(from), Vector<uint32_t, Count>);
}

template <int Count>
ANYATTENTION_INLINE Vector<float, Count> as_floats(Vector<uint32_t, Count> bits) {
  Vector<float, Count> floats;
  std::memcpy(&floats, &bits, sizeof floats);
  return floats;
}

// Some numbers in the type of the sums.
template <class T, int Count>
ANYATTENTION_INLINE Vector<T, Count> load_wide(const T *from) {
  return load<Count>(from);
}
// The upper half of a float.
template <class T, int Count>
ANYATTENTION_INLINE Vector<float, Count> load_wide(const BFloat16 *from) {
  return as_floats<Count>(load_bits<Count>(&from->bits) << 16);
}
// 5 bits of exponent of 15, where a float has 8 of 127. Nothing here is a float's subnormal, which a processor may be told
// to take for 0.
template <class T, int Count>
ANYATTENTION_INLINE Vector<float, Count> load_wide(const Float16 *from) {
#ifdef __AVX512F__
  if constexpr (Count == 16) {
    // Not _mm512_cvtph_ps: g++ warns of the register that it leaves undefined.
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
  }
#elif defined(__F16C__)
  if constexpr (Count == 8) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#endif
  using Bits = Vector<uint32_t, Count>;
  const Bits half = load_bits<Count>(&from->bits), size = (half & 0x7fff) << 13, exponent = half & 0x7c00;
  const Bits whole = size + (exponent == 0x7c00 ? Bits{} + ((255 - 31) << 23) : Bits{} + ((127 - 15) << 23));
  // Below 2^-14 a number is so many 2^-24.
  const Vector<float, Count> small = as_floats<Count>(size + (113 << 23)) - 0x1p-14f;
  Bits bits;
  std::memcpy(&bits, &small, sizeof bits);
  return as_floats<Count>((exponent == 0 ? bits : whole) | (half & 0x8000) << 16);
}

// Calls with a number of a type at rest, beside sums of type T.
template <class T, class Call>
ANYATTENTION_INLINE auto with_type_of(int64_t type, const Call &call) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == ANYATTENTION_BFLOAT16) return call(BFloat16{});
    if (type == ANYATTENTION_FLOAT16) return call(Float16{});
  }
  return call(T{});
}

}  // namespace anyattention

#endif
