/* The plain C interface of anyattention's compiled kernels.
 *
 * Everything crosses as pointers, sizes and a number of threads; every array is
 * contiguous and owned by the caller; sizes and indices are int64_t. A function
 * returns one of the codes below, lets no exception out, and touches nothing
 * outside the arrays it was given, whatever their contents.
 *
 * ANYATTENTION_INTERFACE is raised whenever a declaration changes, and the
 * loader refuses a library that was built for another number.
 */
#ifndef ANYATTENTION_H
#define ANYATTENTION_H

#include <stdint.h>

#define ANYATTENTION_INTERFACE 8

#if defined(__GNUC__)
#define ANYATTENTION_EXPORT __attribute__((visibility("default")))
#else
#define ANYATTENTION_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum anyattention_status {
  ANYATTENTION_OK = 0,
  ANYATTENTION_INVALID_ARGUMENT = 1, /* a negative size or a null array */
  ANYATTENTION_OUT_OF_RANGE = 2,     /* an index outside its bounds */
  ANYATTENTION_OUT_OF_MEMORY = 3     /* the workspace could not be allocated */
};

/* ANYATTENTION_INTERFACE as it was when the library was compiled. */
ANYATTENTION_EXPORT int32_t anyattention_interface(void);

/* The package's version, for example "0.1.0". */
ANYATTENTION_EXPORT const char *anyattention_version(void);

/* The instruction set compiled for: "baseline", "v3" or "v4". */
ANYATTENTION_EXPORT const char *anyattention_level(void);

/* 1 where the kernels use OpenMP threads, 0 where they run on one. */
ANYATTENTION_EXPORT int32_t anyattention_threaded(void);

/* Asks for large pages behind memory that is not touched yet; only advice. */
ANYATTENTION_EXPORT int32_t anyattention_prefer_large_pages(void *pointer, int64_t bytes);

/* Sorts an edge list into compressed rows; with `rows` and `columns` exchanged
 * (and their sizes) it gives the transpose.
 *
 *   rows, columns  (num_edges)     row and column of each edge
 *   row_offsets    (num_rows + 1)  out: slots row_offsets[r] up to row_offsets[r + 1]
 *                                  belong to row r
 *   slot_columns   (num_edges)     out: the column of each slot
 *   slot_edges     (num_edges)     out: the edge, as the caller counts, of each slot
 *   bad_edge       (1)             out: the first edge out of range, else -1
 *
 * Slots are ordered by row, and within a row by edge, so that the result is unique
 * and the same for any num_threads. With ANYATTENTION_OUT_OF_RANGE the contents of
 * the other outputs are unspecified.
 *
 * Time O(num_edges + num_rows); workspace at most num_edges + num_threads integers.
 */
ANYATTENTION_EXPORT int32_t anyattention_compressed_rows(
    const int64_t *rows, const int64_t *columns, int64_t num_edges, int64_t num_rows,
    int64_t num_columns, int64_t num_threads, int64_t *row_offsets, int64_t *slot_columns,
    int64_t *slot_edges, int64_t *bad_edge);

/* Compressed rows of a symmetric graph, such as points and their neighbours.
 *
 *   pairs         (num_pairs, 2)   two rows that have each other as a column, either way round
 *   row_offsets   (num_rows + 1)   out: the slots of each row
 *   slot_rows     (2 num_pairs)    out: the row of each slot
 *   slot_columns  (2 num_pairs)    out: its column, ascending within a row
 *   slot_reverse  (2 num_pairs)    out: the slot with its row and column exchanged
 *
 * The result is unique, and the same for any num_threads. A pair that is there twice counts twice, and
 * one of a row with itself gives two slots.
 *
 * Time O(num_pairs log(longest row) + num_rows); workspace at most max(2 num_pairs, num_rows) +
 * num_threads integers.
 */
ANYATTENTION_EXPORT int32_t anyattention_symmetric_rows(
    const int64_t *pairs, int64_t num_pairs, int64_t num_rows, int64_t num_threads, int64_t *row_offsets,
    int64_t *slot_rows, int64_t *slot_columns, int64_t *slot_reverse);

/* A graph as compressed rows, one per query, and their transpose, one per key. */
typedef struct anyattention_graph {
  int64_t num_queries, num_keys, num_edges;
  const int64_t *query_offsets, *keys_by_query, *edges_by_query;
  const int64_t *key_offsets, *queries_by_key, *edges_by_key;
} anyattention_graph;

