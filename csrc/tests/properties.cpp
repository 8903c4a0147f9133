// Drives every exported function over random graphs, for a build with AddressSanitizer and
// UndefinedBehaviorSanitizer: `make sanitize`. Every array is its own allocation of exactly its size, so that one step
// outside is seen. Half of the rounds plant a fault in the graph's arrays, which must be refused. In a quarter of them
// another thread writes into the index arrays while kernels run: results and codes may be anything then, but no kernel
// may leave its memory.
//
//   properties SECONDS [SEED]

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../anyattention.h"
#include "meddler.h"
#include "random_arrays.h"

void drive_cluster_search(bool faulty);
void drive_neighbour_sampling(bool faulty);
void drive_product_keys(bool faulty);

namespace {

using namespace tests;

// Numbers of either type, now and then one that is not finite.
struct Numbers {
  bool is_double;
  Array<float> floats;
  Array<double> doubles;

  Numbers(bool doubled, int64_t count) : is_double(doubled), floats(doubled ? 0 : count), doubles(doubled ? count : 0) {
    std::normal_distribution<double> normal;
    const double odd[] = {NAN, INFINITY, -INFINITY, 1e30, 0};
    const bool has_odd = chance(0.2);
    for (int64_t i = 0; i < count; ++i) {
      const double x = has_odd && chance(0.02) ? odd[up_to(4)] : normal(generator);
      doubled ? doubles[i] = x : floats[i] = static_cast<float>(x);
    }
  }
  void *get() const { return is_double ? static_cast<void *>(doubles.get()) : static_cast<void *>(floats.get()); }
};

struct Graph {
  int64_t num_queries, num_keys, num_edges;
  Array<int64_t> query_offsets, keys_by_query, edges_by_query, key_offsets, queries_by_key, edges_by_key;

  Graph(int64_t queries, int64_t keys, int64_t edges)
      : num_queries(queries),
        num_keys(keys),
        num_edges(edges),
        query_offsets(queries + 1),
        keys_by_query(edges),
        edges_by_query(edges),
        key_offsets(keys + 1),
        queries_by_key(edges),
        edges_by_key(edges) {}

  // The ends of edges, which no kernel reads, are null.
  anyattention_graph_arrays fields() const {
    return {num_queries,         num_edges,            num_keys,          query_offsets.get(), keys_by_query.get(),
            edges_by_query.get(), key_offsets.get(),   queries_by_key.get(), edges_by_key.get(), nullptr, nullptr};
  }
  // What the primitives read, of the graph or of its transpose; the rest is null.
  anyattention_graph_arrays rows(bool transposed) const {
    anyattention_graph_arrays found{};
    found.num_edges = num_edges;
    found.num_queries = transposed ? num_keys : num_queries, found.num_keys = transposed ? num_queries : num_keys;
    found.query_offsets = (transposed ? key_offsets : query_offsets).get();
    found.keys_by_query = (transposed ? queries_by_key : keys_by_query).get();
    found.edges_by_query = (transposed ? edges_by_key : edges_by_query).get();
    return found;
  }
};

// Rows that were sorted while another thread changed their edges are a graph all the same, if another.
void require_whole(int32_t status, const Array<int64_t> &offsets, const Array<int64_t> &columns, int64_t num_columns,
                   const Array<int64_t> &edges) {
  if (status != ANYATTENTION_OK) return;
  const int64_t rows = offsets.count - 1;
  bool whole = offsets[0] == 0 && offsets[rows] == edges.count && std::is_sorted(offsets.get(), offsets.get() + rows + 1);
  std::vector<bool> found(static_cast<std::size_t>(edges.count));
  for (int64_t s = 0; s < edges.count && whole; ++s) {
    whole = 0 <= columns[s] && columns[s] < num_columns && 0 <= edges[s] && edges[s] < edges.count;
    if (whole) found[static_cast<std::size_t>(edges[s])] = true;
  }
  if (whole && std::all_of(found.begin(), found.end(), [](bool there) { return there; })) return;
  std::fprintf(stderr, "failed: rows of a changing edge list are not whole\n");
  std::exit(1);
}

// Duplicates and isolated nodes come by themselves; now and then one query has a large part of the edges.
Graph random_graph(bool large) {
  const int64_t queries = chance(0.05) ? 0 : 1 + up_to(large ? 900 : 12);
  const int64_t keys = chance(0.05) ? 0 : 1 + up_to(large ? 700 : 12);
  const int64_t most = large ? 40000 : 60;
  const int64_t edges = queries == 0 || keys == 0 || chance(0.05) ? 0 : up_to(most);
  Array<int64_t> query_index(edges), key_index(edges);
  const double skew = chance(0.4) ? 0.5 : 0.0;
  for (int64_t e = 0; e < edges; ++e) {
    query_index[e] = chance(skew) ? queries / 2 : up_to(queries - 1);
    key_index[e] = chance(skew) ? keys / 3 : up_to(keys - 1);
  }
  Graph graph(queries, keys, edges);
  int64_t bad = 0;
  const int64_t threads = 1 + up_to(2);
  const int32_t by_query = anyattention_compressed_rows(query_index.get(), key_index.get(), edges, queries, keys, threads,
                                                        graph.query_offsets.get(), graph.keys_by_query.get(),
                                                        graph.edges_by_query.get(), &bad);
  require(by_query == ANYATTENTION_OK && bad == -1, "rows of queries", by_query);
  const int32_t by_key = anyattention_compressed_rows(key_index.get(), query_index.get(), edges, keys, queries, threads,
                                                      graph.key_offsets.get(), graph.queries_by_key.get(),
                                                      graph.edges_by_key.get(), &bad);
  require(by_key == ANYATTENTION_OK && bad == -1, "rows of keys", by_key);
  if (edges > 0 && is_meddled) {
    const auto meddler = meddler_of({&query_index, &key_index});
    const Array<int64_t> offsets(queries + 1), columns(edges), ids(edges);
    const int32_t status = anyattention_compressed_rows(query_index.get(), key_index.get(), edges, queries, keys, threads,
                                                        offsets.get(), columns.get(), ids.get(), &bad);
    require_whole(status, offsets, columns, keys, ids);
  } else if (edges > 0) {
    Array<int64_t> &broken = chance(0.5) ? query_index : key_index;
    const int64_t position = up_to(edges - 1);
    broken[position] = one_of<int64_t>({-1, INT64_MIN, INT64_MAX, int64_t{1} << 40, &broken == &key_index ? keys : queries});
    const int32_t status = anyattention_compressed_rows(query_index.get(), key_index.get(), edges, queries, keys, threads,
                                                        Array<int64_t>(queries + 1).get(), Array<int64_t>(edges).get(),
                                                        Array<int64_t>(edges).get(), &bad);
    require(status == ANYATTENTION_OUT_OF_RANGE && bad == position, "a bad edge is named", status);
  }
  return graph;
}

void drive_symmetric_rows(bool faulty) {
  const int64_t rows = chance(0.05) ? 0 : 1 + up_to(chance(0.3) ? 900 : 12);
  const int64_t pairs = rows == 0 || chance(0.05) ? 0 : up_to(chance(0.3) ? 70000 : 60);
  const double skew = chance(0.4) ? 0.5 : 0.0;
  const Array<int64_t> given(2 * pairs), offsets(rows + 1), of_row(2 * pairs), columns(2 * pairs), reverse(2 * pairs);
  for (int64_t n = 0; n < 2 * pairs; ++n) given[n] = chance(skew) ? rows / 2 : up_to(rows - 1);
  const bool broken = faulty && pairs > 0;
  if (broken) given[up_to(2 * pairs - 1)] = one_of<int64_t>({-1, INT64_MIN, INT64_MAX, int64_t{1} << 40, rows});
  auto meddler = meddler_of({&given});
  const int32_t status = anyattention_symmetric_rows(given.get(), pairs, rows, 1 + up_to(2), offsets.get(), of_row.get(),
                                                     columns.get(), reverse.get());
  require(status == (broken ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK), "rows of pairs", status);
  meddler.reset();
  if (is_meddled) return require_whole(status, offsets, columns, rows, reverse);
  if (broken) return;
  require(offsets[0] == 0 && offsets[rows] == 2 * pairs, "every edge has a slot", offsets[rows]);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = offsets[r]; s < offsets[r + 1]; ++s) {
      require(of_row[s] == r && (s == offsets[r] || columns[s - 1] <= columns[s]), "slots by row and column", s);
      require(0 <= reverse[s] && reverse[s] < 2 * pairs, "a way back", reverse[s]);
      require(of_row[reverse[s]] == columns[s] && columns[reverse[s]] == r, "the way back leads back", s);
    }
}

