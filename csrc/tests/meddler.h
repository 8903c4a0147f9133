// Another thread of the caller, that writes into index arrays while kernels read them.
#ifndef ANYATTENTION_TESTS_MEDDLER_H
#define ANYATTENTION_TESTS_MEDDLER_H

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

struct IndexArray {
  int64_t *indices;
  int64_t count;
};

// For as long as it lives, one index after the other becomes another of its array, a neighbour of it or one that no array
// has, stays so for a while, and is put back.
class Meddler {
 public:
  Meddler(const std::vector<IndexArray> &arrays, uint64_t seed) : random_(seed) {
    for (const IndexArray &array : arrays) {
      if (array.count > 0) arrays_.push_back(array);
    }
    if (!arrays_.empty()) thread_ = std::thread([this] { meddle(); });
  }
  ~Meddler() {
    stops_ = true;
    if (thread_.joinable()) thread_.join();
  }
  Meddler(const Meddler &) = delete;
  Meddler &operator=(const Meddler &) = delete;

 private:
  void meddle() {
    while (!stops_) {
      const IndexArray &array = arrays_[random_() % arrays_.size()];
      int64_t *index = array.indices + random_() % static_cast<uint64_t>(array.count);
      const int64_t before = __atomic_load_n(index, __ATOMIC_RELAXED);
      __atomic_store_n(index, other_than(before, array), __ATOMIC_RELAXED);
      for (uint64_t left = random_() % 2000; left > 0 && !stops_; --left) std::atomic_signal_fence(std::memory_order_seq_cst);
      __atomic_store_n(index, before, __ATOMIC_RELAXED);
    }
  }

  int64_t other_than(int64_t index, const IndexArray &array) {
    const auto number = static_cast<uint64_t>(index);
    const int64_t wild[] = {-1, INT64_MIN, INT64_MAX, int64_t{1} << 40, array.count, static_cast<int64_t>(number + 1),
                            static_cast<int64_t>(number - 1)};
    const uint64_t kind = random_() % 10;
    return kind < 7 ? wild[kind] : array.indices[random_() % static_cast<uint64_t>(array.count)];
  }

  std::mt19937_64 random_;
  std::vector<IndexArray> arrays_;
  std::atomic<bool> stops_{false};
  std::thread thread_;
};

#endif
