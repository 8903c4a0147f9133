// Tiles of queries and keys for attention over runs of keys, and what of each the products must compute.
//
// Keys that no query of a tile sees are left out, in the products too, block by block; a bit for each pair masks the
// others. A tile of queries ends early where the next query sees other keys altogether.
#ifndef ANYATTENTION_TILES_H
#define ANYATTENTION_TILES_H

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "anyattention.h"
#include "half.h"
#include "once.h"
#include "pairs.h"
#include "philox.h"
#include "products.h"
#include "simd.h"
#include "softcap.h"
#include "workspace.h"

namespace anyattention {

constexpr int64_t kQueries = 128, kKeys = 64;  // of a tile, at most
constexpr int64_t kRows = kQueries > kKeys ? kQueries : kKeys;
constexpr int64_t kFewRows = 8;
constexpr uint64_t kWhole = ~uint64_t{0};
template <class T>
constexpr int kVectors = kQueries / kLane<T>;

struct Range {
  int64_t begin, end;
};

// The places from the first to the last bit.
inline Range range_of(uint64_t bits) {
  return bits ? Range{__builtin_ctzll(bits), 64 - __builtin_clzll(bits)} : Range{0, 0};
}

// The bits from begin up to end, at least one.
inline uint64_t bits_of(int64_t begin, int64_t end) { return kWhole >> (64 - (end - begin)) << begin; }

// One part of a call: the sizes, and where everything lies.
struct Part {
  anyattention_run_attention_call c;  // after copy_arrays with copies of the index arrays, which nobody else changes
  int64_t H, G, D, C;
  std::vector<int64_t> first_query;  // of each tile of queries, and one after the last
  std::vector<int64_t> first_pair;   // of each query, and one after the last; with dropout only

  explicit Part(const anyattention_run_attention_call &call) : c(call), H(call.heads), G(call.key_heads) {
    const int64_t lane = call.is_double ? kLane<double> : kLane<float>;
    D = (call.head_dim + lane - 1) / lane * lane;
    C = (call.value_dim + lane - 1) / lane * lane;
  }

  // After is_valid; throws std::bad_alloc.
  void copy_arrays() {
    anyattention_run_part &parts = c.parts;
    const int64_t of_queries = parts.query_order ? c.num_queries : 0, of_keys = parts.key_order ? c.num_keys : 0;
    int64_t *next = copies.emplace(c.num_queries + 1 + 2 * parts.num_runs + of_queries + of_keys, false).get();
    const auto copy = [&next](const int64_t *&array, int64_t count) {
      if (!array) return;
      copy_once(array, count, next);
      array = std::exchange(next, next + count);
    };
    copy(parts.offsets, c.num_queries + 1), copy(parts.begins, parts.num_runs), copy(parts.ends, parts.num_runs);
    copy(parts.query_order, c.num_queries), copy(parts.key_order, c.num_keys);
  }

  // After the checks.
  void cut_tiles() {
    int64_t low = c.num_keys, reach = 0;  // the keys that the tile's queries see lie between
    for (int64_t i = 0; i < c.num_queries; ++i) {
      const int64_t begin = c.parts.offsets[i], end = c.parts.offsets[i + 1];
      const bool is_apart = begin < end && (c.parts.begins[begin] >= reach || c.parts.ends[end - 1] <= low);
      if (first_query.empty() || i - first_query.back() == kQueries || is_apart) {
        first_query.push_back(i);
        low = c.num_keys, reach = 0;
      }
      if (begin == end) continue;
      low = std::min(low, c.parts.begins[begin]);
      reach = std::max(reach, c.parts.ends[end - 1]);
    }
    first_query.push_back(c.num_queries);
    if (c.dropout == 0) return;
    first_pair.push_back(0);
    for (int64_t i = 0; i < c.num_queries; ++i) {
      int64_t pairs = 0;
      for (int64_t r = c.parts.offsets[i]; r < c.parts.offsets[i + 1]; ++r) pairs += c.parts.ends[r] - c.parts.begins[r];
      first_pair.push_back(first_pair.back() + pairs);
    }
  }