void drive_sorted_rows(bool faulty) {
  const int64_t rows = chance(0.05) ? 0 : 1 + up_to(12), edges = rows == 0 ? 0 : up_to(chance(0.3) ? 40000 : 60);
  const int64_t count = 1 + up_to(chance(0.2) ? 10 : 3), stride = 1 + up_to(2);
  const Array<int64_t> offsets(rows + 1), edge(edges), numbers(edges * count * stride), sorted(edges * count);
  for (int64_t r = 1; r < rows; ++r) offsets[r] = std::min(edges, offsets[r - 1] + up_to(2 * edges / rows));
  if (rows > 0) offsets[rows] = edges;
  for (int64_t s = 0; s < edges; ++s) edge[s] = s;
  std::shuffle(edge.get(), edge.get() + edges, generator);
  std::vector<const int64_t *> columns;
  std::vector<int64_t *> sorted_columns;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t range = one_of<int64_t>({0, 1, 5, 300, int64_t{1} << 40, INT64_MAX});
    for (int64_t e = 0; e < edges; ++e)
      numbers[(n * edges + e) * stride] = chance(0.01) ? one_of<int64_t>({INT64_MIN, INT64_MAX}) : up_to(range);
    columns.push_back(numbers.get() + (edges ? n * edges * stride : 0));
    sorted_columns.push_back(sorted.get() + (edges ? n * edges : 0));
  }
  const std::vector<int64_t> strides(count, stride), ones(count, 1);
  const bool broken = faulty && edges > 0;
  if (broken) edge[up_to(edges - 1)] = one_of<int64_t>({-1, INT64_MIN, INT64_MAX, edges});
  const int32_t status =
      anyattention_sorted_rows(offsets.get(), rows, edges, columns.data(), strides.data(), count, 1 + up_to(2), edge.get(),
                               sorted_columns.data(), ones.data());
  require(status == (broken ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK), "rows of numbers", status);
  if (broken) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = offsets[r]; s < offsets[r + 1]; ++s) {
      bool is_after = s == offsets[r], is_decided = is_after;
      for (int64_t n = 0; n < count; ++n) {
        require(sorted_columns[n][s] == columns[n][edge[s] * stride], "the numbers of an edge", n);
        if (is_decided) continue;
        is_decided = sorted_columns[n][s - 1] != sorted_columns[n][s];
        is_after = sorted_columns[n][s - 1] < sorted_columns[n][s];
      }
      require(is_decided ? is_after : edge[s - 1] < edge[s], "edges by their numbers", s);
    }
}

// Spoils one direction of the graph; returns whether it could.
bool plant_fault(Graph &graph, bool of_keys) {
  const Array<int64_t> &offsets = of_keys ? graph.key_offsets : graph.query_offsets;
  const int64_t rows = offsets.count - 1, edges = graph.num_edges;
  const int64_t wild = one_of<int64_t>({-1, INT64_MIN, INT64_MAX, int64_t{1} << 40});
  const int64_t kind = up_to(4);
  if (kind < 2) {
    if (edges == 0) return false;
    const Array<int64_t> &columns = of_keys ? graph.queries_by_key : graph.keys_by_query;
    const Array<int64_t> &ids = of_keys ? graph.edges_by_key : graph.edges_by_query;
    const int64_t limit = kind == 1 ? edges : of_keys ? graph.num_queries : graph.num_keys;
    (kind == 1 ? ids : columns)[up_to(edges - 1)] = chance(0.5) ? limit : wild;
  } else if (kind == 2) {
    offsets[rows] += one_of<int64_t>({-1, 1, 1000});
  } else if (kind == 3) {
    offsets[0] = one_of<int64_t>({-1, 1, INT64_MIN});
  } else {
    if (rows < 2 || edges == 0) return false;
    offsets[1 + up_to(rows - 2)] = chance(0.5) ? edges + 1 : wild;
  }
  return true;
}

