// Attention over runs of keys: dense products of tiles, in which every query sees some runs of neighbouring keys. Tiles
// that no query sees are left out, and tiles that only some see are masked by a bit for each pair. A tile of queries ends
// early where the next query sees other keys altogether.
//
//   i  query in order     j  key in order     t  tile of kKeys keys     h  head     g  key head, h / group
//   D, C  head_dim, value_dim, rounded up to whole vectors in the packed copies
//   S  scores, P  weights, l  logsumexp
//
// The keys that are seen are copied once for each batch entry and key head, tile by tile and as the products read them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "anyattention.h"
#include "products.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {
namespace {

constexpr int64_t kQueries = 48, kKeys = 64;  // of a tile, at most
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr uint64_t kWhole = ~uint64_t{0};

struct Range {
  int64_t begin, end;
};

bool is_finite(const float *row, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t n = 0; n < count; ++n) sum += row[n] * 0;
  return sum == 0;
}

// Some tiles of queries, and the packed tiles of keys from the first to the last that they see.
struct Slice {
  int64_t begin, end, first_key, num_keys;
  int64_t place;  // among the tiles of keys of all slices
};

// One part of a call: the sizes, and where everything lies.
struct Part {
  const anyattention_run_attention &c;
  int64_t H, G, D, C;
  std::vector<int64_t> first_query;  // of each tile of queries, and one after the last
  std::vector<int64_t> packed_tile;  // the place of each tile of keys among those that are seen, else -1
  int64_t query_tiles = 0, num_packed = 0;

  explicit Part(const anyattention_run_attention &call)
      : c(call),
        H(call.heads),
        G(call.key_heads),
        D((call.head_dim + kLane - 1) / kLane * kLane),
        C((call.value_dim + kLane - 1) / kLane * kLane) {}

  // After the checks.
  void cut_tiles() {
    int64_t low = c.num_keys, reach = 0;  // the keys that the tile's queries see lie between
    for (int64_t i = 0; i < c.num_queries; ++i) {
      const int64_t begin = c.run_offsets[i], end = c.run_offsets[i + 1];
      const bool is_apart = begin < end && (c.run_begins[begin] >= reach || c.run_ends[end - 1] <= low);
      if (first_query.empty() || i - first_query.back() == kQueries || is_apart) {
        first_query.push_back(i);
        low = c.num_keys, reach = 0;
      }
      if (begin == end) continue;
      low = std::min(low, c.run_begins[begin]);
      reach = std::max(reach, c.run_ends[end - 1]);
    }
    first_query.push_back(c.num_queries);
    query_tiles = static_cast<int64_t>(first_query.size()) - 1;
    const int64_t num_tiles = (c.num_keys + kKeys - 1) / kKeys;
    std::vector<int64_t> change(static_cast<std::size_t>(num_tiles + 1));
    for (int64_t r = 0; r < c.num_runs; ++r) {
      ++change[static_cast<std::size_t>(c.run_begins[r] / kKeys)];
      --change[static_cast<std::size_t>((c.run_ends[r] - 1) / kKeys + 1)];
    }
    packed_tile.assign(static_cast<std::size_t>(num_tiles), -1);
    for (int64_t t = 0, seen = 0; t < num_tiles; ++t) {
      seen += change[static_cast<std::size_t>(t)];
      if (seen > 0) packed_tile[static_cast<std::size_t>(t)] = num_packed++;
    }
  }

  Slice slice(int64_t begin, int64_t end, int64_t place) const {
    const auto from = static_cast<std::size_t>(begin), to = static_cast<std::size_t>(end);
    int64_t low = c.num_keys, high = 0;
    for (int64_t r = c.run_offsets[first_query[from]]; r < c.run_offsets[first_query[to]]; ++r) {
      low = std::min(low, c.run_begins[r]);
      high = std::max(high, c.run_ends[r]);
    }
    if (low >= high) return {begin, end, 0, 0, place};
    const int64_t first = packed_tile[static_cast<std::size_t>(low / kKeys)];
    return {begin, end, first, packed_tile[static_cast<std::size_t>((high - 1) / kKeys)] - first + 1, place};
  }
  int64_t query_at(int64_t i) const { return c.query_order ? c.query_order[i] : i; }
  int64_t key_at(int64_t j) const { return c.key_order ? c.key_order[j] : j; }
  int64_t query_row(int64_t b, int64_t i, int64_t h) const { return (b * c.num_queries + query_at(i)) * H + h; }
  int64_t key_row(int64_t b, int64_t j, int64_t g) const { return (b * c.num_keys + key_at(j)) * G + g; }

