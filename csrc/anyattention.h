/* The plain C interface of anyattention's compiled kernels.
 *
 * Everything crosses as pointers, sizes and a number of threads; every array is
 * contiguous, unless it has strides, and owned by the caller; sizes and indices are int64_t. A function
 * returns one of the codes below, lets no exception out, and touches nothing
 * outside the arrays it was given, whatever their contents, and whatever other
 * threads write to arrays of indices meanwhile: then results may be anything.
 *
 * A kernel takes one structure with all that it reads, and then the arrays of its results. The
 * fields of a structure are those of a record in Python, in this order: sizes, the record's own
 * fields, num_threads, is_double. The loader compares the structures' sizes.
 */
#ifndef ANYATTENTION_H
#define ANYATTENTION_H

#include <stdint.h>

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
  ANYATTENTION_OUT_OF_RANGE = 2,     /* an index outside its bounds, or one twice that must be there once */
  ANYATTENTION_OUT_OF_MEMORY = 3     /* the workspace could not be allocated */
};

/* sizeof of a structure of this file by its name without prefix and "_call", "edge_dot" for
 * anyattention_edge_dot_call; -1 where there is none of that name. */
ANYATTENTION_EXPORT int64_t anyattention_size_of(const char *structure);

/* The package's version, for example "0.1.0". */
ANYATTENTION_EXPORT const char *anyattention_version(void);

/* The instruction set compiled for: "baseline", "v3", "v4", or "v4-bf16", which multiplies bfloat16 numbers. */
ANYATTENTION_EXPORT const char *anyattention_level(void);

/* 1 where the kernels use OpenMP threads, 0 where they run on one. */
ANYATTENTION_EXPORT int32_t anyattention_threaded(void);

/* How many of the threads a kernel starts for work that is cut into pieces and takes one thread about so many
 * nanoseconds: 1 below a grain, which the environment's ANYATTENTION_GRAIN changes before the first call. */
ANYATTENTION_EXPORT int32_t anyattention_team_size(int64_t threads, int64_t pieces, double nanoseconds);

/* Asks for large pages behind memory that is not touched yet; only advice. */
ANYATTENTION_EXPORT int32_t anyattention_prefer_large_pages(void *pointer, int64_t bytes);

/* The factors of dropout for the positions from 0 up to count: 0 with the probability `dropout`, else
 * 1 / (1 - dropout). Doubles, or floats; the same for any num_threads. */
ANYATTENTION_EXPORT int32_t anyattention_keep_factors(int64_t count, int64_t seed, double dropout, int64_t num_threads,
                                                      int32_t is_double, void *factors);

/* Whether the products below are worth calling: whether vectors are as wide as any processor's. */
ANYATTENTION_EXPORT int32_t anyattention_multiplies_fast(void);

/* results (rows, columns) = x (rows, depth) matrix (depth, columns), plus a bias (columns) unless that is null.
 *
 *   x        (num_x)         matrices that lie side by side, of x_widths columns; rows begin x_strides numbers apart
 *   matrix                   its numbers lie at row * by_row + column * by_column
 *   results  (num_results)   out: matrices side by side, of `widths` columns, each without gaps
 *
 * The same for any num_threads. Time O(rows depth columns); workspace depth * columns numbers.
 */
ANYATTENTION_EXPORT int32_t anyattention_linear_map(int64_t rows, int64_t num_x, const float *const *x,
                                                    const int64_t *x_widths, const int64_t *x_strides,
                                                    const float *matrix, int64_t by_row, int64_t by_column,
                                                    const float *bias, int64_t num_results, float *const *results,
                                                    const int64_t *widths, int64_t num_threads);

/* matrix (outputs, inputs) = the transpose of grads (rows, outputs), times x (rows, inputs), and bias (outputs), unless
 * that is null: the sum of the rows of grads, which are matrices side by side as above.
 *
 * The same for any num_threads; workspace at most 64 times the matrix.
 */
ANYATTENTION_EXPORT int32_t anyattention_linear_map_by_matrix(int64_t rows, int64_t num_grads,
                                                              const float *const *grads, const int64_t *widths,
                                                              const int64_t *strides, const float *x, int64_t inputs,
                                                              int64_t x_stride, int64_t num_threads, float *matrix,
                                                              float *bias);

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
 * the other outputs are unspecified; where bad_edge is -1 the edges changed meanwhile.
 *
 * Time O(num_edges + num_rows); workspace at most 2 num_edges + num_rows + num_threads integers.
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
 * Time O(num_pairs + num_rows), and for each byte that numbers a row once more over the slots of long rows; workspace
 * at most 2 max(2 num_pairs, num_rows) + num_threads (1 + longest row) integers.
 */