void drive_primitives(const Graph &graph, bool transposed, bool faulty) {
  const bool is_double = chance(0.5);
  const int64_t key_heads = 1 + up_to(3), heads = key_heads * (1 + up_to(2));
  const int64_t width = one_of<int64_t>({1, 3, 7, 8, 16, 32, 40, 64}), batch = chance(0.1) ? 0 : 1 + up_to(1);
  const anyattention_graph_arrays rows = graph.rows(transposed);
  const Numbers query(is_double, batch * rows.num_queries * heads * width);
  const Numbers key(is_double, batch * rows.num_keys * key_heads * width);
  const Numbers edges(is_double, batch * rows.num_edges * heads);
  const Numbers by_edge(is_double, batch * rows.num_edges * heads);
  const Numbers by_query(is_double, batch * rows.num_queries * heads);
  const int64_t feature_dim = up_to(5);
  const Numbers features(is_double, rows.num_edges * feature_dim), weight(is_double, heads * width * feature_dim);
  const Array<int64_t> largest(batch * rows.num_queries * heads * width);
  const bool has_features = chance(0.5);
  const int64_t threads = 1 + up_to(2);
  const anyattention_edge_argmax_call argmax{
      batch, heads, key_heads, width, has_features ? feature_dim : 0, rows, edges.get(), key.get(),
      has_features ? features.get() : nullptr, has_features ? weight.get() : nullptr, threads, is_double};
  const anyattention_edge_dot_call dot{batch, heads, width, key_heads, rows, query.get(), key.get(), threads, is_double};
  const anyattention_edge_sum_call sum{batch, heads, key_heads, width, rows, edges.get(), key.get(), threads, is_double};
  const anyattention_edge_softmax_call softmax{batch, heads, rows, edges.get(), threads, is_double};
  const anyattention_edge_total_call total{batch, heads, rows, edges.get(), threads, is_double};
  const int32_t statuses[] = {
      anyattention_edge_argmax(&argmax, largest.get()), anyattention_edge_dot(&dot, by_edge.get()),
      anyattention_edge_sum(&sum, query.get()), anyattention_edge_softmax(&softmax, by_edge.get()),
      anyattention_edge_total(&total, by_query.get()),
  };
  for (const int32_t status : statuses) {
    require((status == ANYATTENTION_OK) == (!faulty || (batch == 0 && status == ANYATTENTION_OK)), "a primitive", status);
  }
  for (int64_t n = 0; n < largest.count; ++n) {
    require(faulty || (-1 <= largest[n] && largest[n] < rows.num_edges), "the largest is an edge", largest[n]);
  }
}

// Numbers per edge and head, with axes that are broadcast or further apart than they need be.
struct Strided {
  Numbers numbers;
  anyattention_edge_numbers fields;

  static Strided random(bool is_double, int64_t batch, int64_t edges, int64_t heads) {
    const int64_t head = chance(0.3) ? 0 : 1 + up_to(1), edge = chance(0.3) ? 0 : heads * 2;
    const int64_t each = chance(0.3) ? 0 : edges * heads * 2;
    const int64_t count = batch * edges == 0 ? 0 : (batch - 1) * each + (edges - 1) * edge + (heads - 1) * head + 1;
    Strided strided{Numbers(is_double, count), {}};
    for (int64_t i = 0; i < count; ++i) {
      if (!chance(0.1)) continue;
      is_double ? strided.numbers.doubles[i] = -INFINITY : strided.numbers.floats[i] = -INFINITY;
    }
    strided.fields = {chance(0.3) ? nullptr : strided.numbers.get(), each, edge, head};
    return strided;
  }
};

void drive_attention(const Graph &graph, bool faulty) {
  // Some calls are made for the code that keeps its sums in registers.
  const bool plain = chance(0.4), is_double = !plain && chance(0.5), normalize = plain || chance(0.7);
  const char *const score = one_of<const char *>({"Dot", "Additive", "Dynamic"});
  const bool is_additive = !std::strcmp(score, "Additive"), is_dynamic = !std::strcmp(score, "Dynamic");
  const int64_t key_heads = plain ? one_of<int64_t>({1, 2, 4, 8}) : 1 + up_to(3), heads = plain ? key_heads : key_heads * (1 + up_to(2));
  const std::vector<int64_t> widths{1, 3, 7, 8, 16, 32, 40, 64};
  const int64_t value_dim = plain ? one_of<int64_t>({8, 16, 32, 64}) : one_of(widths);
  const bool same_width = plain || chance(0.5);
  const int64_t head_dim = is_additive ? 1 : same_width ? value_dim : one_of(widths);
  const int64_t batch = chance(0.05) ? 0 : 1 + up_to(1);
  const int64_t query_stride = heads * head_dim + up_to(2), key_stride = key_heads * head_dim + up_to(2);
  const int64_t value_stride = key_heads * value_dim + up_to(2);
  const int64_t queries = graph.num_queries, keys = graph.num_keys, edges = graph.num_edges;
  const auto numbers = [=](int64_t count) { return Numbers(is_double, count); };
  const Numbers query = numbers(batch * queries * query_stride), key = numbers(batch * keys * key_stride);
  const Numbers value = numbers(batch * keys * value_stride), vector = numbers(heads * head_dim);
  const bool value_is_key = head_dim == value_dim && chance(0.3);
  const Strided term = Strided::random(is_double, batch, edges, heads);
  const Strided bias = Strided::random(is_double, batch, edges, heads);
  const anyattention_graph_attention_call call{
      batch, heads, head_dim, key_heads, value_dim, 0.7, !plain && chance(0.3) ? 2.5 : 0.0,
      graph.fields(), query.get(), query_stride, key.get(), key_stride,
      value_is_key ? key.get() : value.get(), value_is_key ? key_stride : value_stride,
      is_dynamic ? vector.get() : nullptr, plain ? anyattention_edge_numbers{} : term.fields,
      plain ? anyattention_edge_numbers{} : bias.fields, up_to(INT64_MAX), anyattention_score(score), normalize,
      0.2, chance(0.3) ? 0.4 : 0.0, 1 + up_to(2), is_double};

  const Numbers output = numbers(batch * queries * heads * value_dim);
  const Numbers largest = numbers(batch * queries * heads), log_sum = numbers(batch * queries * heads);
  const Numbers weights = numbers(batch * edges * heads);
  const Numbers grad_output = numbers(output.is_double ? output.doubles.count : output.floats.count);
  const Numbers grad_log_sum = numbers(batch * queries * heads);
  const Numbers grad_query = numbers(batch * queries * query_stride), grad_key = numbers(batch * keys * key_stride);
  const Numbers grad_value = numbers(batch * keys * value_stride), grad_vector = numbers(heads * head_dim);
  const Numbers grad_raw = numbers(batch * edges * heads), grad_score = numbers(batch * edges * heads);
  const anyattention_graph_attention_weights_call by_sums{call, largest.get(), log_sum.get(), call.num_threads, is_double};
  const anyattention_graph_attention_backward_call by_results{
      call, output.get(), largest.get(), log_sum.get(), grad_output.get(),
      chance(0.5) ? nullptr : grad_log_sum.get(), call.num_threads, is_double};
  const int32_t statuses[] = {
      anyattention_graph_attention(&call, output.get(), largest.get(), log_sum.get()),
      anyattention_graph_attention_weights(&by_sums, weights.get()),
      anyattention_graph_attention_backward(
          &by_results, grad_query.get(), grad_key.get(), value_is_key ? nullptr : grad_value.get(),
          is_dynamic ? grad_vector.get() : nullptr, chance(0.5) ? nullptr : grad_raw.get(),
          chance(0.5) ? nullptr : grad_score.get()),
  };
  // The forward reads the rows of queries only: of a fault in those of keys it may see nothing.
  for (const int32_t status : statuses) {
    require(faulty || status == ANYATTENTION_OK, "attention refused a sound graph", status);
  }
  require(!faulty || batch == 0 || statuses[2] != ANYATTENTION_OK, "attention took a fault", statuses[2]);
}

