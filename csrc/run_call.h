// What the kernels of attention over runs share: a call that is checked and cut into tiles, sums over many keys, and the
// slices of queries that a backward pass sums up apart.
#ifndef ANYATTENTION_RUN_CALL_H
#define ANYATTENTION_RUN_CALL_H

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "anyattention.h"
#include "simd.h"
#include "tiles.h"

namespace anyattention {

template <class T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// Sums over a query's keys are summed up in blocks of so many tiles of keys, and then over the blocks: the rounding of one
// sum grows with its number of terms, here with a root of it.
constexpr std::size_t kBlock = 16;

// Moves sums to those of the blocks before.
template <class T>
void put_aside(T *sums, int64_t size, T *earlier, bool is_first) {
  if (is_first) std::fill_n(earlier, size, T{0});
  add(earlier, sums, size);
  std::fill_n(sums, size, T{0});
}

// Runs run(part) for a call's part, which is checked before.
template <class Run>
int32_t guarded(const anyattention_run_attention_call *call, const Run &run) {
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  Part part(*call);
  if (!part.is_valid()) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    part.copy_arrays();
    if (!part.is_in_range()) return ANYATTENTION_OUT_OF_RANGE;
    part.cut_tiles();
    run(part);
    return ANYATTENTION_OK;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

// Some tiles of queries, and the keys from the first to the last that they see.
struct Slice {
  int64_t begin, end;
  Range keys;
  int64_t place;  // of its first key among the keys of all slices
};

// Whether queries have numbers of their own.
inline bool slices_are_apart(const anyattention_pairs &pairs) { return pairs.strides[2] != 0 && pairs.strides[3] >= 0; }

// The tiles of queries in as many slices as make sixteen tasks with the batch entries and key heads, whatever the threads.
// Sums of keys have a row for each batch entry, key head, slice and key that it sees. Tasks that add to the same numbers of a
// bias are no tasks apart; a copy of its gradient would cost more than smaller slices.
class Slices {
 public:
  Slices(const Part &p, const anyattention_pairs *gradient) : part(p) {
    const bool has_rows = gradient && slices_are_apart(*gradient);
    const int64_t batch = has_rows && gradient->strides[0] == 0 ? 1 : part.c.batch;
    const int64_t heads = batch * (has_rows && gradient->strides[1] == 0 ? 1 : part.G);
    const int64_t wanted = (16 + heads - 1) / std::max<int64_t>(heads, 1), least = has_rows ? 4 : 8;
    const int64_t count = std::max<int64_t>(1, std::min(wanted, part.query_tiles() / least));
    for (int64_t n = 0; n < count; ++n) {
      const int64_t begin = part.query_tiles() * n / count, end = part.query_tiles() * (n + 1) / count;
      slices.push_back({begin, end, part.keys_of(begin, end), num_keys});
      num_keys += slices.back().keys.end - slices.back().keys.begin;
    }
  }

  int64_t count() const { return static_cast<int64_t>(slices.size()); }
  const Slice &operator[](int64_t n) const { return slices[static_cast<std::size_t>(n)]; }
  int64_t num_rows() const { return part.c.batch * part.G * num_keys; }
  int64_t row(const Slice &slice, int64_t b, int64_t g, int64_t j) const {
    return (b * part.G + g) * num_keys + slice.place + j - slice.keys.begin;
  }
  // Adds a key's sums (padded rows), slice by slice, to a row (width).
  template <class T>
  void add_up(int64_t b, int64_t g, int64_t j, const T *sums, int64_t padded, int64_t width, T *to) const {
    for (const Slice &slice : slices) {
      if (j >= slice.keys.begin && j < slice.keys.end) add(to, sums + row(slice, b, g, j) * padded, width);
    }
  }

 private:
  const Part &part;
  std::vector<Slice> slices;
  int64_t num_keys = 0;  // of all slices
};

}  // namespace anyattention

#endif
