// Drives the search among clusters of keys over random calls, as properties.cpp does the other functions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "../anyattention.h"
#include "random_arrays.h"

namespace {

using namespace tests;
using Call = anyattention_cluster_search_call;

// Offsets that rise from 0 to `last`, many of them equal now and then.
Array<int64_t> random_offsets(int64_t count, int64_t last) {
  Array<int64_t> offsets(count + 1);
  const bool are_few = chance(0.3);
  const int64_t cut = up_to(last);
  for (int64_t c = 1; c < count; ++c) offsets[c] = are_few ? one_of<int64_t>({0, cut, last}) : up_to(last);
  offsets[count] = count > 0 ? last : 0;
  std::sort(offsets.get(), offsets.get() + count + 1);
  return offsets;
}

// Numbers whose products and their sums are exact in float; now and then some that are not finite, or whose products are not.
// Beside the latter a sum depends on its order, which is another one for up to 8 queries.
Array<float> random_numbers(int64_t count, int64_t queries, bool has_odd) {
  Array<float> numbers(count);
  const int64_t most = one_of<int64_t>({1, 2, 400});
  for (int64_t n = 0; n < count; ++n) {
    const std::vector<float> odd{NAN, -NAN, INFINITY, -INFINITY, -0.0f, 0x1p100f, -0x1p100f};
    numbers[n] = has_odd && chance(0.01) ? odd[static_cast<std::size_t>(up_to(queries > 8 ? 6 : 4))]
                                         : static_cast<float>(up_to(2 * most) - most) / 8;
  }
  return numbers;
}

// Keys in clusters, and the queries that look into each.
struct Searched {
  int64_t queries, dim, keys, clusters, k;
  Array<int64_t> offsets, probe_offsets, probing;
  Array<float> query, key;

  Searched(int64_t queries, int64_t dim, int64_t keys, int64_t clusters, int64_t k, bool has_odd)
      : queries(queries),
        dim(dim),
        keys(keys),
        clusters(clusters),
        k(k),
        offsets(random_offsets(clusters, keys)),
        probe_offsets(clusters + 1),
        probing(0),
        query(random_numbers(queries * dim, queries, has_odd)),
        key(random_numbers(keys * dim, queries, has_odd)) {
    std::vector<int64_t> found;
    const double share = one_of<double>({0, 0.1, 0.5, 1});
    for (int64_t c = 0; c < clusters; ++c) {
      for (int64_t i = 0; i < queries; ++i) {
        if (chance(share)) found.push_back(i);
      }
      std::shuffle(found.begin() + probe_offsets[c], found.end(), generator);
      probe_offsets[c + 1] = static_cast<int64_t>(found.size());
    }
    probing = Array<int64_t>(static_cast<int64_t>(found.size()));
    std::copy(found.begin(), found.end(), probing.get());
  }

