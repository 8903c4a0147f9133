// Large results in large pages: touching 25 MB for the first time costs 6,400 page faults in 4 KiB pages, as much as
// some of the kernels here.
#ifndef ANYATTENTION_PAGES_H
#define ANYATTENTION_PAGES_H

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace anyattention {

// Asks for large pages where the memory is not touched yet. Only advice: nothing depends on the answer.
inline void prefer_large_pages(void *pointer, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  constexpr int64_t smallest = int64_t{4} << 20;
  if (!pointer || bytes < smallest) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(pointer) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(pointer) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)pointer, (void)bytes;
#endif
}

}  // namespace anyattention

#endif
