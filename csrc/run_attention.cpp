// Attention over runs of keys: dense products of tiles, in which every query sees some runs of neighbouring keys. Tiles
// that no query sees are left out, and tiles that only some see are masked by a bit for each pair. A tile of queries ends
// early where the next query sees other keys altogether.
//
//   i  query in order     j  key in order     t  tile of kKeys keys     h  head     g  key head, h / group
//   D, C  head_dim, value_dim, multiples of kLane     S  scores, P  weights     l  logsumexp
//
// Scores are kept turned, S[j][i], so that keys and values are read where they lie and a query is a lane of a vector.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
typedef int32_t Integers __attribute__((vector_size(64)));

struct Range {
  int64_t begin, end;
};

bool is_finite(const float *row, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t n = 0; n < count; ++n) sum += row[n] * 0;
  return sum == 0;
}

// One part of a call: the sizes, and where everything lies.
struct Part {
  const anyattention_run_attention &c;
  int64_t H, G, D, C;
  std::vector<int64_t> first_query;  // of each tile of queries, and one after the last
  std::vector<int64_t> seen_tile;    // the place of each tile of keys among those that are seen, else -1
  std::vector<uint8_t> broken;       // (batch, G, tiles of keys that are seen): whether a number is not finite
  int64_t query_tiles = 0, num_seen = 0;

