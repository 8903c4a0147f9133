// The keys of each query's largest scores. No score is written to memory but those of a tile: a tile of keys meets a block
// of queries, and only scores above a query's present k-th best become its candidates.
//
//   i  query     j  key     h  head     g  key head, h / group     D  head_dim
//   n  column: a query and a head of one group, i * group + h % group
//
// Columns lie side by side in vectors and each has its threshold there, so that keys are read as they lie in memory, row
// by row.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "anyattention.h"
#include "candidates.h"
#include "few_columns.h"
#include "once.h"
#include "pairs.h"
#include "products.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {
namespace {

constexpr int64_t kKeys = 96, kColumns = 64;  // of a tile; whole blocks of products
constexpr int64_t kBits = 32;  // keys whose comparisons are one integer
constexpr int64_t kTaskColumns = 4 * kColumns;
constexpr int64_t kTasks = 16;  // wanted, whatever the threads
constexpr int64_t kLongestSlice = int64_t{1} << 30;  // places in a slice are 32 bits of a candidate

constexpr int kScores = kLane<float>;
using Scores = Lanes<float>;
using Integers = Vector<int32_t, kScores>;

// Infinity becomes NaN: -inf would pass for a hidden pair.
template <class T>
inline T scaled(T product, float scale) {
  product *= scale;
  return product + product * 0;
}

// A call: the sizes, how it is cut into tasks, and where everything lies.
struct Selection {
  const anyattention_topk_indices_call &c;
  int64_t group, columns;          // columns of a key head
  int64_t blocks, slices, length;  // blocks of columns, slices of keys, and the keys of a slice
  int64_t kept;                    // candidates of a column after a slice

  explicit Selection(const anyattention_topk_indices_call &call)
      : c(call),
        group(call.heads / call.key_heads),
        columns(call.num_queries * group),
        blocks((columns + kTaskColumns - 1) / kTaskColumns) {
    const int64_t others = std::max<int64_t>(c.batch * c.key_heads * blocks, 1);
    // A slice much longer than k, or most of its keys are candidates.
    const int64_t wanted = std::min((kTasks + others - 1) / others, c.num_keys / 64 / std::max<int64_t>(c.k, 64));
    slices = std::max<int64_t>({1, wanted, c.num_keys / kLongestSlice + 1});
    length = ((c.num_keys + slices - 1) / slices + kKeys - 1) / kKeys * kKeys;
    kept = std::min(c.k, length);
  }

  // What the call takes one thread: a product, of a whole vector where there are not few columns, and a comparison that
  // may keep a candidate. Columns of a tile see each other's keys.
  double nanoseconds() const {
    double keys = c.key_begins ? 0 : static_cast<double>(c.num_queries * c.num_keys);
    for (int64_t i = 0; c.key_begins && i < c.num_queries; ++i) {
      const int64_t begin = std::clamp<int64_t>(begin_of(i), 0, c.num_keys);
      const int64_t own = std::clamp<int64_t>(end_of(i), begin, c.num_keys) - begin;
      keys += static_cast<double>(std::min(own + kColumns / 2, c.num_keys));
    }
    const double product = static_cast<double>(c.head_dim) * (columns <= kFewColumns ? 0.1 : kPerProduct);
    return static_cast<double>(c.batch * c.heads) * keys * (product + 6.5);
  }
  int64_t query_row(int64_t b, int64_t g, int64_t n) const {
    return (b * c.num_queries + n / group) * c.heads + g * group + n % group;
  }
  const float *key_row(int64_t b, int64_t g, int64_t j) const {
    return c.key + ((b * c.num_keys + j) * c.key_heads + g) * c.head_dim;
  }
  int64_t begin_of(int64_t i) const { return c.key_begins ? read_once(c.key_begins + i) : 0; }
  int64_t end_of(int64_t i) const { return c.key_ends ? read_once(c.key_ends + i) : c.num_keys; }
  // What is added to a score; -inf hides the pair.
  float added(int64_t b, int64_t i, int64_t h, int64_t j) const {
    const auto at = [=](const anyattention_pairs &pairs) {
      return place_of_head(pairs, b, h) + i * pairs.strides[2] + j * pairs.strides[3];
    };
    if (c.mask.numbers && !static_cast<const uint8_t *>(c.mask.numbers)[at(c.mask)]) return -kInfinity;
    return c.bias.numbers ? static_cast<const float *>(c.bias.numbers)[at(c.bias)] : 0;
  }
};

bool is_valid(const anyattention_topk_indices_call *c) {
  if (!c || c->batch < 0 || c->heads < 1 || c->key_heads < 1 || c->heads % c->key_heads) return false;
  if (c->num_queries < 0 || c->num_keys < 0 || c->head_dim < 1 || c->k < 1 || c->num_threads < 1) return false;
  if (!c->key_begins != !c->key_ends) return false;
  return c->batch == 0 || c->num_queries == 0 || (c->query && (c->key || c->num_keys == 0));
}

// Of ranges that another thread has changed since, a task takes what lies inside.
bool is_in_range(const anyattention_topk_indices_call &c) {
  bool valid = is_inside(c.mask, c) && is_inside(c.bias, c);
  for (int64_t i = 0; c.key_begins && i < c.num_queries; ++i) {
    const int64_t begin = read_once(c.key_begins + i), end = read_once(c.key_ends + i);
    valid &= begin >= end || (begin >= 0 && end <= c.num_keys);
  }
  return valid;
}

// Some columns of one key head on their way through a slice of its keys.
class Task {
 public:
  static int64_t scratch_size(const Selection &s) {
    return kTaskColumns * s.c.head_dim + 2 * kKeys * kColumns + kTaskColumns;
  }