/* One direction of a graph: the rows that reduce, and for each slot its column and edge. */
typedef struct anyattention_rows {
  int64_t num_rows, num_columns, num_edges;
  const int64_t *offsets, *columns, *edges;
} anyattention_rows;

/* What the primitives work on: numbers of edges (batch, num_edges,
 * heads) in the caller's edge order, rows (batch, num_rows, heads, width) and columns
 * (batch, num_columns, column_heads, width), float, or double where is_double. */
typedef struct anyattention_edge_call {
  anyattention_rows rows;
  int64_t batch, heads, column_heads, width, num_threads;
  int32_t is_double;
} anyattention_edge_call;

/* result[e, h] = rows[i, h] . columns[j, h]: (batch, num_edges, heads). */
ANYATTENTION_EXPORT int32_t anyattention_edge_dot(const anyattention_edge_call *call,
                                                  const void *rows, const void *columns,
                                                  void *result);

/* result[i, h] = sum of weights[e, h] columns[j, h]: (batch, num_rows, heads, width).
 * An edge of weight 0 is not there, whatever its column holds. */
ANYATTENTION_EXPORT int32_t anyattention_edge_sum(const anyattention_edge_call *call,
                                                  const void *weights, const void *columns,
                                                  void *result);

/* The softmax of the scores of each row's edges: (batch, num_edges, heads). */
ANYATTENTION_EXPORT int32_t anyattention_edge_softmax(const anyattention_edge_call *call,
                                                      const void *scores, void *result);

/* result[i, h] = sum of numbers[e, h]: (batch, num_rows, heads). */
ANYATTENTION_EXPORT int32_t anyattention_edge_total(const anyattention_edge_call *call,
                                                    const void *numbers, void *result);

/* Features of edges (num_edges, width), and the weight (heads, call width, width) that
 * makes of them what is added to an edge's column. */
typedef struct anyattention_edge_features {
  const void *features, *weight;
  int64_t width;
} anyattention_edge_features;

/* The edge of the largest weights[e, h] (columns[j, h] + features' part), channel by channel:
 * int64 (batch, num_rows, heads, width). NaN is larger than any number, ties go to the first
 * edge of the row; a weight of -inf hides its edge, and -1 stands where all are hidden.
 * `features` is null where there are none. */
ANYATTENTION_EXPORT int32_t anyattention_edge_argmax(const anyattention_edge_call *call,
                                                     const void *weights, const void *columns,
                                                     const anyattention_edge_features *features,
                                                     int64_t *result);

/* A number for each batch, edge and head, in the caller's edge order; strides count
 * numbers, 0 where an axis is broadcast. `data` is null where there is none. */
typedef struct anyattention_edge_numbers {
  const void *data;
  int64_t batch_stride, edge_stride, head_stride;
} anyattention_edge_numbers;

enum anyattention_score {
  ANYATTENTION_DOT = 0,      /* query . key + term */
  ANYATTENTION_ADDITIVE = 1, /* LeakyReLU(query + key + term), head_dim 1 */
  ANYATTENTION_DYNAMIC = 2   /* vector . LeakyReLU(query + key) */
};

/* One call of graph attention. All numbers are float, or double where is_double.
 *
 *   query (batch, num_queries, heads, head_dim)
 *   key   (batch, num_keys, key_heads, head_dim)    key_heads divides heads
 *   value (batch, num_keys, key_heads, value_dim)
 *   vector (heads, head_dim)                        ANYATTENTION_DYNAMIC only
 *   term                                            added to the raw score
 *   bias                                            added to the scaled, capped score;
 *                                                   -inf hides the edge from the head
 *   query_stride, key_stride, value_stride          numbers from one node's row to the next
 *   softcap                                         0 for none
 *   normalize                                       softmax, else sigmoid
 *   dropout, seed                                   0 for none; Philox4x32-10
 */
typedef struct anyattention_graph_attention {
  anyattention_graph graph;
  int64_t batch, heads, key_heads, head_dim, value_dim, num_threads, seed;
  int32_t is_double, score, normalize;
  double scale, softcap, negative_slope, dropout;
  const void *query, *key, *value, *vector;
  int64_t query_stride, key_stride, value_stride;
  anyattention_edge_numbers term, bias;
} anyattention_graph_attention;

/* output (batch, num_queries, heads, value_dim), logsumexp (batch, num_queries, heads). */
ANYATTENTION_EXPORT int32_t anyattention_graph_attention_forward(
    const anyattention_graph_attention *call, void *output, void *logsumexp);

