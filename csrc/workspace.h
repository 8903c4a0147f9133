// Memory that a kernel needs for the length of a call.
#ifndef ANYATTENTION_WORKSPACE_H
#define ANYATTENTION_WORKSPACE_H

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "pages.h"

namespace anyattention {

struct FreeMemory {
  void operator()(void *pointer) const { std::free(pointer); }
};

struct Block {
  std::unique_ptr<void, FreeMemory> memory;
  std::size_t bytes = 0;
};

constexpr std::size_t kLargeBlock = std::size_t{1} << 22;

// A few blocks that calls of this thread gave back, for its next calls. Left to the allocator, memory at the end of the
// heap may go back to the system with each call, and come again as pages of zeros: 0.9 of 2.5 ms in a small backward.
class KeptBlocks {
 public:
  // A block of at least so many bytes, and of less than twice as many; throws std::bad_alloc.
  static Block take(std::size_t bytes) {
    for (Block &kept : blocks_)
      if (kept.memory && kept.bytes >= bytes && kept.bytes / 2 < bytes) return std::exchange(kept, Block{});
    Block made{std::unique_ptr<void, FreeMemory>(std::aligned_alloc(64, bytes)), bytes};
    if (!made.memory) throw std::bad_alloc();
    prefer_large_pages(made.memory.get(), static_cast<int64_t>(bytes));
    return made;
  }

  static void give_back(Block block) {
    if (block.bytes > kLargest) return;
    std::swap(blocks_[next_], block);
    next_ = (next_ + 1) % blocks_.size();
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr std::size_t kLargest = 0;  // a step outside is seen where each block has its own size
#else
  static constexpr std::size_t kLargest = kLargeBlock;
#endif
  static inline thread_local std::array<Block, 4> blocks_;
  static inline thread_local std::size_t next_ = 0;
};

// 64-byte aligned numbers, 0 unless told otherwise, padded so that a vector may run past the end; throws std::bad_alloc.
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t count, bool zeroed = true, bool written_first = false) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 191) / 64 * 64;
    if (zeroed && written_first && bytes > kLargeBlock) {
      // Fresh pages are zero already, but read first they would fault twice. 64 bytes more to align what calloc gives.
      block_ = Block{std::unique_ptr<void, FreeMemory>(std::calloc(bytes + 64, 1)), bytes};
      if (!block_.memory) throw std::bad_alloc();
      prefer_large_pages(block_.memory.get(), static_cast<int64_t>(bytes));
    } else {
      block_ = KeptBlocks::take(bytes);
      if (zeroed) std::fill_n(static_cast<char *>(block_.memory.get()), bytes, char{0});
    }
    const auto address = reinterpret_cast<uintptr_t>(block_.memory.get());
    numbers_ = reinterpret_cast<T *>((address + 63) / 64 * 64);
  }
  ~Workspace() { KeptBlocks::give_back(std::move(block_)); }
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;
  T *get() const { return numbers_; }

 private:
  Block block_;
  T *numbers_;
};

}  // namespace anyattention

#endif
