// The gradient of a bias, to which many tasks may add: those of batch entries and heads that share its numbers.
#ifndef ANYATTENTION_BIAS_GRADIENT_H
#define ANYATTENTION_BIAS_GRADIENT_H

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <optional>

#include "anyattention.h"
#include "pages.h"
#include "run_call.h"
#include "simd.h"
#include "tile_bias.h"
#include "workspace.h"

namespace anyattention {

// Whether a call has a bias, and these lie as its gradient: contiguous, each axis whole or 1, or by distance.
inline bool is_gradient(const anyattention_pairs &pairs, const anyattention_run_attention_call &c) {
  if (!pairs.numbers || !c.bias.numbers || pairs.size < 0) return false;
  const int64_t distances = std::max<int64_t>(c.num_queries + c.num_keys - 1, 0);
  const int64_t by_head = pairs.strides[1];
  if (pairs.strides[3] == -1) {
    return pairs.strides[0] == 0 && (by_head == 0 || by_head == distances) && pairs.strides[2] == 1 &&
           pairs.offset == std::max<int64_t>(c.num_keys - 1, 0) && pairs.size == (by_head ? c.heads : 1) * distances;
  }
  const int64_t sizes[] = {c.batch, c.heads, c.num_queries, c.num_keys};
  int64_t size = 1;
  for (int axis = 3; axis >= 0; --axis) {
    if (pairs.strides[axis] == 0) continue;
    if (pairs.strides[axis] != size) return false;
    size *= sizes[axis];
  }
  return pairs.offset == 0 && pairs.size == size;
}

// A task is a batch entry, a key head and a slice of the queries. Tasks that add to the same numbers are one piece of work,
// one after the other; where that leaves less than sixteen pieces, several, each with numbers of its own that are added up in
// order. So nothing depends on the threads. Without a gradient each task is a piece.
template <class T>
class BiasGradient {
 public:
  // What is there stays where the gradient `adds` to it.
  BiasGradient(const Part &p, const Slices &s, const anyattention_pairs *pairs, bool a)
      : part(p), slices(s), gradient(pairs ? *pairs : anyattention_pairs{}), adds(a) {
    const int64_t tasks = part.c.batch * part.G * slices.count();
    own = pairs ? Axes{gradient.strides[0] ? part.c.batch : 1, gradient.strides[1] ? part.G : 1,
                       slices_are_apart(gradient) ? slices.count() : 1}
                : Axes{part.c.batch, part.G, slices.count()};
    shared = {part.c.batch / std::max<int64_t>(own.batch, 1), part.G / own.heads, slices.count() / own.slices};
    const int64_t cells = std::max<int64_t>(own.size(), 1);
    parts = std::max<int64_t>(std::min(tasks / cells, (kPieces + cells - 1) / cells), 1);
    copies.emplace((parts - 1) * gradient.size, false);
    if (!adds) prefer_large_pages(numbers_of(0), gradient.size * static_cast<int64_t>(sizeof(T)));
  }

  int64_t num_pieces() const { return own.size() * parts; }

  // In a team: before the tasks, what the first of them do not write.
  void clear() const {
    const bool is_written = is_written_in_rows(part, gradient) && shared.size() > 0;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < (is_written ? 0 : parts * num_blocks()); ++n) {
      if (n < num_blocks() && adds) continue;
      const Range block = block_of(n % num_blocks());
      std::fill(numbers_of(n / num_blocks()) + block.begin, numbers_of(n / num_blocks()) + block.end, T{0});
    }
  }

  // Runs run(batch entry, key head, slice, target) for each task of a piece.
  template <class Run>
  void each_task(int64_t piece, const Run &run) const {
    const int64_t cell = piece / parts, n = piece % parts;
    const int64_t s = cell % own.slices, g = cell / own.slices % own.heads, b = cell / own.slices / own.heads;
    const int64_t begin = shared.size() * n / parts, end = shared.size() * (n + 1) / parts;
    for (int64_t task = begin; task < end; ++task) {
      // An axis is all a cell's own, or all shared.
      const int64_t head = g + task / shared.slices % shared.heads;
      const bool is_first = task == begin && (n > 0 || !adds);
      run(b + task / shared.slices / shared.heads, head, slices[s + task % shared.slices],
          BiasTarget<T>{gradient, gradient.numbers ? numbers_of(n) : nullptr, is_first, head * (part.H / part.G)});
    }
  }

  // In the team: after the tasks.
  void add_up() const {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < num_blocks(); ++n) {
      const Range block = block_of(n);
      for (int64_t copy = 1; copy < parts; ++copy) {
        add(numbers_of(0) + block.begin, numbers_of(copy) + block.begin, block.end - block.begin);
      }
    }
  }

 private:
  struct Axes {
    int64_t batch, heads, slices;
    int64_t size() const { return batch * heads * slices; }
  };
  static constexpr int64_t kPieces = 16, kBlockSize = 1 << 14;

  const Part &part;
  const Slices &slices;
  anyattention_pairs gradient;
  bool adds;
  Axes own, shared;  // of each axis, how many of its places have numbers of their own, and how many share them
  int64_t parts;     // of the tasks that share numbers
  std::optional<Workspace<T>> copies;

  T *numbers_of(int64_t n) const {
    if (n == 0) return static_cast<T *>(const_cast<void *>(gradient.numbers));
    return copies->get() + (n - 1) * gradient.size;
  }
  int64_t num_blocks() const { return (gradient.size + kBlockSize - 1) / kBlockSize; }
  Range block_of(int64_t n) const { return {n * kBlockSize, std::min((n + 1) * kBlockSize, gradient.size)}; }
};

// Runs differentiate(slice, place, b, g, bias, tile, scratch) for each slice, batch entry and key head, a task with sums of its
// own: place is the row of its first sum of a key, and bias where the gradient of the bias goes. Then, when all are done,
// add_up(b, g, j) for each key.
template <class T, class Differentiate, class AddUp>
void each_slice(const Part &part, const Slices &slices, const BiasGradient<T> &bias, int64_t scratch_size,
                double nanoseconds, const Differentiate &differentiate, const AddUp &add_up) {
  const int team = team_size(part.c.num_threads, bias.num_pieces(), nanoseconds);
  const Workspace<T> scratch(team * scratch_size, false);
  std::atomic<bool> has_memory{true};
#pragma omp parallel num_threads(team) if (team > 1)
  {
    QueryTile tile(part);
    bias.clear();
#pragma omp for schedule(dynamic, 1)
    for (int64_t piece = 0; piece < bias.num_pieces(); ++piece) {
      try {
        bias.each_task(piece, [&](int64_t b, int64_t g, const Slice &slice, const BiasTarget<T> &target) {
          differentiate(slice, slices.row(slice, b, g, slice.keys.begin), b, g, target, tile,
                        scratch.get() + thread_number() * scratch_size);
        });
      } catch (const std::bad_alloc &) {
        has_memory = false;
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < part.c.batch * part.G * part.c.num_keys; ++n) {
      add_up(n / part.c.num_keys / part.G, n / part.c.num_keys % part.G, n % part.c.num_keys);
    }
    bias.add_up();
  }
  if (!has_memory) throw std::bad_alloc();
}

}  // namespace anyattention

#endif
