// What all drivers of random calls share: random numbers, arrays of exactly their size, and what must hold.
#ifndef ANYATTENTION_TESTS_RANDOM_ARRAYS_H
#define ANYATTENTION_TESTS_RANDOM_ARRAYS_H

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "meddler.h"

namespace tests {

inline std::mt19937_64 generator;

inline int64_t up_to(int64_t last) { return std::uniform_int_distribution<int64_t>(0, last)(generator); }
inline bool chance(double probability) { return std::uniform_real_distribution<double>(0, 1)(generator) < probability; }
template <class T>
T one_of(const std::vector<T> &choices) {
  return choices[static_cast<std::size_t>(up_to(static_cast<int64_t>(choices.size()) - 1))];
}

// Whether other threads may write into index arrays in this round.
inline bool is_meddled = false;

inline void require(bool holds, const char *what, long long detail = 0) {
  if (holds || is_meddled) return;
  std::fprintf(stderr, "failed: %s (%lld)\n", what, detail);
  std::exit(1);
}

// Exactly `count` numbers on the heap; null where there are none, as torch has it.
template <class T>
struct Array {
  std::unique_ptr<T[]> numbers;
  int64_t count = 0;

  explicit Array(int64_t n) : numbers(n > 0 ? new T[static_cast<std::size_t>(n)]() : nullptr), count(n) {}
  T *get() const { return numbers.get(); }
  T &operator[](int64_t i) const { return numbers[static_cast<std::size_t>(i)]; }
};

// Writes into some arrays in the rounds where others may.
inline std::unique_ptr<Meddler> meddler_of(const std::vector<const Array<int64_t> *> &arrays) {
  if (!is_meddled) return nullptr;
  std::vector<IndexArray> found;
  for (const Array<int64_t> *array : arrays) found.push_back({array->get(), array->count});
  return std::make_unique<Meddler>(found, generator());
}

}  // namespace tests

#endif
