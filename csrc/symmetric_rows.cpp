// Compressed rows of a symmetric graph from a list of its pairs, each given once.
//
// The pairs are cut into chunks of equal size. Each is counted and placed by one thread, which
// leaves the columns of a row in the order of the pairs; then each row is sorted where it lies. Pairs are read twice, and
// another thread may change them in between: then a row does not end where it was counted to end, and they are refused.
//
//   p  pair     r  row     c  column, or chunk in a workspace's name     s  slot

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "anyattention.h"
#include "once.h"
#include "team.h"
#include "workspace.h"

namespace {

using anyattention::is_below, anyattention::read_once;

constexpr int64_t kPairsPerChunk = 1 << 14;
constexpr double kPerPair = 30;  // nanoseconds of one thread

// Up to here shifting columns one by one is faster than sorting by bytes.
constexpr int64_t kShortRow = 48;

// Columns by their lowest byte, then the next, and so on: O(columns x bytes of their range). `other` has as much room.
void sort_by_bytes(int64_t *begin, int64_t *end, int64_t *other) {
  const int64_t count = end - begin;
  const auto [low, high] = std::minmax_element(begin, end);
  const int64_t least = *low;
  const auto range = static_cast<uint64_t>(*high - least);
  int64_t *from = begin, *to = other;
  for (int shift = 0; shift < 64 && range >> shift; shift += 8) {
    const auto byte = [=](int64_t column) { return (static_cast<uint64_t>(column - least) >> shift) & 255; };
    int64_t places[256] = {};
    for (int64_t s = 0; s < count; ++s) ++places[byte(from[s])];
    int64_t total = 0;
    for (int64_t &place : places) {
      const int64_t columns = place;
      place = total;
      total += columns;
    }
    for (int64_t s = 0; s < count; ++s) to[places[byte(from[s])]++] = from[s];
    std::swap(from, to);
  }
  if (from != begin) std::copy_n(from, count, begin);
}

// Puts two rows into each other's next slots; false where they have changed and have none.
bool place(int64_t left, int64_t right, int64_t num_rows, int64_t *cursors, int64_t num_slots, int64_t *slot_columns) {
  if (!is_below(left, num_rows) || !is_below(right, num_rows)) return false;
  const int64_t of_left = cursors[left]++, of_right = cursors[right]++;
  if (of_left >= num_slots || of_right >= num_slots) return false;
  slot_columns[of_left] = right;
  slot_columns[of_right] = left;
  return true;
}

void sort_row(int64_t *begin, int64_t *end, int64_t *other) {
  if (end - begin > kShortRow) {
    sort_by_bytes(begin, end, other);
    return;
  }
  for (int64_t *next = begin; next < end; ++next) {
    const int64_t column = *next;
    int64_t *place = next;
    for (; place > begin && place[-1] > column; --place) *place = place[-1];
    *place = column;
  }
}

}  // namespace

extern "C" int32_t anyattention_symmetric_rows(const int64_t *pairs, int64_t num_pairs, int64_t num_rows,
                                               int64_t num_threads, int64_t *row_offsets, int64_t *slot_rows,
                                               int64_t *slot_columns, int64_t *slot_reverse) {
  if (num_pairs < 0 || num_rows < 0 || !row_offsets) return ANYATTENTION_INVALID_ARGUMENT;
  if (num_pairs > 0 && (!pairs || !slot_rows || !slot_columns || !slot_reverse)) return ANYATTENTION_INVALID_ARGUMENT;

  // Each chunk needs a counter per row: together no more counters than edges.
  const int64_t most = std::min(num_pairs / kPairsPerChunk, 2 * num_pairs / std::max<int64_t>(num_rows, 1));
  const int threads = anyattention::team_size(num_threads, most, static_cast<double>(num_pairs) * kPerPair);
  const int64_t chunks = threads;
  const auto counts = anyattention::allocate<int64_t>(chunks * num_rows);
  const auto placed = anyattention::allocate<int64_t>(chunks * num_rows);
  const auto bad = anyattention::allocate<int64_t>(chunks);
  if (!counts || !placed || !bad) return ANYATTENTION_OUT_OF_MEMORY;
  const auto cut = [=](int64_t total, int64_t c) { return total / chunks * c + std::min(c, total % chunks); };

#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t *own = counts.get() + c * num_rows;
    for (int64_t p = cut(num_pairs, c); p < cut(num_pairs, c + 1); ++p)
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t row = read_once(pairs + 2 * p + side);
        if (is_below(row, num_rows))
          ++own[row];
        else
          bad[c] = 1;
      }
  }
  const auto any_is_bad = [&] { return std::any_of(bad.get(), bad.get() + chunks, [](int64_t found) { return found; }); };
  if (any_is_bad()) return ANYATTENTION_OUT_OF_RANGE;

  int64_t total = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    row_offsets[r] = total;
    for (int64_t c = 0; c < chunks; ++c) {
      int64_t &count = counts[c * num_rows + r];
      const int64_t start = total;
      total += count;
      count = start;
    }
  }
  row_offsets[num_rows] = total;

#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t *starts = counts.get() + c * num_rows, *ends = c + 1 < chunks ? starts + num_rows : row_offsets + 1;
    int64_t *cursors = placed.get() + c * num_rows;
    std::copy_n(starts, num_rows, cursors);
    for (int64_t p = cut(num_pairs, c); p < cut(num_pairs, c + 1) && !bad[c]; ++p)
      bad[c] = !place(read_once(pairs + 2 * p), read_once(pairs + 2 * p + 1), num_rows, cursors, total, slot_columns);
    if (!std::equal(cursors, cursors + num_rows, ends)) bad[c] = 1;
  }
  if (any_is_bad()) return ANYATTENTION_OUT_OF_RANGE;

  int64_t longest = 0;
  for (int64_t r = 0; r < num_rows; ++r) longest = std::max(longest, row_offsets[r + 1] - row_offsets[r]);
  const auto others = anyattention::allocate<int64_t>(chunks * longest);
  if (!others) return ANYATTENTION_OUT_OF_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t r = cut(num_rows, c); r < cut(num_rows, c + 1); ++r) {
      sort_row(slot_columns + row_offsets[r], slot_columns + row_offsets[r + 1], others.get() + c * longest);
      std::fill(slot_rows + row_offsets[r], slot_rows + row_offsets[r + 1], r);
    }

  // Rows that are visited in ascending order meet the slots of row c one after the other: the cursor of c
  // is the way back. It starts behind the rows of the chunks before.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t *cursors = counts.get() + c * num_rows;
    const int64_t begin = cut(num_rows, c), end = cut(num_rows, c + 1);
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t *row = slot_columns + row_offsets[r], *next = slot_columns + row_offsets[r + 1];
      cursors[r] = row_offsets[r];
      if (c > 0) cursors[r] += std::lower_bound(row, next, begin) - row;
    }
    for (int64_t s = row_offsets[begin]; s < row_offsets[end]; ++s) slot_reverse[s] = cursors[slot_columns[s]]++;
  }
  return ANYATTENTION_OK;
}