  Task(const Selection &selection, int64_t b, int64_t g, int64_t block, int64_t slice, float *scratch,
       uint64_t *candidates)
      : s_(selection),
        b_(b),
        g_(g),
        first_(block * kTaskColumns),
        count_(std::min(kTaskColumns, selection.columns - first_)),
        begin_(std::min(slice * selection.length, selection.c.num_keys)),
        end_(std::min(begin_ + selection.length, selection.c.num_keys)),
        turned_(scratch),
        scores_(turned_ + kTaskColumns * selection.c.head_dim),
        added_(scores_ + kKeys * kColumns),
        best_(selection.kept, candidates, sizes_, added_ + kKeys * kColumns) {
    const int64_t D = s_.c.head_dim;
    std::fill_n(turned_, kTaskColumns * D, 0.0f);
    std::fill_n(best_.thresholds, kTaskColumns, kInfinity);
    std::fill_n(best_.thresholds, count_, -kInfinity);
    std::fill_n(sizes_, kTaskColumns, 0);
    std::fill_n(begins_, kTaskColumns, 0);
    std::fill_n(ends_, kTaskColumns, 0);
    for (int64_t n = 0; n < count_; ++n) {
      const float *query = s_.c.query + s_.query_row(b, g, first_ + n) * D;
      float *turned = turned_ + n / kColumns * kColumns * D + n % kColumns;
      for (int64_t d = 0; d < D; ++d) turned[d * kColumns] = query[d];
      const int64_t i = (first_ + n) / s_.group;
      begins_[n] = static_cast<int32_t>(std::clamp(s_.begin_of(i), begin_, end_) - begin_);
      ends_[n] = static_cast<int32_t>(std::clamp(s_.end_of(i), begin_, end_) - begin_);
      Seen &seen = seen_[n / kColumns];
      seen.low = std::min<int64_t>(seen.low, begins_[n]), seen.high = std::max<int64_t>(seen.high, ends_[n]);
      seen.begin = std::max<int64_t>(seen.begin, begins_[n]), seen.end = std::min<int64_t>(seen.end, ends_[n]);
    }
  }

  // Writes each column's best candidates, the largest first, with 0 after the last, to `kept` numbers for each.
  void run(uint64_t *results) {
    int64_t low = kLongestSlice, high = 0;
    for (const Seen &seen : seen_) low = std::min(low, seen.low), high = std::max(high, seen.high);
    for (int64_t place = low / kKeys * kKeys; place < high; place += kKeys) {
      const int64_t rows = std::min(kKeys, end_ - begin_ - place);
      for (int64_t n = 0; n < count_; n += kColumns) look_at(place, rows, n);
    }
    for (int64_t n = 0; n < count_; ++n) {
      const int64_t found = best_.sort(n);
      std::fill(std::copy_n(best_.begin(n), found, results + n * s_.kept), results + (n + 1) * s_.kept, uint64_t{0});
    }
  }

