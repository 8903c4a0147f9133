// The score `Dynamic` of edges, with or without edge features, and its derivatives of any order: see anyattention_dynamic_dot_call.
// LeakyReLU's slopes are constants almost everywhere, so the derivatives are sums of the same products.
//
//   i  query     j  key     e  edge, in the caller's order     s  slot     h  head     g  key head, h / group     p  feature

#include <algorithm>
#include <atomic>

#include "anyattention.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {
namespace {

// Some of the call's arrays, whose sum is one of x and y.
struct Arguments {
  const void *query, *key, *weight, *features;
  int64_t num_features;
};

int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// One batch entry of a call.
template <class T, int W>
struct Products {
  const anyattention_dynamic_dot_call &c;
  const Arguments base, at;
  const int64_t b, H, D, group;
  const T slope;
  const T *vector;
  const bool is_base;  // the arguments are those that the slopes are taken at

  Products(const anyattention_dynamic_dot_call &call, int64_t batch)
      : c(call),
        base{c.base_query, c.base_key, c.base_weight, c.base_features, c.num_base_features},
        at{c.query, c.key, c.weight, c.features, c.num_features},
        b(batch),
        H(c.heads),
        D(channels<W>(c.width)),
        group(c.heads / c.key_heads),
        slope(static_cast<T>(c.negative_slope)),
        vector(static_cast<const T *>(c.vector)),
        is_base(at.query == base.query && at.key == base.key && at.weight == base.weight &&
                at.features == base.features && at.num_features == base.num_features) {}

  template <class Number>
  Number *edge_numbers(Number *numbers) const {
    return numbers + b * c.graph.num_edges * H;
  }
  const T *features(const Arguments &from, int64_t e) const {
    return static_cast<const T *>(from.features) + e * from.num_features;
  }
  const T *weight(const Arguments &from, int64_t p, int64_t h) const {
    return static_cast<const T *>(from.weight) + (p * H + h) * D;
  }

  // query + key + weight features of one edge and head.
  void sum(const Arguments &from, int64_t i, int64_t j, int64_t e, int64_t h, T *result) const {
    if (from.query) {
      std::copy_n(static_cast<const T *>(from.query) + ((b * c.graph.num_queries + i) * H + h) * D, D, result);
    } else {
      std::fill_n(result, D, T{0});
    }
    if (from.key) {
      add(result, static_cast<const T *>(from.key) + ((b * c.graph.num_keys + j) * c.key_heads + h / group) * D, D);
    }
    for (int64_t p = 0; p < from.num_features; ++p) {
      add_scaled<W>(result, features(from, e)[p], weight(from, p, h), D);
    }
  }

  // The sum where the slopes are taken, and that of the arguments, in `scratch` of 2 D numbers.
  const T *both(int64_t i, int64_t j, int64_t e, int64_t h, T *scratch) const {
    sum(base, i, j, e, h, scratch);
    if (is_base) return scratch;
    sum(at, i, j, e, h, scratch + D);
    return scratch + D;
  }
};

// The sums over each query's edges, or over each key's, of numbers[e, h] slopes[e, h] vector[h].
template <class T, int W>
struct RowSums : Products<T, W> {
  using Products<T, W>::c, Products<T, W>::b, Products<T, W>::H, Products<T, W>::D, Products<T, W>::group;
  const CompressedRows rows;
  const bool of_keys;
  const int64_t row_heads;
  const T *numbers;
  T *result;

  RowSums(const anyattention_dynamic_dot_call &call, int64_t batch, bool keys, const T *given, T *out)
      : Products<T, W>(call, batch),
        rows(keys ? rows_of_keys(call.graph) : rows_of_queries(call.graph)),
        of_keys(keys),
        row_heads(keys ? call.key_heads : call.heads),
        numbers(this->edge_numbers(given)),
        result(out + batch * rows.num_rows * row_heads * D) {}

  int64_t accumulator_size() const { return row_heads * D; }
  int64_t scratch_size(int64_t) const { return D; }
  int64_t slot_size() const { return H * (64 + D * (1 + this->base.num_features)); }
  void start(T *accumulator) const { std::fill_n(accumulator, row_heads * D, T{0}); }
  void combine(T *accumulator, const T *next) const { add(accumulator, next, row_heads * D); }
  void finish(int64_t row, const T *accumulator) const {
    std::copy_n(accumulator, row_heads * D, result + row * row_heads * D);
  }