  // The keys from the first to the last that the queries of some tiles see.
  Range keys_of(int64_t begin, int64_t end) const {
    const auto from = static_cast<std::size_t>(begin), to = static_cast<std::size_t>(end);
    Range keys{c.num_keys, 0};
    for (int64_t r = c.parts.offsets[first_query[from]]; r < c.parts.offsets[first_query[to]]; ++r) {
      keys.begin = std::min(keys.begin, c.parts.begins[r]);
      keys.end = std::max(keys.end, c.parts.ends[r]);
    }
    return {std::min(keys.begin, keys.end), keys.end};
  }
  int64_t query_at(int64_t i) const { return c.parts.query_order ? c.parts.query_order[i] : i; }
  int64_t key_at(int64_t j) const { return c.parts.key_order ? c.parts.key_order[j] : j; }
  int64_t query_row(int64_t b, int64_t i, int64_t h) const { return (b * c.num_queries + query_at(i)) * H + h; }
  int64_t key_row(int64_t b, int64_t j, int64_t g) const { return (b * c.num_keys + key_at(j)) * G + g; }

  int64_t query_tiles() const { return static_cast<int64_t>(first_query.size()) - 1; }

  // Whether the queries of all heads that share a key head are few; more fill the lanes of a tile well enough.
  bool has_few_queries() const { return query_tiles() == 1 && c.num_queries * (H / G) <= kFewRows; }

  // Whether products take rows as halves (halves.h): rows in bfloat16, on a processor that multiplies it.
  bool has_halves() const {
#ifdef __AVX512BF16__
    const auto is_bfloat16 = [](const anyattention_head_rows &rows) { return rows.type == ANYATTENTION_BFLOAT16; };
    return is_bfloat16(c.query) && is_bfloat16(c.key) && is_bfloat16(c.value) && !has_few_queries();
#else
    return false;
#endif
  }

  // What a forward takes one thread: products of whole vectors of queries, and the rows that are copied for them; a
  // backward takes twice as long, but for dropout.
  double nanoseconds() const {
    const int64_t lane = c.is_double ? kLane<double> : kLane<float>;
    double pairs = 0, keys = 0;
    for (std::size_t tile = 0; tile + 1 < first_query.size(); ++tile) {
      const int64_t begin = first_query[tile], end = first_query[tile + 1];
      int64_t seen = 0;
      for (int64_t r = c.parts.offsets[begin]; r < c.parts.offsets[end]; ++r) seen += c.parts.ends[r] - c.parts.begins[r];
      const int64_t queries = std::max<int64_t>(end - begin, 1), padded = (queries + lane - 1) / lane * lane;
      pairs += static_cast<double>(seen) * static_cast<double>(padded) / static_cast<double>(queries);
      keys += static_cast<double>(seen) / static_cast<double>(queries);
    }
    const double heads = static_cast<double>(c.batch * H), width = static_cast<double>(D + C);
    const double queries = static_cast<double>(c.num_queries), copied = width * (keys + 2 * queries) * 0.15;
    const double per_product = has_halves() ? kPerProduct / 2 : kPerProduct;
    return heads * (pairs * (width * per_product + (c.dropout > 0 ? 2 : 0.5)) + copied + queries * 80) *
           (c.is_double ? 2 : 1);
  }

  bool is_valid() const {
    if (c.batch < 0 || H < 1 || G < 1 || H % G || c.num_queries < 0 || c.num_keys < 0 || c.head_dim < 1) return false;
    if (c.value_dim < 1 || c.num_threads < 1 || !c.parts.offsets) return false;
    if (c.parts.num_runs < 0 || (c.parts.num_runs > 0 && (!c.parts.begins || !c.parts.ends))) return false;
    for (const anyattention_head_rows *rows : {&c.query, &c.key, &c.value}) {
      if (!is_valid(*rows, c.is_double)) return false;
    }
    return c.dropout >= 0 && c.dropout < 1 && (c.dropout == 0 || !(c.parts.query_order || c.parts.key_order));
  }

  static bool is_valid(const anyattention_head_rows &rows, bool is_double) {
    const bool has_type = rows.type >= ANYATTENTION_FULL && rows.type <= ANYATTENTION_FLOAT16;
    return has_type && (rows.type == ANYATTENTION_FULL || !is_double) && rows.batch_stride >= 0 && rows.row_stride >= 0 &&
           rows.head_stride >= 0;
  }

  // Whether offsets and runs rise, the runs apart from one another and inside the keys, the orders name each place once, and
  // the mask and bias stay inside.
  bool is_in_range() const {
    if (!offsets_rise()) return false;
    bool valid = is_inside(c.mask, c) && is_inside(c.bias, c);
    for (int64_t i = 0; i < c.num_queries; ++i) {
      int64_t reached = 0;
      for (int64_t r = c.parts.offsets[i]; r < c.parts.offsets[i + 1]; ++r) {
        valid &= c.parts.begins[r] >= reached && c.parts.begins[r] < c.parts.ends[r];
        reached = c.parts.ends[r];
      }
      valid &= reached <= c.num_keys;
    }
    return valid && is_order(c.parts.query_order, c.num_queries) && is_order(c.parts.key_order, c.num_keys);
  }

