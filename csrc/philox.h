// Philox4x32-10 (Salmon et al., 2011): position n of a row-major array takes word n % 4 at counter n / 4.
#ifndef ANYATTENTION_PHILOX_H
#define ANYATTENTION_PHILOX_H

#include <cstdint>

namespace anyattention {

inline void philox(uint64_t counter, uint64_t seed, uint32_t words[4]) {
  uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32);
  uint32_t x2 = 0, x3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(x0) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(x2) * 0xCD9E8D57u;
    x0 = static_cast<uint32_t>(second >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(second);
    x2 = static_cast<uint32_t>(first >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}

// The factors of `count` positions from `position` on: 0 with probability `dropout`, else `kept`.
template <class T>
inline void keep_factors(uint64_t position, int64_t count, uint64_t seed, double dropout, T kept,
                         T *factors) {
  uint32_t words[4];
  uint64_t counter = ~uint64_t{0};
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t n = position + static_cast<uint64_t>(i);
    if (n / 4 != counter) philox(counter = n / 4, seed, words);
    const double uniform = static_cast<double>(words[n % 4] >> 8) * 0x1p-24;
    factors[i] = uniform >= dropout ? kept : T{0};
  }
}

}  // namespace anyattention

#endif