  bool is_valid() const {
    if (c.batch < 0 || H < 1 || G < 1 || H % G || c.num_queries < 0 || c.num_keys < 0 || c.head_dim < 1) return false;
    if (c.value_dim < 1 || c.num_threads < 1 || !c.run_offsets) return false;
    const int64_t runs = c.run_offsets[c.num_queries];
    if (c.run_offsets[0] != 0 || runs < 0 || runs != c.num_runs || (runs > 0 && (!c.run_begins || !c.run_ends))) return false;
    for (int64_t i = 0; i < c.num_queries; ++i) {
      if (c.run_offsets[i] > c.run_offsets[i + 1]) return false;
    }
    return true;
  }

  // Whether runs rise, apart from one another and inside the keys, and the orders stay inside, too.
  bool is_in_range() const {
    bool valid = true;
    for (int64_t i = 0; i < c.num_queries; ++i) {
      int64_t reached = 0;
      for (int64_t r = c.run_offsets[i]; r < c.run_offsets[i + 1]; ++r) {
        valid &= c.run_begins[r] >= reached && c.run_begins[r] < c.run_ends[r];
        reached = c.run_ends[r];
      }
      valid &= reached <= c.num_keys;
    }
    for (int64_t i = 0; c.query_order && i < c.num_queries; ++i) {
      valid &= static_cast<uint64_t>(c.query_order[i]) < static_cast<uint64_t>(c.num_queries);
    }
    for (int64_t j = 0; c.key_order && j < c.num_keys; ++j) {
      valid &= static_cast<uint64_t>(c.key_order[j]) < static_cast<uint64_t>(c.num_keys);
    }
    return valid;
  }
};

// The keys and values of all heads, tile by tile: turned (width, kKeys), for products along a row, or as rows.
struct PackedKeys {
  const Part &part;
  Workspace<float> turned_keys, rows_of_keys, rows_of_values, turned_values;
  std::vector<int64_t> tiles;   // which are packed
  std::vector<uint8_t> broken;  // packed tiles with a number that is not finite

  PackedKeys(const Part &p, bool backward)
      : part(p),
        turned_keys(size(p.D), false),
        rows_of_keys(backward ? size(p.D) : 0, false),
        rows_of_values(backward ? 0 : size(p.C), false),
        turned_values(backward ? size(p.C) : 0, false),
        broken(static_cast<std::size_t>(p.c.batch * p.G * p.num_packed)) {
    for (std::size_t t = 0; t < p.packed_tile.size(); ++t) {
      if (p.packed_tile[t] >= 0) tiles.push_back(static_cast<int64_t>(t));
    }
    const int64_t count = p.c.batch * p.G * p.num_packed;
    const int team = static_cast<int>(std::max<int64_t>(1, std::min(p.c.num_threads, count)));
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t n = 0; n < count; ++n) pack(n, backward);
  }

  int64_t size(int64_t width) const { return part.c.batch * part.G * part.num_packed * kKeys * width; }
  int64_t tile(int64_t b, int64_t g, int64_t t) const {
    return (b * part.G + g) * part.num_packed + part.packed_tile[static_cast<std::size_t>(t)];
  }

  void pack(int64_t n, bool backward) {
    const int64_t t = tiles[static_cast<std::size_t>(n % part.num_packed)];
    const int64_t g = n / part.num_packed % part.G, b = n / part.num_packed / part.G;
    const int64_t count = std::min(kKeys, part.c.num_keys - t * kKeys), D = part.c.head_dim, C = part.c.value_dim;
    bool finite = true;
    float *turned_key = turned_keys.get() + n * kKeys * part.D;
    std::fill_n(turned_key, kKeys * part.D, 0.0f);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t row = part.key_row(b, t * kKeys + j, g);
      const float *k = part.c.key + row * D;
      const float *v = part.c.value + row * C;
      finite = finite && is_finite(k, D) && is_finite(v, C);
      for (int64_t d = 0; d < D; ++d) turned_key[d * kKeys + j] = k[d];
    }
    const auto rows = [&](float *to, const float *from, int64_t width, int64_t padded) {
      std::fill_n(to, kKeys * padded, 0.0f);
      for (int64_t j = 0; j < count; ++j) {
        std::copy_n(from + part.key_row(b, t * kKeys + j, g) * width, width, to + j * padded);
      }
    };
    if (backward) {
      rows(rows_of_keys.get() + n * kKeys * part.D, part.c.key, D, part.D);
      float *turned_value = turned_values.get() + n * kKeys * part.C;
      std::fill_n(turned_value, kKeys * part.C, 0.0f);
      for (int64_t j = 0; j < count; ++j) {
        const float *v = part.c.value + part.key_row(b, t * kKeys + j, g) * C;
        for (int64_t d = 0; d < C; ++d) turned_value[d * kKeys + j] = v[d];
      }
    } else {
      rows(rows_of_values.get() + n * kKeys * part.C, part.c.value, C, part.C);
    }
    broken[static_cast<std::size_t>(n)] = !finite;
  }
};