ANYATTENTION_EXPORT int32_t anyattention_symmetric_rows(
    const int64_t *pairs, int64_t num_pairs, int64_t num_rows, int64_t num_threads, int64_t *row_offsets,
    int64_t *slot_rows, int64_t *slot_columns, int64_t *slot_reverse);

/* Sorts the edges of each row, where they lie, by columns of numbers: by the first, among equal ones by the next, and
 * last by the edge's own number.
 *
 *   row_offsets  (num_rows + 1)   the slots of each row
 *   columns      (num_columns)    pointers to the numbers; that of edge e stands at e times the column's stride
 *   strides      (num_columns)
 *   slot_edges   (num_edges)      in and out: the edge of each slot, each from 0 and below num_edges
 *   sorted       (num_columns)    out, or NULL: where the numbers of each slot's edge go, by their own strides
 *
 * The result is unique, and the same for any num_threads.
 *
 * Time O(num_edges log(longest row) + num_rows), less where rows are nearly sorted; workspace num_edges +
 * 2 num_threads (longest row) integers.
 */
ANYATTENTION_EXPORT int32_t anyattention_sorted_rows(
    const int64_t *row_offsets, int64_t num_rows, int64_t num_edges, const int64_t *const *columns,
    const int64_t *strides, int64_t num_columns, int64_t num_threads, int64_t *slot_edges, int64_t *const *sorted,
    const int64_t *sorted_strides);

/* Neighbour sampling: of each listed row of compressed rows at most `fanout` slots, or all where that is -1, drawn
 * without replacement: each set of slots equally likely, or with weights one slot after the other, each with a
 * probability in proportion to its weight. Slots of weight 0 are never drawn.
 *
 *   row_offsets   (num_rows + 1)   the slots of each row
 *   weights       (num_edges)      null for none, else floats, or doubles where is_double; none negative
 *   weight_edges  (num_edges)      the place of each slot's weight; null where that is the slot itself
 *   nodes         (num_nodes)      the rows
 *   offsets       (num_nodes + 1)  in: the first; out: the others. What is drawn of nodes[i] goes to the places
 *                                  offsets[i] up to offsets[i + 1]
 *
 * The same for any num_threads. Time O(num_nodes), with weights O(the rows' slots).
 */
ANYATTENTION_EXPORT int32_t anyattention_sampled_offsets(const int64_t *row_offsets, int64_t num_rows,
                                                         int64_t num_edges, const void *weights,
                                                         const int64_t *weight_edges, int32_t is_double,
                                                         const int64_t *nodes, int64_t num_nodes, int64_t fanout,
                                                         int64_t num_threads, int64_t *offsets);

/* What is drawn, with `offsets` from above. Draw t of row r is a number of Philox4x32-10 under the key `seed`, whose
 * counter has the words t / 2, stream, r and r / 2^32: it depends on nothing else.
 *
 *   slot_columns, slot_edges  (num_edges)      of the compressed rows
 *   columns    (num_places)   out: of each slot that was drawn, in the order of the row
 *   positions  (num_places)   out: first + i for what was drawn of nodes[i]
 *   edges      (num_places)   out: its edge
 *
 * The same for any num_threads. Time O(num_nodes + what is drawn), with weights O(the rows' slots); workspace for each
 * thread one bit for each slot of the longest row, with weights 16 bytes for each that is drawn of a row.
 */
ANYATTENTION_EXPORT int32_t anyattention_sampled_rows(
    const int64_t *row_offsets, const int64_t *slot_columns, const int64_t *slot_edges, int64_t num_rows,
    int64_t num_columns, int64_t num_edges, const void *weights, const int64_t *weight_edges, int32_t is_double,
    const int64_t *nodes, int64_t num_nodes, const int64_t *offsets, int64_t num_places, int64_t first, int64_t seed,
    int64_t stream, int64_t num_threads, int64_t *columns, int64_t *positions, int64_t *edges);