/* weights (batch, num_edges, heads), before dropout, in the caller's edge order. */
ANYATTENTION_EXPORT int32_t anyattention_graph_attention_weights(
    const anyattention_graph_attention *call, const void *logsumexp, void *weights);

/* From the forward's results and the gradients by them (grad_logsumexp may be null):
 * grad_query, grad_key, grad_value as their inputs, strides too (without grad_value, of
 * a value that is the key, grad_key is the gradient by both); grad_vector (heads, head_dim), null
 * but for ANYATTENTION_DYNAMIC; grad_raw (batch, num_edges, heads), by the raw score (for
 * ANYATTENTION_ADDITIVE: by what the LeakyReLU takes), which is the term's gradient, or
 * null; grad_score, of the same shape, by the score, which is the bias's gradient, or null. */
ANYATTENTION_EXPORT int32_t anyattention_graph_attention_backward(
    const anyattention_graph_attention *call, const void *output, const void *logsumexp,
    const void *grad_output, const void *grad_logsumexp, void *grad_query, void *grad_key,
    void *grad_value, void *grad_vector, void *grad_raw, void *grad_score);

/* A sum x[e, h] = query[i, h] + key[j, g] + sum over p of features[e, p] weight[p, h].
 *
 *   query (batch, num_queries, heads, width), or null for 0
 *   key   (batch, num_keys, key_heads, width), or null for 0    key_heads divides heads
 *   weight (num_features, heads, width)     features (num_edges, num_features)
 */
typedef struct anyattention_dynamic_arguments {
  const void *query, *key, *weight, *features;
  int64_t num_features;
} anyattention_dynamic_arguments;

/* The score Dynamic and its derivatives. With y the sum of `at`, vector (heads, width) and
 * slopes[e, h, d] = LeakyReLU'(x[e, h, d]), x the sum of `base`, both functions are about
 *
 *   product[e, h] = sum over d of vector[h, d] slopes[e, h, d] y[e, h, d]
 *
 * which is the score where `at` is `base`. All numbers are float, or double where is_double. */
typedef struct anyattention_dynamic {
  anyattention_graph graph;
  int64_t batch, heads, key_heads, width, num_threads;
  int32_t is_double;
  double negative_slope;
  const void *vector;
  anyattention_dynamic_arguments base, at;
} anyattention_dynamic;

/* result = product: (batch, num_edges, heads). */
ANYATTENTION_EXPORT int32_t anyattention_dynamic_dot(const anyattention_dynamic *call, void *result);

/* The derivatives of the sum of numbers[e, h] product[e, h], numbers (batch, num_edges,
 * heads), with constant slopes: by_vector, and by `at`'s arrays, of their shapes; null for
 * those not wanted. Those that have no batch axis are added to, the others are written. An
 * edge of number 0 is not there, whatever its rows hold. */
ANYATTENTION_EXPORT int32_t anyattention_dynamic_sums(
    const anyattention_dynamic *call, const void *numbers, void *by_vector, void *by_query,
    void *by_key, void *by_weight, void *by_features);

/* Numbers of each pair: that of (batch entry, head, query, key) lies at offset + b strides[0] +
 * h strides[1] + i strides[2] + j strides[3], which is below size. */
typedef struct anyattention_pairs {
  const void *numbers;
  int64_t size, offset, strides[4];
} anyattention_pairs;

/* One part of attention over a sequence: each query sees some runs of keys. All arrays of
 * numbers are contiguous, in the sequence's own order, float, or double where is_double.
 *
 *   query (batch, num_queries, heads, head_dim)
 *   key   (batch, num_keys, key_heads, head_dim)    key_heads divides heads
 *   value (batch, num_keys, key_heads, value_dim)
 *   query_order, key_order   which query or key stands at each place; null where each
 *                            stands at its own
 *   run_offsets (num_queries + 1)   the query at place i sees runs run_offsets[i] up to
 *                                   run_offsets[i + 1]
 *   run_begins, run_ends (num_runs) places of keys from a begin up to an end, rising, not empty
 *                                   and apart from one another
 *   softcap                  0 for none
 *   mask                     bytes, 0 hides a pair; numbers null for none
 *   bias                     added to the score, finite; numbers null for none
 *   dropout, seed            0 for none; Philox4x32-10, whose position for a pair is that of (batch
 *                            entry, head, query, key) where is_dense, else of (batch entry, pair
 *                            in order of query, then key, head); without the orders only
 */
