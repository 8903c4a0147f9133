// Short loops over one row's channels, and exponentials over contiguous numbers.
//
// A reduction adds its lanes in an order that is fixed when it is compiled: the result does not
// depend on threads. Vectors are the compiler's own; a machine with narrower registers splits them.
#ifndef ANYATTENTION_SIMD_H
#define ANYATTENTION_SIMD_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// For functions that only prefetch: g++ takes a call of such a function for one without effect, and drops it. And for
// functions of vectors that are in registers, which a call would send through memory.
#define ANYATTENTION_INLINE __attribute__((always_inline)) inline
// For loops whose sums fill the registers: all that they call is inlined.
#define ANYATTENTION_FLATTEN __attribute__((flatten))

namespace anyattention {

// `Width` is the number of channels where it is known at compile time (a multiple of a vector's), else 0.
template <int Width>
inline int64_t channels(int64_t count) {
  return Width ? Width : count;
}

// Runs body(h) for each head; the common numbers of heads are known to the compiler, which makes vectors of them.
template <class Body>
inline void each_head(int64_t heads, const Body &body) {
  if (heads == 8) {
#pragma omp simd
    for (int64_t h = 0; h < 8; ++h) body(h);
  } else if (heads == 4) {
#pragma omp simd
    for (int64_t h = 0; h < 4; ++h) body(h);
  } else {
#pragma omp simd
    for (int64_t h = 0; h < heads; ++h) body(h);
  }
}

template <class T, int Count>
using Vector __attribute__((vector_size(Count * sizeof(T)))) = T;

template <int Width, class T>
constexpr int kLanes = Width * sizeof(T) < 64 ? Width : 64 / static_cast<int>(sizeof(T));

template <int Count, class T>
inline Vector<T, Count> load(const T *from) {
  Vector<T, Count> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class T, int Count>
inline void store(T *to, Vector<T, Count> vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// The sum of a vector's numbers, by halves.
template <class T, int Count>
inline T sum_of(Vector<T, Count> vector) {
  if constexpr (Count == 1) {
    return vector[0];
  } else {
    Vector<T, Count / 2> halves[2];
    std::memcpy(halves, &vector, sizeof vector);
    return sum_of<T, Count / 2>(halves[0] + halves[1]);
  }
}

// Adds each two neighbouring groups of `Group` lanes: those of a in the lower half, those of b in the upper.
template <int Group, int Count, int... Lane>
inline Vector<float, Count> add_groups(Vector<float, Count> a, Vector<float, Count> b,
                                       std::integer_sequence<int, Lane...>) {
  const Vector<int32_t, Count> first = {(Lane / Group * 2 * Group + Lane % Group)...};
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + Group);
}

// The sums of `Rows` vectors, side by side; two vectors become one at each step, and each is summed by halves.
template <int Rows, int Count, int Group = Count / 2>
ANYATTENTION_INLINE Vector<float, Rows> sums_of(const Vector<float, Count> *rows) {
  static_assert(Rows <= Count, "a lane for each sum");
  constexpr auto lanes = std::make_integer_sequence<int, Count>();
  if constexpr (Group == 0) {
    return load<Rows>(reinterpret_cast<const float *>(rows));
  } else {
    constexpr int left = Rows * Group * 2 > Count ? Rows * Group * 2 / Count : 1;
    Vector<float, Count> joined[left > 1 ? left / 2 : 1];
    for (int n = 0; n < (left > 1 ? left / 2 : 1); ++n) {
      joined[n] = add_groups<Group, Count>(rows[left > 1 ? 2 * n : 0], rows[left > 1 ? 2 * n + 1 : 0], lanes);
    }
    return sums_of<Rows, Count, Group / 2>(joined);
  }
}

template <int Width, class T>
inline T dot(const T *a, const T *b, int64_t count) {
  if constexpr (Width > 1) {
    constexpr int lanes = kLanes<Width, T>;
    Vector<T, lanes> sum = load<lanes>(a) * load<lanes>(b);
    for (int c = lanes; c < Width; c += lanes) sum += load<lanes>(a + c) * load<lanes>(b + c);
    return sum_of<T, lanes>(sum);
  } else {
    constexpr int lanes = 64 / static_cast<int>(sizeof(T));
    T sum = 0;
    int64_t c = 0;
    if (count >= lanes) {
      Vector<T, lanes> sums{};
      for (; c + lanes <= count; c += lanes) sums += load<lanes>(a + c) * load<lanes>(b + c);
      sum = sum_of<T, lanes>(sums);
    }
    if (c + lanes / 2 <= count) {
      sum += sum_of<T, lanes / 2>(load<lanes / 2>(a + c) * load<lanes / 2>(b + c));
      c += lanes / 2;
    }
    for (; c < count; ++c) sum += a[c] * b[c];
    return sum;
  }
}

// result[h] = a_h . b_h for each head h of `Width` channels; `shared` is 1 where b has a row per head, else how many heads
// share one.
template <int Width, class T>
inline void head_dots(const T *a, const T *b, int64_t heads, int64_t shared, int64_t count, T *result) {
  int64_t h = 0;
#ifdef __AVX512F__
  if constexpr ((Width == 8 || Width == 16) && sizeof(T) == 4) {
    for (; shared == 1 && h + 8 <= heads; h += 8) {
      Vector<T, Width> products[8];
      for (int n = 0; n < 8; ++n) {
        products[n] = load<Width>(a + (h + n) * Width) * load<Width>(b + (h + n) * Width);
      }
      store<T, 8>(result + h, sums_of<8, Width>(products));
    }
  }
#endif
  const int64_t n = channels<Width>(count);
  for (; h < heads; ++h) result[h] = dot<Width>(a + h * n, b + (shared == 1 ? h : h / shared) * n, n);
}

// accumulator += factor * row
template <int Width, class T>
inline void add_scaled(T *__restrict accumulator, T factor, const T *__restrict row,
                       int64_t count) {
  if constexpr (Width > 1) {
    constexpr int lanes = kLanes<Width, T>;
    for (int c = 0; c < Width; c += lanes) {
      store<T, lanes>(accumulator + c, load<lanes>(accumulator + c) + factor * load<lanes>(row + c));
    }
  } else {
    constexpr int lanes = 64 / static_cast<int>(sizeof(T));
    const int64_t n = channels<Width>(count);
    int64_t c = 0;
    for (; c + lanes <= n; c += lanes) {
      store<T, lanes>(accumulator + c, load<lanes>(accumulator + c) + factor * load<lanes>(row + c));
    }
    if (c + lanes / 2 <= n) {
      store<T, lanes / 2>(accumulator + c, load<lanes / 2>(accumulator + c) + factor * load<lanes / 2>(row + c));
      c += lanes / 2;
    }
    for (; c < n; ++c) accumulator[c] += factor * row[c];
  }
}

// accumulator += sum over n of weights[n * stride] * (rows[n] + offset)
template <int Width, class T>
inline void add_weighted_rows(T *accumulator, const T *weights, int64_t stride, const T *const *rows, int64_t offset,
                              int64_t num_rows, int64_t count) {
  if constexpr (Width > 1) {
    constexpr int lanes = kLanes<Width, T>, parts = Width / lanes;
    Vector<T, lanes> sums[parts];
    for (int part = 0; part < parts; ++part) sums[part] = load<lanes>(accumulator + part * lanes);
    for (int64_t n = 0; n < num_rows; ++n) {
      const T weight = weights[n * stride];
      const T *row = rows[n] + offset;
      for (int part = 0; part < parts; ++part) sums[part] += weight * load<lanes>(row + part * lanes);
    }
    for (int part = 0; part < parts; ++part) store<T, lanes>(accumulator + part * lanes, sums[part]);
  } else {
    for (int64_t n = 0; n < num_rows; ++n) add_scaled<Width>(accumulator, weights[n * stride], rows[n] + offset, count);
  }
}

template <class T>
inline void add(T *__restrict accumulator, const T *__restrict row, int64_t count) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) accumulator[c] += row[c];
}

