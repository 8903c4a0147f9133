// Runs a reduction over each row of compressed rows, in parallel and with one result for any number of threads.
//
// Short rows are whole pieces of work. A long row is cut every kSlotsPerPiece slots, each piece reduced into an
// accumulator of its own, and the pieces combined in order.
#ifndef ANYATTENTION_ROWS_H
#define ANYATTENTION_ROWS_H

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "anyattention.h"
#include "once.h"
#include "workspace.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace anyattention {

constexpr int64_t kPrefetch = 16;  // slots ahead
constexpr int64_t kSlotsPerPiece = 2048;
// What a thread takes at a time; small, so that threads end together on a small graph too.
constexpr int64_t kSlotsPerTurn = 1024;
// Of short rows that are read together, so that they stay in the first cache.
constexpr int64_t kSlotsPerWindow = 64;

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// One direction of a graph: the rows that reduce, and for each slot its column and edge.
struct CompressedRows {
  int64_t num_rows, num_columns, num_edges;
  const int64_t *offsets, *columns, *edges;

  // Copies the offsets to num_rows + 1 numbers; whether they rise from 0 to num_edges.
  bool copy_offsets(int64_t *to) const {
    copy_once(offsets, num_rows + 1, to);
    return offsets_rise(to);
  }
  // Whether the arrays are there, and the offsets rise at this moment: kernels copy them.
  bool is_valid() const { return offsets && (num_edges == 0 || (columns && edges)) && offsets_rise(offsets); }
  bool offsets_rise(const int64_t *from) const {
    if (from[0] != 0 || from[num_rows] != num_edges) return false;
    for (int64_t r = 0; r < num_rows; ++r) {
      if (from[r] > from[r + 1]) return false;
    }
    return true;
  }
};

// Some slots of one row, in range. kPrefetch more may be read: those after them, or zeros.
struct Slots {
  int64_t count;
  const int64_t *columns, *edges;
};

// A thread's own copy of the slots of a few rows, or of one piece of a long row.
class SlotWindow {
 public:
  // False where an index is out of range.
  bool read(const CompressedRows &rows, int64_t begin, int64_t end) {
    const int64_t count = end - begin, there = std::min(end + kPrefetch, rows.num_edges) - begin;
    copy_once(rows.columns + begin, there, columns_);
    copy_once(rows.edges + begin, there, edges_);
    for (int64_t n = 0; n < kSlotsPerWindow; n += 8) {
      __builtin_prefetch(rows.columns + begin + there + n);
      __builtin_prefetch(rows.edges + begin + there + n);
    }
    bool valid = true;
    for (int64_t n = 0; n < count; ++n) valid &= is_below(columns_[n], rows.num_columns);
    for (int64_t n = 0; n < count; ++n) valid &= is_below(edges_[n], rows.num_edges);
    for (int64_t n = count; n < count + kPrefetch; ++n) {
      if (n < there && is_below(columns_[n], rows.num_columns) && is_below(edges_[n], rows.num_edges)) continue;
      columns_[n] = edges_[n] = 0;
    }
    begin_ = begin;
    return valid;
  }
  Slots slots(int64_t begin, int64_t end) const {
    return {end - begin, columns_ + (begin - begin_), edges_ + (begin - begin_)};
  }

 private:
  int64_t begin_ = 0;
  int64_t columns_[kSlotsPerPiece + kPrefetch], edges_[kSlotsPerPiece + kPrefetch];
};

inline CompressedRows rows_of_queries(const anyattention_graph_arrays &graph) {
  return {graph.num_queries,   graph.num_keys,      graph.num_edges,
          graph.query_offsets, graph.keys_by_query, graph.edges_by_query};
}

inline CompressedRows rows_of_keys(const anyattention_graph_arrays &graph) {
  return {graph.num_keys,    graph.num_queries,    graph.num_edges,
          graph.key_offsets, graph.queries_by_key, graph.edges_by_key};
}

template <class Reduction, class = void>
constexpr bool kHasTotal = false;
template <class Reduction>
constexpr bool kHasTotal<Reduction, std::void_t<decltype(&Reduction::total_size)>> = true;

// Whether a reduction writes results of edges: then each edge must have a slot, or its place would stay uninitialised.
template <class Reduction, class = void>
constexpr bool kHasEdges = false;
template <class Reduction>
constexpr bool kHasEdges<Reduction, std::void_t<decltype(&Reduction::writes_edges)>> = true;

// Which edges had a slot; nothing where no result needs them all.
class EdgesSeen {
 public:
  EdgesSeen(int64_t num_edges, bool counts) : count_(counts ? num_edges : 0), seen_(count_) {}
  // Another thread may set the same byte to the same.
  void add(int64_t edge) const { seen_.get()[edge] = 1; }
  void add(const Slots &slots) const {
    for (int64_t n = 0; n < slots.count && count_ > 0; ++n) add(slots.edges[n]);
  }
  bool all() const { return count_ == 0 || !std::memchr(seen_.get(), 0, static_cast<std::size_t>(count_)); }

 private:
  int64_t count_;
  Workspace<uint8_t> seen_;
};