/* Numbers nodes in the order in which they are found.
 *
 *   ids     (num_ids)      in: nodes, from 0 and below num_nodes; out: the number of each
 *   places  (num_nodes)    a workspace of any contents, int32_t, or int64_t where is_wide
 *   found   (capacity)     in and out: the node of each number
 *   count   (1)            in and out: how many numbers there are
 *
 * Numbers that were given before count where `places` is as it was left then. Time O(num_ids).
 */
ANYATTENTION_EXPORT int32_t anyattention_numbered_nodes(int64_t *ids, int64_t num_ids, int64_t num_nodes, void *places,
                                                        int32_t is_wide, int64_t *found, int64_t capacity,
                                                        int64_t *count);

/* A graph as compressed rows, one per query, their transpose, one per key, and the ends of each edge. */
typedef struct anyattention_graph_arrays {
  int64_t num_queries, num_edges, num_keys;
  const int64_t *query_offsets, *keys_by_query, *edges_by_query;
  const int64_t *key_offsets, *queries_by_key, *edges_by_key;
  const int64_t *query_index, *key_index;
} anyattention_graph_arrays;

/* A number for each batch, edge and head, in the caller's edge order; strides count
 * numbers, 0 where an axis is broadcast. `data` is null where there is none. */
typedef struct anyattention_edge_numbers {
  const void *data;
  int64_t batch_stride, edge_stride, head_stride;
} anyattention_edge_numbers;

/* Numbers of each pair: that of (batch entry, head, query, key) lies at offset + b strides[0] +
 * h strides[1] + i strides[2] + j strides[3], which is below size. */
typedef struct anyattention_pairs {
  const void *numbers;
  int64_t size, offset, strides[4];
} anyattention_pairs;

/* What numbers are at rest: float, or double where a call is_double; or half precision beside float. */
enum anyattention_type { ANYATTENTION_FULL = 0, ANYATTENTION_BFLOAT16 = 1, ANYATTENTION_FLOAT16 = 2 };

/* Rows of contiguous numbers, read where they lie: that of (batch entry, position, head) begins at
 * b batch_stride + i row_stride + h head_stride; strides count numbers, and none is negative.
 * `type` is an anyattention_type. */
typedef struct anyattention_head_rows {
  const void *numbers;
  int64_t batch_stride, row_stride, head_stride, type;
} anyattention_head_rows;

/* The primitives: numbers of edges (batch, num_edges, heads) in the caller's edge order, queries (batch,
 * num_queries, heads, width) and keys (batch, num_keys, key_heads, width), key_heads dividing heads;
 * float, or double where is_double.
 *
 * They reduce over the edges of each query, and read the graph's rows of queries only: the other
 * arrays may be null. For those of each key, give the transposed graph. */

/* result[e, h] = query[i, h] . key[j, g]: (batch, num_edges, heads). */
typedef struct anyattention_edge_dot_call {
  int64_t batch, heads, width, key_heads;
  anyattention_graph_arrays graph;
  const void *query, *key;
  int64_t num_threads;
  int32_t is_double;
} anyattention_edge_dot_call;
ANYATTENTION_EXPORT int32_t anyattention_edge_dot(const anyattention_edge_dot_call *call, void *result);

/* result[i, h] = sum of weights[e, h] key[j, g]: (batch, num_queries, heads, width).
 * An edge of weight 0 is not there, whatever its key holds. */
typedef struct anyattention_edge_sum_call {
  int64_t batch, heads, key_heads, width;
  anyattention_graph_arrays graph;
  const void *weights, *key;
  int64_t num_threads;
  int32_t is_double;
} anyattention_edge_sum_call;
ANYATTENTION_EXPORT int32_t anyattention_edge_sum(const anyattention_edge_sum_call *call, void *result);

/* The softmax of the scores of each query's edges: (batch, num_edges, heads). */
typedef struct anyattention_edge_softmax_call {
  int64_t batch, heads;
  anyattention_graph_arrays graph;
  const void *scores;
  int64_t num_threads;
  int32_t is_double;
} anyattention_edge_softmax_call;
ANYATTENTION_EXPORT int32_t anyattention_edge_softmax(const anyattention_edge_softmax_call *call, void *result);