 private:
  std::optional<Workspace<int64_t>> copies;

  bool offsets_rise() const {
    const int64_t *offsets = c.parts.offsets;
    return offsets[0] == 0 && offsets[c.num_queries] == c.parts.num_runs &&
           std::is_sorted(offsets, offsets + c.num_queries + 1);
  }

  // A place that is missing would leave a result unwritten.
  static bool is_order(const int64_t *places, int64_t count) {
    std::vector<bool> found(static_cast<std::size_t>(places ? count : 0));
    for (int64_t n = 0; places && n < count; ++n) {
      if (!is_below(places[n], count) || found[static_cast<std::size_t>(places[n])]) return false;
      found[static_cast<std::size_t>(places[n])] = true;
    }
    return true;
  }
};

// Copies rows (width) from wherever `row_of` finds them into whole vectors; whether all numbers are finite.
template <class T, class RowOf>
bool copy_rows(int64_t count, int64_t width, int64_t padded, const RowOf &row_of, T *to) {
  Lanes<T> broken{};
  for (int64_t n = 0; n < count; ++n, to += padded) {
    const auto *row = row_of(n);
    int64_t d = 0;
    for (; d + kLane<T> <= width; d += kLane<T>) {
      const Lanes<T> part = load_wide<T, kLane<T>>(row + d);
      store<T, kLane<T>>(to + d, part);
      broken += part * 0;
    }
    if (d == padded) continue;
    for (int64_t rest = d; rest < padded; ++rest) to[rest] = rest < width ? load_wide<T, 1>(row + rest)[0] : T{0};
    broken += load<kLane<T>>(to + d) * 0;
  }
  return sum_of<T, kLane<T>>(broken) == 0;
}

// A tile of queries, the keys that it sees, and which of these each query sees.
class QueryTile {
 public:
  int64_t first = 0, count = 0;
  std::vector<Range> keys;  // tiles of keys, rising, each begun by a key that is seen
  Range now{};              // one of them
  uint64_t seen[kQueries];  // for each query a bit for each key of it
  // With dropout only: the same without the mask, and which of all pairs is the first of the tile's, or would be.
  uint64_t runs[kQueries];
  int64_t pair[kQueries];

  explicit QueryTile(const Part &p) : part(p) {}

  void move_to(int64_t index) {
    if (index == at) return;
    at = index;
    first = part.first_query[static_cast<std::size_t>(index)];
    count = part.first_query[static_cast<std::size_t>(index) + 1] - first;
    ranges.clear();
    for (int64_t r = part.c.parts.offsets[first]; r < part.c.parts.offsets[first + count]; ++r) {
      ranges.push_back({part.c.parts.begins[r], part.c.parts.ends[r]});
    }
    std::sort(ranges.begin(), ranges.end(), [](Range a, Range b) { return a.begin < b.begin; });
    keys.clear();
    for (std::size_t n = 0; n < ranges.size();) {
      Range joined = ranges[n];
      for (++n; n < ranges.size() && ranges[n].begin <= joined.end; ++n) {
        joined.end = std::max(joined.end, ranges[n].end);
      }
      if (!keys.empty() && joined.begin < keys.back().begin + kKeys) {
        keys.back().end = std::min(joined.end, keys.back().begin + kKeys);
        joined.begin = keys.back().begin + kKeys;
      }
      for (int64_t j = joined.begin; j < joined.end; j += kKeys) keys.push_back({j, std::min(j + kKeys, joined.end)});
    }
  }

  // Before the first tile of keys, or one that begins with a key.
  void start(int64_t key = 0) {
    std::copy_n(part.c.parts.offsets + first, count, cursor);
    if (part.c.dropout == 0) return;
    std::fill(runs, runs + kQueries, 0);
    std::copy_n(part.first_pair.data() + first, count, pair);
    for (int64_t i = 0; key > 0 && i < count; ++i) {
      for (int64_t r = part.c.parts.offsets[first + i]; r < part.c.parts.offsets[first + i + 1]; ++r) {
        pair[i] += std::max<int64_t>(0, std::min(part.c.parts.ends[r], key) - part.c.parts.begins[r]);
      }
    }
  }