// The queries of one tile and the keys they see.
struct QueryTile {
  const Part &part;
  int64_t first, count;
  int64_t cursor[kQueries];  // each query's first run that does not end before the tile of keys
  uint64_t seen[kQueries];   // a bit for each key of the tile
  std::vector<Range> tiles;  // of keys

  QueryTile(const Part &p, int64_t index)
      : part(p),
        first(p.first_query[static_cast<std::size_t>(index)]),
        count(p.first_query[static_cast<std::size_t>(index) + 1] - first) {
    std::vector<Range> ranges;
    for (int64_t i = 0; i < count; ++i) {
      cursor[i] = part.c.run_offsets[first + i];
      for (int64_t r = cursor[i]; r < part.c.run_offsets[first + i + 1]; ++r) {
        ranges.push_back({part.c.run_begins[r] / kKeys, (part.c.run_ends[r] - 1) / kKeys + 1});
      }
    }
    std::sort(ranges.begin(), ranges.end(), [](Range a, Range b) { return a.begin < b.begin; });
    for (const Range &range : ranges) {
      if (tiles.empty() || range.begin > tiles.back().end) {
        tiles.push_back(range);
      } else {
        tiles.back().end = std::max(tiles.back().end, range.end);
      }
    }
  }

  // Reads which keys of tile t each query sees; tiles must come in rising order. Whether every query sees every key.
  bool look_at(int64_t t) {
    const int64_t begin = t * kKeys, end = begin + kKeys;
    bool whole = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t last = part.c.run_offsets[first + i + 1];
      while (cursor[i] < last && part.c.run_ends[cursor[i]] <= begin) ++cursor[i];
      uint64_t bits = 0;
      for (int64_t r = cursor[i]; r < last && part.c.run_begins[r] < end; ++r) {
        const int64_t from = std::max<int64_t>(part.c.run_begins[r] - begin, 0);
        const int64_t to = std::min(part.c.run_ends[r] - begin, kKeys);
        bits |= (to - from == kKeys ? kWhole : ((uint64_t{1} << (to - from)) - 1) << from);
      }
      seen[i] = bits;
      whole &= bits == kWhole;
    }
    return whole;
  }

  // Copies rows (width) of the tile's queries into whole vectors, times a factor; whether all are finite.
  bool copy_rows(const float *from, int64_t b, int64_t h, int64_t width, int64_t padded, float factor, float *to) const {
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      const float *row = from + part.query_row(b, first + i, h) * width;
      for (int64_t d = 0; d < width; ++d) to[i * padded + d] = row[d] * factor;
      finite = finite && is_finite(to + i * padded, width);
      std::fill_n(to + i * padded + width, padded - width, 0.0f);
    }
    return finite;
  }
};

// Infinity becomes NaN, which -inf would pass for a hidden key, and hidden keys become -inf.
inline Lanes shown(Lanes scores, uint64_t bits, int64_t lane) {
  typedef int32_t Integers __attribute__((vector_size(64)));
  const Integers places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Integers sees = (static_cast<int32_t>(bits >> lane & 0xffff) >> places) & 1;
  const Lanes hidden = Lanes{} + kMinusInfinity;
  return sees ? scores + scores * 0 : hidden;
}

inline float largest_of(Lanes lanes) {
  float largest = kMinusInfinity;
  for (int n = 0; n < kLane; ++n) largest = lanes[n] > largest ? lanes[n] : largest;
  return largest;
}

