// Products of a long matrix with a small one: linear maps of many rows, and their gradients.
//
// The small matrix is packed once, in panels whose columns fill a block of products.h, and stays in the caches while
// tiles of rows pass by. The gradient by the small matrix is a sum over all rows: of parts that are cut by the number of
// rows alone and added up in order, so that no bit depends on threads. A long matrix may lie in several, side by side.

#include <algorithm>
#include <cstdint>
#include <new>

#include "anyattention.h"
#include "pages.h"
#include "products.h"
#include "simd.h"
#include "team.h"
#include "workspace.h"

namespace anyattention {
namespace {

constexpr int64_t kPanel = 64;  // columns
constexpr int64_t kTileRows = 8 * kBlockRows;
// Of a panel, beside which a block's columns of the other factor fit the first cache.
constexpr int64_t kTileDepth = 96;
constexpr int64_t kMostParts = 64, kLeastPartRows = 1024;
constexpr int64_t kSize = sizeof(float);

int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// c = a b, or c += a b, of some rows and whole vectors of columns.
template <bool Adds>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Product<float> &p) {
  product<Adds>(rows, p, [=](int64_t, int64_t) { return Extent{0, columns, 0, depth}; });
}

// Matrices side by side.
template <class T>
struct Columns {
  int64_t count;
  T *const *numbers;
  const int64_t *widths, *strides;

  int64_t width() const {
    int64_t sum = 0;
    for (int64_t n = 0; n < count; ++n) sum += widths[n];
    return sum;
  }
  T *at(int64_t n, int64_t row) const { return numbers[n] + row * strides[n]; }
  // Calls body(n, column) for each matrix and its first column.
  template <class Body>
  void each(const Body &body) const {
    for (int64_t n = 0, column = 0; n < count; column += widths[n++]) body(n, column);
  }
  bool are_valid(int64_t rows) const {
    if (count < 1 || !numbers || !widths || !strides) return false;
    for (int64_t n = 0; n < count; ++n) {
      if (widths[n] < 1 || strides[n] < widths[n] || (rows > 0 && !numbers[n])) return false;
    }
    return true;
  }
};

// results (rows, columns) = x (rows, depth) times a matrix, plus a bias.
class Map {
 public:
  Map(const Columns<const float> &x, const float *matrix, int64_t by_row, int64_t by_column, const float *bias,
      const Columns<float> &results)
      : x_(x),
        results_(results),
        depth_(x.width()),
        columns_(results.width()),
        bias_(bias),
        panels_(depth_ * rounded_up(columns_, kLane<float>), false) {
    each_panel([&](int64_t begin, int64_t count, int64_t width) {
      float *panel = panels_.get() + begin * depth_;
      for (int64_t k = 0; k < depth_; ++k) {
        const float *from = matrix + k * by_row + begin * by_column;
        for (int64_t c = 0; c < count; ++c) panel[k * width + c] = from[c * by_column];
        std::fill(panel + k * width + count, panel + (k + 1) * width, 0.0f);
      }
    });
  }

  int64_t multiplications() const { return depth_ * columns_; }

  void run(int64_t first, int64_t rows) const {
    float block[kTileRows * kPanel];
    each_panel([&](int64_t begin, int64_t count, int64_t width) {
      results_.each([&](int64_t n, int64_t column) {
        const int64_t left = std::max(begin, column), right = std::min(begin + count, column + results_.widths[n]);
        if (left >= right) return;
        float *to = results_.at(n, first) + left - column;
        // A vector past a matrix's last column would lie in its next row.
        const bool is_direct = right - left == width;
        if (is_direct) multiply_panel(first, rows, begin, width, to, results_.strides[n]);
        if (!is_direct && left == begin) multiply_panel(first, rows, begin, width, block, width);
        for (int64_t r = 0; r < rows; ++r, to += results_.strides[n]) {
          if (!is_direct) std::copy_n(block + r * width + left - begin, right - left, to);
          if (bias_) add(to, bias_ + left, right - left);
        }
      });
    });
  }

 private:
  Columns<const float> x_;
  Columns<float> results_;
  int64_t depth_, columns_;
  const float *bias_;
  Workspace<float> panels_;

  // Calls body(first column, columns, columns of the panel).
  template <class Body>
  void each_panel(const Body &body) const {
    for (int64_t begin = 0; begin < columns_; begin += kPanel) {
      const int64_t count = std::min(kPanel, columns_ - begin);
      body(begin, count, rounded_up(count, kLane<float>));
    }
  }