/* result[i, h] = sum of numbers[e, h]: (batch, num_queries, heads). */
typedef struct anyattention_edge_total_call {
  int64_t batch, heads;
  anyattention_graph_arrays graph;
  const void *numbers;
  int64_t num_threads;
  int32_t is_double;
} anyattention_edge_total_call;
ANYATTENTION_EXPORT int32_t anyattention_edge_total(const anyattention_edge_total_call *call, void *result);

/* The edge of the largest weights[e, h] (value[j, g] + feature_weight[h] features[e]), channel by channel:
 * int64 (batch, num_queries, heads, width). NaN is larger than any number, ties go to the first
 * edge of the query; a weight of -inf hides its edge, and -1 stands where all are hidden.
 *
 *   features (num_edges, num_features), feature_weight (heads, width, num_features); both null for none
 */
typedef struct anyattention_edge_argmax_call {
  int64_t batch, heads, key_heads, width, num_features;
  anyattention_graph_arrays graph;
  const void *weights, *value, *features, *feature_weight;
  int64_t num_threads;
  int32_t is_double;
} anyattention_edge_argmax_call;
ANYATTENTION_EXPORT int32_t anyattention_edge_argmax(const anyattention_edge_argmax_call *call, int64_t *result);

/* The number of a score of graph attention by its name, -1 where there is none of that name:
 *
 *   "Dot"        query . key + term
 *   "Additive"   LeakyReLU(query + key + term), head_dim 1
 *   "Dynamic"    vector . LeakyReLU(query + key)
 */
ANYATTENTION_EXPORT int32_t anyattention_score(const char *name);

/* Graph attention. All numbers are float, or double where is_double.
 *
 *   query (batch, num_queries, heads, head_dim)
 *   key   (batch, num_keys, key_heads, head_dim)    key_heads divides heads
 *   value (batch, num_keys, key_heads, value_dim)
 *   query_stride, key_stride, value_stride          numbers from one node's row to the next
 *   vector (heads, head_dim)                        Dynamic only, else null
 *   term                                            added to the raw score
 *   bias                                            added to the scaled, capped score;
 *                                                   -inf hides the edge from the head
 *   score                                           its number, of anyattention_score
 *   normalize                                       softmax, else sigmoid
 *   softcap                                         0 for none
 *   dropout, seed                                   0 for none; Philox4x32-10
 *
 * output (batch, num_queries, heads, value_dim); largest and log_sum (batch, num_queries, heads): a
 * row's largest score, and the logarithm of its sum of exponentials relative to that; -inf and 0
 * for a row without edges. logsumexp is their sum, in which beside a large score no digits of
 * log_sum are left. */
typedef struct anyattention_graph_attention_call {
  int64_t batch, heads, head_dim, key_heads, value_dim;
  double scale, softcap;
  anyattention_graph_arrays graph;
  const void *query;
  int64_t query_stride;
  const void *key;
  int64_t key_stride;
  const void *value;
  int64_t value_stride;
  const void *vector;
  anyattention_edge_numbers term, bias;
  int64_t seed, score;
  int32_t normalize;
  double negative_slope, dropout;
  int64_t num_threads;
  int32_t is_double;
} anyattention_graph_attention_call;
ANYATTENTION_EXPORT int32_t anyattention_graph_attention(const anyattention_graph_attention_call *call, void *output,
                                                         void *largest, void *log_sum);

/* weights (batch, num_edges, heads), before dropout, in the caller's edge order. */
typedef struct anyattention_graph_attention_weights_call {
  anyattention_graph_attention_call call;
  const void *largest, *log_sum;
  int64_t num_threads;
  int32_t is_double;
} anyattention_graph_attention_weights_call;
ANYATTENTION_EXPORT int32_t
anyattention_graph_attention_weights(const anyattention_graph_attention_weights_call *call, void *weights);

/* From the forward's results and the gradients by them (grad_log_sum may be null):
 * grad_query, grad_key, grad_value as their inputs, strides too (without grad_value, of
 * a value that is the key, grad_key is the gradient by both); grad_vector as the vector, null where
 * there is none; grad_term (batch, num_edges, heads), by the raw score (for Additive: by what the
 * LeakyReLU takes), or null; grad_bias, of the same shape, by the score, or null. */
