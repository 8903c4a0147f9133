// Philox4x32-10 (Salmon et al., 2011). Dropout: position n of a row-major array takes word n % 4 at counter n / 4.
#ifndef ANYATTENTION_PHILOX_H
#define ANYATTENTION_PHILOX_H

#include <cmath>
#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "products.h"
#include "simd.h"

namespace anyattention {

using Counters = Lanes<uint64_t>;
constexpr int kCounters = kLane<uint64_t>;

// The product of the lower half of each lane and a number below 2^32. The compiler multiplies whole lanes, which takes
// three times as long.
ANYATTENTION_INLINE Counters lower_product(Counters x, uint64_t factor) {
#if defined(__AVX512F__)
  const Counters factors = Counters{} + factor;
  return reinterpret_cast<Counters>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(factors)));
#elif defined(__AVX2__)
  const Counters factors = Counters{} + factor;
  return reinterpret_cast<Counters>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(factors)));
#else
  return (x & 0xFFFFFFFFu) * factor;
#endif
}

// The four words of a counter in each lane. They are the lower halves; what is above them is of no meaning, in what
// comes as in what goes.
struct Words {
  Counters x0, x1, x2, x3;
};

ANYATTENTION_INLINE Words philox(uint64_t seed, Words words) {
  auto [x0, x1, x2, x3] = words;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Counters first = lower_product(x0, 0xD2511F53u), second = lower_product(x2, 0xCD9E8D57u);
    x0 = second >> 32 ^ x1 ^ k0;
    x1 = second;
    x2 = first >> 32 ^ x3 ^ k1;
    x3 = first;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {x0, x1, x2, x3};
}

// Which positions dropout keeps: those whose word w gives a u = (w >> 8) 2^-24 >= dropout. In integers that is
// w >= limit: u and dropout 2^24 are exact, powers of two away from w >> 8 and dropout, and an integer is at least a
// number where it is at least the number's ceiling; w >> 8 >= c is w >= c 2^8. Where dropout is near 1 the limit is 2^32.
class Kept {
 public:
  Kept(double dropout, int64_t seed)
      : seed_(static_cast<uint64_t>(seed)), limit_(static_cast<uint64_t>(std::ceil(dropout * 0x1p24)) << 8) {}

  // Bit n of a lane is whether its position + n is kept, for n < count <= 64; the bits above are of no meaning.
  Counters neighbours(Counters position, int64_t count) const {
    const Counters skipped = position & 3, first = position >> 2;
    const bool is_aligned = sum_of<uint64_t, kCounters>(skipped) == 0;
    const int64_t numbers = count + (is_aligned ? 0 : 3);
    Counters dropped{}, last{};
    for (int n = 0; n < 16 && 4 * n < numbers; ++n) dropped |= dropped_of(first + static_cast<uint64_t>(n)) << (4 * n);
    if (numbers > 64) last = dropped_of(first + 16);
    return is_aligned ? ~dropped : ~(dropped >> skipped | last << 1 << (63 - skipped));
  }

  // The same of position + n * step.
  Counters apart(Counters position, uint64_t step, int64_t count) const {
    if (step == 1) return neighbours(position, count);
    Counters dropped{};
    for (int64_t n = 0; n < count; ++n, position += step) {
      dropped |= (dropped_of(position >> 2) >> (position & 3) & 1) << static_cast<int>(n);
    }
    return ~dropped;
  }

 private:
  uint64_t seed_, limit_;

  // Bit n of a lane, n < 4, is whether word n at its counter drops a position; the bits above are 0.
  ANYATTENTION_INLINE Counters dropped_of(Counters counter) const {
    constexpr uint64_t lower = 0xFFFFFFFFu;
    const Words words = philox(seed_, {counter, counter >> 32, Counters{}, Counters{}});
    const auto is_dropped = [this](Counters word) { return ((word & lower) - limit_) >> 63; };
    return is_dropped(words.x0) | is_dropped(words.x1) << 1 | is_dropped(words.x2) << 2 | is_dropped(words.x3) << 3;
  }
};

}  // namespace anyattention

#endif
