// The largest scores so far of some columns. A candidate is one integer in which a larger score stands above a smaller one,
// NaN above all, and among equal scores the first place above the others: whatever was thrown away, and when, the largest
// are the same.
#ifndef ANYATTENTION_CANDIDATES_H
#define ANYATTENTION_CANDIDATES_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

namespace anyattention {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline uint64_t candidate(float score, int64_t place) {
  score += 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = score != score ? ~uint32_t{0} : bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
  return uint64_t{bits} << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(place));
}

inline int64_t place_of(uint64_t candidate) { return static_cast<uint32_t>(~candidate); }

// The score of a candidate; infinity for NaN, so that no number is larger.
inline float score_of(uint64_t candidate) {
  auto bits = static_cast<uint32_t>(candidate >> 32);
  bits = bits >> 31 ? bits & ~(uint32_t{1} << 31) : ~bits;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score != score ? kInfinity : score;
}

// As std::nth_element with std::greater, for numbers that all differ: comparisons of random numbers are added up here,
// where a branch on them would be guessed wrong half of the time.
inline void put_largest_first(uint64_t *begin, uint64_t *nth, uint64_t *end) {
  for (int round = 0; round < 32 && end - begin > 1; ++round) {
    uint64_t *last = end - 1, *middle = begin + (end - begin) / 2;
    if (*middle < *begin) std::swap(*middle, *begin);
    if (*last < *middle) std::swap(*last, *middle);
    if (*middle < *begin) std::swap(*middle, *begin);
    std::swap(*middle, *last);
    const uint64_t pivot = *last;
    uint64_t *larger = begin;
    for (uint64_t *at = begin; at < last; ++at) {
      const uint64_t number = *at;
      *at = *larger;
      *larger = number;
      larger += number > pivot;
    }
    std::swap(*larger, *last);
    if (larger == nth) return;
    (larger < nth ? begin : end) = larger < nth ? larger + 1 : larger;
  }
  std::nth_element(begin, nth, end, std::greater<uint64_t>());
}

// The best of each column's candidates: `kept` of them, and some that came since.
class Candidates {
 public:
  // Numbers of `memory` for a column.
  static int64_t capacity(int64_t kept) { return kept + std::max<int64_t>(kept, 32); }

  Candidates(int64_t kept, uint64_t *memory, int64_t *sizes, float *thresholds)
      : thresholds(thresholds), kept_(kept), capacity_(capacity(kept)), memory_(memory), sizes_(sizes) {}

  // Of a column: scores that are not larger are none of its best. They begin at -infinity.
  float *const thresholds;

  // The places of a column rise from one to the next: of scores that equal its threshold the first were taken.
  void take(int64_t column, float score, int64_t place) {
    if (score <= thresholds[column]) return;
    memory_[column * capacity_ + sizes_[column]++] = candidate(score, place);
    if (sizes_[column] == capacity_) prune(column);
  }
  // Leaves a column the best of its candidates, the largest first; returns how many.
  int64_t sort(int64_t column) {
    prune(column);
    std::sort(begin(column), begin(column) + sizes_[column], std::greater<uint64_t>());
    return sizes_[column];
  }
  uint64_t *begin(int64_t column) const { return memory_ + column * capacity_; }

 private:
  void prune(int64_t column) {
    if (sizes_[column] < kept_ || sizes_[column] == 0) return;
    uint64_t *mine = begin(column), *last = mine + kept_ - 1;
    put_largest_first(mine, last, mine + sizes_[column]);
    sizes_[column] = kept_;
    thresholds[column] = score_of(*last);
  }

  int64_t kept_, capacity_;
  uint64_t *memory_;
  int64_t *sizes_;
};

}  // namespace anyattention

#endif
