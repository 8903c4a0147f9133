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
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "anyattention.h"
#include "once.h"
#include "simd.h"
#include "team.h"
#include "workspace.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace anyattention {

constexpr int64_t kPrefetch = 16;  // slots ahead
// The same for slots of so many bytes, where one takes a few nanoseconds and memory is a hundred away: as many as stay in
// the first cache until their turn.
constexpr int64_t slots_ahead(int64_t bytes) {
  return std::clamp<int64_t>((int64_t{1} << 15) / bytes, kPrefetch, 4 * kPrefetch);
}
constexpr int64_t kSlotsPerPiece = 2048;
// What a thread takes at a time; small, so that threads end together on a small graph too.
constexpr int64_t kSlotsPerTurn = 1024;
// Short rows that a reduction takes together: at most so many, and slots.
constexpr int64_t kRowsTogether = 64, kSlotsTogether = 128;
// What a float's multiplication, a slot and a row take one thread, in nanoseconds; see team.h.
constexpr double kPerNumber = 0.125, kPerSlot = 4, kPerRow = 16;

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Indices below a bound. Another thread may write to them: each is read once, and 0 stands for one that is outside, so that
// none leads out of an array.
struct Indices {
  const int64_t *numbers;
  int64_t bound;

  ANYATTENTION_INLINE int64_t operator[](int64_t n) const {
    int64_t index = read_once(numbers + n);
    if (!is_below(index, bound)) index = 0;
    asm("" : "+r"(index));  // else the compiler cuts a loop's addresses in two, for this 0 and for others
    return index;
  }
  // For prefetches: such a number must lead to no read.
  int64_t unchecked(int64_t n) const { return numbers[n]; }
};

// One direction of a graph: the rows that reduce, and for each slot its column and edge.
struct CompressedRows {
  int64_t num_rows, num_columns, num_edges;
  const int64_t *offsets;
  Indices columns, edges;

  CompressedRows(int64_t rows, int64_t bound, int64_t slots, const int64_t *o, const int64_t *c, const int64_t *e)
      : num_rows(rows), num_columns(bound), num_edges(slots), offsets(o), columns{c, bound}, edges{e, slots} {}

  bool has_arrays() const { return offsets && (num_edges == 0 || (columns.numbers && edges.numbers)); }
  // Copies the offsets to num_rows + 1 numbers; whether they rise from 0 to num_edges, and slots have columns to name.
  bool copy_offsets(int64_t *to) const {
    copy_once(offsets, num_rows + 1, to);
    return to[0] == 0 && to[num_rows] == num_edges && std::is_sorted(to, to + num_rows + 1) &&
           (num_edges == 0 || num_columns > 0);
  }
  bool slots_are_valid(int64_t begin, int64_t end) const {
    bool valid = true;
    for (int64_t s = begin; s < end; ++s) {
      valid &= is_below(columns.numbers[s], num_columns) & is_below(edges.numbers[s], num_edges);
    }
    return valid;
  }
};

inline CompressedRows rows_of_queries(const anyattention_graph_arrays &graph) {
  return {graph.num_queries,   graph.num_keys,      graph.num_edges,
          graph.query_offsets, graph.keys_by_query, graph.edges_by_query};
}

inline CompressedRows rows_of_keys(const anyattention_graph_arrays &graph) {
  return {graph.num_keys,    graph.num_queries,    graph.num_edges,
          graph.key_offsets, graph.queries_by_key, graph.edges_by_key};
}

// Whether slots name each edge once: else the result of one that none names would stay uninitialised. What is left of a sum
// over slots of mixed(edge) - mixed(slot) is 0 then, and otherwise but once in 2^64. A mark for each edge would take a tenth
// of a backward, since its places are at random.
class NamedEdges {
 public:
  void add(const Indices &edges, int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t s = begin; s < end; ++s) sum += mixed(static_cast<uint64_t>(edges.numbers[s])) - mixed(static_cast<uint64_t>(s));
    left_ += sum;
  }
  void add_to(NamedEdges &all) const { __atomic_fetch_add(&all.left_, left_, __ATOMIC_RELAXED); }
  bool are_all() const { return left_ == 0; }

 private:
  static uint64_t mixed(uint64_t x) {
    x *= 0x9e3779b97f4a7c15;
    x ^= x >> 32;
    return x * 0xd6e8feb86659fd93;
  }
  uint64_t left_ = 0;
};

template <class Reduction, class = void>
constexpr bool kHasTotal = false;
template <class Reduction>
constexpr bool kHasTotal<Reduction, std::void_t<decltype(&Reduction::total_size)>> = true;

template <class Reduction, class = void>
constexpr bool kWritesEdges = false;
template <class Reduction>
constexpr bool kWritesEdges<Reduction, std::void_t<decltype(Reduction::kWritesEdges)>> = true;

template <class Reduction, class = void>
constexpr bool kTakesRowsTogether = false;
template <class Reduction>
constexpr bool kTakesRowsTogether<Reduction, std::void_t<decltype(&Reduction::takes_rows_together)>> = true;

// The end of the rows from `row` that are taken together: one, or several that are short.
inline int64_t end_of_short_rows(const int64_t *offsets, int64_t row, int64_t last) {
  const int64_t begin = offsets[row];
  last = std::min(last, row + kRowsTogether);
  for (++row; row < last && offsets[row + 1] - begin <= kSlotsTogether;) ++row;
  return row;
}

