// The edges of each row sorted by columns of numbers.
//
//   r  row     s  slot     n  column of numbers

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "anyattention.h"
#include "once.h"
#include "team.h"
#include "workspace.h"

namespace {

// Below this, starting a thread costs more than it saves.
constexpr int64_t kEdgesPerChunk = 1 << 14;
constexpr double kPerEdge = 25;  // nanoseconds of one thread

// Up to here shifting edges one by one is faster than std::sort.
constexpr int64_t kShortRow = 48;

// So many columns are put into one number, where their ranges leave room.
constexpr int64_t kPacked = 8;

struct Edge {
  uint64_t number;
  int64_t edge;
};

// The first `packed` columns as one number, in the same order, and the others for ties.
struct Numbers {
  const int64_t *const *columns;
  const int64_t *strides;
  int64_t count, packed = 0;
  int64_t least[kPacked] = {};
  int bits[kPacked] = {};

  Numbers(const int64_t *const *columns, const int64_t *strides, int64_t count, int64_t num_edges)
      : columns(columns), strides(strides), count(count) {
    int left = 64;
    for (; packed < std::min(count, kPacked) && num_edges > 0; ++packed) {
      int64_t low = at(packed, 0), high = low;
      for (int64_t e = 1; e < num_edges; ++e) {
        low = std::min(low, at(packed, e));
        high = std::max(high, at(packed, e));
      }
      const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
      int needed = 0;
      while (needed < 64 && range >> needed) ++needed;
      if (needed > left) break;
      least[packed] = low;
      bits[packed] = needed;
      left -= needed;
    }
  }

  int64_t at(int64_t n, int64_t edge) const { return columns[n][edge * strides[n]]; }

  uint64_t number(int64_t edge) const {
    uint64_t sum = 0;
    for (int64_t n = 0; n < packed; ++n) {
      const uint64_t own = static_cast<uint64_t>(at(n, edge)) - static_cast<uint64_t>(least[n]);
      sum = bits[n] < 64 ? (sum << bits[n]) | own : own;
    }
    return sum;
  }

  // The columns of an edge, each in its own array.
  void write(const Edge &edge, int64_t *const *sorted, const int64_t *sorted_strides, int64_t slot) const {
    uint64_t rest = edge.number;
    for (int64_t n = count; n-- > 0;) {
      int64_t value;
      if (n >= packed) {
        value = at(n, edge.edge);
      } else {
        const uint64_t own = bits[n] < 64 ? rest & ((uint64_t{1} << bits[n]) - 1) : rest;
        value = static_cast<int64_t>(own + static_cast<uint64_t>(least[n]));
        rest = bits[n] < 64 ? rest >> bits[n] : 0;
      }
      sorted[n][slot * sorted_strides[n]] = value;
    }
  }

  bool is_before(const Edge &left, const Edge &right) const {
    if (left.number != right.number) return left.number < right.number;
    for (int64_t n = packed; n < count; ++n) {
      const int64_t a = at(n, left.edge), b = at(n, right.edge);
      if (a != b) return a < b;
    }
    return left.edge < right.edge;
  }

  void sort(Edge *begin, Edge *end) const {
    if (end - begin > kShortRow) {
      const auto by_numbers = [this](const Edge &left, const Edge &right) { return is_before(left, right); };
      if (packed == count) {
        std::sort(begin, end, by_numbers);
      } else {
        // Another thread may change the columns that are not packed: a heap stays inside whatever comes before what.
        std::make_heap(begin, end, by_numbers);
        std::sort_heap(begin, end, by_numbers);
      }
      return;
    }
    for (Edge *next = begin; next < end; ++next) {
      const Edge edge = *next;
      Edge *place = next;
      for (; place > begin && is_before(edge, place[-1]); --place) *place = place[-1];
      *place = edge;
    }
  }
};

}  // namespace

extern "C" int32_t anyattention_sorted_rows(const int64_t *row_offsets, int64_t num_rows, int64_t num_edges,
                                            const int64_t *const *columns, const int64_t *strides,
                                            int64_t num_columns, int64_t num_threads, int64_t *slot_edges,
                                            int64_t *const *sorted, const int64_t *sorted_strides) {
  if (num_rows < 0 || num_edges < 0 || num_columns < 1 || !row_offsets || !columns || !strides)
    return ANYATTENTION_INVALID_ARGUMENT;
  if ((num_edges > 0 && !slot_edges) || (sorted && !sorted_strides)) return ANYATTENTION_INVALID_ARGUMENT;
  const auto copied = anyattention::allocate<int64_t>(num_rows + 1, false);
  if (!copied) return ANYATTENTION_OUT_OF_MEMORY;
  const int64_t *offsets = copied.get();
  anyattention::copy_once(row_offsets, num_rows + 1, copied.get());
  int64_t longest = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    if (offsets[r] > offsets[r + 1]) return ANYATTENTION_OUT_OF_RANGE;
    longest = std::max(longest, offsets[r + 1] - offsets[r]);
  }
  if (offsets[0] != 0 || offsets[num_rows] != num_edges) return ANYATTENTION_OUT_OF_RANGE;

  const Numbers numbers(columns, strides, num_columns, num_edges);
  const int64_t most = num_edges / kEdgesPerChunk;
  const int threads = anyattention::team_size(num_threads, most, static_cast<double>(num_edges) * kPerEdge);
  const int64_t chunks = threads;
  const auto rows = anyattention::allocate<Edge>(chunks * longest, false);
  const auto packed_numbers = anyattention::allocate<uint64_t>(num_edges, false);
  if (!rows || !packed_numbers) return ANYATTENTION_OUT_OF_MEMORY;
  for (int64_t e = 0; e < num_edges; ++e) packed_numbers[e] = numbers.number(e);
  // The first row of each chunk: about as many edges to each.
  const auto cut = [=](int64_t c) {
    return std::lower_bound(offsets, offsets + num_rows, num_edges / chunks * c) - offsets;
  };
  std::atomic<bool> is_bad{false};
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t c = 0; c < chunks; ++c) {
    Edge *edges = rows.get() + c * longest;
    const int64_t last = c + 1 < chunks ? cut(c + 1) : num_rows;
    for (int64_t r = c > 0 ? cut(c) : 0; r < last; ++r) {
      const int64_t begin = offsets[r], count = offsets[r + 1] - begin;
      bool is_inside = true;
      for (int64_t s = 0; s < count; ++s) {
        const int64_t edge = anyattention::read_once(slot_edges + begin + s);
        is_inside &= anyattention::is_below(edge, num_edges);
        if (!is_inside) break;
        edges[s] = {packed_numbers[edge], edge};
      }
      if (!is_inside) {
        is_bad = true;
        continue;
      }
      numbers.sort(edges, edges + count);
      for (int64_t s = 0; s < count; ++s) {
        slot_edges[begin + s] = edges[s].edge;
        if (sorted) numbers.write(edges[s], sorted, sorted_strides, begin + s);
      }
    }
  }
  return is_bad ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK;
}
