// Neighbours of nodes, drawn without replacement from compressed rows, and numbers for the nodes that are found.
//
// A draw depends on the seed, the stream, the row and its own number alone, and what is drawn of a row on its draws: so
// neither the cuts between threads nor the other rows change anything.
//
//   r  row     i  listed node     s  slot     d  slots of a row     k  how many of them are drawn     t  draw

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "anyattention.h"
#include "once.h"
#include "philox.h"
#include "team.h"
#include "workspace.h"

namespace {

using anyattention::is_below, anyattention::read_once;

constexpr int64_t kNodesPerChunk = 64;
constexpr double kPerNode = 60, kPerEdge = 20, kPerWeight = 15;  // nanoseconds of one thread

// How far ahead memory is asked for: nodes whose rows begin anywhere, and ids whose places do.
constexpr int64_t kNodesAhead = 16, kIdsAhead = 32, kFoundAhead = 12;

// Up to here the drawn slots are kept in order as they come; beyond, a bit for each slot of the row is faster.
constexpr int64_t kFewDrawn = 64;

using Memory = std::unique_ptr<uint64_t[], anyattention::FreeMemory>;

// The draws of one row: 64 bits each, two for each counter.
class Draws {
 public:
  Draws(int64_t seed, int64_t stream, int64_t row)
      : seed_(static_cast<uint64_t>(seed)), stream_(static_cast<uint64_t>(stream)), row_(static_cast<uint64_t>(row)) {}

  uint64_t operator()(int64_t t) {
    if (t < first_ || t >= first_ + kDraws) fill(t / kDraws * kDraws);
    return draws_[t - first_];
  }

 private:
  static constexpr int64_t kDraws = 2 * anyattention::kCounters;

  void fill(int64_t first) {
    constexpr uint64_t lower = 0xFFFFFFFFu;
    anyattention::Counters counter{};
    for (int n = 0; n < anyattention::kCounters; ++n) counter[n] = static_cast<uint64_t>(first / 2 + n);
    const anyattention::Counters none{};
    const auto words = anyattention::philox(seed_, {counter, none + stream_, none + row_, none + (row_ >> 32)});
    const anyattention::Counters even = (words.x0 & lower) | words.x1 << 32, odd = (words.x2 & lower) | words.x3 << 32;
    for (int n = 0; n < anyattention::kCounters; ++n) {
      draws_[2 * n] = even[n];
      draws_[2 * n + 1] = odd[n];
    }
    first_ = first;
  }

  uint64_t seed_, stream_, row_, draws_[kDraws];
  int64_t first_ = -kDraws;
};

// A number from 0 up to a bound. The odds of any two differ by a part of bound / 2^64.
inline int64_t below(uint64_t draw, int64_t bound) {
  return static_cast<int64_t>(static_cast<unsigned __int128>(draw) * static_cast<uint64_t>(bound) >> 64);
}

// The weight of each slot.
struct Weights {
  const void *numbers;
  const int64_t *edges;
  bool is_double;
  int64_t num_edges;

  // 0 where the slot's edge is not there. Subnormal numbers are 0, as threads that flush them read them.
  double of(int64_t slot) const {
    const int64_t place = edges ? read_once(edges + slot) : slot;
    if (!is_below(place, num_edges)) return 0;
    return is_double ? normal(static_cast<const double *>(numbers)[place])
                     : normal(static_cast<const float *>(numbers)[place]);
  }

 private:
  template <class Number>
  static double normal(Number weight) {
    return weight >= std::numeric_limits<Number>::min() ? weight : 0;
  }
};

// The exponential time at the rate of a weight, relative to the largest; where it could be infinite, what it becomes there
// still rises with it.
inline double waiting_time(double uniform, double weight, double largest) {
  constexpr double least_rate = 0x1p-990, far = 0x1p996, log_far = 690.3745;
  const double rate = weight / largest;
  if (rate >= least_rate) return -std::log(uniform) / rate;
  const double log_time = std::log(-std::log(uniform)) - std::log(weight) + std::log(largest);
  return log_time < log_far ? std::exp(log_time) : far * (1 + log_time - log_far);
}

// Draws slots of a row of d slots and writes them, counted from the row's first, in ascending order.
class Drawer {
 public:
  // Floyd's (Bentley and Floyd, 1987): the t-th draw is one of the first d - k + t + 1 slots, and where that is drawn
  // already, the last of them.
  int32_t uniform(Draws draws, int64_t d, int64_t k, int64_t *slots) {
    if (k == d) {
      for (int64_t s = 0; s < d; ++s) slots[s] = s;
      return ANYATTENTION_OK;
    }
    if (d <= 64) {
      uint64_t drawn = 0;
      for (int64_t t = 0, last = d - k; t < k; ++t, ++last) {
        const uint64_t bit = uint64_t{1} << below(draws(t), last + 1);
        drawn |= drawn & bit ? uint64_t{1} << last : bit;
      }
      write(drawn, 0, slots);
      return ANYATTENTION_OK;
    }
    if (k <= kFewDrawn) {
      for (int64_t t = 0, last = d - k; t < k; ++t, ++last) {
        const int64_t slot = below(draws(t), last + 1);
        int64_t *place = std::lower_bound(slots, slots + t, slot);
        if (place < slots + t && *place == slot) {
          slots[t] = last;
        } else {
          std::copy_backward(place, slots + t, slots + t + 1);
          *place = slot;
        }
      }
      return ANYATTENTION_OK;
    }
    return by_bits(draws, d, k, slots);
  }