  void multiply_panel(int64_t first, int64_t rows, int64_t begin, int64_t width, float *c, int64_t c_row) const {
    const float *panel = panels_.get() + begin * depth_;
    x_.each([&](int64_t n, int64_t k) {
      const Product<float> p{x_.at(n, first), x_.strides[n], 1, panel + k * width, width, c, c_row};
      if (k == 0) multiply<false>(rows, width, x_.widths[n], p);
      else multiply<true>(rows, width, x_.widths[n], p);
    });
  }
};

// The gradient (outputs, inputs) by the matrix of a map, and by its bias.
class ByMatrix {
 public:
  ByMatrix(const Columns<const float> &grads, int64_t rows, const float *x, int64_t inputs, int64_t stride, bool has_bias)
      : grads_(grads),
        rows_(rows),
        outputs_(grads.width()),
        x_(x),
        inputs_(inputs),
        stride_(stride),
        sums_row_(rounded_up(inputs, kLane<float>)),
        size_(outputs_ * sums_row_ + (has_bias ? outputs_ : 0)),
        part_rows_(std::max(kLeastPartRows, (rows + kMostParts - 1) / kMostParts)),
        parts_((rows + part_rows_ - 1) / part_rows_),
        sums_(std::max<int64_t>(parts_, 1) * size_),
        has_bias_(has_bias) {}

  void run(int64_t threads, float *matrix, float *bias) const {
    const int team = team_size(threads, parts_, static_cast<double>(rows_ * outputs_ * inputs_) * kPerProduct);
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
    for (int64_t n = 0; n < parts_; ++n) {
      for (int64_t k = n * part_rows_; k < std::min(rows_, (n + 1) * part_rows_); k += kTileDepth) {
        add_tile(k, std::min(kTileDepth, std::min(rows_, (n + 1) * part_rows_) - k), sums_.get() + n * size_);
      }
    }
    for (int64_t n = 1; n < parts_; ++n) add(sums_.get(), sums_.get() + n * size_, size_);
    for (int64_t r = 0; r < outputs_; ++r) std::copy_n(sums_.get() + r * sums_row_, inputs_, matrix + r * inputs_);
    if (has_bias_) std::copy_n(sums_.get() + outputs_ * sums_row_, outputs_, bias);
  }

 private:
  Columns<const float> grads_;
  int64_t rows_, outputs_;
  const float *x_;
  int64_t inputs_, stride_, sums_row_, size_, part_rows_, parts_;
  Workspace<float> sums_;
  bool has_bias_;

  void add_tile(int64_t first, int64_t depth, float *sums) const {
    float panel[kTileDepth * kPanel];
    for (int64_t begin = 0; begin < inputs_; begin += kPanel) {
      const int64_t count = std::min(kPanel, inputs_ - begin), width = rounded_up(count, kLane<float>);
      for (int64_t k = 0; k < depth; ++k) {
        std::copy_n(x_ + (first + k) * stride_ + begin, count, panel + k * width);
        std::fill(panel + k * width + count, panel + (k + 1) * width, 0.0f);
      }
      grads_.each([&](int64_t n, int64_t output) {
        float *c = sums + output * sums_row_ + begin;
        multiply<true>(grads_.widths[n], width, depth,
                       {grads_.at(n, first), 1, grads_.strides[n], panel, width, c, sums_row_});
      });
    }
    if (!has_bias_) return;
    grads_.each([&](int64_t n, int64_t output) {
      float *bias = sums + outputs_ * sums_row_ + output;
      for (int64_t k = 0; k < depth; ++k) add(bias, grads_.at(n, first + k), grads_.widths[n]);
    });
  }
};

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_multiplies_fast(void) { return anyattention::kLane<float> >= 16; }

int32_t anyattention_linear_map(int64_t rows, int64_t num_x, const float *const *x, const int64_t *x_widths,
                                const int64_t *x_strides, const float *matrix, int64_t by_row, int64_t by_column,
                                const float *bias, int64_t num_results, float *const *results, const int64_t *widths,
                                int64_t num_threads) {
  using namespace anyattention;
  const Columns<const float> from{num_x, x, x_widths, x_strides};
  const Columns<float> to{num_results, results, widths, widths};
  if (rows < 0 || num_threads < 1 || !matrix || !from.are_valid(rows) || !to.are_valid(rows)) {
    return ANYATTENTION_INVALID_ARGUMENT;
  }
  try {
    const Map map(from, matrix, by_row, by_column, bias, to);
    for (int64_t n = 0; n < num_results; ++n) prefer_large_pages(results[n], rows * widths[n] * kSize);
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int team = team_size(num_threads, tiles, static_cast<double>(rows * map.multiplications()) * kPerProduct);
#pragma omp parallel for num_threads(team) schedule(dynamic, 4) if (team > 1)
    for (int64_t n = 0; n < tiles; ++n) map.run(n * kTileRows, std::min(kTileRows, rows - n * kTileRows));
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
  return ANYATTENTION_OK;
}

int32_t anyattention_linear_map_by_matrix(int64_t rows, int64_t num_grads, const float *const *grads,
                                          const int64_t *widths, const int64_t *strides, const float *x, int64_t inputs,
                                          int64_t x_stride, int64_t num_threads, float *matrix, float *bias) {
  using namespace anyattention;
  const Columns<const float> from{num_grads, grads, widths, strides};
  if (rows < 0 || inputs < 1 || x_stride < inputs || num_threads < 1 || !from.are_valid(rows)) {
    return ANYATTENTION_INVALID_ARGUMENT;
  }
  if (!matrix || (rows > 0 && !x)) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    ByMatrix(from, rows, x, inputs, x_stride, bias != nullptr).run(num_threads, matrix, bias);
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
  return ANYATTENTION_OK;
}
}