// Numbers of pairs, not there yet: contiguous axes, some of them of size 1.
anyattention_pairs pairs_of_axes(const std::vector<int64_t> &sizes) {
  anyattention_pairs pairs{};
  pairs.size = 1;
  for (std::size_t axis = sizes.size(); axis-- > 0;) {
    const bool is_whole = chance(0.5);
    pairs.strides[axis] = is_whole ? pairs.size : 0;
    pairs.size *= is_whole ? sizes[axis] : 1;
  }
  return pairs;
}

// The same in any order, some backwards or further apart than they need be.
anyattention_pairs scattered_pairs(const std::vector<int64_t> &sizes) {
  std::vector<std::size_t> order{0, 1, 2, 3};
  std::shuffle(order.begin(), order.end(), generator);
  anyattention_pairs pairs{};
  int64_t next = 1 + up_to(1), last = 0;
  bool is_empty = false;
  for (const std::size_t axis : order) {
    if (chance(0.4)) continue;
    is_empty |= sizes[axis] == 0;
    const int64_t reach = std::max<int64_t>(sizes[axis] - 1, 0) * next;
    const bool is_backwards = chance(0.2);
    pairs.strides[axis] = is_backwards ? -next : next;
    pairs.offset += is_backwards ? reach : 0;
    last += reach, next += reach + up_to(3);
  }
  pairs.size = is_empty ? 0 : last + 1;
  return pairs;
}

// Moves numbers of pairs outside, where there are any; returns whether it did.
bool plant_fault_in_pairs(anyattention_pairs &mask, anyattention_pairs &bias, bool is_empty) {
  const bool moves_mask = !is_empty && mask.numbers && chance(0.5), moves_bias = !is_empty && bias.numbers && chance(0.5);
  if (moves_mask) mask.size = std::min(mask.size - 1, up_to(mask.size));
  if (moves_bias) bias.offset = one_of<int64_t>({-1, bias.size});
  return moves_mask || moves_bias;
}

int64_t random_type(bool is_double) {
  return is_double ? 0 : one_of<int64_t>({ANYATTENTION_FULL, ANYATTENTION_BFLOAT16, ANYATTENTION_FLOAT16});
}

// Rows of numbers (batch, positions, heads, width) with axes in any order, broadcast or further apart than they need be,
// in one of the types.
struct HeadRows {
  Numbers numbers;
  Array<uint16_t> halves;
  anyattention_head_rows fields;

  static HeadRows random(bool is_double, int64_t type, const std::vector<int64_t> &sizes, int64_t width) {
    std::vector<std::size_t> order{0, 1, 2};
    std::shuffle(order.begin(), order.end(), generator);
    int64_t strides[3], next = width + up_to(2), count = width;
    for (const std::size_t axis : order) {
      strides[axis] = chance(0.2) ? 0 : next;
      count += (sizes[axis] - 1) * strides[axis];
      next = std::max(next, strides[axis] * sizes[axis] + up_to(2));
    }
    for (const int64_t size : sizes) count = size == 0 ? 0 : count;
    const bool is_half = type != ANYATTENTION_FULL;
    HeadRows rows{Numbers(is_double, is_half ? 0 : count), Array<uint16_t>(is_half ? count : 0), {}};
    // Any bits are a number, or none.
    for (int64_t n = 0; n < rows.halves.count; ++n) rows.halves[n] = static_cast<uint16_t>(up_to(UINT16_MAX));
    const void *const first = is_half ? static_cast<void *>(rows.halves.get()) : rows.numbers.get();
    rows.fields = {first, strides[0], strides[1], strides[2], type};
    return rows;
  }
};

