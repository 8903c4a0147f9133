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

#define ANYATTENTION_INTERFACE 1

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

#ifdef __cplusplus
}
#endif

#endif