  explicit Part(const anyattention_run_attention &call)
      : c(call),
        H(call.heads),
        G(call.key_heads),
        D(call.head_dim),
        C(call.value_dim) {}

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
    seen_tile.assign(static_cast<std::size_t>(num_tiles), -1);
    for (int64_t t = 0, seen = 0; t < num_tiles; ++t) {
      seen += change[static_cast<std::size_t>(t)];
      if (seen > 0) seen_tile[static_cast<std::size_t>(t)] = num_seen++;
    }
  }

  void look_for_broken_tiles() {
    broken.assign(static_cast<std::size_t>(c.batch * G * num_seen), 0);
    const int64_t num_tiles = static_cast<int64_t>(seen_tile.size()), tasks = c.batch * num_tiles;
    const int team = static_cast<int>(std::max<int64_t>(1, std::min(c.num_threads, tasks / 4)));
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t n = 0; n < tasks; ++n) {
      const int64_t t = n % num_tiles, b = n / num_tiles, seen = seen_tile[static_cast<std::size_t>(t)];
      for (int64_t j = t * kKeys; seen >= 0 && j < std::min((t + 1) * kKeys, c.num_keys); ++j) {
        for (int64_t g = 0; g < G; ++g) {
          const int64_t row = key_row(b, j, g);
          if (is_finite(c.key + row * D, D) && is_finite(c.value + row * C, C)) continue;
          broken[static_cast<std::size_t>((b * G + g) * num_seen + seen)] = 1;
        }
      }
    }
  }
  bool is_broken(int64_t b, int64_t g, int64_t t) const {
    return broken[static_cast<std::size_t>((b * G + g) * num_seen + seen_tile[static_cast<std::size_t>(t)])];
  }

  int64_t query_at(int64_t i) const { return c.query_order ? c.query_order[i] : i; }
  int64_t key_at(int64_t j) const { return c.key_order ? c.key_order[j] : j; }
  int64_t query_row(int64_t b, int64_t i, int64_t h) const { return (b * c.num_queries + query_at(i)) * H + h; }
  int64_t key_row(int64_t b, int64_t j, int64_t g) const { return (b * c.num_keys + key_at(j)) * G + g; }

  bool is_valid() const {
    if (c.batch < 0 || H < 1 || G < 1 || H % G || c.num_queries < 0 || c.num_keys < 0 || D < 1 || D % kLane) return false;
    if (C < 1 || C % kLane || c.num_threads < 1 || !c.run_offsets) return false;
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

// The queries of one tile, and the keys they see.
struct QueryTile {
  const Part &part;
  int64_t b, h, g, first, count;
  int64_t cursor[kQueries];          // each query's first run that does not end before the tile of keys
  std::vector<Range> tiles;          // of keys
  std::vector<int32_t> from, to;     // (ranges, kQueries): what each query sees of the tile of keys
  const float *keys[kKeys], *values[kKeys];
  int64_t num_keys = 0, num_ranges = 0;  // of the tile of keys

  QueryTile(const Part &p, int64_t batch, int64_t head, int64_t index)
      : part(p),
        b(batch),
        h(head),
        g(head / (p.H / p.G)),
        first(p.first_query[static_cast<std::size_t>(index)]),
        count(p.first_query[static_cast<std::size_t>(index) + 1] - first) {
    std::vector<Range> ranges;
    for (int64_t i = 0; i < count; ++i) {
      cursor[i] = part.c.run_offsets[first + i];
      for (int64_t r = cursor[i]; r < part.c.run_offsets[first + i + 1]; ++r) {
        ranges.push_back({part.c.run_begins[r] / kKeys, (part.c.run_ends[r] - 1) / kKeys + 1});
      }
    }
    std::sort(ranges.begin(), ranges.end(), [](Range x, Range y) { return x.begin < y.begin; });
    for (const Range &range : ranges) {
      if (tiles.empty() || range.begin > tiles.back().end) {
        tiles.push_back(range);
      } else {
        tiles.back().end = std::max(tiles.back().end, range.end);
      }
    }
  }

  // Reads tile t of keys; tiles must come in rising order. Whether every query sees every key of it.
  bool look_at(int64_t t) {
    const int64_t begin = t * kKeys, end = std::min(begin + kKeys, part.c.num_keys);
    num_keys = end - begin;
    for (int64_t j = 0; j < num_keys; ++j) {
      const int64_t row = part.key_row(b, begin + j, g);
      keys[j] = part.c.key + row * part.D;
      values[j] = part.c.value + row * part.C;
    }
    bool whole = true;
    num_ranges = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t last = part.c.run_offsets[first + i + 1];
      while (cursor[i] < last && part.c.run_ends[cursor[i]] <= begin) ++cursor[i];
      bool sees_all = false;
      for (int64_t r = cursor[i]; r < last && part.c.run_begins[r] < end; ++r) {
        const int64_t n = r - cursor[i];
        if (n == num_ranges) {
          ++num_ranges;
          if (static_cast<int64_t>(from.size()) < num_ranges * kQueries) {
            from.resize(static_cast<std::size_t>(num_ranges * kQueries));
            to.resize(static_cast<std::size_t>(num_ranges * kQueries));
          }
          std::fill_n(from.begin() + n * kQueries, kQueries, 0);
          std::fill_n(to.begin() + n * kQueries, kQueries, 0);
        }
        const std::size_t place = static_cast<std::size_t>(n * kQueries + i);
        from[place] = static_cast<int32_t>(std::max<int64_t>(part.c.run_begins[r] - begin, 0));
        to[place] = static_cast<int32_t>(std::min(part.c.run_ends[r], end) - begin);
        sees_all |= to[place] - from[place] == num_keys;
      }
      whole &= sees_all;
    }
    return whole;
  }

  bool sees(int64_t i, int64_t j) const {
    for (int64_t n = 0; n < num_ranges; ++n) {
      const std::size_t place = static_cast<std::size_t>(n * kQueries + i);
      if (from[place] <= j && j < to[place]) return true;
    }
    return false;
  }

  // Infinity becomes NaN, which -inf would pass for a hidden key, and hidden keys become -inf.
  Lanes shown(Lanes scores, int64_t j, int64_t lane) const {
    Integers seen{};
    for (int64_t n = 0; n < num_ranges; ++n) {
      Integers low, high;
      std::memcpy(&low, from.data() + n * kQueries + lane, sizeof low);
      std::memcpy(&high, to.data() + n * kQueries + lane, sizeof high);
      const int32_t key = static_cast<int32_t>(j);
      seen |= (low <= key) & (high > key);
    }
    return seen ? scores + scores * 0 : Lanes{} + kMinusInfinity;
  }

  // Copies the queries' rows (width), times a factor, as they are or turned, or both; whether all are finite.
  bool copy_rows(const float *source, int64_t width, float factor, float *rows, float *turned) const {
    bool finite = true;
    std::fill_n(turned, width * kQueries, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const float *row = source + part.query_row(b, first + i, h) * width;
      finite = finite && is_finite(row, width);
      for (int64_t d = 0; d < width; ++d) turned[d * kQueries + i] = row[d] * factor;
      for (int64_t d = 0; rows && d < width; ++d) rows[i * width + d] = row[d] * factor;
    }
    return finite;
  }
};