// Where a row is, or would be if there were one of that number: nothing but a prefetch takes such an address.
template <class T>
ANYATTENTION_INLINE const void *address_of(const T *rows, int64_t row, int64_t stride) {
  const uintptr_t offset = static_cast<uintptr_t>(row) * static_cast<uintptr_t>(stride) * sizeof(T);
  return reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(rows) + offset);
}

ANYATTENTION_INLINE void prefetch_row(const void *row, int64_t bytes) {
  const auto line = reinterpret_cast<uintptr_t>(row);
  for (int64_t offset = 0; offset < bytes; offset += 64) {
    __builtin_prefetch(reinterpret_cast<const void *>(line + static_cast<uintptr_t>(offset)), 0, 2);
  }
}

// Of a row whose size is known to the compiler, into the first cache.
template <int64_t Bytes>
ANYATTENTION_INLINE void prefetch_row(const void *row) {
  const auto line = reinterpret_cast<uintptr_t>(row);
#pragma GCC unroll 16
  for (int64_t offset = 0; offset < Bytes; offset += 64) {
    __builtin_prefetch(reinterpret_cast<const void *>(line + static_cast<uintptr_t>(offset)), 0, 3);
  }
}

// The exponential of x <= 0 (or a little above), NaN kept, -inf to 0: x = n ln 2 + r with |r| <= ln 2 / 2, a
// polynomial in r, and n added to the exponent's bits. Error below 2 units in the last place.
template <class T, int Count>
struct Exponential;