 private:
  // The places that any of some columns sees, and those that all see.
  struct Seen {
    int64_t low = kLongestSlice, high = 0, begin = 0, end = kLongestSlice;
  };

  // A tile of keys, and the columns from `first` on.
  void look_at(int64_t place, int64_t rows, int64_t first) {
    const Seen &seen = seen_[first / kColumns];
    if (seen.low >= place + rows || seen.high <= place) return;
    const bool whole = seen.begin <= place && place + rows <= seen.end, adds = s_.c.mask.numbers || s_.c.bias.numbers;
    const int64_t columns = std::min(kColumns, count_ - first), D = s_.c.head_dim, t = begin_ + place;
    const int64_t width = (columns + kScores - 1) / kScores * kScores;
    if (adds) read_pairs(t, rows, first, columns);
    if (columns <= kFewColumns) {
      multiply_few_columns(t, rows, first, columns);
    } else {
      const Product<float> products{s_.key_row(b_, g_, t), s_.c.key_heads * D, 1, turned_ + first * D, kColumns, scores_,
                                    kColumns};
      product<false>(rows, products, [=](int64_t, int64_t) { return Extent{0, width, 0, D}; });
    }
    for (int64_t lane = 0; lane < columns; lane += kScores) {
      const int64_t lanes = std::min<int64_t>(kScores, columns - lane);
      for (int64_t j = 0; j < rows; j += kBits) {
        const int64_t last = std::min(j + kBits, rows);
        adds    ? finish<true, true>(place, j, last, first, lane, lanes)
        : whole ? finish<false, false>(place, j, last, first, lane, lanes)
                : finish<false, true>(place, j, last, first, lane, lanes);
      }
    }
  }

  // Apart from the code above, which would be slower with its arrays inside.
  __attribute__((noinline)) void multiply_few_columns(int64_t t, int64_t rows, int64_t first, int64_t columns) {
    const int64_t D = s_.c.head_dim;
    const float *queries[kFewColumns];
    for (int64_t n = 0; n < columns; ++n) queries[n] = s_.c.query + s_.query_row(b_, g_, first_ + first + n) * D;
    multiply_few(s_.key_row(b_, g_, t), s_.c.key_heads * D, rows, queries, columns, D, scores_, kColumns);
  }

  // Makes scores of products, for the columns of one vector and some keys, and takes those above their thresholds.
  template <bool Adds, bool Hides>
  void finish(int64_t place, int64_t from, int64_t to, int64_t first, int64_t lane, int64_t lanes) {
    const Scores threshold = load<kScores>(best_.thresholds + first + lane), hidden = Scores{} - kInfinity;
    const Integers begins = load<kScores>(begins_ + first + lane) - static_cast<int32_t>(place);
    const Integers ends = load<kScores>(ends_ + first + lane) - static_cast<int32_t>(place);
    const auto scale = static_cast<float>(s_.c.scale);
    Integers above{};  // a bit for each key
    Integers bit = Integers{} + 1;
    for (int64_t j = from; j < to; ++j, bit <<= 1) {
      float *at = scores_ + j * kColumns + lane;
      Scores x = scaled(load<kScores>(at), scale);
      if (Adds) {
        const Scores more = load<kScores>(added_ + j * kColumns + lane);
        x = more == hidden ? hidden : x + more;
      }
      if (Hides) {
        const auto row = static_cast<int32_t>(j);
        x = (begins <= row) & (ends > row) ? x : hidden;
      }
      store<float, kScores>(at, x);
      above |= x <= threshold ? Integers{} : bit;  // NaN too
    }
    int32_t any = 0;
    for (int n = 0; n < kScores; ++n) any |= above[n];
    if (!any) return;
    for (int n = 0; n < lanes; ++n) {
      if (above[n]) take(static_cast<uint32_t>(above[n]), place, from, first + lane + n);
    }
  }