constexpr int kVectors = kQueries / kLane;

void forward_tile(const Part &part, int64_t b, int64_t h, int64_t index, bool merges, float *scratch, float *output,
                  float *logsumexp) {
  const int64_t D = part.D, C = part.C;
  float *turned_query = scratch, *score = turned_query + kQueries * D, *out = score + kQueries * kKeys;
  QueryTile tile(part, b, h, index);
  const bool finite = tile.copy_rows(part.c.query, D, static_cast<float>(part.c.scale), nullptr, turned_query);
  std::fill_n(out, kQueries * C, 0.0f);
  Lanes largest[kVectors], sum[kVectors];
  for (int v = 0; v < kVectors; ++v) largest[v] = Lanes{} + kMinusInfinity, sum[v] = Lanes{};
  for (const Range &range : tile.tiles) {
    for (int64_t t = range.begin; t < range.end; ++t) {
      const bool whole = tile.look_at(t), broken = part.is_broken(b, tile.g, t), is_plain = whole && finite && !broken;
      product<false>(tile.num_keys, kQueries, D, Pointers{tile.keys}, 1, Rows{turned_query, kQueries}, score, kQueries);
      for (int v = 0; v < kVectors; ++v) {
        float *column = score + v * kLane;
        Lanes top = largest[v];
        for (int64_t j = 0; j < tile.num_keys; ++j) {
          Lanes x = load<kLane>(column + j * kQueries);
          if (!is_plain) store<float, kLane>(column + j * kQueries, x = tile.shown(x, j, v * kLane));
          top = x > top ? x : top;
        }
        const Lanes shift = top == kMinusInfinity ? Lanes{} : top;
        Lanes total{};
        for (int64_t j = 0; j < tile.num_keys; ++j) {
          const Lanes weight = Exponential<float, kLane>::run(load<kLane>(column + j * kQueries) - shift);
          store<float, kLane>(column + j * kQueries, weight);
          total += weight;
        }
        const Lanes factor = Exponential<float, kLane>::run(largest[v] - shift);
        for (int lane = 0; lane < kLane; ++lane) {
          if (top[lane] == largest[v][lane]) continue;
          float *row = out + (v * kLane + lane) * C;
          for (int64_t d = 0; d < C; ++d) row[d] *= factor[lane];
        }
        sum[v] = (top == largest[v] ? sum[v] : sum[v] * factor) + total;
        largest[v] = top;
      }
      if (whole || !broken) {
        product<true>(tile.count, C, tile.num_keys, Rows{score, 1}, kQueries, Pointers{tile.values}, out, C);
        continue;
      }
      for (int64_t i = 0; i < tile.count; ++i) {  // 0 x NaN
        for (int64_t j = 0; j < tile.num_keys; ++j) {
          if (tile.sees(i, j)) add_scaled<0>(out + i * C, score[j * kQueries + i], tile.values[j], C);
        }
      }
    }
  }
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t row = part.query_row(b, tile.first + i, h);
    const float own_sum = sum[i / kLane][i % kLane];
    float *target = output + row * C;
    float l = own_sum == 0 ? kMinusInfinity : largest[i / kLane][i % kLane] + std::log(own_sum);
    float mine = own_sum == 0 ? 0 : 1 / own_sum, theirs = 0;
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
    for (int64_t d = 0; d < C; ++d) target[d] = out[i * C + d] * mine + (theirs == 0 ? 0 : target[d] * theirs);
  }
}

// The gradients by the seen keys and values of one batch entry and key head.
struct KeyGradients {
  float *keys, *values;
};