  // Reads which keys of a tile each query sees in a head; tiles must come in rising order.
  void look_at(Range tile, int64_t b, int64_t h) {
    const bool is_next = tile.begin != now.begin || tile.end != now.end;  // not the same once more, for another head
    now = tile;
    std::fill(seen, seen + kQueries, 0);
    for (int64_t i = 0; i < count; ++i) {
      if (part.c.dropout > 0 && is_next) pair[i] += __builtin_popcountll(runs[i]);
      const int64_t last = part.c.parts.offsets[first + i + 1];
      while (cursor[i] < last && part.c.parts.ends[cursor[i]] <= now.begin) ++cursor[i];
      for (int64_t r = cursor[i]; r < last && part.c.parts.begins[r] < now.end; ++r) {
        seen[i] |= bits_of(std::max(part.c.parts.begins[r], now.begin) - now.begin,
                           std::min(part.c.parts.ends[r], now.end) - now.begin);
      }
    }
    if (part.c.dropout > 0) std::copy_n(seen, kQueries, runs);
    if (part.c.mask.numbers) hide(b, h);
    join_groups();
  }
  // After pairs were hidden.
  void join_groups() {
    for (int n = 0; n < kGroups; ++n) seen_by_group[n] = any_of(n * kGroup, (n + 1) * kGroup);
  }

  // The vectors of queries, from the first to the last, of which one sees one of the keys from begin up to end.
  template <class T>
  Range vectors_of(int64_t begin, int64_t end) const {
    const uint64_t bits = bits_of(begin, end);
    Range vectors{0, 0};
    for (int v = 0; v < kVectors<T>; ++v) {
      if (!(seen_by<T>(v) & bits)) continue;
      if (vectors.begin == vectors.end) vectors.begin = v;
      vectors.end = v + 1;
    }
    return vectors;
  }
  // The keys that a vector of queries sees, each by one of them at least.
  template <class T>
  uint64_t seen_by(int64_t v) const {
    constexpr int groups = kLane<T> / kGroup;
    uint64_t bits = 0;
    for (int n = 0; n < groups; ++n) bits |= seen_by_group[v * groups + n];
    return bits;
  }
  uint64_t any_of(int64_t begin, int64_t end) const {
    uint64_t bits = 0;
    for (int64_t i = begin; i < end; ++i) bits |= seen[i];
    return bits;
  }
  // Whether each query sees every key.
  bool is_whole() const { return every_of(0, count) == bits_of(0, now.end - now.begin); }
  // The keys that each of some queries sees.
  uint64_t every_of(int64_t begin, int64_t end) const {
    uint64_t bits = kWhole;
    for (int64_t i = begin; i < std::min(end, count); ++i) bits &= seen[i];
    return bits;
  }

  // How many pairs the products compute, those of queries that see no such key included.
  template <class T>
  int64_t num_pairs() const {
    int64_t pairs = 0;
    for (int v = 0; v < kVectors<T>; ++v) {
      const Range range = range_of(seen_by<T>(v));
      pairs += (range.end - range.begin) * kLane<T>;
    }
    return pairs;
  }

  // What of the tile's products some keys or queries need. Scores that no query of a vector sees are not computed, and
  // what lies in their place is not read: weights are made from a vector's first seen key to its last, the others are 0.
  template <class T>
  Extent scores_of(int64_t begin, int64_t end, int64_t depth) const {
    const Range v = vectors_of<T>(begin, end);
    return {v.begin * kLane<T>, (v.end - v.begin) * kLane<T>, 0, depth};
  }
  template <class T>
  auto sums_over_queries(int64_t columns) const {
    return [this, columns](int64_t begin, int64_t end) {
      const Range v = vectors_of<T>(begin, end);
      return Extent{0, columns, v.begin * kLane<T>, std::min(v.end * kLane<T>, count)};
    };
  }
  auto sums_over_keys(int64_t columns) const {
    return [this, columns](int64_t begin, int64_t end) {
      const Range j = range_of(any_of(begin, end));
      return Extent{0, columns, j.begin, j.end};
    };
  }

 private:
  const Part &part;
  int64_t at = -1;
  int64_t cursor[kQueries];  // each query's first run that does not end before the tile of keys
  std::vector<Range> ranges;
  static constexpr int kGroup = kLane<double>, kGroups = kQueries / kGroup;
  uint64_t seen_by_group[kGroups];

