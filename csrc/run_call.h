// What the kernels of attention over runs share: a call that is checked and cut into tiles, weights from the results of the
// forward, sums over many keys, and the slices of queries that a backward pass sums up apart.
#ifndef ANYATTENTION_RUN_CALL_H
#define ANYATTENTION_RUN_CALL_H

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "anyattention.h"
#include "products.h"
#include "rows.h"
#include "simd.h"
#include "softcap.h"
#include "team.h"
#include "tile_bias.h"
#include "tiles.h"
#include "workspace.h"

namespace anyattention {

template <class T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// Sums over a query's keys are summed up in blocks of so many tiles of keys, and then over the blocks: the rounding of one
// sum grows with its number of terms, here with a root of it.
constexpr std::size_t kBlock = 16;

// Moves sums to those of the blocks before.
template <class T>
void put_aside(T *sums, int64_t size, T *earlier, bool is_first) {
  if (is_first) std::fill_n(earlier, size, T{0});
  add(earlier, sums, size);
  std::fill_n(sums, size, T{0});
}

// Where a forward's results go.
template <class T>
struct RowResults {
  bool merges;  // with those of the parts before
  T *output, *largest, *log_sum;

  // A query's: sums (a row's channels, times a factor, and of its weights) relative to a base, and its largest score.
  void write(const Part &part, int64_t row, const T *sums, T base, T own, T sum, T factor = 1) const {
    const T other = merges ? largest[row] : kMinusInfinity<T>, top = std::max(own, other);
    // All sums relative to the largest score of both.
    const T shift = top == kMinusInfinity<T> ? T{0} : top;
    T mine = std::exp(base - shift), theirs = merges ? std::exp((other - shift) + log_sum[row]) : T{0};
    const T total = sum * mine + theirs, inverse = total == 0 ? T{0} : 1 / total;
    largest[row] = top;
    log_sum[row] = total == 0 ? T{0} : std::log(total);
    mine *= inverse * factor, theirs *= inverse;
    T *target = output + row * part.c.value_dim;
    for (int64_t d = 0; d < part.c.value_dim; ++d) target[d] = sums[d] * mine + (merges ? target[d] * theirs : 0);
  }
};

// Runs run(part) for a call's part, which is checked before.
template <class Run>
int32_t guarded(const anyattention_run_attention_call *call, const Run &run) {
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  Part part(*call);
  if (!part.is_valid()) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    part.copy_arrays();
    if (!part.is_in_range()) return ANYATTENTION_OUT_OF_RANGE;
    part.cut_tiles();
    run(part);
    return ANYATTENTION_OK;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

// What of the forward's results a tile of queries needs in a head.
template <class T>
struct Normalizer {
  T largest[kQueries], log_sum[kQueries];

  void read(const Part &part, const QueryTile &tile, int64_t b, int64_t h, const T *all_largest, const T *all_log_sums) {
    std::fill_n(largest, kQueries, T{0});
    std::fill_n(log_sum, kQueries, T{0});
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t row = part.query_row(b, tile.first + i, h);
      log_sum[i] = all_log_sums[row];
      if (all_largest[row] != kMinusInfinity<T>) largest[i] = all_largest[row];
    }
  }
};

// The weights of a vector of queries, given to take(j, sees j, weight, slope, curvature) for each key that one of them sees,
// from the first to the last; slope and curvature are the derivatives of the softcap.
template <class T, class Take>
ANYATTENTION_INLINE void each_weight(const Part &part, const QueryTile &tile, const Normalizer<T> &normalizer,
                                     const T *scores, const TileBias<T> &bias, int64_t v, const Take &take) {
  constexpr int lane = kLane<T>;
  using Seen = typename SeenLanes<T>::Words;
  const Range range = range_of(tile.seen_by<T>(v));
  const T *score = scores + v * lane;
  const Lanes<T> top = load<lane>(normalizer.largest + v * lane), log = load<lane>(normalizer.log_sum + v * lane);
  const Lanes<T> one = Lanes<T>{} + 1;
  const T cap = cap_of<T>(part.c.softcap);
  // Of a vector that the tile's last query does not fill, the other lanes see nothing.
  const bool is_whole = range.begin < range.end && (v + 1) * lane <= tile.count &&
                        tile.every_of(v * lane, (v + 1) * lane) == bits_of(range.begin, range.end);
  const bool has_bias = part.c.bias.numbers;
  if (is_whole && cap == 0) {
    for (int64_t j = range.begin; j < range.end; ++j) {
      Lanes<T> x = load<lane>(score + j * kQueries);
      if (has_bias) x += bias.at(j, v);
      take(j, Seen{} + 1, Exponential<T, lane>::run((x - top) - log), one, Lanes<T>{});
    }
    return;
  }
  const SeenLanes<T> sees(tile.seen + v * lane);
  for (int64_t j = range.begin; j < range.end; ++j) {
    const Seen seen = sees.of(j);
    Lanes<T> x = load<lane>(score + j * kQueries), slope = one, curvature{};
    if (cap > 0) {
      x = capped<T>(x, cap);
      const Lanes<T> t = x / cap;
      slope -= t * t;
      curvature = -2 * t * slope / cap;
    }
    if (has_bias) x += bias.at(j, v);
    take(j, seen, seen ? Exponential<T, lane>::run((x - top) - log) : Lanes<T>{}, slope, curvature);
  }
}

// A tile's keys as a product reads them.
template <class T>
struct KeyRows {
  const T *numbers;
  int64_t stride;
};

// Those where they lie, if whole vectors do, or else their copies, which are made unless they are there.
template <class T>
KeyRows<T> key_rows(const Part &part, Range keys, int64_t b, int64_t g, T *copies, bool are_there) {
  if (!part.c.parts.key_order && part.c.head_dim == part.D && part.c.key.type == ANYATTENTION_FULL) {
    return {row_of<T>(part.c.key, b, keys.begin, g), part.c.key.row_stride};
  }
  if (!are_there) copy_keys(part, keys, b, g, part.c.key, part.c.head_dim, part.D, copies);
  return {copies, part.D};
}

// The factors of dropout of a vector of queries, where there is dropout, from the first key that one of them sees.
template <class T>
std::optional<Dropout<T>> dropout_of(const Part &part, const QueryTile &tile, int64_t b, int64_t h, int64_t v) {
  if (part.c.dropout == 0) return std::nullopt;
  return std::optional<Dropout<T>>(std::in_place, part, tile, b, h, v, range_of(tile.seen_by<T>(v)).begin);
}

// Runs add(i, j) for each query and key of a tile that sees it: 0 for the others times a number that is not finite is NaN.
template <class Add>
ANYATTENTION_INLINE void each_seen(const QueryTile &tile, const Add &add) {
  const int64_t count = tile.now.end - tile.now.begin;
  for (int64_t i = 0; i < tile.count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      if (tile.seen[i] >> j & 1) add(i, j);
    }
  }
}

