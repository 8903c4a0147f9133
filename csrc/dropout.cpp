// The factors of dropout as an array, where a caller needs them as one.

#include <algorithm>
#include <cstdint>

#include "anyattention.h"
#include "philox.h"
#include "team.h"

namespace anyattention {
namespace {

constexpr int64_t kGroup = 64 * kCounters;  // positions that are drawn at a time

template <class T>
void fill(int64_t begin, int64_t end, const Kept &kept, T factor, T *factors) {
  Counters position{};
  for (int lane = 0; lane < kCounters; ++lane) position[lane] = static_cast<uint64_t>(begin + 64 * lane);
  const Counters bits = kept.neighbours(position, 64);
  for (int64_t n = begin; n < end; n += 64) {
    const uint64_t own = bits[(n - begin) / 64];
    const int64_t count = std::min<int64_t>(64, end - n);
    for (int64_t i = 0; i < count; ++i) factors[n + i] = own >> i & 1 ? factor : T{0};
  }
}

template <class T>
void fill_all(int64_t count, int64_t seed, double dropout, int64_t num_threads, T *factors) {
  const Kept kept(dropout, seed);
  const T factor = static_cast<T>(1 / (1 - dropout));
  const int64_t groups = (count + kGroup - 1) / kGroup;
  const int team = team_size(num_threads, groups, static_cast<double>(count));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t n = 0; n < groups; ++n) fill(n * kGroup, std::min(count, (n + 1) * kGroup), kept, factor, factors);
}

}  // namespace
}  // namespace anyattention

extern "C" int32_t anyattention_keep_factors(int64_t count, int64_t seed, double dropout, int64_t num_threads,
                                             int32_t is_double, void *factors) {
  if (count < 0 || !(dropout >= 0 && dropout < 1) || num_threads < 1) return ANYATTENTION_INVALID_ARGUMENT;
  if (count > 0 && !factors) return ANYATTENTION_INVALID_ARGUMENT;
  if (is_double) {
    anyattention::fill_all(count, seed, dropout, num_threads, static_cast<double *>(factors));
  } else {
    anyattention::fill_all(count, seed, dropout, num_threads, static_cast<float *>(factors));
  }
  return ANYATTENTION_OK;
}