// Attention over random runs of keys, in random orders, once sound and once with a fault where one is planted.
void drive_runs(bool faulty) {
  const int64_t queries = up_to(150), keys = up_to(200), key_heads = 1 + up_to(2), heads = key_heads * (1 + up_to(1));
  const int64_t head_dim = one_of<int64_t>({1, 3, 8, 16, 40, 64}), value_dim = one_of<int64_t>({1, 5, 16, 64});
  const int64_t batch = chance(0.05) ? 0 : 1 + up_to(1);
  std::vector<int64_t> begins, ends;
  const Array<int64_t> offsets(queries + 1);
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t at = up_to(keys); chance(0.8) && at < keys; at += 1 + up_to(60)) {
      begins.push_back(at);
      at += 1 + up_to(std::min<int64_t>(keys - at - 1, chance(0.3) ? 150 : 5));
      ends.push_back(at);
    }
    offsets[i + 1] = static_cast<int64_t>(begins.size());
  }
  const auto copy = [](const std::vector<int64_t> &from) {
    Array<int64_t> to(static_cast<int64_t>(from.size()));
    std::copy(from.begin(), from.end(), to.get());
    return to;
  };
  const auto order = [](int64_t count) {
    Array<int64_t> places(count);
    for (int64_t n = 0; n < count; ++n) places[n] = n;
    std::shuffle(places.get(), places.get() + count, generator);
    return places;
  };
  const Array<int64_t> run_begins = copy(begins), run_ends = copy(ends), query_order = order(queries), key_order = order(keys);
  const int64_t num_runs = run_begins.count;
  bool broken = false;
  if (faulty && num_runs > 0) {
    const int64_t wild = one_of<int64_t>({-1, INT64_MIN, INT64_MAX, int64_t{1} << 40});
    const std::vector<const Array<int64_t> *> arrays{&run_begins, &run_ends, &query_order, &key_order, &offsets};
    const Array<int64_t> &array = *one_of(arrays);
    array[up_to(array.count - 1)] = wild;
    broken = true;
  }
  const bool wild_order = broken;
  const bool is_double = chance(0.3), by_distance = chance(0.5);
  const auto numbers = [=](int64_t count) { return Numbers(is_double, count); };
  // Mostly the same of all, as some kernels are for.
  const int64_t shared_type = random_type(is_double);
  const auto type = [=] { return chance(0.9) ? shared_type : random_type(is_double); };
  HeadRows query = HeadRows::random(is_double, type(), {batch, queries, heads}, head_dim);
  const HeadRows key = HeadRows::random(is_double, type(), {batch, keys, key_heads}, head_dim);
  const HeadRows value = HeadRows::random(is_double, type(), {batch, keys, key_heads}, value_dim);
  const int64_t output_size = batch * queries * heads * value_dim, num_rows = batch * queries * heads;
  const Numbers output = numbers(output_size), largest = numbers(num_rows), log_sum = numbers(num_rows);
  const HeadRows grad_output = HeadRows::random(is_double, type(), {batch, queries, heads}, value_dim);
  const Numbers grad_log_sum = numbers(num_rows);
  const Numbers grad_query = numbers(batch * queries * heads * head_dim), grad_key = numbers(batch * keys * key_heads * head_dim);
  const Numbers grad_value = numbers(batch * keys * key_heads * value_dim);
  const std::vector<int64_t> axes{batch, heads, queries, keys};
  anyattention_pairs mask = pairs_of_axes(axes), bias = scattered_pairs(axes), grad_bias = pairs_of_axes(axes);
  const int64_t distances = std::max<int64_t>(queries + keys - 1, 0);
  if (by_distance) bias = {nullptr, heads * distances, std::max<int64_t>(keys - 1, 0), {0, distances, 1, -1}};
  if (by_distance) grad_bias = bias;
  const Array<uint8_t> allowed(mask.size);
  for (int64_t n = 0; n < mask.size; ++n) allowed[n] = chance(0.8);
  const Numbers biases = numbers(bias.size), by_bias = numbers(grad_bias.size);
  grad_bias.numbers = by_bias.get();
  if (chance(0.4)) mask.numbers = allowed.get();
  if (chance(0.4)) bias.numbers = biases.get();
  if (faulty && plant_fault_in_pairs(mask, bias, batch * queries * keys == 0)) broken = true;
  if (faulty && chance(0.1)) {
    anyattention_head_rows &rows = query.fields;
    (chance(0.5) ? rows.row_stride : rows.type) = one_of<int64_t>({-1, INT64_MIN});
    broken = true;
  }
  const bool has_orders = wild_order || chance(0.5);
  const double dropout = has_orders || chance(0.5) ? 0 : 0.3;
  const auto meddler = meddler_of({&run_begins, &run_ends, &query_order, &key_order, &offsets});
  const anyattention_run_part part{queries, keys, num_runs, has_orders ? query_order.get() : nullptr,
                                   has_orders ? key_order.get() : nullptr, offsets.get(), run_begins.get(),
                                   run_ends.get()};
  const anyattention_run_attention_call call{
      batch, queries, heads, head_dim, keys, key_heads, value_dim, 0.4, chance(0.3) ? 2.0 : 0.0,
      query.fields, key.fields, value.fields, mask, bias, up_to(1 << 20), part, dropout, chance(0.5), 1 + up_to(2), is_double};
  const anyattention_run_attention_backward_call by_results{
      call, output.get(), largest.get(), log_sum.get(), grad_output.fields,
      chance(0.5) ? nullptr : grad_log_sum.get(), call.num_threads, is_double};
  const HeadRows by_query = HeadRows::random(is_double, type(), {batch, queries, heads}, head_dim);
  const HeadRows by_key = HeadRows::random(is_double, type(), {batch, keys, key_heads}, head_dim);
  const HeadRows by_value = HeadRows::random(is_double, type(), {batch, keys, key_heads}, value_dim);
  const auto maybe = [](anyattention_head_rows rows) { return chance(0.3) ? anyattention_head_rows{} : rows; };
  const anyattention_run_attention_double_backward_call by_gradients{
      by_results, maybe(by_query.fields), maybe(by_key.fields), maybe(by_value.fields),
      bias.numbers && !broken && chance(0.5) ? bias : anyattention_pairs{}, call.num_threads, is_double};
  const Numbers sums = numbers(2 * num_rows), grad_grad_output = numbers(output_size);
  const auto wanted = [](const Numbers &result) { return chance(0.7) ? result.get() : nullptr; };
  const int64_t weight_heads = chance(0.5) ? 1 : heads;
  const Numbers weights = numbers(batch * weight_heads * queries * keys);
  const anyattention_run_attention_weights_call of_results{call, largest.get(), log_sum.get(), weight_heads,
                                                           call.num_threads, is_double};
  const anyattention_run_attention_weights_backward_call by_weights{
      weight_heads, call, largest.get(), log_sum.get(), weights.get(), call.num_threads, is_double};
  const anyattention_pairs *to = bias.numbers && grad_bias.numbers && chance(0.8) ? &grad_bias : nullptr;
  const int32_t statuses[] = {
      anyattention_run_attention_forward(&call, chance(0.3), output.get(), largest.get(), log_sum.get()),
      anyattention_run_attention_weights(&of_results, chance(0.3), weights.get()),
      anyattention_run_attention_weights_backward(&by_weights, chance(0.3), grad_query.get(), grad_key.get(),
                                                  log_sum.get(), to),
      anyattention_run_attention_backward(&by_results, chance(0.3), grad_query.get(), grad_key.get(), grad_value.get(),
                                          to),
      anyattention_run_attention_double_backward_sums(&by_gradients, chance(0.3), sums.get()),
      anyattention_run_attention_double_backward(&by_gradients, chance(0.3), chance(0.5), sums.get(), wanted(grad_query),
                                                 wanted(grad_key), wanted(grad_value), wanted(grad_grad_output), to),
  };
  for (const int32_t status : statuses) {
    require(broken == (status != ANYATTENTION_OK), broken ? "runs took a fault" : "sound runs refused", status);
  }
  if (!to || broken) return;
  anyattention_pairs others = grad_bias;
  (chance(0.5) ? others.size : others.offset) += one_of<int64_t>({-3, 1, 1000});
  require(anyattention_run_attention_backward(&by_results, 0, grad_query.get(), grad_key.get(), grad_value.get(), &others) ==
              ANYATTENTION_INVALID_ARGUMENT, "a gradient that is no gradient of the bias");
}