  // Each slot waits for an exponential time at the rate of its weight (Efraimidis and Spirakis, 2006): the k slots that
  // come first.
  int32_t weighted(Draws draws, const Weights &weights, int64_t begin, int64_t d, int64_t k, int64_t *slots) {
    if (!reserve(2 * k, waiting_, num_waiting_)) return ANYATTENTION_OUT_OF_MEMORY;
    auto *heap = reinterpret_cast<Waiting *>(waiting_.get());
    double largest = 0;
    for (int64_t s = 0; s < d; ++s) largest = std::max(largest, weights.of(begin + s));
    int64_t found = 0;
    for (int64_t s = 0; s < d; ++s) {
      const double weight = weights.of(begin + s);
      if (!(weight > 0)) continue;
      // 53 bits, above 0 and up to 1.
      const double uniform = (static_cast<double>(draws(s) >> 11) + 1) * 0x1p-53;
      const Waiting next{waiting_time(uniform, weight, largest), s};
      if (found < k) {
        heap[found++] = next;
        std::push_heap(heap, heap + found);
      } else if (k > 0 && next < heap[0]) {
        std::pop_heap(heap, heap + k);
        heap[k - 1] = next;
        std::push_heap(heap, heap + k);
      }
    }
    // Another thread may have changed which edges these are.
    if (found < k) return ANYATTENTION_OUT_OF_RANGE;
    for (int64_t n = 0; n < k; ++n) slots[n] = heap[n].slot;
    std::sort(slots, slots + k);
    return ANYATTENTION_OK;
  }

 private:
  struct Waiting {
    double time;
    int64_t slot;
    bool operator<(const Waiting &other) const {
      return time != other.time ? time < other.time : slot < other.slot;
    }
  };

  // Slots from the bits of a word.
  static int64_t *write(uint64_t bits, int64_t first, int64_t *slots) {
    for (; bits; bits &= bits - 1) *slots++ = first + __builtin_ctzll(bits);
    return slots;
  }

  int32_t by_bits(Draws &draws, int64_t d, int64_t k, int64_t *slots) {
    const int64_t words = d / 64 + 1;
    if (!reserve(words, bits_, num_bits_)) return ANYATTENTION_OUT_OF_MEMORY;
    uint64_t *bits = bits_.get();
    std::fill_n(bits, words, uint64_t{0});
    for (int64_t t = 0, last = d - k; t < k; ++t, ++last) {
      const int64_t slot = below(draws(t), last + 1);
      const int64_t chosen = bits[slot / 64] >> slot % 64 & 1 ? last : slot;
      bits[chosen / 64] |= uint64_t{1} << chosen % 64;
    }
    for (int64_t w = 0; w < words; ++w) slots = write(bits[w], 64 * w, slots);
    return ANYATTENTION_OK;
  }

  static bool reserve(int64_t count, Memory &memory, int64_t &size) {
    if (size >= count) return true;
    memory = anyattention::allocate<uint64_t>(2 * count, false);
    size = memory ? 2 * count : 0;
    return memory != nullptr;
  }

  Memory bits_, waiting_;
  int64_t num_bits_ = 0, num_waiting_ = 0;
};

// Compressed rows that may change: what is read of them is read once, and compared.
struct Rows {
  const int64_t *offsets, *columns, *edges;
  int64_t num_rows, num_columns, num_edges;

  // The slots of a row; false where there is no such row, or no such slots.
  bool read(int64_t row, int64_t *begin, int64_t *size) const {
    if (!is_below(row, num_rows)) return false;
    *begin = read_once(offsets + row);
    const int64_t end = read_once(offsets + row + 1);
    if (!is_below(*begin, num_edges + 1) || !is_below(end, num_edges + 1) || end < *begin) return false;
    *size = end - *begin;
    return true;
  }