  void read_pairs(int64_t t, int64_t rows, int64_t first, int64_t columns) {
    for (int64_t n = 0; n < columns; ++n) {
      const int64_t column = first_ + first + n, i = column / s_.group, h = g_ * s_.group + column % s_.group;
      for (int64_t j = 0; j < rows; ++j) added_[j * kColumns + n] = s_.added(b_, i, h, t + j);
    }
  }

  // Takes some of one column's scores, by a bit for each key.
  void take(uint32_t above, int64_t place, int64_t from, int64_t n) {
    for (; above; above &= above - 1) {
      const int64_t j = from + __builtin_ctz(above);
      best_.take(n, scores_[j * kColumns + n % kColumns], place + j);
    }
  }

  const Selection &s_;
  int64_t b_, g_, first_, count_, begin_, end_;
  float *turned_, *scores_, *added_;
  Seen seen_[kTaskColumns / kColumns];
  int64_t sizes_[kTaskColumns];
  Candidates best_;
  int32_t begins_[kTaskColumns], ends_[kTaskColumns];  // the places that a column sees
};

// The best of all slices' candidates, which are sorted; among equal scores those of the first slice.
void merge(const Selection &s, const uint64_t *results, int64_t stride, int64_t *cursor, int64_t *indices) {
  std::fill_n(cursor, s.slices, 0);
  for (int64_t n = 0; n < s.c.k; ++n) {
    uint64_t best = 0;
    int64_t from = 0;
    for (int64_t slice = 0; slice < s.slices; ++slice) {
      const uint64_t next = cursor[slice] < s.kept ? results[slice * stride + cursor[slice]] : 0;
      if (next >> 32 > best >> 32) best = next, from = slice;
    }
    if (best == 0) {
      std::fill(indices + n, indices + s.c.k, -1);
      return;
    }
    ++cursor[from];
    indices[n] = from * s.length + place_of(best);
  }
}

void select(const Selection &s, int64_t *indices) {
  const int64_t heads = s.c.batch * s.c.key_heads, tasks = heads * s.blocks * s.slices;
  const int team = team_size(s.c.num_threads, tasks, s.nanoseconds());
  const int64_t own = (Task::scratch_size(s) + kScores - 1) / kScores * kScores;
  const int64_t whole = std::min(kTaskColumns, s.columns);
  const int64_t stride = heads * s.columns * s.kept;  // from one slice's results to the next
  const Workspace<float> scratch(team * own);
  const Workspace<uint64_t> candidates(team * whole * Candidates::capacity(s.kept), false), results(s.slices * stride, false);
  const Workspace<int64_t> cursors(team * s.slices, false);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int64_t thread = thread_number();
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < tasks; ++n) {
      const int64_t slice = n % s.slices, block = n / s.slices % s.blocks, head = n / s.slices / s.blocks;
      Task task(s, head / s.c.key_heads, head % s.c.key_heads, block, slice, scratch.get() + thread * own,
                candidates.get() + thread * whole * Candidates::capacity(s.kept));
      task.run(results.get() + slice * stride + (head * s.columns + block * kTaskColumns) * s.kept);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < heads * s.columns; ++n) {
      const int64_t head = n / s.columns, row = s.query_row(head / s.c.key_heads, head % s.c.key_heads, n % s.columns);
      merge(s, results.get() + n * s.kept, stride, cursors.get() + thread * s.slices, indices + row * s.c.k);
    }
  }
}

}  // namespace
}  // namespace anyattention

extern "C" int32_t anyattention_topk_indices(const anyattention_topk_indices_call *call, int64_t *indices) {
  using namespace anyattention;
  if (!is_valid(call)) return ANYATTENTION_INVALID_ARGUMENT;
  if (!is_in_range(*call)) return ANYATTENTION_OUT_OF_RANGE;
  if (call->batch == 0 || call->num_queries == 0) return ANYATTENTION_OK;
  if (!indices) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    select(Selection(*call), indices);
    return ANYATTENTION_OK;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}