  bool reduce(int64_t row, int64_t begin, int64_t end, T *accumulator, T *x) const {
    if (!rows.slots_are_valid(begin, end)) return false;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t column = rows.columns[s], e = rows.edges[s];
      for (int64_t h = 0; h < H; ++h) {
        const T above = numbers[e * H + h], below = above * this->slope;
        if (above == 0) continue;
        this->sum(this->base, of_keys ? column : row, of_keys ? row : column, e, h, x);
        const T *a = this->vector + h * D;
        T *to = accumulator + (of_keys ? h / group : h) * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[d] += (x[d] > 0 ? above : below) * a[d];
      }
    }
    return true;
  }
};

constexpr int64_t kBlocks = 64;

// Runs body(block, i, j, e) for each slot of the rows of queries. The slots are cut into blocks at places that do not depend
// on threads, and a block is one thread's; slot_size as in reduce_rows. Returns false when an index was out of range.
template <class Body>
bool each_slot(const anyattention_dynamic_dot_call &c, bool writes_edges, int64_t slot_size, const Body &body) {
  const CompressedRows rows = rows_of_queries(c.graph);
  const int64_t size = (rows.num_edges + kBlocks - 1) / kBlocks;
  const int64_t most = rows.num_edges > kSlotsPerPiece ? kBlocks : 1;
  const double per_slot = static_cast<double>(slot_size) * kPerNumber + kPerSlot;
  const int team = team_size(c.num_threads, most, static_cast<double>(rows.num_edges) * per_slot);
  const Workspace<int64_t> copied(rows.num_rows + 1, false);
  if (!rows.copy_offsets(copied.get())) return false;
  const int64_t *offsets = copied.get();
  NamedEdges named;
  std::atomic<bool> valid{true};
#pragma omp parallel for schedule(dynamic, 1) num_threads(team) if (team > 1)
  for (int64_t block = 0; block < kBlocks; ++block) {
    const int64_t begin = block * size, end = std::min(begin + size, rows.num_edges);
    if (!rows.slots_are_valid(begin, end)) {
      valid = false;
      continue;
    }
    int64_t i = std::upper_bound(offsets, offsets + rows.num_rows, begin) - offsets - 1;
    for (int64_t s = begin; s < end; ++s) {
      while (offsets[i + 1] <= s) ++i;
      body(block, i, rows.columns[s], rows.edges[s]);
    }
    if (!writes_edges) continue;
    NamedEdges own_named;
    own_named.add(rows.edges, begin, end);
    own_named.add_to(named);
  }
  return valid && named.are_all();
}

template <class T, int W>
bool dot_entry(const anyattention_dynamic_dot_call &c, int64_t b, T *result) {
  const Products<T, W> products(c, b);
  const int64_t H = products.H, D = products.D, own = padded(2 * D);
  const Workspace<T> workspace(kBlocks * own);
  T *out = products.edge_numbers(result);
  // LeakyReLU by branches.
  return each_slot(c, true, H * (100 + D * (40 + c.num_features)), [&](int64_t block, int64_t i, int64_t j, int64_t e) {
    T *x = workspace.get() + block * own;
    for (int64_t h = 0; h < H; ++h) {
      const T *y = products.both(i, j, e, h, x), *a = products.vector + h * D;
      T total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t d = 0; d < D; ++d) total += a[d] * (x[d] > 0 ? y[d] : products.slope * y[d]);
      out[e * H + h] = total;
    }
  });
}