// Choosing keys: each query's are different, in its range, best first, and as many as it sees; once sound, and once with
// a fault where one is planted.
void drive_topk(bool faulty) {
  const bool long_keys = chance(0.03);
  const int64_t queries = up_to(long_keys ? 3 : 90), keys = up_to(long_keys ? 20000 : 220), key_heads = 1 + up_to(2);
  const int64_t heads = key_heads * (1 + up_to(3)), head_dim = one_of<int64_t>({1, 3, 8, 16, 40, 64});
  const int64_t k = 1 + up_to(chance(0.3) ? keys + 3 : 6), batch = chance(0.05) ? 0 : 1 + up_to(1);
  const Numbers query(false, batch * queries * heads * head_dim), key(false, batch * keys * key_heads * head_dim);
  const Array<int64_t> begins(queries), ends(queries), indices(batch * queries * heads * k);
  for (int64_t i = 0; i < queries; ++i) begins[i] = up_to(keys), ends[i] = up_to(keys);
  for (int64_t i = 0; i < queries; i += 7) begins[i] = INT64_MAX, ends[i] = INT64_MIN;
  anyattention_topk_indices_call call{batch, queries, heads, head_dim, keys, key_heads, query.floats.get(),
                                      key.floats.get(), nullptr, nullptr, {}, {}, 0.3, k, 1 + up_to(2), 0};
  if (chance(0.6)) call.key_begins = begins.get(), call.key_ends = ends.get();
  call.mask = pairs_of_axes({batch, heads, queries, keys}), call.bias = pairs_of_axes({batch, heads, queries, keys});
  const Array<uint8_t> mask(call.mask.size);
  for (int64_t n = 0; n < mask.count; ++n) mask[n] = chance(0.7);
  const Numbers bias(false, call.bias.size);
  if (chance(0.4)) call.mask.numbers = mask.get();
  if (chance(0.4)) call.bias.numbers = bias.get();
  bool broken = faulty && plant_fault_in_pairs(call.mask, call.bias, batch * queries * keys == 0);
  if (faulty && queries > 0 && call.key_begins) {
    const int64_t i = up_to(queries - 1);
    begins[i] = chance(0.5) ? one_of<int64_t>({-1, INT64_MIN}) : 0;
    ends[i] = begins[i] == 0 ? one_of<int64_t>({keys + 1, INT64_MAX}) : 1;
    broken = true;
  }
  auto meddler = meddler_of({&begins, &ends});
  const int32_t status = anyattention_topk_indices(&call, indices.get());
  meddler.reset();
  if (is_meddled) return;
  require(status == (broken ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK), "choosing keys", status);
  for (int64_t row = 0; !broken && row < batch * queries * heads; ++row) {
    const int64_t i = row / heads % queries, begin = call.key_begins ? begins[i] : 0, end = call.key_ends ? ends[i] : keys;
    int64_t *chosen = indices.get() + row * k, *last = std::find(chosen, chosen + k, -1);
    require(std::all_of(last, chosen + k, [](int64_t j) { return j == -1; }), "unused slots stand last");
    require(std::all_of(chosen, last, [=](int64_t j) { return begin <= j && j < end; }), "a key that the query sees");
    const int64_t seen = begin < end ? end - begin : 0;
    require(call.mask.numbers || call.bias.numbers || last - chosen == std::min(seen, k), "as many keys as there are", last - chosen);
    std::sort(chosen, last);
    require(std::adjacent_find(chosen, last) == last, "no key twice");
  }
}

// The arrays that are summed up before the LeakyReLU.
struct Summed {
  int64_t num_features;
  Numbers query, key, weight, features;

  static Summed random(bool is_double, const anyattention_dynamic_dot_call &call) {
    const anyattention_graph_arrays &graph = call.graph;
    const int64_t num_features = chance(0.4) ? 0 : 1 + up_to(3), width = call.width;
    return {num_features,
            Numbers(is_double, call.batch * graph.num_queries * call.heads * width),
            Numbers(is_double, call.batch * graph.num_keys * call.key_heads * width),
            Numbers(is_double, num_features * call.heads * width),
            Numbers(is_double, graph.num_edges * num_features)};
  }
};

// Distances have no indices to break: any sizes, any numbers, and a missing array where one is planted.
void drive_distances(bool faulty) {
  const bool doubled = chance(0.5);
  const int64_t rows = chance(0.1) ? up_to(20000) : up_to(150), dim = 1 + up_to(3), heads = 1 + up_to(4);
  const int64_t num_radial = up_to(20), outputs = heads + (num_radial > 0 ? up_to(5) : 0);
  const Numbers displacement(doubled, rows * dim), decay(doubled, heads), weight(doubled, outputs * num_radial);
  const Numbers terms(doubled, rows * outputs), by_displacement(doubled, rows * dim), by_decay(doubled, heads);
  const Numbers by_weight(doubled, outputs * num_radial);
  const bool broken = faulty && rows > 0;
  const int64_t missing = broken ? up_to(num_radial > 0 ? 3 : 2) : -1;
  const auto given = [&](int64_t place, const Numbers &numbers) { return missing == place ? nullptr : numbers.get(); };
  const auto wanted = [&](const Numbers &numbers) { return chance(0.2) ? nullptr : numbers.get(); };
  const anyattention_distance_terms_call call{
      rows, dim, heads, num_radial > 0 ? outputs : 0, num_radial, given(0, displacement), given(1, decay),
      given(3, weight), chance(0.5) ? 1.5 : 0.0, 2.0, 1e-6, 1 + up_to(2), doubled};
  const anyattention_distance_terms_backward_call by_terms{call, given(2, terms), call.num_threads, doubled};
  const int32_t forward = anyattention_distance_terms(&call, given(2, terms));
  const int32_t backward = anyattention_distance_terms_backward(&by_terms, wanted(by_displacement), wanted(by_decay),
                                                                wanted(by_weight));
  for (const int32_t status : {forward, backward}) {
    require(status == (broken ? ANYATTENTION_INVALID_ARGUMENT : ANYATTENTION_OK), "distances", status);
  }
}

void drive_dynamic(const Graph &graph, bool faulty) {
  const bool is_double = chance(0.5);
  const int64_t key_heads = 1 + up_to(3), heads = key_heads * (1 + up_to(2));
  const int64_t width = one_of<int64_t>({1, 3, 7, 8, 16, 32, 40, 64}), batch = chance(0.05) ? 0 : 1 + up_to(1);
  const auto numbers = [=](int64_t count) { return Numbers(is_double, count); };
  const Numbers vector = numbers(heads * width);
  anyattention_dynamic_dot_call call{};
  call.heads = heads, call.width = width, call.batch = batch, call.key_heads = key_heads, call.graph = graph.fields();
  call.negative_slope = 0.2, call.vector = vector.get(), call.num_threads = 1 + up_to(2), call.is_double = is_double;
  const Summed base = Summed::random(is_double, call), other = Summed::random(is_double, call);
  const bool is_base = chance(0.5);
  const Summed &at = is_base ? base : other;
  call.num_features = at.num_features, call.num_base_features = base.num_features;
  // Queries or keys may be missing, but for the base.
  call.query = is_base || chance(0.7) ? at.query.get() : nullptr, call.key = is_base || chance(0.7) ? at.key.get() : nullptr;
  call.weight = at.weight.get(), call.features = at.features.get();
  call.base_query = base.query.get(), call.base_key = base.key.get();
  call.base_weight = base.weight.get(), call.base_features = base.features.get();
  const Numbers products = numbers(batch * graph.num_edges * heads), by_vector = numbers(heads * width);
  const Numbers by_query = numbers(batch * graph.num_queries * heads * width);
  const Numbers by_key = numbers(batch * graph.num_keys * key_heads * width);
  const Numbers by_weight = numbers(at.num_features * heads * width);
  const Numbers by_features = numbers(graph.num_edges * at.num_features);
  const auto wanted = [](const Numbers &result) { return chance(0.7) ? result.get() : nullptr; };
  const anyattention_dynamic_sums_call by_products{call, products.get(), call.num_threads, is_double};
  const int32_t statuses[] = {
      anyattention_dynamic_dot(&call, products.get()),
      anyattention_dynamic_sums(&by_products, wanted(by_vector), wanted(by_query), wanted(by_key), wanted(by_weight),
                                wanted(by_features)),
      anyattention_dynamic_sums(&by_products, by_vector.get(), by_query.get(), by_key.get(), by_weight.get(),
                                by_features.get()),
  };
  for (const int32_t status : statuses) {
    require(faulty || status == ANYATTENTION_OK, "Dynamic refused a sound graph", status);
  }
  // Sums of no rows are not wanted, and the offsets of no rows not read.
  const bool is_read = batch > 0 && graph.num_queries > 0 && graph.num_keys > 0;
  require(!faulty || !is_read || statuses[2] != ANYATTENTION_OK, "Dynamic took a fault", statuses[2]);
}