void forward_tile(const Part &part, const PackedKeys &keys, int64_t b, int64_t h, int64_t index, bool merges,
                  float *scratch, float *output, float *logsumexp) {
  const int64_t D = part.D, C = part.C, g = h / (part.H / part.G);
  float *q = scratch, *score = q + kQueries * D, *out = score + kQueries * kKeys;
  float largest[kQueries], sum[kQueries];
  QueryTile tile(part, index);
  tile.copy_rows(part.c.query, b, h, part.c.head_dim, D, static_cast<float>(part.c.scale), q);
  std::fill_n(out, kQueries * C, 0.0f);
  std::fill_n(largest, kQueries, kMinusInfinity);
  std::fill_n(sum, kQueries, 0.0f);
  for (const Range &range : tile.tiles) {
    for (int64_t t = range.begin; t < range.end; ++t) {
      const bool whole = tile.look_at(t);
      const int64_t n = keys.tile(b, g, t);
      const bool broken = keys.broken[static_cast<std::size_t>(n)];
      product<false>(tile.count, kKeys, D, q, D, 1, keys.turned_keys.get() + n * kKeys * D, kKeys, score, kKeys);
      for (int64_t i = 0; i < tile.count; ++i) {
        float *row = score + i * kKeys;
        Lanes x[kKeys / kLane], top = Lanes{} + kMinusInfinity;
        for (int p = 0; p < kKeys / kLane; ++p) {
          x[p] = load<kLane>(row + p * kLane);
          x[p] = whole ? x[p] + x[p] * 0 : shown(x[p], tile.seen[i], p * kLane);
          top = x[p] > top ? x[p] : top;
        }
        const float before = largest[i], now = std::max(before, largest_of(top));
        const float shift = now == kMinusInfinity ? 0 : now;
        Lanes total{};
        for (int p = 0; p < kKeys / kLane; ++p) {
          x[p] = Exponential<float, kLane>::run(x[p] - shift);
          total += x[p];
          store<float, kLane>(row + p * kLane, x[p]);
        }
        if (now != before) {
          const float factor = std::exp(before - shift);
          sum[i] *= factor;
          for (int64_t d = 0; d < C; ++d) out[i * C + d] *= factor;
          largest[i] = now;
        }
        sum[i] += sum_of<float, kLane>(total);
      }
      const float *values = keys.rows_of_values.get() + n * kKeys * C;
      if (whole || !broken) {
        product<true>(tile.count, C, kKeys, score, kKeys, 1, values, C, out, C);
        continue;
      }
      for (int64_t i = 0; i < tile.count; ++i) {  // 0 x NaN
        for (int64_t j = 0; j < kKeys; ++j) {
          if (tile.seen[i] >> j & 1) add_scaled<0>(out + i * C, score[i * kKeys + j], values + j * C, C);
        }
      }
    }
  }
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t row = part.query_row(b, tile.first + i, h);
    float *target = output + row * part.c.value_dim;
    float l = sum[i] == 0 ? kMinusInfinity : largest[i] + std::log(sum[i]);
    float mine = sum[i] == 0 ? 0 : 1 / sum[i], theirs = 0;
    if (merges) {
      const float other = logsumexp[row], top = std::max(l, other);
      if (top != kMinusInfinity || l != l || other != other) {
        const float both = top + std::log(std::exp(l - top) + std::exp(other - top));
        mine *= std::exp(l - both);
        theirs = std::exp(other - both);
        l = both;
      }
    }
    logsumexp[row] = l;
    for (int64_t d = 0; d < part.c.value_dim; ++d) {
      target[d] = out[i * C + d] * mine + (merges ? target[d] * theirs : 0);
    }
  }
}

// The gradients by the keys and values that a slice sees, tile by tile like the packed rows.
struct KeyGradients {
  float *keys, *values;
  int64_t first_key;  // the packed tile that they begin with
};

