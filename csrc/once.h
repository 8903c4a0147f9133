// Index arrays are the caller's, and another of its threads may write to them at any moment. So an index is read once,
// what was read is compared with its bounds, and that is what is used.
#ifndef ANYATTENTION_ONCE_H
#define ANYATTENTION_ONCE_H

#include <algorithm>
#include <cstdint>

namespace anyattention {

// What comes out of the empty assembly is not known to be what lies in memory, so the compiler cannot read it again. A
// volatile or an atomic load would keep it from holding a loop's sums in registers, which is up to a third of its time.
inline int64_t read_once(const int64_t *from) {
  int64_t index = *from;
  asm("" : "+r"(index));
  return index;
}

// The same for an array: after the barrier the compiler can no longer take the original for the copy.
inline void copy_once(const int64_t *from, int64_t count, int64_t *to) {
  std::copy_n(from, count, to);
  asm volatile("" : : "r"(to) : "memory");
}

// Whether an index lies below a bound; one unsigned comparison finds negative ones, too.
inline bool is_below(int64_t index, int64_t bound) { return static_cast<uint64_t>(index) < static_cast<uint64_t>(bound); }

}  // namespace anyattention

#endif