// A Reduction has
//   accumulator_size(), scratch_size(slots)    numbers per accumulator, and per thread that reduces so many slots
//   slot_size()                                multiplications of floats per slot, or what takes as long
//   start(accumulator)                         the value of no slots
//   reduce(row, begin, end, accumulator, scratch)   slots begin to end; false for an index out of range
//   combine(accumulator, next)                 accumulator, then next
//   finish(row, accumulator)                   writes the row's result
//   total_size(), add_total(accumulator, total)     where there are numbers to sum over all rows
//   kWritesEdges                               where it has results of edges
//   takes_rows_together()                      where it has code for short rows, whether a call can use it, and then
//   reduce_together(first, count, bounds, accumulator, scratch, total)   all of this for rows from `first`, whose slots
//                                              begin at `bounds`; total is null where there is none
// Returns false when an index was out of range, or an edge has no slot. Throws std::bad_alloc.
template <class T, class Reduction>
bool reduce_rows(const CompressedRows &rows, int64_t threads, const Reduction &reduction, T *total = nullptr) {
  const Workspace<int64_t> copied(rows.num_rows + 1, false);
  if (!rows.copy_offsets(copied.get())) return false;
  const int64_t *offsets = copied.get();
  std::vector<int64_t> turns{0};  // the first row of each turn
  std::vector<int64_t> long_rows, first_piece;
  int64_t num_pieces = 0, taken = 0, most_slots = 0;  // of a piece
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const int64_t degree = offsets[r + 1] - offsets[r];
    most_slots = std::max(most_slots, std::min(degree, kSlotsPerPiece));
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
  const double numbers = static_cast<double>(rows.num_edges * reduction.slot_size() + rows.num_rows * size);
  const double nanoseconds = numbers * kPerNumber * (sizeof(T) / sizeof(float)) +
                             static_cast<double>(rows.num_edges) * kPerSlot + static_cast<double>(rows.num_rows) * kPerRow;
  const int team = team_size(threads, num_turns + num_pieces, nanoseconds);
  // Allocated here: an exception must not leave a parallel region. Pages apart: where they are near, what one thread's core
  // fetches ahead is taken from the other's.
  constexpr int64_t kPage = 4096 / sizeof(T);
  bool together = false;
  if constexpr (kTakesRowsTogether<Reduction>) together = reduction.takes_rows_together();
  const int64_t scratch_slots = together ? std::max(most_slots, kSlotsTogether) : most_slots;
  const int64_t own = (size + reduction.scratch_size(scratch_slots) + 31) / kPage * kPage + 2 * kPage;
  const Workspace<T> workspaces(team * own);
  NamedEdges named;

#pragma omp parallel num_threads(team) if (team > 1)
  {
    T *accumulator = workspaces.get() + thread_number() * own;
    T *scratch = accumulator + (size + 15) / 16 * 16;
    NamedEdges own_named;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t p = 0; p < num_pieces; ++p) {
      const int64_t i = row_of_piece[static_cast<std::size_t>(p)];
      const int64_t row = long_rows[static_cast<std::size_t>(i)];
      const int64_t begin =
          offsets[row] + (p - first_piece[static_cast<std::size_t>(i)]) * kSlotsPerPiece;
      const int64_t end = std::min(begin + kSlotsPerPiece, offsets[row + 1]);
      T *piece = pieces.get() + p * size;
      reduction.start(piece);
      if (!reduction.reduce(row, begin, end, piece, scratch)) valid = false;
      if constexpr (kWritesEdges<Reduction>) own_named.add(rows.edges, begin, end);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t turn = 0; turn < num_turns; ++turn) {
      const int64_t last = turns[static_cast<std::size_t>(turn) + 1];
      int64_t first = offsets[turns[static_cast<std::size_t>(turn)]];  // slot that is not in own_named
      [[maybe_unused]] T *turn_total = nullptr;
      if constexpr (kHasTotal<Reduction>) turn_total = total_size ? totals.get() + turn * total_size : nullptr;
      for (int64_t row = turns[static_cast<std::size_t>(turn)]; row < last; ++row) {
        const int64_t begin = offsets[row], end = offsets[row + 1];
        if (end - begin > kSlotsPerPiece) {
          if constexpr (kWritesEdges<Reduction>) own_named.add(rows.edges, first, begin);
          first = end;
          continue;
        }
        if constexpr (kTakesRowsTogether<Reduction>) {
          if (together) {
            const int64_t next = end_of_short_rows(offsets, row, last), count = next - row;
            if (!reduction.reduce_together(row, count, offsets + row, accumulator, scratch, turn_total)) valid = false;
            row = next - 1;
            continue;
          }
        }
        reduction.start(accumulator);
        if (!reduction.reduce(row, begin, end, accumulator, scratch)) valid = false;
        reduction.finish(row, accumulator);
        if constexpr (kHasTotal<Reduction>) {
          if (turn_total) reduction.add_total(accumulator, turn_total);
        }
      }
      if constexpr (kWritesEdges<Reduction>) own_named.add(rows.edges, first, offsets[last]);
    }
    if constexpr (kWritesEdges<Reduction>) own_named.add_to(named);
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
  return valid && named.are_all();
}

}  // namespace anyattention

#endif