typedef struct anyattention_run_attention {
  int64_t batch, heads, key_heads, num_queries, num_keys, head_dim, value_dim, num_threads;
  int64_t seed;
  int32_t is_double;
  double scale, softcap, dropout;
  int32_t is_dense;
  const void *query, *key, *value;
  const int64_t *query_order, *key_order, *run_offsets, *run_begins, *run_ends;
  int64_t num_runs;
  anyattention_pairs mask, bias;
} anyattention_run_attention;

/* How many pairs the kernels compute in tiles for each batch entry and head, allowed ones and
 * others; reads no numbers. */
ANYATTENTION_EXPORT int32_t anyattention_run_attention_tiles(const anyattention_run_attention *call,
                                                             int64_t *num_pairs);

/* output (batch, num_queries, heads, value_dim) and logsumexp (batch, num_queries, heads); with
 * `merges` joined to what they hold, the results of parts with other pairs. */
ANYATTENTION_EXPORT int32_t anyattention_run_attention_forward(
    const anyattention_run_attention *call, int32_t merges, void *output, void *logsumexp);

/* From the results of all parts: gradients as their inputs; with `adds` added to what they
 * hold. grad_logsumexp may be null, and grad_bias. A bias of which the gradient is wanted has
 * strides[0] 0 and, for each head in its order, size / heads numbers strides[1] apart, or
 * strides[1] 0 and one such array for all; the gradient is added to what grad_bias holds. */
ANYATTENTION_EXPORT int32_t anyattention_run_attention_backward(
    const anyattention_run_attention *call, int32_t adds, const void *output, const void *logsumexp,
    const void *grad_output, const void *grad_logsumexp, void *grad_query, void *grad_key,
    void *grad_value, void *grad_bias);

/* Which keys to choose for each query and head: the k of largest score, scale query . key +
 * bias. Strides count numbers along (batch, heads, num_queries, num_keys), 0 where an axis is
 * broadcast.
 *
 *   query (batch, num_queries, heads, head_dim)
 *   key   (batch, num_keys, key_heads, head_dim)    key_heads divides heads
 *   key_begins, key_ends (num_queries)   query i sees the keys from key_begins[i] up to
 *                                        key_ends[i]; both null where each sees all
 *   mask                                 0 hides the pair; null for none
 *   bias                                 -inf hides the pair; null for none
 */
typedef struct anyattention_topk {
  int64_t batch, heads, key_heads, num_queries, num_keys, head_dim, k, num_threads;
  double scale;
  const float *query, *key;
  const int64_t *key_begins, *key_ends;
  const uint8_t *mask;
  int64_t mask_strides[4];
  const float *bias;
  int64_t bias_strides[4];
} anyattention_topk;

/* indices (batch, num_queries, heads, k): the keys, best first; NaN is larger than any number,
 * of equal scores the first key is best, and -1 stands in the slots that are not used. */
ANYATTENTION_EXPORT int32_t anyattention_topk_indices(const anyattention_topk *call, int64_t *indices);

/* What attention between points adds to scores, of displacements x (rows, dim) of length d:
 *
 *   terms[o] = sum over k of radial_weight[o, k] exp(-(d / w - k)^2 / 2)
 *              and for the first `heads` outputs - decay[o] |x|^2 + log u(d / radius)
 *
 * with w = radial_range / max(num_radial - 1, 1), d not below eps, and the envelope u(x) =
 * (1 - x)^3 (1 + 3 x + 6 x^2 + 10 x^3 + 15 x^4 + 21 x^5), 0 from 1 on. num_radial 0: no sum; radius 0: no
 * envelope. Numbers are float or double, as is_double says. */
typedef struct anyattention_distance_call {
  int64_t rows, dim, heads, outputs, num_radial, num_threads;
  double radius, radial_range, eps;
  int32_t is_double;
} anyattention_distance_call;

/* terms (rows, outputs), of decay (heads) and radial_weight (outputs, num_radial). */
ANYATTENTION_EXPORT int32_t anyattention_distance_terms(const anyattention_distance_call *call,
                                                        const void *displacement, const void *decay,
                                                        const void *radial_weight, void *terms);

/* Gradients of displacement, decay and radial_weight, of terms' gradient by_terms; each is left out where null. */
ANYATTENTION_EXPORT int32_t anyattention_distance_gradients(const anyattention_distance_call *call,
                                                            const void *displacement, const void *decay,
                                                            const void *radial_weight, const void *by_terms,
                                                            void *by_displacement, void *by_decay,
                                                            void *by_weight);

#ifdef __cplusplus
}
#endif

#endif