  Call call(int64_t threads) const {
    return {queries,       dim,                 keys,          clusters, probing.count, query.get(), key.get(),
            offsets.get(), probe_offsets.get(), probing.get(), k,        threads,       0};
  }
};

// The keys of one query, the best first: every product is looked at.
std::vector<int64_t> best_of(const Searched &given, int64_t i) {
  std::vector<std::pair<float, int64_t>> found;  // the product with its sign turned, and NaN as infinity
  for (int64_t c = 0; c < given.clusters; ++c) {
    const int64_t *begin = given.probing.get() + given.probe_offsets[c], *end = given.probing.get() + given.probe_offsets[c + 1];
    if (std::find(begin, end, i) == end) continue;
    for (int64_t j = given.offsets[c]; j < given.offsets[c + 1]; ++j) {
      float sum = 0;
      for (int64_t d = 0; d < given.dim; ++d) sum += given.query[i * given.dim + d] * given.key[j * given.dim + d];
      found.emplace_back(std::isfinite(sum) ? -sum : -INFINITY, j);
    }
  }
  std::sort(found.begin(), found.end());
  std::vector<int64_t> best(static_cast<std::size_t>(given.k), -1);
  for (std::size_t n = 0; n < std::min(best.size(), found.size()); ++n) best[n] = found[n].second;
  return best;
}

// Makes the arrays of a call contradict each other; there are queries.
void plant(Searched &given) {
  const auto wild = [](int64_t last) { return one_of<int64_t>({-1, INT64_MIN, INT64_MAX, int64_t{1} << 40, last + 1}); };
  const Array<int64_t> &some = chance(0.5) ? given.offsets : given.probe_offsets;
  std::vector<int64_t> falls, pairs;  // where neighbours differ, and the clusters of two queries
  for (int64_t c = 0; c < given.clusters; ++c) {
    if (some[c] < some[c + 1]) falls.push_back(c);
    if (given.probe_offsets[c + 1] - given.probe_offsets[c] > 1) pairs.push_back(c);
  }
  const int64_t kind = up_to(3);
  if (kind == 0 && given.probing.count > 0) {
    given.probing[up_to(given.probing.count - 1)] = one_of<int64_t>({given.queries, wild(given.queries)});
  } else if (kind == 1 && !pairs.empty()) {
    const int64_t c = one_of(pairs), first = given.probe_offsets[c], count = given.probe_offsets[c + 1] - first;
    const int64_t one = up_to(count - 1), other = (one + 1 + up_to(count - 2)) % count;
    given.probing[first + one] = given.probing[first + other];
  } else if (kind == 2 && !falls.empty()) {
    const int64_t c = one_of(falls);
    std::swap(some[c], some[c + 1]);
  } else {
    some[up_to(given.clusters)] = wild(std::max(given.keys, given.probing.count));
  }
}

int32_t run(const Searched &given, int64_t threads, const Array<int64_t> &indices) {
  const Call call = given.call(threads);
  return anyattention_cluster_search(&call, indices.get());
}

void refuse_searches() {
  require(anyattention_cluster_search(nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  const int64_t offsets[] = {0, 1}, probing[] = {0};
  const float row[] = {1};
  int64_t found = 7;
  const Call good{1, 1, 1, 1, 1, row, row, offsets, offsets, probing, 1, 1, 0};
  require(anyattention_cluster_search(&good, &found) == ANYATTENTION_OK && found == 0, "a search of one key");
  require(anyattention_cluster_search(&good, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "nowhere to write");
  const auto refuse = [&](const Call &call, const char *what) {
    require(anyattention_cluster_search(&call, &found) == ANYATTENTION_INVALID_ARGUMENT, what);
  };
  for (int64_t Call::*field : {&Call::num_queries, &Call::dim, &Call::num_keys, &Call::num_clusters, &Call::num_probes,
                               &Call::k, &Call::num_threads}) {
    for (int64_t size : {int64_t{-1}, INT64_MIN}) {
      Call call = good;
      call.*field = size;
      refuse(call, "a negative size");
    }
  }
  for (int64_t Call::*field : {&Call::dim, &Call::k, &Call::num_threads}) {
    Call call = good;
    call.*field = 0;
    refuse(call, "a size of 0");
  }
  for (int64_t Call::*field : {&Call::num_keys, &Call::k}) {
    for (int64_t size : {int64_t{1} << 32, INT64_MAX}) {
      Call call = good;
      call.*field = size;
      refuse(call, "more keys than a candidate can name");
    }
  }
  for (const float *Call::*field : {&Call::query, &Call::key}) {
    Call call = good;
    call.*field = nullptr;
    refuse(call, "no numbers");
  }
  for (const int64_t *Call::*field : {&Call::cluster_offsets, &Call::probe_offsets, &Call::probing}) {
    Call call = good;
    call.*field = nullptr;
    refuse(call, "no indices");
  }
  Call none = good;
  none.num_queries = 0, none.query = nullptr;
  require(anyattention_cluster_search(&none, nullptr) == ANYATTENTION_OK, "no queries");
  Call homeless = good;  // keys of no cluster
  homeless.num_clusters = homeless.num_probes = 0;
  require(anyattention_cluster_search(&homeless, &found) == ANYATTENTION_OUT_OF_RANGE, "keys without clusters");
}

}  // namespace

void drive_cluster_search(bool faulty) {
  refuse_searches();
  // Several tiles of keys and of queries now and then.
  const bool large = chance(0.1);
  const int64_t queries = up_to(large ? 200 : 12), clusters = up_to(large ? 12 : 9);
  const int64_t keys = clusters == 0 ? 0 : up_to(large ? 3000 : 60);
  const int64_t k = 1 + up_to(one_of<int64_t>({0, 3, 20, keys + 5}));
  Searched given(queries, 1 + up_to(large ? 20 : 69), keys, clusters, k, chance(0.3));
  const Array<int64_t> one(queries * k), three(queries * k);
  const bool broken = faulty && queries > 0;
  if (broken) plant(given);
  auto meddler = meddler_of({&given.offsets, &given.probe_offsets, &given.probing});
  const int32_t wanted = broken ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK;
  int32_t status = run(given, 1, one);
  require(status == wanted, "a search among clusters", status);
  status = run(given, 3, three);
  require(status == wanted, "a search among clusters in threads", status);
  meddler.reset();
  if (broken || is_meddled) return;
  for (int64_t i = 0; i < queries; ++i) {
    const std::vector<int64_t> best = best_of(given, i);
    require(std::equal(best.begin(), best.end(), one.get() + i * k), "the keys of the largest products", i);
    require(std::equal(best.begin(), best.end(), three.get() + i * k), "the same keys for any number of threads", i);
  }
}