  void hide(int64_t b, int64_t h) {
    const anyattention_pairs &mask = part.c.mask;
    const auto *allowed = static_cast<const uint8_t *>(mask.numbers) + place_of_head(mask, b, h);
    const auto bits = [&](int64_t i) {
      uint64_t found = 0;
      for (int64_t j = now.begin; j < now.end; ++j) {
        found |= uint64_t{allowed[i * mask.strides[2] + part.key_at(j) * mask.strides[3]] != 0} << (j - now.begin);
      }
      return found;
    };
    uint64_t found = mask.strides[2] == 0 ? bits(0) : 0;
    for (int64_t i = 0; i < count; ++i) {
      if (mask.strides[2] != 0 && seen[i]) found = bits(part.query_at(first + i));
      seen[i] &= found;
    }
  }
};

// Which keys of a tile a vector of queries sees, as lanes.
template <class T>
class SeenLanes {
 public:
  using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Words = Vector<Word, kLane<T>>;

  explicit SeenLanes(const uint64_t *seen) {
    for (int n = 0; n < kWords; ++n) {
      for (int lane = 0; lane < kLane<T>; ++lane) words[n][lane] = static_cast<Word>(seen[lane] >> (n * kBits));
    }
  }
  Words of(int64_t j) const { return words[j / kBits] >> static_cast<int>(j % kBits) & 1; }

 private:
  static constexpr int kBits = 8 * sizeof(Word), kWords = 64 / kBits;
  Words words[kWords];
};

// Puts the lowest bits, in order, to where `places` has bits.
inline uint64_t spread(uint64_t bits, uint64_t places) {
  uint64_t result = 0;
  while (places) {
    const uint64_t rest = places & (places + (places & -places)), run = places ^ rest;
    result |= bits << __builtin_ctzll(run) & run;
    if (!rest) break;  // the run may be all 64 places
    bits >>= __builtin_popcountll(run);
    places = rest;
  }
  return result;
}

// The factors of dropout for a vector of queries, from one key of a tile on.
template <class T>
class Dropout {
 public:
  Dropout(const Part &p, const QueryTile &tile, int64_t b, int64_t h, int64_t v, int64_t key)
      : factor_(Lanes<T>{} + static_cast<T>(1 / (1 - p.c.dropout))), kept_(kept_of(p, tile, b, h, v, key).data()) {}

  Lanes<T> next() { return kept_.of(next_++) ? factor_ : Lanes<T>{}; }

  // For each query a bit for each key.
  static std::array<uint64_t, kLane<T>> kept_of(const Part &p, const QueryTile &tile, int64_t b, int64_t h, int64_t v,
                                                int64_t key) {
    const Kept kept(p.c.dropout, p.c.seed);
    std::array<uint64_t, kLane<T>> bits{};
    for (int64_t n = 0; n < kLane<T> && v * kLane<T> + n < tile.count; n += kCounters) {
      Counters position{};
      uint64_t runs[kCounters]{};
      int64_t count = p.c.is_dense ? range_of(tile.seen_by<T>(v)).end - key : 0;
      for (int lane = 0; lane < kCounters; ++lane) {
        const int64_t i = std::min(v * kLane<T> + n + lane, tile.count - 1);
        int64_t place = (((b * p.H + h) * p.c.num_queries + tile.first + i) * p.c.num_keys) + tile.now.begin + key;
        if (!p.c.is_dense) {
          runs[lane] = tile.runs[i] >> key;
          const int64_t pair = tile.pair[i] + __builtin_popcountll(tile.runs[i] & ~(kWhole << key));
          place = (b * p.first_pair.back() + pair) * p.H + h;
          count = std::max<int64_t>(count, __builtin_popcountll(runs[lane]));
        }
        position[lane] = static_cast<uint64_t>(place);
      }
      const Counters found = kept.apart(position, p.c.is_dense ? 1 : static_cast<uint64_t>(p.H), count);
      for (int lane = 0; lane < kCounters; ++lane) {
        bits[static_cast<std::size_t>(n + lane)] = p.c.is_dense ? found[lane] : spread(found[lane], runs[lane]);
      }
    }
    return bits;
  }