// Adds to the derivatives by what all queries and keys share, and by the features.
template <class T, int W>
bool totals_entry(const anyattention_dynamic_dot_call &c, int64_t b, const T *numbers, T *by_vector, T *by_weight,
                  T *by_features) {
  const Products<T, W> products(c, b);
  const int64_t H = products.H, D = products.D, P = c.num_features;
  const int64_t vector_size = by_vector ? H * D : 0, weight_size = by_weight ? P * H * D : 0;
  const int64_t scratch = padded(3 * D), own = scratch + padded(vector_size + weight_size);
  const Workspace<T> workspace(kBlocks * own);
  const T *given = products.edge_numbers(numbers);
  const bool valid = each_slot(c, false, H * (180 + D * (1 + P + c.num_base_features)), [&](int64_t block, int64_t i, int64_t j, int64_t e) {
    T *x = workspace.get() + block * own, *part = x + 2 * D, *vector_sum = x + scratch, *weight_sum = vector_sum + vector_size;
    for (int64_t h = 0; h < H; ++h) {
      const T above = given[e * H + h], below = above * products.slope;
      if (above == 0) continue;
      const T *y = products.both(i, j, e, h, x), *a = products.vector + h * D;
      for (int64_t d = 0; d < D; ++d) part[d] = x[d] > 0 ? above : below;
      if (by_vector) {
        for (int64_t d = 0; d < D; ++d) vector_sum[h * D + d] += part[d] * y[d];
      }
      for (int64_t d = 0; d < D; ++d) part[d] *= a[d];
      for (int64_t p = 0; p < P; ++p) {
        if (by_weight) add_scaled<W>(weight_sum + (p * H + h) * D, products.features(products.at, e)[p], part, D);
        if (by_features) by_features[e * P + p] += dot<W>(products.weight(products.at, p, h), part, D);
      }
    }
  });
  for (int64_t block = 0; block < kBlocks; ++block) {
    const T *sums = workspace.get() + block * own + scratch;
    if (by_vector) add(by_vector, sums, vector_size);
    if (by_weight) add(by_weight, sums + vector_size, weight_size);
  }
  return valid;
}

template <class T, int W>
bool sums_entry(const anyattention_dynamic_dot_call &c, int64_t b, const T *numbers, T *by_vector, T *by_query, T *by_key,
                T *by_weight, T *by_features) {
  bool valid = true;
  for (const bool of_keys : {false, true}) {
    T *result = of_keys ? by_key : by_query;
    if (!result) continue;
    const RowSums<T, W> sums(c, b, of_keys, numbers, result);
    valid &= reduce_rows<T>(sums.rows, c.num_threads, sums);
  }
  if (by_vector || by_weight || by_features) {
    valid &= totals_entry<T, W>(c, b, numbers, by_vector, by_weight, by_features);
  }
  return valid;
}

bool is_valid(const anyattention_dynamic_dot_call *c) {
  if (!c || c->batch < 0 || c->heads < 1 || c->key_heads < 1 || c->heads % c->key_heads) return false;
  if (c->width < 1 || c->num_threads < 1 || c->num_base_features < 0 || c->num_features < 0) return false;
  const anyattention_graph_arrays &graph = c->graph;
  if (graph.num_queries < 0 || graph.num_keys < 0 || graph.num_edges < 0) return false;
  return rows_of_queries(graph).has_arrays() && rows_of_keys(graph).has_arrays();
}

template <int W>
struct Width {};

// Runs body(T{}, Width<W>{}, b) for each batch entry.
template <class Body>
int32_t run(const anyattention_dynamic_dot_call *call, const Body &body) {
  if (!is_valid(call)) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    bool valid = true;
    for (int64_t b = 0; b < call->batch; ++b) {
      if (call->is_double) {
        valid &= body(double{}, Width<0>{}, b);
        continue;
      }
      switch (call->width) {
        case 8: valid &= body(float{}, Width<8>{}, b); break;
        case 16: valid &= body(float{}, Width<16>{}, b); break;
        case 32: valid &= body(float{}, Width<32>{}, b); break;
        case 64: valid &= body(float{}, Width<64>{}, b); break;
        default: valid &= body(float{}, Width<0>{}, b);
      }
    }
    return valid ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

template <class T, int W>
bool run_dot(Width<W>, const anyattention_dynamic_dot_call &c, int64_t b, void *result) {
  return dot_entry<T, W>(c, b, static_cast<T *>(result));
}

template <class T, int W, class... Results>
bool run_sums(Width<W>, const anyattention_dynamic_dot_call &c, int64_t b, const void *numbers, Results... results) {
  return sums_entry<T, W>(c, b, static_cast<const T *>(numbers), static_cast<T *>(results)...);
}

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_dynamic_dot(const anyattention_dynamic_dot_call *call, void *result) {
  using namespace anyattention;
  return run(call, [=](auto zero, auto width, int64_t b) {
    return run_dot<decltype(zero)>(width, *call, b, result);
  });
}

int32_t anyattention_dynamic_sums(const anyattention_dynamic_sums_call *call, void *by_vector, void *by_query,
                                  void *by_key, void *by_weight, void *by_features) {
  using namespace anyattention;
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  return run(&call->call, [=](auto zero, auto width, int64_t b) {
    return run_sums<decltype(zero)>(width, call->call, b, call->numbers, by_vector, by_query, by_key, by_weight,
                                    by_features);
  });
}
}