// Writes a tile's sums (padded rows) times a factor to the rows (width) of its queries, or adds them.
template <class T>
void write_queries(const Part &part, const QueryTile &tile, int64_t b, int64_t h, const T *sums, int64_t padded, T factor,
                   bool adds, T *rows, int64_t width) {
  for (int64_t i = 0; i < tile.count; ++i) {
    T *row = rows + part.query_row(b, tile.first + i, h) * width;
    for (int64_t d = 0; d < width; ++d) row[d] = sums[i * padded + d] * factor + (adds ? row[d] : 0);
  }
}

// Runs body(n, tile, scratch) for each of some tasks, of which a thread takes `turn` at a time.
template <class T, class Body>
void each_task(const Part &part, int64_t tasks, int64_t turn, int64_t scratch_size, double nanoseconds, const Body &body) {
  const int team = team_size(part.c.num_threads, (tasks + turn - 1) / turn, nanoseconds);
  const Workspace<T> scratch(team * scratch_size, false);
  std::atomic<bool> has_memory{true};
#pragma omp parallel num_threads(team) if (team > 1)
  {
    QueryTile tile(part);
#pragma omp for schedule(dynamic, turn)
    for (int64_t n = 0; n < tasks; ++n) {
      try {
        body(n, tile, scratch.get() + thread_number() * scratch_size);
      } catch (const std::bad_alloc &) {
        has_memory = false;
      }
    }
  }
  if (!has_memory) throw std::bad_alloc();
}