void backward_tile(const Part &part, const PackedKeys &packed, int64_t b, int64_t h, int64_t index, bool adds,
                   float *scratch, const float *output, const float *logsumexp, const float *grad_output,
                   const float *grad_logsumexp, float *grad_query, KeyGradients grads) {
  const int64_t D = part.D, C = part.C, g = h / (part.H / part.G);
  float *q = scratch, *grad = q + kQueries * D, *weight = grad + kQueries * C, *by_score = weight + kQueries * kKeys;
  float *by_query = by_score + kQueries * kKeys;
  float shift[kQueries], delta[kQueries];
  QueryTile tile(part, index);
  bool finite = tile.copy_rows(part.c.query, b, h, part.c.head_dim, D, static_cast<float>(part.c.scale), q);
  finite &= tile.copy_rows(grad_output, b, h, part.c.value_dim, C, 1, grad);
  std::fill_n(by_query, kQueries * D, 0.0f);
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t row = part.query_row(b, tile.first + i, h);
    shift[i] = logsumexp[row] == kMinusInfinity ? 0 : logsumexp[row];
    delta[i] = dot<0>(grad + i * C, output + row * part.c.value_dim, part.c.value_dim);
    if (grad_logsumexp && logsumexp[row] != kMinusInfinity) delta[i] -= grad_logsumexp[row];
  }
  for (const Range &range : tile.tiles) {
    for (int64_t t = range.begin; t < range.end; ++t) {
      const bool whole = tile.look_at(t);
      const int64_t n = packed.tile(b, g, t);
      product<false>(tile.count, kKeys, D, q, D, 1, packed.turned_keys.get() + n * kKeys * D, kKeys, weight, kKeys);
      product<false>(tile.count, kKeys, C, grad, C, 1, packed.turned_values.get() + n * kKeys * C, kKeys, by_score, kKeys);
      for (int64_t i = 0; i < tile.count; ++i) {
        for (int64_t p = 0; p < kKeys; p += kLane) {
          float *w = weight + i * kKeys + p, *s = by_score + i * kKeys + p;
          const Lanes x = shown(load<kLane>(w), tile.seen[i], p);
          // A row of NaN has none for hidden keys.
          const Lanes weights = x == kMinusInfinity ? Lanes{} : Exponential<float, kLane>::run(x - shift[i]);
          const Lanes by = weights * (load<kLane>(s) - delta[i]);
          store<float, kLane>(w, weights);
          store<float, kLane>(s, x == kMinusInfinity ? Lanes{} : by);
        }
      }
      const float *k = packed.rows_of_keys.get() + n * kKeys * D;
      const int64_t place = (part.packed_tile[static_cast<std::size_t>(t)] - grads.first_key) * kKeys;
      float *gk = grads.keys + place * D, *gv = grads.values + place * C;
      if (whole || (finite && !packed.broken[static_cast<std::size_t>(n)])) {
        product<true>(kKeys, C, tile.count, weight, 1, kKeys, grad, C, gv, C);
        product<true>(kKeys, D, tile.count, by_score, 1, kKeys, q, D, gk, D);
        product<true>(tile.count, D, kKeys, by_score, kKeys, 1, k, D, by_query, D);
        continue;
      }
      for (int64_t i = 0; i < tile.count; ++i) {  // 0 x NaN
        for (int64_t j = 0; j < kKeys; ++j) {
          if (!(tile.seen[i] >> j & 1)) continue;
          add_scaled<0>(gv + j * C, weight[i * kKeys + j], grad + i * C, C);
          add_scaled<0>(gk + j * D, by_score[i * kKeys + j], q + i * D, D);
          add_scaled<0>(by_query + i * D, by_score[i * kKeys + j], k + j * D, D);
        }
      }
    }
  }
  const float scale = static_cast<float>(part.c.scale);
  for (int64_t i = 0; i < tile.count; ++i) {
    float *target = grad_query + part.query_row(b, tile.first + i, h) * part.c.head_dim;
    for (int64_t d = 0; d < part.c.head_dim; ++d) target[d] = by_query[i * D + d] * scale + (adds ? target[d] : 0);
  }
}

void forward(const Part &part, bool merges, float *output, float *logsumexp) {
  const PackedKeys keys(part, false);
  const int64_t tasks = part.c.batch * part.H * part.query_tiles;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min(part.c.num_threads, tasks)));
  const int64_t own = kQueries * (part.D + kKeys + part.C) + kLane;
  const Workspace<float> scratch(team * own);
  std::atomic<bool> has_memory{true};
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 4)
  for (int64_t n = 0; n < tasks; ++n) {
    const int64_t index = n % part.query_tiles, h = n / part.query_tiles % part.H, b = n / part.query_tiles / part.H;
    try {
      forward_tile(part, keys, b, h, index, merges, scratch.get() + thread_number() * own, output, logsumexp);
    } catch (const std::bad_alloc &) {
      has_memory = false;
    }
  }
  if (!has_memory) throw std::bad_alloc();
}