// A Reduction has
//   accumulator_size(), scratch_size()         numbers per accumulator and per thread
//   start(accumulator)                         the value of no slots
//   reduce(row, slots, accumulator, scratch)   adds some slots
//   combine(accumulator, next)                 accumulator, then next
//   finish(row, accumulator)                   writes the row's result
//   total_size(), add_total(accumulator, total)     where there are numbers to sum over all rows
//   writes_edges()                             where it may write results of edges
// Returns false when an index was out of range, or an edge without a slot. Throws std::bad_alloc.
template <class T, class Reduction>
bool reduce_rows(const CompressedRows &rows, int64_t threads, const Reduction &reduction, T *total = nullptr) {
  const Workspace<int64_t> copied(rows.num_rows + 1, false);
  if (!rows.copy_offsets(copied.get())) return false;
  const int64_t *offsets = copied.get();
  std::vector<int64_t> turns{0};  // the first row of each turn
  std::vector<int64_t> long_rows, first_piece;
  int64_t num_pieces = 0, taken = 0;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const int64_t degree = offsets[r + 1] - offsets[r];
    if (degree > kSlotsPerPiece) {
      long_rows.push_back(r);
      first_piece.push_back(num_pieces);
      num_pieces += (degree + kSlotsPerPiece - 1) / kSlotsPerPiece;
    } else {
      taken += degree + 4;  // a row costs something without slots, too
      if (taken >= kSlotsPerTurn) turns.push_back(r + 1), taken = 0;
    }
  }
  first_piece.push_back(num_pieces);
  if (turns.back() < rows.num_rows) turns.push_back(rows.num_rows);
  const int64_t num_turns = static_cast<int64_t>(turns.size()) - 1;
  const int64_t size = reduction.accumulator_size();
  const Workspace<T> pieces(num_pieces * size);
  // One sum for each turn and one for all long rows: cut by the graph alone, and added up in order.
  int64_t total_size = 0;
  if constexpr (kHasTotal<Reduction>) total_size = total ? reduction.total_size() : 0;
  const Workspace<T> totals((num_turns + 1) * total_size);
  std::vector<int64_t> row_of_piece(static_cast<std::size_t>(num_pieces));
  for (std::size_t i = 0; i < long_rows.size(); ++i) {
    for (int64_t p = first_piece[i]; p < first_piece[i + 1]; ++p) {
      row_of_piece[static_cast<std::size_t>(p)] = static_cast<int64_t>(i);
    }
  }
  std::atomic<bool> valid{true};
  const int team = static_cast<int>(std::max<int64_t>(1, std::min(threads, num_turns + num_pieces)));
  // Allocated here: an exception must not leave a parallel region.
  const int64_t own = (size + reduction.scratch_size() + 31) / 16 * 16;
  const Workspace<T> workspaces(team * own);
  bool writes_edges = false;
  if constexpr (kHasEdges<Reduction>) writes_edges = reduction.writes_edges();
  const EdgesSeen seen(rows.num_edges, writes_edges);

#pragma omp parallel num_threads(team) if (team > 1)
  {
    T *accumulator = workspaces.get() + thread_number() * own;
    T *scratch = accumulator + (size + 15) / 16 * 16;
    SlotWindow window;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t p = 0; p < num_pieces; ++p) {
      const int64_t i = row_of_piece[static_cast<std::size_t>(p)];
      const int64_t row = long_rows[static_cast<std::size_t>(i)];
      const int64_t begin = offsets[row] + (p - first_piece[static_cast<std::size_t>(i)]) * kSlotsPerPiece;
      const int64_t end = std::min(begin + kSlotsPerPiece, offsets[row + 1]);
      if (!window.read(rows, begin, end)) {
        valid = false;
        continue;
      }
      seen.add(window.slots(begin, end));
      T *piece = pieces.get() + p * size;
      reduction.start(piece);
      reduction.reduce(row, window.slots(begin, end), piece, scratch);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t turn = 0; turn < num_turns; ++turn) {
      const int64_t last = turns[static_cast<std::size_t>(turn) + 1];
      for (int64_t row = turns[static_cast<std::size_t>(turn)]; row < last;) {
        const int64_t begin = offsets[row];
        int64_t stop = row + 1;
        while (stop < last && offsets[stop + 1] - begin <= kSlotsPerWindow) ++stop;
        const int64_t end = offsets[stop];
        const bool is_long = end - begin > kSlotsPerPiece;
        if (is_long || !window.read(rows, begin, end)) {
          if (!is_long) valid = false;
          row = stop;
          continue;
        }
        seen.add(window.slots(begin, end));
        for (; row < stop; ++row) {
          reduction.start(accumulator);
          reduction.reduce(row, window.slots(offsets[row], offsets[row + 1]), accumulator, scratch);
          reduction.finish(row, accumulator);
          if constexpr (kHasTotal<Reduction>) {
            if (total) reduction.add_total(accumulator, totals.get() + turn * total_size);
          }
        }
      }
    }
  }

  for (std::size_t i = 0; i < long_rows.size(); ++i) {
    T *whole = pieces.get() + first_piece[i] * size;
    for (int64_t p = first_piece[i] + 1; p < first_piece[i + 1]; ++p) {
      reduction.combine(whole, pieces.get() + p * size);
    }
    reduction.finish(long_rows[i], whole);
    if constexpr (kHasTotal<Reduction>) {
      if (total) reduction.add_total(whole, totals.get() + num_turns * total_size);
    }
  }
  if (total) std::fill_n(total, total_size, T{0});
  for (int64_t turn = 0; total && turn <= num_turns; ++turn) {
    for (int64_t n = 0; n < total_size; ++n) total[n] += totals.get()[turn * total_size + n];
  }
  return valid && seen.all();
}

}  // namespace anyattention

#endif
