// The keys of each query's largest products, among the keys of some clusters: those that the query looks into. Queries
// that look into one cluster are multiplied by its keys together, so that each key is read once for all of them.
//
//   i  query     c  cluster     j  key     n  column: a query of the cluster's     D  dim
//
// A thread takes whole clusters, the first ones first, and has its own candidates of every query, which are joined at the
// end.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <new>
#include <vector>

#include "anyattention.h"
#include "candidates.h"
#include "few_columns.h"
#include "once.h"
#include "products.h"
#include "rows.h"
#include "simd.h"
#include "team.h"
#include "workspace.h"

namespace anyattention {
namespace {

constexpr int64_t kKeys = 96, kColumns = 64;  // of a tile; whole blocks of products
constexpr int64_t kBits = 32;                 // keys whose comparisons are one integer
constexpr int64_t kBytes = sizeof(float);
constexpr int64_t kMostKeys = (int64_t{1} << 32) - 1;  // a candidate's place has 32 bits
constexpr int64_t kMostCandidates = int64_t{1} << 28;  // of all threads: where there were more, fewer threads take part

constexpr int kScores = kLane<float>;
using Scores = Lanes<float>;
using Integers = Vector<int32_t, kScores>;

using Call = anyattention_cluster_search_call;

bool is_valid(const Call *c) {
  if (!c || c->num_queries < 0 || c->dim < 1 || c->num_clusters < 0 || c->num_probes < 0) return false;
  if (c->num_keys < 0 || c->num_keys > kMostKeys || c->k < 1 || c->k > kMostKeys || c->num_threads < 1) return false;
  if (!c->cluster_offsets || !c->probe_offsets || (c->num_probes > 0 && !c->probing)) return false;
  return (c->query || c->num_queries == 0) && (c->key || c->num_keys == 0);
}

// A copy of offsets, and whether they rise from 0 to `last`.
bool copy_rising(const int64_t *offsets, int64_t count, int64_t last, int64_t *to) {
  copy_once(offsets, count + 1, to);
  return to[0] == 0 && to[count] == last && std::is_sorted(to, to + count + 1);
}

// One thread's way through clusters.
class Task {
 public:
  static int64_t scratch_size(const Call &c) { return kColumns * c.dim + kKeys * kColumns; }

  Task(const Call &call, Candidates best, int64_t *last_cluster, float *scratch)
      : c_(call), best_(best), last_cluster_(last_cluster), turned_(scratch), scores_(scratch + kColumns * call.dim) {}

  // The keys `first` to `end` of a cluster for the queries `probing`; false for a query that is not there, or twice.
  bool run(int64_t cluster, int64_t first, int64_t end, const int64_t *probing, int64_t count) {
    for (int64_t n = 0; n < count; n += kColumns) {
      const int64_t columns = std::min(kColumns, count - n), width = (columns + kScores - 1) / kScores * kScores;
      if (!take_queries(cluster, probing + n, columns, width)) return false;
      for (int64_t j = first; j < end; j += kKeys) look_at(j, std::min(kKeys, end - j), columns, width);
    }
    return true;
  }

 private:
  bool take_queries(int64_t cluster, const int64_t *probing, int64_t columns, int64_t width) {
    for (int64_t n = 0; n < columns; ++n) {
      const int64_t i = queries_[n] = read_once(probing + n);
      if (!is_below(i, c_.num_queries) || last_cluster_[i] == cluster + 1) return false;
      last_cluster_[i] = cluster + 1;
      thresholds_[n] = best_.thresholds[i];
      const float *query = c_.query + i * c_.dim;
      for (int64_t d = 0; d < c_.dim; ++d) turned_[d * kColumns + n] = query[d];
    }
    for (int64_t n = columns; n < width; ++n) {
      thresholds_[n] = kInfinity;
      for (int64_t d = 0; d < c_.dim; ++d) turned_[d * kColumns + n] = 0;
    }
    return true;
  }

  void look_at(int64_t j, int64_t rows, int64_t columns, int64_t width) {
    if (c_.num_queries <= kFewColumns) {  // in all clusters: sums of another order are not compared with each other
      const float *queries[kFewColumns];
      for (int64_t n = 0; n < columns; ++n) queries[n] = c_.query + queries_[n] * c_.dim;
      multiply_few(c_.key + j * c_.dim, c_.dim, rows, queries, columns, c_.dim, scores_, kColumns);
    } else {
      const Product<float> products{c_.key + j * c_.dim, c_.dim, 1, turned_, kColumns, scores_, kColumns};
      product<false>(rows, products, [=](int64_t, int64_t) { return Extent{0, width, 0, c_.dim}; });
    }
    for (int64_t lane = 0; lane < columns; lane += kScores) {
      for (int64_t row = 0; row < rows; row += kBits) compare(j, row, std::min(row + kBits, rows), lane, columns);
    }
  }