// Each batch entry, key head and slice of the tiles of queries is one task with sums of its own, for the keys that the
// slice sees: as many slices as make sixteen tasks, whatever the threads, and added up in order.
void backward(const Part &part, bool adds, const float *output, const float *logsumexp, const float *grad_output,
              const float *grad_logsumexp, float *grad_query, float *grad_key, float *grad_value) {
  const PackedKeys packed(part, true);
  const int64_t heads = part.c.batch * part.G, group = part.H / part.G;
  const int64_t wanted = (16 + heads - 1) / std::max<int64_t>(heads, 1);
  const int64_t slices = std::max<int64_t>(1, std::min(wanted, part.query_tiles / 8));
  std::vector<Slice> slice;
  int64_t size = 0;  // tiles of keys of all slices
  for (int64_t n = 0; n < slices; ++n) {
    slice.push_back(part.slice(part.query_tiles * n / slices, part.query_tiles * (n + 1) / slices, size));
    size += slice.back().num_keys;
  }
  const int64_t key_size = kKeys * part.D, value_size = kKeys * part.C;  // of a tile
  const int64_t tasks = heads * slices;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min(part.c.num_threads, tasks)));
  const int64_t own = kQueries * (2 * part.D + part.C + 2 * kKeys) + kLane;
  const Workspace<float> scratch(team * own), by_keys(heads * size * key_size), by_values(heads * size * value_size);
  std::atomic<bool> has_memory{true};
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < tasks; ++n) {
      const Slice &mine = slice[static_cast<std::size_t>(n % slices)];
      const int64_t g = n / slices % part.G, b = n / slices / part.G, place = (b * part.G + g) * size + mine.place;
      const KeyGradients grads{by_keys.get() + place * key_size, by_values.get() + place * value_size, mine.first_key};
      try {
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          for (int64_t index = mine.begin; index < mine.end; ++index) {
            backward_tile(part, packed, b, h, index, adds, scratch.get() + thread_number() * own, output, logsumexp,
                          grad_output, grad_logsumexp, grad_query, grads);
          }
        }
      } catch (const std::bad_alloc &) {
        has_memory = false;
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < heads * part.c.num_keys; ++n) {
      const int64_t j = n % part.c.num_keys, g = n / part.c.num_keys % part.G, b = n / part.c.num_keys / part.G;
      const int64_t row = part.key_row(b, j, g), tile = part.packed_tile[static_cast<std::size_t>(j / kKeys)];
      float *gk = grad_key + row * part.c.head_dim, *gv = grad_value + row * part.c.value_dim;
      if (!adds) std::fill_n(gk, part.c.head_dim, 0.0f), std::fill_n(gv, part.c.value_dim, 0.0f);
      if (tile < 0) continue;
      for (const Slice &each : slice) {
        if (tile < each.first_key || tile >= each.first_key + each.num_keys) continue;
        const int64_t place = ((b * part.G + g) * size + each.place + tile - each.first_key) * kKeys + j % kKeys;
        add(gk, by_keys.get() + place * part.D, part.c.head_dim);
        add(gv, by_values.get() + place * part.C, part.c.value_dim);
      }
    }
  }
  if (!has_memory) throw std::bad_alloc();
}

template <class Run>
int32_t guarded(const anyattention_run_attention *call, const Run &run) {
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  Part part(*call);
  if (!part.is_valid()) return ANYATTENTION_INVALID_ARGUMENT;
  if (!part.is_in_range()) return ANYATTENTION_OUT_OF_RANGE;
  try {
    part.cut_tiles();
    run(part);
    return ANYATTENTION_OK;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_run_attention_tiles(const anyattention_run_attention *call, int64_t *num_pairs) {
  return anyattention::guarded(call, [=](const auto &part) {
    *num_pairs = 0;
    for (int64_t index = 0; index < part.query_tiles; ++index) {
      const anyattention::QueryTile tile(part, index);
      for (const anyattention::Range &range : tile.tiles) {
        *num_pairs += tile.count * (range.end - range.begin) * anyattention::kKeys;
      }
    }
  });
}

int32_t anyattention_run_attention_forward(const anyattention_run_attention *call, int32_t merges, float *output,
                                           float *logsumexp) {
  return anyattention::guarded(
      call, [=](const auto &part) { anyattention::forward(part, merges != 0, output, logsumexp); });
}

int32_t anyattention_run_attention_backward(const anyattention_run_attention *call, int32_t adds, const float *output,
                                            const float *logsumexp, const float *grad_output,
                                            const float *grad_logsumexp, float *grad_query, float *grad_key,
                                            float *grad_value) {
  return anyattention::guarded(call, [=](const auto &part) {
    anyattention::backward(part, adds != 0, output, logsumexp, grad_output, grad_logsumexp, grad_query, grad_key,
                           grad_value);
  });
}
}