template <int Count>
struct Exponential<float, Count> {
  using Numbers = Vector<float, Count>;
  using Integers = Vector<uint32_t, Count>;  // NaN overflows them

  static inline Numbers polynomial(Numbers r) {
    Numbers p = Numbers{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
  }

  static ANYATTENTION_INLINE Numbers run(Numbers x) {
#ifdef __AVX512F__
    if constexpr (Count == 16) return of_registers(x);
#endif
    const Numbers magic = Numbers{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Numbers lowest = Numbers{} - 87.0f;
    const Numbers highest = Numbers{} + 88.0f;
    Numbers inside = x < lowest ? lowest : x;
    inside = inside > highest ? highest : inside;
    const Numbers shifted = inside * 1.44269504088896341f + magic;
    const Numbers n = shifted - magic;
    const Numbers r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
    const Numbers p = polynomial(r);
    const Integers bits = ((Integers)shifted - (Integers)magic) << 23;
    const Numbers result = (Numbers)((Integers)p + bits);
    const Numbers small = x < lowest ? Numbers{} : result;
    return x != x ? x : small;
  }

#ifdef __AVX512F__
  // The same polynomial; the processor rounds and scales, keeps NaN, and ends in 0 by itself. (Intrinsics with a mask:
  // without one, g++ 12 warns of its own header.)
  static inline Numbers of_registers(Numbers x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    constexpr __mmask16 all = 0xffff;
    const Numbers lowest = Numbers{} - 110.0f, highest = Numbers{} + 88.0f;
    const Numbers inside = _mm512_maskz_min_ps(all, highest, _mm512_maskz_max_ps(all, lowest, x));
    const Numbers n = _mm512_maskz_roundscale_ps(all, inside * 1.44269504088896341f, nearest);
    const Numbers r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
    return _mm512_maskz_scalef_ps(all, polynomial(r), n);
  }
#endif
};

template <int Count>
struct Exponential<double, Count> {
  using Numbers = Vector<double, Count>;
  using Integers = Vector<uint64_t, Count>;

  static ANYATTENTION_INLINE Numbers run(Numbers x) {
    const Numbers magic = Numbers{} + 6755399441055744.0;  // 1.5 * 2^52
    const Numbers lowest = Numbers{} - 708.0;
    const Numbers highest = Numbers{} + 709.0;
    Numbers inside = x < lowest ? lowest : x;
    inside = inside > highest ? highest : inside;
    const Numbers shifted = inside * 1.4426950408889634074 + magic;
    const Numbers n = shifted - magic;
    const Numbers r = (inside - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    Numbers p = Numbers{} + 1.0 / 6227020800.0;
    const double inverse_factorials[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                         1.0 / 362880.0,    1.0 / 40320.0,    1.0 / 5040.0,
                                         1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,
                                         1.0 / 6.0,         0.5,              1.0};
    for (double coefficient : inverse_factorials) p = p * r + coefficient;
    p = p * r + 1.0;
    const Integers bits = ((Integers)shifted - (Integers)magic) << 52;
    const Numbers result = (Numbers)((Integers)p + bits);
    const Numbers small = x < lowest ? Numbers{} : result;
    return x != x ? x : small;
  }
};

// The natural logarithm of a normal x > 0 up to 2^127, NaN and infinity kept: x = 2^n m with m near 1, and the series of
// atanh((m - 1) / (m + 1)). Error below 2 units in the last place; written for loops that the compiler makes vectors of.
inline float logarithm(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // m from sqrt(1/2) to sqrt(2).
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const uint32_t significand = bits - (static_cast<uint32_t>(exponent) << 23);
  float m;
  std::memcpy(&m, &significand, sizeof m);
  const float z = (m - 1) / (m + 1), y = z * z;
  float p = 0.2222222222f;
  p = p * y + 0.2857142857f;
  p = p * y + 0.4f;
  p = p * y + 0.6666666667f;
  const float n = static_cast<float>(exponent);
  const float result = n * 0.693359375f + (n * -2.12194440e-4f + (2 * z + z * y * p));
  return x < std::numeric_limits<float>::infinity() ? result : x;
}

inline double logarithm(double x) { return std::log(x); }

// A row of `Heads` heads of `Width` channels, kept in registers.
template <int Heads, int Width>
struct RegisterRow {
#ifdef __AVX512F__
  static constexpr int kVector = Width < 16 ? Width : 16;
#else
  static constexpr int kVector = Width < 8 ? Width : 8;
#endif
  static constexpr int kParts = Width / kVector;  // of a head
  using Part = Vector<float, kVector>;
  using Numbers = Vector<float, Heads>;
  Part part[Heads * kParts];

  void write(float *row) const {
    for (int n = 0; n < Heads * kParts; ++n) store<float, kVector>(row + n * kVector, part[n]);
  }
  // Each head times a factor.
  void write(float *row, Numbers factors) const {
    for (int n = 0; n < Heads * kParts; ++n) store<float, kVector>(row + n * kVector, part[n] * factors[n / kParts]);
  }
  static Part part_of(const float *row, int n) { return load<kVector>(row + n * kVector); }
  static RegisterRow read(const float *row) {
    RegisterRow result;
    for (int n = 0; n < Heads * kParts; ++n) result.part[n] = part_of(row, n);
    return result;
  }
  // Not RegisterRow{}, which the compiler clears in memory.
  static RegisterRow zeros() {
    RegisterRow result;
    for (int n = 0; n < Heads * kParts; ++n) result.part[n] = Part{};
    return result;
  }
  // Adds factors[h] times each head of a row. Rows stay in memory where they can: the registers are full of sums.
  void add(Numbers factors, const float *row) {
    for (int n = 0; n < Heads * kParts; ++n) part[n] += factors[n / kParts] * part_of(row, n);
  }
  // The same by factors in memory, where each is spread over a vector as it is read.
  void add(const float *factors, const float *row) {
    for (int n = 0; n < Heads * kParts; ++n) part[n] += factors[n / kParts] * part_of(row, n);
  }
  Numbers dots(const float *row) const {
    RegisterRow products;
    for (int n = 0; n < Heads * kParts; ++n) products.part[n] = part[n] * part_of(row, n);
    return products.sums();
  }
  // The product of each head of one row with that of another.
  static Numbers dots(const float *a, const float *b) {
    RegisterRow products;
    for (int n = 0; n < Heads * kParts; ++n) products.part[n] = part_of(a, n) * part_of(b, n);
    return products.sums();
  }
  // The sum of each head's channels.
  Numbers sums() const {
    Part whole[Heads];
    for (int h = 0; h < Heads; ++h) {
      whole[h] = part[h * kParts];
      for (int n = 1; n < kParts; ++n) whole[h] += part[h * kParts + n];
    }
    return sums_of<Heads, kVector>(whole);
  }
};

// values[i] = exp(values[i]); `values` must have room up to the next multiple of the vector's width.
template <class T>
inline void exponentials(T *values, int64_t count) {
  constexpr int lanes = 64 / static_cast<int>(sizeof(T));
  for (int64_t i = 0; i < count; i += lanes) {
    store<T, lanes>(values + i, Exponential<T, lanes>::run(load<lanes>(values + i)));
  }
}

}  // namespace anyattention

#endif