  // Takes the scores above their thresholds of one vector of columns and some keys.
  void compare(int64_t j, int64_t from, int64_t to, int64_t lane, int64_t columns) {
    const Scores threshold = load<kScores>(thresholds_ + lane);
    Integers above{}, bit = Integers{} + 1;  // a bit for each key
    for (int64_t row = from; row < to; ++row, bit <<= 1) {
      if (lane == 0) prefetch_row(address_of(c_.key, j + row + kKeys, c_.dim), c_.dim * kBytes);
      float *at = scores_ + row * kColumns + lane;
      Scores x = load<kScores>(at);
      x += x * 0;  // infinity becomes NaN
      store<float, kScores>(at, x);
      above |= x <= threshold ? Integers{} : bit;  // NaN too
    }
    int32_t any = 0;
    for (int n = 0; n < kScores; ++n) any |= above[n];
    if (!any) return;
    for (int64_t n = lane; n < std::min<int64_t>(lane + kScores, columns); ++n) {
      for (auto left = static_cast<uint32_t>(above[n - lane]); left; left &= left - 1) {
        const int64_t row = from + __builtin_ctz(left);
        best_.take(queries_[n], scores_[row * kColumns + n], j + row);
      }
      thresholds_[n] = best_.thresholds[queries_[n]];
    }
  }

  const Call &c_;
  Candidates best_;
  int64_t *last_cluster_;
  float *turned_, *scores_;
  int64_t queries_[kColumns];
  float thresholds_[kColumns];
};

// The best of all threads' candidates of a query.
void join(const Candidates *of_threads, int team, int64_t i, int64_t k, uint64_t *all, int64_t *indices) {
  int64_t count = 0;
  for (int thread = 0; thread < team; ++thread) {
    Candidates best = of_threads[thread];
    const int64_t found = best.sort(i);
    std::copy_n(best.begin(i), found, all + count);
    count += found;
  }
  const int64_t kept = std::min(count, k);
  std::partial_sort(all, all + kept, all + count, std::greater<uint64_t>());
  for (int64_t n = 0; n < k; ++n) indices[n] = n < kept ? place_of(all[n]) : -1;
}

bool search(const Call &c, int64_t *indices) {
  const Workspace<int64_t> offsets(c.num_clusters + 1, false), probes(c.num_clusters + 1, false);
  if (!copy_rising(c.cluster_offsets, c.num_clusters, c.num_keys, offsets.get())) return false;
  if (!copy_rising(c.probe_offsets, c.num_clusters, c.num_probes, probes.get())) return false;
  double pairs = 0;
  for (int64_t n = 0; n < c.num_clusters; ++n) {
    const auto keys = static_cast<double>(offsets.get()[n + 1] - offsets.get()[n]);
    pairs += keys * static_cast<double>(probes.get()[n + 1] - probes.get()[n]);
  }
  const int64_t kept = std::min(c.k, std::max<int64_t>(c.num_keys, 1)), capacity = Candidates::capacity(kept);
  const int64_t pieces = std::min(c.num_clusters, kMostCandidates / capacity / c.num_queries);
  const int team = team_size(c.num_threads, pieces, pairs * (static_cast<double>(c.dim) * kPerProduct + 1));
  const int64_t own = (Task::scratch_size(c) + kScores - 1) / kScores * kScores;
  const int64_t most = std::min(team * kept, c.num_keys);  // a query meets each key once, in one of the threads
  const Workspace<uint64_t> candidates(team * c.num_queries * capacity, false), joined(team * most, false);
  const Workspace<int64_t> sizes(team * c.num_queries), last_clusters(team * c.num_queries);
  const Workspace<float> thresholds(team * c.num_queries, false), scratch(team * own);
  std::fill_n(thresholds.get(), team * c.num_queries, -kInfinity);
  std::vector<Candidates> of_threads;
  for (int thread = 0; thread < team; ++thread) {
    const int64_t first = thread * c.num_queries;
    of_threads.emplace_back(kept, candidates.get() + first * capacity, sizes.get() + first, thresholds.get() + first);
  }
  std::atomic<bool> valid{true};
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int64_t thread = thread_number();
    Task task(c, of_threads[static_cast<std::size_t>(thread)], last_clusters.get() + thread * c.num_queries,
              scratch.get() + thread * own);
    // Rising clusters, as candidates need rising places; without the word, threads may take them in any order.
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int64_t n = 0; n < c.num_clusters; ++n) {
      const int64_t first = probes.get()[n], count = probes.get()[n + 1] - first;
      if (!task.run(n, offsets.get()[n], offsets.get()[n + 1], c.probing + first, count)) valid = false;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c.num_queries; ++i) {
      join(of_threads.data(), team, i, c.k, joined.get() + thread * most, indices + i * c.k);
    }
  }
  return valid;
}

}  // namespace
}  // namespace anyattention

extern "C" int32_t anyattention_cluster_search(const anyattention_cluster_search_call *call, int64_t *indices) {
  using namespace anyattention;
  if (!is_valid(call)) return ANYATTENTION_INVALID_ARGUMENT;
  if (call->num_queries == 0) return ANYATTENTION_OK;
  if (!indices) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    return search(*call, indices) ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}