  ANYATTENTION_INLINE void prefetch(int64_t row) const {
    if (is_below(row, num_rows)) __builtin_prefetch(offsets + row);
  }
};

struct Places {
  const int64_t *offsets;
  int64_t count, first;
  int64_t *columns, *positions, *edges;
};

// The slots of listed nodes from `begin` to `end`: drawn, while memory is asked for, and then read.
int32_t draw(const Rows &rows, const Weights &weights, const int64_t *nodes, int64_t begin, int64_t end, int64_t num_nodes,
             int64_t seed, int64_t stream, const Places &places, Drawer &drawer) {
  const int64_t first = read_once(places.offsets + begin);
  if (!is_below(first, places.count + 1)) return ANYATTENTION_OUT_OF_RANGE;
  int64_t next = first;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kNodesAhead < num_nodes) rows.prefetch(read_once(nodes + i + kNodesAhead));
    const int64_t row = read_once(nodes + i), last = read_once(places.offsets + i + 1);
    int64_t slot, d;
    if (!rows.read(row, &slot, &d) || !is_below(last, places.count + 1)) return ANYATTENTION_OUT_OF_RANGE;
    const int64_t k = last - next;
    if (!is_below(k, d + 1)) return ANYATTENTION_OUT_OF_RANGE;
    int64_t *slots = places.edges + next;
    const Draws draws(seed, stream, row);
    const int32_t drawn =
        weights.numbers ? drawer.weighted(draws, weights, slot, d, k, slots) : drawer.uniform(draws, d, k, slots);
    if (drawn != ANYATTENTION_OK) return drawn;
    for (int64_t n = 0; n < k; ++n) {
      slots[n] += slot;
      __builtin_prefetch(rows.columns + slots[n]);
      __builtin_prefetch(rows.edges + slots[n]);
      places.positions[next + n] = places.first + i;
    }
    next = last;
  }
  bool is_inside = true;
  for (int64_t p = first; p < next; ++p) {
    const int64_t slot = read_once(places.edges + p);
    if (!is_below(slot, rows.num_edges)) return ANYATTENTION_OUT_OF_RANGE;
    const int64_t column = read_once(rows.columns + slot), edge = read_once(rows.edges + slot);
    is_inside &= is_below(column, rows.num_columns) & is_below(edge, rows.num_edges);
    places.columns[p] = column;
    places.edges[p] = edge;
  }
  return is_inside ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
}

template <class Place>
int32_t number(int64_t *ids, int64_t num_ids, int64_t num_nodes, Place *places, int64_t *found, int64_t capacity,
               int64_t *count) {
  int64_t known = *count;
  // Whatever `places` holds: a number that was given has its node.
  for (int64_t p = 0; p < num_ids; ++p) {
    if (p + kIdsAhead < num_ids) {
      const int64_t ahead = read_once(ids + p + kIdsAhead);
      if (is_below(ahead, num_nodes)) __builtin_prefetch(places + ahead, 1);
      const int64_t nearer = read_once(ids + p + kFoundAhead);
      if (is_below(nearer, num_nodes) && is_below(places[nearer], known)) __builtin_prefetch(found + places[nearer]);
    }
    const int64_t node = read_once(ids + p);
    if (!is_below(node, num_nodes)) return ANYATTENTION_OUT_OF_RANGE;
    int64_t place = places[node];
    if (!is_below(place, known) || found[place] != node) {
      if (known == capacity) return ANYATTENTION_OUT_OF_RANGE;
      place = known++;
      found[place] = node;
      places[node] = static_cast<Place>(place);
    }
    ids[p] = place;
  }
  *count = known;
  return ANYATTENTION_OK;
}

// Several errors leave one: the smallest code, so that it does not depend on who was first.
void keep_worse(std::atomic<int32_t> &status, int32_t found) {
  int32_t known = status;
  while (found != ANYATTENTION_OK && (known == ANYATTENTION_OK || found < known)) {
    if (status.compare_exchange_weak(known, found)) break;
  }
}

}  // namespace