typedef struct anyattention_graph_attention_backward_call {
  anyattention_graph_attention_call call;
  const void *output, *largest, *log_sum, *grad_output, *grad_log_sum;
  int64_t num_threads;
  int32_t is_double;
} anyattention_graph_attention_backward_call;
ANYATTENTION_EXPORT int32_t anyattention_graph_attention_backward(
    const anyattention_graph_attention_backward_call *call, void *grad_query, void *grad_key, void *grad_value,
    void *grad_vector, void *grad_term, void *grad_bias);

/* The score Dynamic and its derivatives. Four arguments make a sum
 *
 *   y[e, h] = query[i, h] + key[j, g] + sum over p of features[e, p] weight[p, h]
 *
 *   query (batch, num_queries, heads, width), or null for 0
 *   key   (batch, num_keys, key_heads, width), or null for 0    key_heads divides heads
 *   weight (num_features, heads, width)     features (num_edges, num_features)
 *
 * and the base_ four, all there, a sum x, where the slopes are taken. With vector (heads, width),
 *
 *   result[e, h] = sum over d of vector[h, d] LeakyReLU'(x[e, h, d]) y[e, h, d]: (batch, num_edges, heads)
 *
 * which is the score where y is x. All numbers are float, or double where is_double. */
typedef struct anyattention_dynamic_dot_call {
  int64_t heads, width, batch, key_heads, num_features, num_base_features;
  anyattention_graph_arrays graph;
  double negative_slope;
  const void *vector, *query, *key, *weight, *features;
  const void *base_query, *base_key, *base_weight, *base_features;
  int64_t num_threads;
  int32_t is_double;
} anyattention_dynamic_dot_call;
ANYATTENTION_EXPORT int32_t anyattention_dynamic_dot(const anyattention_dynamic_dot_call *call, void *result);

/* The derivatives of the sum of numbers[e, h] result[e, h], numbers (batch, num_edges,
 * heads), with constant slopes: by the vector, and by the four arguments, of their shapes; null for
 * those not wanted. Those that have no batch axis are added to, the others are written. An
 * edge of number 0 is not there, whatever its rows hold. */
typedef struct anyattention_dynamic_sums_call {
  anyattention_dynamic_dot_call call;
  const void *numbers;
  int64_t num_threads;
  int32_t is_double;
} anyattention_dynamic_sums_call;
ANYATTENTION_EXPORT int32_t anyattention_dynamic_sums(const anyattention_dynamic_sums_call *call, void *by_vector,
                                                      void *by_query, void *by_key, void *by_weight,
                                                      void *by_features);

/* Some runs of keys for each query.
 *
 *   query_order, key_order   which query or key stands at each place; null where each
 *                            stands at its own
 *   offsets (num_queries + 1)   the query at place i sees runs offsets[i] up to offsets[i + 1]
 *   begins, ends (num_runs)  places of keys from a begin up to an end, rising, not empty
 *                            and apart from one another
 */
typedef struct anyattention_run_part {
  int64_t num_queries, num_keys, num_runs;
  const int64_t *query_order, *key_order, *offsets, *begins, *ends;
} anyattention_run_part;

/* One part of attention over a sequence. All numbers are in the sequence's own order, float, or
 * double where is_double; query, key and value may be half precision at rest, and sums are float. Level "v4-bf16" multiplies
 * rows that are all bfloat16 as they are, and rounds weights and gradients by scores to bfloat16 for their products.
 *
 *   query (batch, num_queries, heads, head_dim)
 *   key   (batch, num_keys, key_heads, head_dim)    key_heads divides heads
 *   value (batch, num_keys, key_heads, value_dim)
 *   mask                     bytes, 0 hides a pair; numbers null for none
 *   bias                     added to the score, -inf hides a pair; numbers null for none
 *   parts                    the one of them that is computed
 *   softcap                  0 for none
 *   dropout, seed            0 for none; Philox4x32-10, whose position for a pair is that of (batch
 *                            entry, head, query, key) where is_dense, else of (batch entry, pair
 *                            in order of query, then key, head); without the orders only
 */
typedef struct anyattention_run_attention_call {
  int64_t batch, num_queries, heads, head_dim, num_keys, key_heads, value_dim;
  double scale, softcap;
  anyattention_head_rows query, key, value;
  anyattention_pairs mask, bias;
  int64_t seed;
  anyattention_run_part parts;
  double dropout;
  int32_t is_dense;
  int64_t num_threads;
  int32_t is_double;
} anyattention_run_attention_call;

/* How many pairs the kernels compute in tiles for each batch entry and head, allowed ones and
 * others; reads no numbers. */