void backward_tile(const Part &part, int64_t b, int64_t h, int64_t index, bool adds, float *scratch, const float *output,
                   const float *logsumexp, const float *grad_output, const float *grad_logsumexp, float *grad_query,
                   KeyGradients grads) {
  const int64_t D = part.D, C = part.C;
  float *q = scratch, *turned_query = q + kQueries * D, *grad = turned_query + kQueries * D;
  float *turned_grad = grad + kQueries * C, *weight = turned_grad + kQueries * C, *by_score = weight + kQueries * kKeys;
  float *by_query = by_score + kQueries * kKeys;
  alignas(64) float shift[kQueries]{}, delta[kQueries]{};
  QueryTile tile(part, b, h, index);
  const float scale = static_cast<float>(part.c.scale);
  bool finite = tile.copy_rows(part.c.query, D, scale, q, turned_query);
  finite &= tile.copy_rows(grad_output, C, 1, grad, turned_grad);
  std::fill_n(by_query, kQueries * D, 0.0f);
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t row = part.query_row(b, tile.first + i, h);
    shift[i] = logsumexp[row] == kMinusInfinity ? 0 : logsumexp[row];
    delta[i] = dot<0>(grad + i * C, output + row * C, C);
    if (grad_logsumexp && logsumexp[row] != kMinusInfinity) delta[i] -= grad_logsumexp[row];
  }
  for (const Range &range : tile.tiles) {
    for (int64_t t = range.begin; t < range.end; ++t) {
      const bool whole = tile.look_at(t), broken = part.is_broken(b, tile.g, t), is_plain = whole && finite && !broken;
      const int64_t keys = tile.num_keys;
      product<false>(keys, kQueries, D, Pointers{tile.keys}, 1, Rows{turned_query, kQueries}, weight, kQueries);
      product<false>(keys, kQueries, C, Pointers{tile.values}, 1, Rows{turned_grad, kQueries}, by_score, kQueries);
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t lane = 0; lane < kQueries; lane += kLane) {
          float *w = weight + j * kQueries + lane, *s = by_score + j * kQueries + lane;
          Lanes x = load<kLane>(w);
          if (!is_plain) x = tile.shown(x, j, lane);
          // A row of NaN has none for hidden keys.
          const Lanes weights = x == kMinusInfinity ? Lanes{} : Exponential<float, kLane>::run(x - load<kLane>(shift + lane));
          const Lanes by = weights * (load<kLane>(s) - load<kLane>(delta + lane));
          store<float, kLane>(w, weights);
          store<float, kLane>(s, x == kMinusInfinity ? Lanes{} : by);
        }
      }
      const int64_t place = part.seen_tile[static_cast<std::size_t>(t)] * kKeys;
      float *gk = grads.keys + place * D, *gv = grads.values + place * C;
      if (whole || (finite && !broken)) {
        product<true>(keys, C, tile.count, Rows{weight, kQueries}, 1, Rows{grad, C}, gv, C);
        product<true>(keys, D, tile.count, Rows{by_score, kQueries}, 1, Rows{q, D}, gk, D);
        product<true>(tile.count, D, keys, Rows{by_score, 1}, kQueries, Pointers{tile.keys}, by_query, D);
        continue;
      }
      for (int64_t i = 0; i < tile.count; ++i) {  // 0 x NaN
        for (int64_t j = 0; j < keys; ++j) {
          if (!tile.sees(i, j)) continue;
          add_scaled<0>(gv + j * C, weight[j * kQueries + i], grad + i * C, C);
          add_scaled<0>(gk + j * D, by_score[j * kQueries + i], q + i * D, D);
          add_scaled<0>(by_query + i * D, by_score[j * kQueries + i], tile.keys[j], D);
        }
      }
    }
  }
  for (int64_t i = 0; i < tile.count; ++i) {
    float *target = grad_query + part.query_row(b, tile.first + i, h) * D;
    for (int64_t d = 0; d < D; ++d) target[d] = by_query[i * D + d] * scale + (adds ? target[d] : 0);
  }
}