// Small whole numbers, whose products and sums are exact.
Array<float> whole_numbers(int64_t count) {
  Array<float> numbers(count);
  for (int64_t n = 0; n < count; ++n) numbers[n] = static_cast<float>(up_to(8) - 4);
  return numbers;
}

// Matrices side by side, whose last rows end with their numbers.
struct SideBySide {
  int64_t rows, width = 0;
  std::vector<Array<float>> parts;
  std::vector<int64_t> widths, strides;
  std::vector<float *> pointers;

  SideBySide(int64_t num_rows, int64_t gap) : rows(num_rows) {
    for (int64_t n = 1 + up_to(3); n > 0; --n) {
      widths.push_back(1 + up_to(chance(0.2) ? 150 : 20));
      strides.push_back(widths.back() + gap);
      width += widths.back();
      parts.push_back(whole_numbers(rows > 0 ? (rows - 1) * strides.back() + widths.back() : 0));
      pointers.push_back(parts.back().get());
    }
  }
  int64_t count() const { return static_cast<int64_t>(parts.size()); }
  float at(int64_t row, int64_t column) const {
    std::size_t n = 0;
    for (; column >= widths[n]; ++n) column -= widths[n];
    return parts[n][row * strides[n] + column];
  }
};

void drive_products() {
  const int64_t rows = up_to(chance(0.1) ? 2500 : 60), threads = 1 + up_to(2);
  const SideBySide x(rows, up_to(3)), results(rows, 0);
  const bool is_turned = chance(0.5), has_bias = chance(0.5);
  const Array<float> matrix = whole_numbers(x.width * results.width), bias = whole_numbers(results.width);
  const int64_t by_row = is_turned ? 1 : results.width, by_column = is_turned ? x.width : 1;
  require(anyattention_linear_map(rows, x.count(), x.pointers.data(), x.widths.data(), x.strides.data(), matrix.get(),
                                  by_row, by_column, has_bias ? bias.get() : nullptr, results.count(),
                                  results.pointers.data(), results.widths.data(), threads) == ANYATTENTION_OK,
          "linear map");
  for (int64_t check = 0; rows > 0 && check < 20; ++check) {
    const int64_t row = up_to(rows - 1), column = up_to(results.width - 1);
    float sum = has_bias ? bias[column] : 0;
    for (int64_t k = 0; k < x.width; ++k) sum += x.at(row, k) * matrix[k * by_row + column * by_column];
    require(results.at(row, column) == sum, "a number of a linear map", column);
  }
  const int64_t inputs = 1 + up_to(chance(0.2) ? 150 : 20), gap = up_to(3);
  const Array<float> from = whole_numbers(rows > 0 ? (rows - 1) * (inputs + gap) + inputs : 0);
  const Array<float> by_matrix(x.width * inputs), by_bias(x.width);
  require(anyattention_linear_map_by_matrix(rows, x.count(), x.pointers.data(), x.widths.data(), x.strides.data(),
                                            from.get(), inputs, inputs + gap, threads, by_matrix.get(),
                                            has_bias ? by_bias.get() : nullptr) == ANYATTENTION_OK,
          "gradients of a linear map");
  for (int64_t check = 0; check < 20; ++check) {
    const int64_t output = up_to(x.width - 1), input = up_to(inputs - 1);
    float sum = 0, bias_sum = 0;
    for (int64_t k = 0; k < rows; ++k) sum += x.at(k, output) * from[k * (inputs + gap) + input];
    for (int64_t k = 0; k < rows; ++k) bias_sum += x.at(k, output);
    require(by_matrix[output * inputs + input] == sum, "a gradient by a matrix", output);
    require(!has_bias || by_bias[output] == bias_sum, "a gradient by a bias", output);
  }
}

void refuse_products() {
  const float one = 1, *from = &one;
  float result = 0, *to = &result;
  const int64_t width = 1, none = 0;
  const auto map = [&](int64_t rows, int64_t count, const int64_t *widths, const float *matrix, int64_t threads) {
    return anyattention_linear_map(rows, count, &from, widths, widths, matrix, 1, 1, nullptr, 1, &to, &width, threads);
  };
  require(map(1, 1, &width, &one, 1) == ANYATTENTION_OK && result == 1, "a product");
  const bool refused = map(-1, 1, &width, &one, 1) && map(1, 0, &width, &one, 1) && map(1, 1, &none, &one, 1) &&
                       map(1, 1, nullptr, &one, 1) && map(1, 1, &width, nullptr, 1) && map(1, 1, &width, &one, 0);
  require(refused, "a product without sizes");
  const auto by = [&](int64_t rows, int64_t inputs, int64_t stride, const float *x, int64_t threads, float *matrix) {
    return anyattention_linear_map_by_matrix(rows, 1, &from, &width, &width, x, inputs, stride, threads, matrix, nullptr);
  };
  require(by(1, 1, 1, &one, 1, &result) == ANYATTENTION_OK && result == 1, "a gradient");
  const bool none_by = by(-1, 1, 1, &one, 1, &result) && by(1, 0, 1, &one, 1, &result) && by(1, 2, 1, &one, 1, &result) &&
                       by(1, 1, 1, nullptr, 1, &result) && by(1, 1, 1, &one, 0, &result) && by(1, 1, 1, &one, 1, nullptr);
  require(none_by, "a gradient without sizes");
}