ANYATTENTION_EXPORT int32_t anyattention_run_attention_tiles(const anyattention_run_attention_call *call,
                                                             int64_t *num_pairs);

/* output, largest and log_sum as of graph attention; with `merges` joined to what they hold, the
 * results of parts with other pairs. */
ANYATTENTION_EXPORT int32_t anyattention_run_attention_forward(const anyattention_run_attention_call *call,
                                                               int32_t merges, void *output, void *largest,
                                                               void *log_sum);

/* From the results of all parts: gradients of their inputs' sizes, contiguous, float or double;
 * with `adds` added to what they hold. grad_log_sum may be null, and grad_bias, which tells where the gradient of the bias
 * goes: contiguous, each of the axes (batch, heads, num_queries, num_keys) whole, or 1 with a stride of 0; or by distance,
 * that of query i and key j at i - j + num_keys - 1 of num_queries + num_keys - 1 numbers for each head, or for all. */
typedef struct anyattention_run_attention_backward_call {
  anyattention_run_attention_call call;
  const void *output, *largest, *log_sum;
  anyattention_head_rows grad_output;
  const void *grad_log_sum;
  int64_t num_threads;
  int32_t is_double;
} anyattention_run_attention_backward_call;
ANYATTENTION_EXPORT int32_t anyattention_run_attention_backward(const anyattention_run_attention_backward_call *call,
                                                                int32_t adds, void *grad_query, void *grad_key,
                                                                void *grad_value,
                                                                const anyattention_pairs *grad_bias);

/* The gradient of that backward: of the sum of the products of its four gradients with grad_grad_query, grad_grad_key,
 * grad_grad_value and grad_grad_bias, whose numbers may be null. The results of the forward are no inputs of their own: what
 * follows from a change of query, key, value or bias through them counts as that of these. */
typedef struct anyattention_run_attention_double_backward_call {
  anyattention_run_attention_backward_call backward;
  anyattention_head_rows grad_grad_query, grad_grad_key, grad_grad_value;
  anyattention_pairs grad_grad_bias;
  int64_t num_threads;
  int32_t is_double;
} anyattention_run_attention_double_backward_call;

/* Two sums of each row (2, batch, num_queries, heads), of which the first is the gradient by grad_log_sum; with `adds` added
 * to what they hold, those of other parts. */
ANYATTENTION_EXPORT int32_t anyattention_run_attention_double_backward_sums(
    const anyattention_run_attention_double_backward_call *call, int32_t adds, void *sums);

/* Gradients by query, key, value and grad_output, of their sizes, contiguous, and by the bias, as those of the backward, or
 * null for those not wanted; with `adds` added to what they hold. The sums are those of all parts, or are computed first, which is faster, where there is only one. */
ANYATTENTION_EXPORT int32_t anyattention_run_attention_double_backward(
    const anyattention_run_attention_double_backward_call *call, int32_t adds, int32_t has_sums, void *sums,
    void *grad_query, void *grad_key, void *grad_value, void *grad_grad_output, const anyattention_pairs *grad_bias);

/* The weights before dropout, from the results of all parts: (batch, weight_heads, num_queries, num_keys), where
 * weight_heads is heads, or 1 for the mean over the heads. Hidden pairs and those of other parts have 0; with `adds` a
 * part's weights are added to what is there. The value and dropout of the call are not read. */
typedef struct anyattention_run_attention_weights_call {
  anyattention_run_attention_call call;
  const void *largest, *log_sum;
  int64_t weight_heads;
  int64_t num_threads;
  int32_t is_double;
} anyattention_run_attention_weights_call;
ANYATTENTION_EXPORT int32_t anyattention_run_attention_weights(const anyattention_run_attention_weights_call *call,
                                                               int32_t adds, void *weights);

/* From grad_weights, of the shape of the weights: gradients by query, key and bias, as of the attention itself, with log_sum
 * held, and by log_sum; with `adds` added to what they hold. grad_bias may be null. */
typedef struct anyattention_run_attention_weights_backward_call {
  int64_t weight_heads;
  anyattention_run_attention_call call;
  const void *largest, *log_sum, *grad_weights;
  int64_t num_threads;
  int32_t is_double;
} anyattention_run_attention_weights_backward_call;
ANYATTENTION_EXPORT int32_t
anyattention_run_attention_weights_backward(const anyattention_run_attention_weights_backward_call *call, int32_t adds,
                                            void *grad_query, void *grad_key, void *grad_log_sum,
                                            const anyattention_pairs *grad_bias);