extern "C" int32_t anyattention_sampled_offsets(const int64_t *row_offsets, int64_t num_rows, int64_t num_edges,
                                                const void *weights, const int64_t *weight_edges, int32_t is_double,
                                                const int64_t *nodes, int64_t num_nodes, int64_t fanout,
                                                int64_t num_threads, int64_t *offsets) {
  if (num_rows < 0 || num_edges < 0 || num_nodes < 0 || fanout < -1 || !row_offsets || !offsets)
    return ANYATTENTION_INVALID_ARGUMENT;
  if (num_nodes > 0 && !nodes) return ANYATTENTION_INVALID_ARGUMENT;
  const Rows rows{row_offsets, nullptr, nullptr, num_rows, 0, num_edges};
  const Weights weight{weights, weight_edges, is_double != 0, num_edges};
  std::atomic<bool> is_bad{false};
  const int64_t chunks = (num_nodes + kNodesPerChunk - 1) / kNodesPerChunk;
  double nanoseconds = static_cast<double>(num_nodes) * kPerNode;
  // As if rows were of the same length.
  if (weights) nanoseconds *= 1 + static_cast<double>(num_edges) / static_cast<double>(num_rows + 1) * kPerWeight / kPerNode;
#pragma omp parallel for num_threads(anyattention::team_size(num_threads, chunks, nanoseconds)) schedule(static)
  for (int64_t i = 0; i < num_nodes; ++i) {
    if (i + kNodesAhead < num_nodes) rows.prefetch(read_once(nodes + i + kNodesAhead));
    int64_t begin, size;
    if (!rows.read(read_once(nodes + i), &begin, &size)) {
      is_bad = true;
      offsets[i + 1] = 0;
      continue;
    }
    if (weights) {
      int64_t there = 0;
      for (int64_t s = 0; s < size; ++s) there += weight.of(begin + s) > 0;
      size = there;
    }
    offsets[i + 1] = fanout < 0 ? size : std::min(size, fanout);
  }
  if (is_bad) return ANYATTENTION_OUT_OF_RANGE;
  for (int64_t i = 0; i < num_nodes; ++i) offsets[i + 1] += offsets[i];
  return ANYATTENTION_OK;
}

extern "C" int32_t anyattention_sampled_rows(const int64_t *row_offsets, const int64_t *slot_columns,
                                             const int64_t *slot_edges, int64_t num_rows, int64_t num_columns,
                                             int64_t num_edges, const void *weights, const int64_t *weight_edges,
                                             int32_t is_double, const int64_t *nodes, int64_t num_nodes,
                                             const int64_t *offsets, int64_t num_places, int64_t first, int64_t seed,
                                             int64_t stream, int64_t num_threads, int64_t *columns,
                                             int64_t *positions, int64_t *edges) {
  if (num_rows < 0 || num_columns < 0 || num_edges < 0 || num_nodes < 0 || num_places < 0 || !row_offsets || !offsets)
    return ANYATTENTION_INVALID_ARGUMENT;
  if (num_nodes > 0 && !nodes) return ANYATTENTION_INVALID_ARGUMENT;
  if (num_places > 0 && (!slot_columns || !slot_edges || !columns || !positions || !edges))
    return ANYATTENTION_INVALID_ARGUMENT;
  const Rows rows{row_offsets, slot_columns, slot_edges, num_rows, num_columns, num_edges};
  const Weights weight{weights, weight_edges, is_double != 0, num_edges};
  const Places places{offsets, num_places, first, columns, positions, edges};
  const int64_t chunks = (num_nodes + kNodesPerChunk - 1) / kNodesPerChunk;
  double nanoseconds = static_cast<double>(num_nodes) * kPerNode + static_cast<double>(num_places) * kPerEdge;
  if (weights) nanoseconds += static_cast<double>(num_edges) / static_cast<double>(num_rows + 1) * kPerWeight * num_nodes;
  std::atomic<int32_t> status{ANYATTENTION_OK};
#pragma omp parallel num_threads(anyattention::team_size(num_threads, chunks, nanoseconds))
  {
    Drawer drawer;
#pragma omp for schedule(dynamic, 2)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * kNodesPerChunk, end = std::min(begin + kNodesPerChunk, num_nodes);
      keep_worse(status, draw(rows, weight, nodes, begin, end, num_nodes, seed, stream, places, drawer));
    }
  }
  return status;
}

extern "C" int32_t anyattention_numbered_nodes(int64_t *ids, int64_t num_ids, int64_t num_nodes, void *places,
                                               int32_t is_wide, int64_t *found, int64_t capacity, int64_t *count) {
  if (num_ids < 0 || num_nodes < 0 || capacity < 0 || !count || *count < 0 || *count > capacity)
    return ANYATTENTION_INVALID_ARGUMENT;
  if ((num_ids > 0 && (!ids || !found || !places)) || (!is_wide && num_nodes > INT32_MAX))
    return ANYATTENTION_INVALID_ARGUMENT;
  return is_wide ? number(ids, num_ids, num_nodes, static_cast<int64_t *>(places), found, capacity, count)
                 : number(ids, num_ids, num_nodes, static_cast<int32_t *>(places), found, capacity, count);
}