void forward(Part &part, bool merges, float *output, float *logsumexp) {
  part.look_for_broken_tiles();
  const int64_t tasks = part.c.batch * part.H * part.query_tiles;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min(part.c.num_threads, tasks)));
  const int64_t own = kQueries * (part.D + kKeys + part.C) + kLane;
  const Workspace<float> scratch(team * own);
  std::atomic<bool> has_memory{true};
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 4)
  for (int64_t n = 0; n < tasks; ++n) {
    const int64_t index = n % part.query_tiles, h = n / part.query_tiles % part.H, b = n / part.query_tiles / part.H;
    try {
      forward_tile(part, b, h, index, merges, scratch.get() + thread_number() * own, output, logsumexp);
    } catch (const std::bad_alloc &) {
      has_memory = false;
    }
  }
  if (!has_memory) throw std::bad_alloc();
}

// Each batch entry, key head and slice of the tiles of queries is one task with sums of its own: as many slices as make
// sixteen tasks, whatever the threads, and added up in order.
void backward(Part &part, bool adds, const float *output, const float *logsumexp, const float *grad_output,
              const float *grad_logsumexp, float *grad_query, float *grad_key, float *grad_value) {
  part.look_for_broken_tiles();
  const int64_t heads = part.c.batch * part.G, group = part.H / part.G;
  const int64_t slices = std::max<int64_t>(1, std::min<int64_t>((16 + heads - 1) / std::max<int64_t>(heads, 1), part.query_tiles / 8));
  const int64_t key_size = part.num_seen * kKeys * part.D, value_size = part.num_seen * kKeys * part.C;
  const int64_t tasks = heads * slices;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min(part.c.num_threads, tasks)));
  const int64_t own = kQueries * (3 * part.D + 2 * part.C + 2 * kKeys) + kLane;
  const Workspace<float> scratch(team * own), by_keys(tasks * key_size), by_values(tasks * value_size);
  std::atomic<bool> has_memory{true};
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < tasks; ++n) {
      const int64_t slice = n % slices, g = n / slices % part.G, b = n / slices / part.G;
      const KeyGradients grads{by_keys.get() + n * key_size, by_values.get() + n * value_size};
      const int64_t begin = part.query_tiles * slice / slices, end = part.query_tiles * (slice + 1) / slices;
      try {
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          for (int64_t index = begin; index < end; ++index) {
            backward_tile(part, b, h, index, adds, scratch.get() + thread_number() * own, output, logsumexp,
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
      const int64_t row = part.key_row(b, j, g);
      float *gk = grad_key + row * part.c.head_dim, *gv = grad_value + row * part.c.value_dim;
      if (!adds) std::fill_n(gk, part.c.head_dim, 0.0f), std::fill_n(gv, part.c.value_dim, 0.0f);
      const int64_t tile = part.seen_tile[static_cast<std::size_t>(j / kKeys)];
      if (tile < 0) continue;
      const int64_t place = tile * kKeys + j % kKeys;
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t task = (b * part.G + g) * slices + slice;
        add(gk, by_keys.get() + task * key_size + place * part.D, part.c.head_dim);
        add(gv, by_values.get() + task * value_size + place * part.C, part.c.value_dim);
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
      const anyattention::QueryTile tile(part, 0, 0, index);
      for (const anyattention::Range &range : tile.tiles) {
        *num_pairs += tile.count * (range.end - range.begin) * anyattention::kKeys;
      }
    }
  });
}

int32_t anyattention_run_attention_forward(const anyattention_run_attention *call, int32_t merges, float *output,
                                           float *logsumexp) {
  return anyattention::guarded(
      call, [=](auto &part) { anyattention::forward(part, merges != 0, output, logsumexp); });
}

int32_t anyattention_run_attention_backward(const anyattention_run_attention *call, int32_t adds, const float *output,
                                            const float *logsumexp, const float *grad_output,
                                            const float *grad_logsumexp, float *grad_query, float *grad_key,
                                            float *grad_value) {
  return anyattention::guarded(call, [=](auto &part) {
    anyattention::backward(part, adds != 0, output, logsumexp, grad_output, grad_logsumexp, grad_query, grad_key,
                           grad_value);
  });
}
}