/* Which keys to choose for each query and head: the k of largest score, scale query . key +
 * bias.
 *
 *   query (batch, num_queries, heads, head_dim), float
 *   key   (batch, num_keys, key_heads, head_dim), float    key_heads divides heads
 *   key_begins, key_ends (num_queries)   query i sees the keys from key_begins[i] up to
 *                                        key_ends[i]; both null where each sees all
 *   mask                                 bytes, 0 hides the pair; numbers null for none
 *   bias                                 float, -inf hides the pair; numbers null for none
 *
 * indices (batch, num_queries, heads, k): the keys, best first; NaN is larger than any number,
 * of equal scores the first key is best, and -1 stands in the slots that are not used. */
typedef struct anyattention_topk_indices_call {
  int64_t batch, num_queries, heads, head_dim, num_keys, key_heads;
  const float *query, *key;
  const int64_t *key_begins, *key_ends;
  anyattention_pairs mask, bias;
  double scale;
  int64_t k, num_threads;
  int32_t is_double;
} anyattention_topk_indices_call;
ANYATTENTION_EXPORT int32_t anyattention_topk_indices(const anyattention_topk_indices_call *call, int64_t *indices);

/* Which keys to choose for each query among the keys of some clusters: the k of largest product query . key.
 *
 *   query (num_queries, dim), key (num_keys, dim)   float
 *   cluster_offsets (num_clusters + 1)              rising from 0 to num_keys, which is below 2^32: cluster c has the keys
 *                                                   cluster_offsets[c] up to cluster_offsets[c + 1]
 *   probe_offsets (num_clusters + 1)                rising from 0 to num_probes
 *   probing (num_probes)                            the queries that look into cluster c stand at probe_offsets[c] up to
 *                                                   probe_offsets[c + 1], none of them twice
 *
 * indices (num_queries, k): the keys, best first; NaN is larger than any number, and infinity of either sign counts as NaN;
 * of equal products the first key is best, and -1 stands in the slots that are not used. */
typedef struct anyattention_cluster_search_call {
  int64_t num_queries, dim, num_keys, num_clusters, num_probes;
  const float *query, *key;
  const int64_t *cluster_offsets, *probe_offsets, *probing;
  int64_t k, num_threads;
  int32_t is_double;
} anyattention_cluster_search_call;
ANYATTENTION_EXPORT int32_t anyattention_cluster_search(const anyattention_cluster_search_call *call, int64_t *indices);

/* Product-key memory. A slot's key is a pair of half keys, its number i * num_half_keys + j; num_half_keys is at most
 * ANYATTENTION_MOST_HALF_KEYS, so that slots have 32 bits.
 *
 *   query      (tokens, heads, halves = 2, half_dim)           float, or double where is_double
 *   half_keys  (halves = 2, heads, num_half_keys, half_dim)
 *
 * indices (tokens, heads, k): the slots of the largest sums of both halves' products, best first; NaN is larger than any
 * number, of equal sums the lowest slot is best. scores (tokens, heads, k): the sums. k is at most num_half_keys^2. */
#define ANYATTENTION_MOST_HALF_KEYS 65536
typedef struct anyattention_product_key_indices_call {
  int64_t tokens, heads, halves, half_dim, num_half_keys;
  const void *query, *half_keys;
  int64_t k, num_threads;
  int32_t is_double;
} anyattention_product_key_indices_call;
ANYATTENTION_EXPORT int32_t anyattention_product_key_indices(const anyattention_product_key_indices_call *call,
                                                             int64_t *indices, void *scores);

/* Attention to chosen slots, summed over heads:
 *
 *   weights = softmax over k of the scores                           (tokens, heads, k), out
 *   output  = sum over heads and k of weights keep values            (tokens, value_dim), out
 *
 *   values   (num_slots = num_half_keys^2, value_dim)   rows row_stride apart, of half precision at rest too
 *   indices  (tokens, heads, k)                         slots
 *   scores   (tokens, heads, k)                         of query and half keys, which the gradients alone read
 *   keep     (tokens, heads, k)                         dropout's factors, null for none */
