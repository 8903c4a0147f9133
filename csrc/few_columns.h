// Products of rows with so few columns that most lanes of a vector of columns would be idle: channels are lanes here.
#ifndef ANYATTENTION_FEW_COLUMNS_H
#define ANYATTENTION_FEW_COLUMNS_H

#include <algorithm>
#include <cstdint>

#include "products.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {

constexpr int64_t kFewColumns = 8;

// scores[row * scores_row + n] of `count` rows, `stride` numbers apart, and some columns, whose D numbers each are neighbours.
// Some rows at a time; of the last ones, up to a whole vector, scores are written too.
inline void multiply_few(const float *rows, int64_t stride, int64_t count, const float *const *columns, int64_t num_columns,
                         int64_t D, float *scores, int64_t scores_row) {
  constexpr int lanes = kLane<float>;
  const int64_t whole = D / lanes * lanes;
  for (int64_t j = 0; j < count; j += lanes) {
    const float *some[lanes];
    for (int r = 0; r < lanes; ++r) {
      some[r] = rows + std::min(j + r, count - 1) * stride;
      prefetch_row(address_of(rows, j + r + kPrefetch, stride), D * static_cast<int64_t>(sizeof(float)));
    }
    for (int64_t n = 0; n < num_columns; ++n) {
      const float *column = columns[n];
      Lanes<float> sums[lanes]{};
      for (int64_t d = 0; d < whole; d += lanes) {
        const Lanes<float> part = load<lanes>(column + d);
        for (int r = 0; r < lanes; ++r) sums[r] += part * load<lanes>(some[r] + d);
      }
      float products[lanes];
      store<float, lanes>(products, sums_of<lanes, lanes>(sums));
      for (int r = 0; r < lanes; ++r) {
        for (int64_t d = whole; d < D; ++d) products[r] += column[d] * some[r][d];
        scores[(j + r) * scores_row + n] = products[r];
      }
    }
  }
}

}  // namespace anyattention

#endif
