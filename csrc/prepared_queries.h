// What a backward of graph attention reads of each query, made before its passes over the edges.
#ifndef ANYATTENTION_PREPARED_QUERIES_H
#define ANYATTENTION_PREPARED_QUERIES_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "anyattention.h"
#include "graph_call.h"
#include "simd.h"
#include "team.h"

namespace anyattention {

// Threads for a pass over the rows of queries: each head's dot product or row, and an exponential.
inline int team_of_rows(const anyattention_graph_attention_call &c) {
  const int64_t rows = c.batch * c.graph.num_queries;
  return team_size(c.num_threads, rows, static_cast<double>(rows * c.heads) * (0.2 * static_cast<double>(c.value_dim) + 1));
}

// What the rounding of top + log, to `shift`, leaves.
template <class T>
T rest_of(T top, T log, T shift) {
  return (top - shift) + log;
}

// For each query side by side, so that an edge reads one place: shift (H), the largest score, or 0 where that is -inf,
// plus the logarithm of the sum, and delta (H), sum(grad_output * output) - grad_log_sum. Whether the rounding of a
// shift leaves a rest that counts, which it does where scores are beyond some hundreds.
template <class T, int CW>
bool prepare_backward(const anyattention_graph_attention_call &c, const T *output, const T *largest, const T *log_sum,
                      const T *grad_output, const T *grad_log_sum, T *of_query) {
  const int64_t C = c.value_dim, rows = c.batch * c.graph.num_queries, H = c.heads;
  const int team = team_of_rows(c);
  bool counts = false;
#pragma omp parallel for num_threads(team) reduction(|| : counts) if (team > 1)
  for (int64_t i = 0; i < rows; ++i) {
    T *shift = of_query + i * 2 * H, *delta = shift + H;
    if (!c.normalize) {
      std::fill_n(shift, 2 * H, T{0});
      continue;
    }
    head_dots<CW>(grad_output + i * H * C, output + i * H * C, H, 1, C, delta);
    const T *tops = largest + i * H, *logs = log_sum + i * H;
    each_head(H, [=](int64_t h) { shift[h] = (tops[h] == kMinusInfinity<T> ? T{0} : tops[h]) + logs[h]; });
    int any = 0;
    for (int64_t h = 0; h < H; ++h) {
      const bool has_score = tops[h] != kMinusInfinity<T>;
      any |= has_score & (std::abs(rest_of(tops[h], logs[h], shift[h])) > 32 * std::numeric_limits<T>::epsilon());
    }
    counts |= any != 0;
    for (int64_t h = 0; grad_log_sum && h < H; ++h) {
      if (tops[h] != kMinusInfinity<T>) delta[h] -= grad_log_sum[i * H + h];
    }
  }
  return counts;
}

// exp(score - shift) is too large by exp(rest), and all that comes of it is linear in grad_output and delta: these times
// exp(-rest) say the same. So the edges read nothing more, which would take a tenth of their time.
template <class T>
void scale_by_rest(const anyattention_graph_attention_call &c, const T *largest, const T *log_sum, const T *grad_output,
                   T *of_query, T *scaled) {
  const int64_t C = c.value_dim, rows = c.batch * c.graph.num_queries, H = c.heads;
  const int team = team_of_rows(c);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t n = 0; n < rows * H; ++n) {
    T *shift = of_query + n / H * 2 * H + n % H, *delta = shift + H;
    const T factor = largest[n] == kMinusInfinity<T> ? T{1} : std::exp(-rest_of(largest[n], log_sum[n], *shift));
    *delta *= factor;
    for (int64_t d = 0; d < C; ++d) scaled[n * C + d] = grad_output[n * C + d] * factor;
  }
}

}  // namespace anyattention

#endif