typedef struct anyattention_slot_attention_call {
  int64_t tokens, heads, halves, half_dim, num_half_keys, num_slots, value_dim, k;
  const void *query, *half_keys;
  anyattention_head_rows values;
  const int64_t *indices;
  const void *scores, *keep;
  int64_t num_threads;
  int32_t is_double;
} anyattention_slot_attention_call;
ANYATTENTION_EXPORT int32_t anyattention_slot_attention(const anyattention_slot_attention_call *call, void *output,
                                                        void *weights);

/* The slots that entries of indices name, each once and in order, and their entries: those of slots[u] are entries[offsets[u]]
 * up to entries[offsets[u + 1]], in order. */
typedef struct anyattention_used_slots {
  int64_t num_used, num_entries;
  const int64_t *slots, *offsets, *entries;
} anyattention_used_slots;

/* Finds them: slots (num_entries), offsets (num_entries + 1), entries (num_entries) and num_used (1) are out; of the first two
 * num_used numbers, and one more, are written. Time O(num_entries) for each 11 bits of num_slots. */
ANYATTENTION_EXPORT int32_t anyattention_sorted_slots(const int64_t *indices, int64_t num_entries, int64_t num_slots,
                                                      int64_t *slots, int64_t *offsets, int64_t *entries,
                                                      int64_t *num_used);

/* Gradients by query, half_keys and values, each null where it is not wanted, from those of output and weights, either of which
 * may be null. That of the values has float or double rows: of the used slots, in order, or with `at_slots` at the places of
 * the slots, where other rows stay as they are. */
typedef struct anyattention_slot_attention_backward_call {
  anyattention_slot_attention_call call;
  const void *weights, *grad_output, *grad_weights;
  int64_t num_threads;
  int32_t is_double;
} anyattention_slot_attention_backward_call;
ANYATTENTION_EXPORT int32_t anyattention_slot_attention_backward(const anyattention_slot_attention_backward_call *call,
                                                                 const anyattention_used_slots *used, int32_t at_slots,
                                                                 void *grad_query, void *grad_half_keys,
                                                                 void *grad_values);

/* The rows of the values' gradient of some used slots: result (num_used, value_dim), each the sum of weights[e]
 * grad_output[e / of_token] over its entries. used->num_entries counts the entries of these slots, num_entries all weights. */
ANYATTENTION_EXPORT int32_t anyattention_slot_rows(const void *weights, const void *grad_output, int64_t num_entries,
                                                   int64_t of_token, int64_t value_dim,
                                                   const anyattention_used_slots *used, int64_t num_threads,
                                                   int32_t is_double, void *result);

/* What attention between points adds to scores, of displacements x (rows, dim) of length d:
 *
 *   terms[o] = sum over k of radial_weight[o, k] exp(-(d / w - k)^2 / 2)
 *              and for the first `heads` outputs - decay[o] |x|^2 + log u(d / radius)
 *
 * with decay (heads), radial_weight (outputs, num_radial), w = radial_range / max(num_radial - 1, 1), d not
 * below eps, and the envelope u(x) = (1 - x)^3 (1 + 3 x + 6 x^2 + 10 x^3 + 15 x^4 + 21 x^5), 0 from 1 on.
 * num_radial 0: no sum, radial_weight null, `heads` outputs; radius 0: no envelope. Numbers are float
 * or double, as is_double says. terms (rows, outputs). */
typedef struct anyattention_distance_terms_call {
  int64_t rows, dim, heads, outputs, num_radial;
  const void *displacement, *decay, *radial_weight;
  double radius, radial_range, eps;
  int64_t num_threads;
  int32_t is_double;
} anyattention_distance_terms_call;
ANYATTENTION_EXPORT int32_t anyattention_distance_terms(const anyattention_distance_terms_call *call, void *terms);

/* Gradients of displacement, decay and radial_weight, of terms' gradient; each is left out where null. */
typedef struct anyattention_distance_terms_backward_call {
  anyattention_distance_terms_call call;
  const void *grad_terms;
  int64_t num_threads;
  int32_t is_double;
} anyattention_distance_terms_backward_call;
ANYATTENTION_EXPORT int32_t
anyattention_distance_terms_backward(const anyattention_distance_terms_backward_call *call, void *grad_displacement,
                                     void *grad_decay, void *grad_radial_weight);

#ifdef __cplusplus
}
#endif

#endif