void refuse_arguments() {
  refuse_products();
  const Array<int64_t> offsets(1);
  anyattention_graph_arrays graph{};
  graph.query_offsets = offsets.get();
  const anyattention_edge_total_call no_rows{1, 1, graph, nullptr, 1, 0};
  require(anyattention_edge_total(&no_rows, nullptr) == ANYATTENTION_OK, "no rows at all");
  const anyattention_edge_dot_call dot{1, 1, 1, 1, graph, nullptr, nullptr, 1, 0};
  using Dot = anyattention_edge_dot_call;
  for (int64_t Dot::*field : {&Dot::heads, &Dot::key_heads, &Dot::width, &Dot::num_threads}) {
    Dot wrong = dot;
    wrong.*field = 0;
    require(anyattention_edge_dot(&wrong, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "a size of 0");
  }
  anyattention_edge_softmax_call no_offsets{1, 1, {}, nullptr, 1, 0};
  require(anyattention_edge_softmax(&no_offsets, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no offsets");
  anyattention_edge_sum_call negative_size{1, 1, 1, 1, graph, nullptr, nullptr, 1, 0};
  negative_size.graph.num_edges = -1;
  require(anyattention_edge_sum(&negative_size, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "a negative size");
  const anyattention_edge_argmax_call features{1, 1, 1, 1, -1, graph, nullptr, nullptr, nullptr, nullptr, 1, 0};
  require(anyattention_edge_argmax(&features, nullptr) == ANYATTENTION_INVALID_ARGUMENT,
          "a negative number of features");
  require(anyattention_edge_total(nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  require(anyattention_graph_attention(nullptr, nullptr, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  anyattention_graph_attention_call empty{};
  require(anyattention_graph_attention(&empty, nullptr, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no sizes");
  require(anyattention_dynamic_dot(nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  anyattention_dynamic_sums_call nothing{};
  require(anyattention_dynamic_sums(&nothing, nullptr, nullptr, nullptr, nullptr, nullptr) ==
              ANYATTENTION_INVALID_ARGUMENT, "no sizes");
  require(anyattention_run_attention_forward(nullptr, 0, nullptr, nullptr, nullptr) ==
              ANYATTENTION_INVALID_ARGUMENT, "no call");
  anyattention_run_attention_backward_call no_sizes{};
  require(anyattention_run_attention_backward(&no_sizes, 0, nullptr, nullptr, nullptr, nullptr) ==
              ANYATTENTION_INVALID_ARGUMENT, "no sizes");
  anyattention_run_attention_double_backward_call no_gradients{};
  require(anyattention_run_attention_double_backward_sums(&no_gradients, 0, nullptr) == ANYATTENTION_INVALID_ARGUMENT,
          "no sizes");
  no_gradients.grad_grad_key.type = -1;
  require(anyattention_run_attention_double_backward(&no_gradients, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) ==
              ANYATTENTION_INVALID_ARGUMENT, "no such type");
  require(anyattention_run_attention_weights(nullptr, 0, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  anyattention_run_attention_weights_backward_call other_heads{};
  other_heads.weight_heads = 2;
  require(anyattention_run_attention_weights_backward(&other_heads, 0, nullptr, nullptr, nullptr, nullptr) ==
              ANYATTENTION_INVALID_ARGUMENT, "weights of other heads");
  require(anyattention_distance_terms(nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  double factor = 0;
  require(anyattention_keep_factors(1, 0, 0.5, 1, 1, &factor) == ANYATTENTION_OK, "a factor");
  require(anyattention_keep_factors(1, 0, 1, 1, 1, &factor) == ANYATTENTION_INVALID_ARGUMENT, "all are dropped");
  require(anyattention_keep_factors(1, 0, 0.5, 1, 1, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no factors");
  require(anyattention_keep_factors(-1, 0, 0.5, 1, 1, &factor) == ANYATTENTION_INVALID_ARGUMENT, "a negative size");
  require(anyattention_topk_indices(nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  using TopK = anyattention_topk_indices_call;
  TopK sizes{};
  require(anyattention_topk_indices(&sizes, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no sizes");
  sizes.heads = sizes.key_heads = sizes.head_dim = sizes.k = sizes.num_threads = 1;
  require(anyattention_topk_indices(&sizes, nullptr) == ANYATTENTION_OK, "no queries");
  for (int64_t TopK::*field : {&TopK::heads, &TopK::key_heads,
                                           &TopK::head_dim, &TopK::k,
                                           &TopK::num_threads}) {
    TopK none = sizes;
    none.*field = 0;
    require(anyattention_topk_indices(&none, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "a size of 0");
  }
  for (int64_t TopK::*field :
       {&TopK::batch, &TopK::num_queries, &TopK::num_keys}) {
    TopK negative = sizes;
    negative.*field = -1;
    require(anyattention_topk_indices(&negative, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "a negative size");
  }
  TopK half = sizes;
  half.key_begins = offsets.get();
  require(anyattention_topk_indices(&half, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "begins without ends");
  sizes.batch = sizes.num_queries = 1;
  require(anyattention_topk_indices(&sizes, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no arrays");
  require(anyattention_score("Dot") == 0 && anyattention_score("Dynamic") == 2, "scores by their names");
  require(anyattention_score("dot") == -1 && anyattention_score(nullptr) == -1, "no score of that name");
  empty.score = 3;
  require(anyattention_graph_attention(&empty, nullptr, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no such score");
  require(anyattention_size_of("pairs") == sizeof(anyattention_pairs), "the size of a structure");
  require(anyattention_size_of("pair") == -1 && anyattention_size_of(nullptr) == -1, "no structure of that name");
}

}  // namespace

int main(int argc, char **argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  generator.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  refuse_arguments();
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [start] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  int64_t rounds = 0, faults = 0, meddled = 0;
  for (; elapsed() < seconds; ++rounds) {
    is_meddled = chance(0.25);
    Graph graph = random_graph(rounds % 16 == 0);
    const bool of_keys = chance(0.5), faulty = !is_meddled && chance(0.5) && plant_fault(graph, of_keys);
    faults += faulty, meddled += is_meddled;
    {
      const auto meddler = meddler_of({&graph.query_offsets, &graph.keys_by_query, &graph.edges_by_query,
                                       &graph.key_offsets, &graph.queries_by_key, &graph.edges_by_key});
      drive_primitives(graph, of_keys, faulty);
      drive_attention(graph, faulty);
      drive_dynamic(graph, faulty);
    }
    drive_runs(faulty);
    drive_topk(faulty);
    drive_cluster_search(faulty);
    drive_distances(faulty);
    drive_symmetric_rows(faulty);
    drive_sorted_rows(faulty);
    drive_neighbour_sampling(faulty);
    drive_product_keys(faulty);
    drive_products();
  }
  std::printf("%lld rounds in %.0f s, %lld of them with a planted fault, %lld with another thread's writes: clean\n",
              static_cast<long long>(rounds), elapsed(), static_cast<long long>(faults), static_cast<long long>(meddled));
  return 0;
}
