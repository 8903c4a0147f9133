// A stable counting sort of edges by row.
//
// The edges are cut into chunks of equal size, each counted and placed by one
// thread. Within a row, chunk c writes behind all edges of the chunks before it,
// so the result does not depend on where the cuts are.
//
// Edges are read twice, and another thread may change them in between: then a row does not end where it was counted to
// end, and the edge list is refused.
//
//   e  edge, in the caller's order     r  row     c  chunk     b  block of rows

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "anyattention.h"
#include "once.h"
#include "team.h"
#include "workspace.h"

namespace {

using anyattention::is_below, anyattention::read_once;

constexpr int64_t kEdgesPerChunk = 1 << 15;
constexpr double kPerEdge = 3, kPerRow = 1;  // nanoseconds of one thread

struct Edges {
  const int64_t *rows;
  const int64_t *columns;
  int64_t num_rows;
  int64_t num_columns;

  // Adds up the edges of each row; returns the first edge out of range, or -1.
  int64_t count(int64_t begin, int64_t end, int64_t *counts) const {
    for (int64_t e = begin; e < end; ++e) {
      const int64_t row = read_once(rows + e);
      if (!is_below(row, num_rows) || !is_below(read_once(columns + e), num_columns)) return e;
      ++counts[row];
    }
    return -1;
  }

  // cursors[r] is the slot of the next edge of row r, and moves on. False where an edge has changed and has no slot.
  bool place(int64_t begin, int64_t end, int64_t *cursors, int64_t num_slots, int64_t *slot_columns,
             int64_t *slot_edges) const {
    for (int64_t e = begin; e < end; ++e) {
      const int64_t row = read_once(rows + e), column = read_once(columns + e);
      if (!is_below(row, num_rows) || !is_below(column, num_columns)) return false;
      const int64_t slot = cursors[row]++;
      if (slot >= num_slots) return false;
      slot_columns[slot] = column;
      slot_edges[slot] = e;
    }
    return true;
  }
};

constexpr int64_t kNone = -1, kChanged = -2;  // in place of a bad edge

// cursors (num_rows) is a workspace.
int64_t sort_in_one_chunk(const Edges &edges, int64_t num_edges, int64_t *cursors, int64_t *row_offsets,
                          int64_t *slot_columns, int64_t *slot_edges) {
  const int64_t num_rows = edges.num_rows;
  std::fill_n(row_offsets, num_rows + 1, int64_t{0});
  const int64_t bad = edges.count(0, num_edges, row_offsets);
  if (bad >= 0) return bad;

  int64_t total = 0;
  for (int64_t r = 0; r <= num_rows; ++r) {
    const int64_t count = row_offsets[r];
    row_offsets[r] = total;
    total += count;
  }
  std::copy_n(row_offsets, num_rows, cursors);
  if (!edges.place(0, num_edges, cursors, num_edges, slot_columns, slot_edges)) return kChanged;
  return std::equal(cursors, cursors + num_rows, row_offsets + 1) ? kNone : kChanged;
}

// counts (chunks, num_rows) and partial (chunks) are zeroed workspaces, cursors is one of the size of counts.
int64_t sort_in_chunks(const Edges &edges, int64_t num_edges, int64_t chunks, int64_t *counts, int64_t *cursors,
                       int64_t *partial, int64_t *row_offsets, int64_t *slot_columns,
                       int64_t *slot_edges) {
  const int64_t num_rows = edges.num_rows;
  const int threads = static_cast<int>(chunks);
  const auto edge_cut = [=](int64_t c) { return num_edges / chunks * c + std::min(c, num_edges % chunks); };
  const auto row_cut = [=](int64_t b) { return num_rows / chunks * b + std::min(b, num_rows % chunks); };

#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t c = 0; c < chunks; ++c)
    partial[c] = edges.count(edge_cut(c), edge_cut(c + 1), counts + c * num_rows);
  for (int64_t c = 0; c < chunks; ++c)
    if (partial[c] >= 0) return partial[c];

  // Counts become starts in two steps: sums of blocks of rows, then rows inside a block.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t b = 0; b < chunks; ++b) {
    int64_t sum = 0;
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t r = row_cut(b); r < row_cut(b + 1); ++r) sum += counts[c * num_rows + r];
    partial[b] = sum;
  }
  int64_t total = 0;
  for (int64_t b = 0; b < chunks; ++b) {
    const int64_t sum = partial[b];
    partial[b] = total;
    total += sum;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t b = 0; b < chunks; ++b) {
    int64_t next = partial[b];
    for (int64_t r = row_cut(b); r < row_cut(b + 1); ++r) {
      row_offsets[r] = next;
      for (int64_t c = 0; c < chunks; ++c) {
        int64_t &count = counts[c * num_rows + r];
        const int64_t start = next;
        next += count;
        count = start;
      }
    }
  }
  row_offsets[num_rows] = num_edges;

#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t *own = cursors + c * num_rows;
    std::copy_n(counts + c * num_rows, num_rows, own);
    const int64_t *ends = c + 1 < chunks ? counts + (c + 1) * num_rows : row_offsets + 1;
    const bool placed = edges.place(edge_cut(c), edge_cut(c + 1), own, num_edges, slot_columns, slot_edges);
    partial[c] = placed && std::equal(own, own + num_rows, ends);
  }
  return std::all_of(partial, partial + chunks, [](int64_t placed) { return placed; }) ? kNone : kChanged;
}

}  // namespace

extern "C" int32_t anyattention_compressed_rows(
    const int64_t *rows, const int64_t *columns, int64_t num_edges, int64_t num_rows,
    int64_t num_columns, int64_t num_threads, int64_t *row_offsets, int64_t *slot_columns,
    int64_t *slot_edges, int64_t *bad_edge) {
  if (num_edges < 0 || num_rows < 0 || num_columns < 0 || !row_offsets || !bad_edge)
    return ANYATTENTION_INVALID_ARGUMENT;
  if (num_edges > 0 && (!rows || !columns || !slot_columns || !slot_edges))
    return ANYATTENTION_INVALID_ARGUMENT;

  // Each chunk needs a counter per row: together no more counters than edges.
  const Edges edges{rows, columns, num_rows, num_columns};
  const int64_t most = std::min(num_edges / kEdgesPerChunk, num_edges / std::max<int64_t>(num_rows, 1));
  const double nanoseconds = static_cast<double>(num_edges) * kPerEdge + static_cast<double>(num_rows) * kPerRow;
  const int64_t chunks = anyattention::team_size(num_threads, most, nanoseconds);
  int64_t bad;
  const auto cursors = anyattention::allocate<int64_t>(std::max<int64_t>(chunks, 1) * num_rows);
  if (!cursors) return ANYATTENTION_OUT_OF_MEMORY;
  if (chunks <= 1) {
    bad = sort_in_one_chunk(edges, num_edges, cursors.get(), row_offsets, slot_columns, slot_edges);
  } else {
    const auto counts = anyattention::allocate<int64_t>(chunks * num_rows);
    const auto partial = anyattention::allocate<int64_t>(chunks);
    if (!counts || !partial) return ANYATTENTION_OUT_OF_MEMORY;
    bad = sort_in_chunks(edges, num_edges, chunks, counts.get(), cursors.get(), partial.get(), row_offsets,
                         slot_columns, slot_edges);
  }
  *bad_edge = std::max(bad, kNone);
  return bad == kNone ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
}