// Runs body(b, h, tile, scratch) for each batch entry, tile of queries and head.
template <class T, class Body>
void each_query_tile(const Part &part, int64_t scratch_size, double nanoseconds, const Body &body) {
  const int64_t tiles = part.query_tiles();
  each_task<T>(part, part.c.batch * tiles * part.H, 4, scratch_size, nanoseconds,
               [&](int64_t n, QueryTile &tile, T *scratch) {
                 tile.move_to(n / part.H % tiles);
                 body(n / part.H / tiles, n % part.H, tile, scratch);
               });
}

// Some tiles of queries, and the keys from the first to the last that they see.
struct Slice {
  int64_t begin, end;
  Range keys;
  int64_t place;  // of its first key among the keys of all slices
};

// Whether queries have numbers of their own.
inline bool slices_are_apart(const anyattention_pairs &pairs) { return pairs.strides[2] != 0 && pairs.strides[3] >= 0; }

// The tiles of queries in as many slices as make sixteen tasks with the batch entries and key heads, whatever the threads.
// Sums of keys have a row for each batch entry, key head, slice and key that it sees. Tasks that add to the same numbers of a
// bias are no tasks apart; a copy of its gradient would cost more than smaller slices.
class Slices {
 public:
  Slices(const Part &p, const anyattention_pairs *gradient) : part(p) {
    const bool has_rows = gradient && slices_are_apart(*gradient);
    const int64_t batch = has_rows && gradient->strides[0] == 0 ? 1 : part.c.batch;
    const int64_t heads = batch * (has_rows && gradient->strides[1] == 0 ? 1 : part.G);
    const int64_t wanted = (16 + heads - 1) / std::max<int64_t>(heads, 1), least = has_rows ? 4 : 8;
    const int64_t count = std::max<int64_t>(1, std::min(wanted, part.query_tiles() / least));
    for (int64_t n = 0; n < count; ++n) {
      const int64_t begin = part.query_tiles() * n / count, end = part.query_tiles() * (n + 1) / count;
      slices.push_back({begin, end, part.keys_of(begin, end), num_keys});
      num_keys += slices.back().keys.end - slices.back().keys.begin;
    }
  }

  int64_t count() const { return static_cast<int64_t>(slices.size()); }
  const Slice &operator[](int64_t n) const { return slices[static_cast<std::size_t>(n)]; }
  int64_t num_rows() const { return part.c.batch * part.G * num_keys; }
  int64_t row(const Slice &slice, int64_t b, int64_t g, int64_t j) const {
    return (b * part.G + g) * num_keys + slice.place + j - slice.keys.begin;
  }
  // Writes a key's sums (padded rows), slice by slice, to its row (width), or adds them.
  template <class T>
  void add_up(int64_t b, int64_t g, int64_t j, const T *sums, int64_t padded, bool adds, T *rows, int64_t width) const {
    T *to = rows + part.key_row(b, j, g) * width;
    if (!adds) std::fill_n(to, width, T{0});
    for (const Slice &slice : slices) {
      if (j >= slice.keys.begin && j < slice.keys.end) add(to, sums + row(slice, b, g, j) * padded, width);
    }
  }

 private:
  const Part &part;
  std::vector<Slice> slices;
  int64_t num_keys = 0;  // of all slices
};

}  // namespace anyattention

#endif