 private:
  Lanes<T> factor_;
  SeenLanes<T> kept_;
  int64_t next_ = 0;
};

// c tanh(x / c). Near 0 the difference of exponentials would lose digits, and a series takes its place.
template <class T>
Lanes<T> capped(Lanes<T> x, T cap) {
  const Lanes<T> t = x / cap, square = t * t;
  if constexpr (sizeof(T) == sizeof(double)) {
    Lanes<T> result{};
    for (int lane = 0; lane < kLane<T>; ++lane) result[lane] = cap * std::tanh(t[lane]);
    return square < kLinear<T> ? x : result;
  } else {
    const Lanes<T> series = 2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835));
    const Lanes<T> near = t * (1 + square * (-1.0f / 3 + square * series));
    const Lanes<T> far = 1 - 2 / (Exponential<T, kLane<T>>::run(2 * t) + 1);
    const Lanes<T> bent = cap * (square < 0.0625f ? near : far);
    return square < kLinear<T> ? x : bent;
  }
}

// What one tile of queries needs in one head, in a thread's own memory.
template <class T>
struct TileMemory {
  T *query, *turned_query, *key, *value, *score, *output;
  T *grad, *turned_grad, *by_score, *by_query;  // backward
  T *earlier;                                   // output or by_query, of the blocks of keys before
  T *bias;

  TileMemory(T *memory, const Part &part) {
    const int64_t by_key = kRows * part.D, by_value = kRows * part.C, pairs = kQueries * kKeys;
    const auto take = [&memory](int64_t size) { return std::exchange(memory, memory + size); };
    query = take(by_key), turned_query = take(by_key), key = take(by_key), value = take(by_value);
    score = take(pairs), output = take(by_value);
    grad = take(by_value), turned_grad = take(by_value), by_score = take(pairs), by_query = take(by_key);
    earlier = take(std::max(by_key, by_value)), bias = take(part.c.bias.numbers ? pairs : 0);
  }
  static int64_t size(const Part &part) {
    const int64_t tiles = part.c.bias.numbers ? 3 : 2;
    return kRows * (4 * (part.D + part.C) + std::max(part.D, part.C)) + tiles * kQueries * kKeys + kLane<T>;
  }
};

// Turns rows (padded) into columns kQueries apart, times a factor; the last vector of queries is filled with 0.
template <class T>
void turn(int64_t count, int64_t padded, const T *rows, T factor, T *turned) {
  for (int64_t d = 0; d < padded; ++d) {
    for (int64_t i = 0; i < count; ++i) turned[d * kQueries + i] = rows[i * padded + d] * factor;
    for (int64_t i = count; i % kLane<T>; ++i) turned[d * kQueries + i] = 0;
  }
}

// The row of a batch entry, a position and a head.
template <class Number>
ANYATTENTION_INLINE const Number *row_of(const anyattention_head_rows &rows, int64_t b, int64_t i, int64_t h) {
  return static_cast<const Number *>(rows.numbers) + b * rows.batch_stride + i * rows.row_stride + h * rows.head_stride;
}

// Copies rows (width) of a tile's keys or values; whether all numbers are finite.
template <class T>
bool copy_keys(const Part &part, Range keys, int64_t b, int64_t g, const anyattention_head_rows &rows, int64_t width,
               int64_t padded, T *to) {
  return with_type_of<T>(rows.type, [&](auto zero) {
    return copy_rows(keys.end - keys.begin, width, padded,
                     [&](int64_t j) { return row_of<decltype(zero)>(rows, b, part.key_at(keys.begin + j), g); }, to);
  });
}

// Copies rows (width) of a tile's queries; whether all numbers are finite.
template <class T>
bool copy_queries(const Part &part, const QueryTile &tile, int64_t b, int64_t h, const anyattention_head_rows &rows,
                  int64_t width, int64_t padded, T *to) {
  return with_type_of<T>(rows.type, [&](auto zero) {
    return copy_rows(tile.count, width, padded,
                     [&](int64_t i) { return row_of<decltype(zero)>(rows, b, part.query_at(tile.first + i), h); }, to);
  });
}

// A head's rows, to ask for them before they are needed.
template <class T>
struct RowsAhead {
  uintptr_t first;  // no pointer: there may be no rows
  int64_t stride, bytes;

  RowsAhead(const anyattention_head_rows &rows, int64_t b, int64_t head, int64_t width) {
    const int64_t size = rows.type == ANYATTENTION_FULL ? sizeof(T) : sizeof(uint16_t);
    first = reinterpret_cast<uintptr_t>(rows.numbers) +
            static_cast<uintptr_t>((b * rows.batch_stride + head * rows.head_stride) * size);
    stride = rows.row_stride * size, bytes = width * size;
  }
  ANYATTENTION_INLINE void prefetch(int64_t i) const {
    prefetch_row(reinterpret_cast<const void *>(first + static_cast<uintptr_t>(i * stride)), bytes);
  }
};

}  // namespace anyattention

#endif
