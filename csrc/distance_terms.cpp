// What attention between points adds to scores for a distance: a Gaussian of learned width, radial bumps and an envelope.
//
//   n  row of a block     a  coordinate     h  head     o  output, heads first     k  bump     d  distance
//
// A block of rows is turned, so that each loop runs over the rows of one number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>

#include "anyattention.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {
namespace {

constexpr int64_t kBlock = 64;
// What the numbers of a row take one thread, in nanoseconds: the row, its bumps, its outputs, and their products.
constexpr double kOfRow = 2.5, kPerBump = 0.25, kPerOutput = 0.5, kPerProductOfBoth = 0.08;
// Sums over rows are cut here, whatever the threads.
constexpr int64_t kRowsPerSum = 4096;

// The factor of (1 - x)^3 in the envelope.
constexpr double kFactor[] = {1, 3, 6, 10, 15, 21};

template <class T>
struct Block {
  const anyattention_distance_terms_call &c;
  const T *displacement, *decay, *radial_weight;
  T *coordinates, *squared, *distance, *bumps, *envelope, *slope, *outputs, *sum;

  static int64_t size(const anyattention_distance_terms_call &c) {
    return kBlock * (c.dim + c.num_radial + c.outputs + 5);
  }

  Block(const anyattention_distance_terms_call &call, T *space)
      : c(call),
        displacement(static_cast<const T *>(call.displacement)),
        decay(static_cast<const T *>(call.decay)),
        radial_weight(static_cast<const T *>(call.radial_weight)),
        coordinates(space),
        squared(coordinates + kBlock * c.dim),
        distance(squared + kBlock),
        bumps(distance + kBlock),
        envelope(bumps + kBlock * c.num_radial),
        slope(envelope + kBlock),
        outputs(slope + kBlock),
        sum(outputs + kBlock * c.outputs) {}

  T inverse_width() const { return static_cast<T>(std::max<int64_t>(c.num_radial - 1, 1) / c.radial_range); }

  // Distances, bumps and the envelope's logarithm and its slope, of up to kBlock rows; rows that are not there are 0.
  void read(int64_t first, int64_t count) {
    const T *rows = displacement + first * c.dim;
    std::fill_n(coordinates, kBlock * c.dim, T{0});
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t a = 0; a < c.dim; ++a) coordinates[a * kBlock + n] = rows[n * c.dim + a];
    }
    std::fill_n(squared, kBlock, T{0});
    for (int64_t a = 0; a < c.dim; ++a) {
      const T *x = coordinates + a * kBlock;
      for (int64_t n = 0; n < kBlock; ++n) squared[n] += x[n] * x[n];
    }
    const T nearest = static_cast<T>(c.eps * c.eps);
    for (int64_t n = 0; n < kBlock; ++n) distance[n] = std::sqrt(squared[n] < nearest ? nearest : squared[n]);
    const T inverse = inverse_width();
    for (int64_t k = 0; k < c.num_radial; ++k) {
      T *bump = bumps + k * kBlock;
      for (int64_t n = 0; n < kBlock; ++n) {
        const T steps = distance[n] * inverse - static_cast<T>(k);
        bump[n] = T{-0.5} * steps * steps;
      }
    }
    exponentials(bumps, kBlock * c.num_radial);
    if (c.radius > 0) read_envelope();
  }

  void read_envelope() {
    const T radius = static_cast<T>(c.radius), inverse = static_cast<T>(1 / c.radius);
    for (int64_t n = 0; n < kBlock; ++n) {
      const T x = distance[n] / radius, left = 1 - x, near = x < 1 ? x : T{1};
      T factor = static_cast<T>(kFactor[5]), derivative = 0;
      for (int i = 4; i >= 0; --i) {
        derivative = derivative * near + factor;
        factor = factor * near + static_cast<T>(kFactor[i]);
      }
      const bool is_outside = left <= 0;
      const T safe = is_outside ? T{1} : left;
      const T value = 3 * logarithm(safe) + logarithm(factor);
      envelope[n] = is_outside ? -std::numeric_limits<T>::infinity() : value;
      slope[n] = is_outside ? T{0} : (derivative / factor - 3 / safe) * inverse;
    }
  }

  void write_terms(int64_t first, int64_t count, T *terms) {
    for (int64_t o = 0; o < c.outputs; ++o) {
      if (o < c.heads) {
        const T own = decay[o];
        for (int64_t n = 0; n < kBlock; ++n) sum[n] = -own * squared[n];
        for (int64_t n = 0; c.radius > 0 && n < kBlock; ++n) sum[n] += envelope[n];
      } else {
        std::fill_n(sum, kBlock, T{0});
      }
      for (int64_t k = 0; k < c.num_radial; ++k) {
        const T weight = radial_weight[o * c.num_radial + k];
        const T *bump = bumps + k * kBlock;
        for (int64_t n = 0; n < kBlock; ++n) sum[n] += weight * bump[n];
      }
      T *out = terms + first * c.outputs + o;
      for (int64_t n = 0; n < count; ++n) out[n * c.outputs] = sum[n];
    }
  }

  // Gradients by the displacements, and what is added to those of decays and weights; each where it is not null.
  void write_gradients(int64_t first, int64_t count, const T *by_terms, T *by_displacement, T *by_decay, T *by_weight) {
    std::fill_n(outputs, kBlock * c.outputs, T{0});
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t o = 0; o < c.outputs; ++o) outputs[o * kBlock + n] = by_terms[(first + n) * c.outputs + o];
    }
    T by_squared[kBlock] = {}, by_distance[kBlock] = {};
    for (int64_t h = 0; h < c.heads; ++h) {
      const T own = decay[h], *given = outputs + h * kBlock;
      for (int64_t n = 0; n < kBlock; ++n) by_squared[n] -= own * given[n];
      for (int64_t n = 0; c.radius > 0 && n < kBlock; ++n) by_distance[n] += given[n] * slope[n];
      if (by_decay) by_decay[h] -= dot<kBlock>(given, squared, kBlock);
    }
    const T inverse = inverse_width();
    for (int64_t k = 0; k < c.num_radial; ++k) {
      const T *bump = bumps + k * kBlock;
      std::fill_n(sum, kBlock, T{0});
      for (int64_t o = 0; o < c.outputs; ++o) {
        const T weight = radial_weight[o * c.num_radial + k], *given = outputs + o * kBlock;
        for (int64_t n = 0; n < kBlock; ++n) sum[n] += weight * given[n];
        if (by_weight) by_weight[o * c.num_radial + k] += dot<kBlock>(given, bump, kBlock);
      }
      for (int64_t n = 0; n < kBlock; ++n) {
        by_distance[n] -= sum[n] * bump[n] * (distance[n] * inverse - static_cast<T>(k)) * inverse;
      }
    }
    if (!by_displacement) return;
    const T nearest = static_cast<T>(c.eps * c.eps);
    for (int64_t n = 0; n < kBlock; ++n) {
      const T along = squared[n] < nearest ? T{0} : by_distance[n] / distance[n];
      sum[n] = 2 * by_squared[n] + along;
    }
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t a = 0; a < c.dim; ++a) {
        by_displacement[(first + n) * c.dim + a] = coordinates[a * kBlock + n] * sum[n];
      }
    }
  }
};

// `terms` are those of the call, or their gradient.
bool is_valid(const anyattention_distance_terms_call *c, const void *terms) {
  if (!c || c->rows < 0 || c->dim < 1 || c->heads < 1 || c->num_radial < 0 || c->num_threads < 1) return false;
  if (c->outputs < c->heads || (c->num_radial > 0 && !(c->radial_range > 0))) return false;
  if (c->rows == 0) return true;
  return c->displacement && c->decay && terms && (c->num_radial == 0 || c->radial_weight);
}

// Runs body(block, first row, number of rows, sums) over all rows; `sums` is of a piece of the rows, cut by them alone.
template <class T, class Body>
void over_rows(const anyattention_distance_terms_call &c, int64_t size, T *sums, const Body &body) {
  const int64_t pieces = (c.rows + kRowsPerSum - 1) / kRowsPerSum;
  const double bumps = static_cast<double>(c.num_radial), outputs = static_cast<double>(c.outputs);
  const double row = kOfRow + kPerBump * bumps + (kPerOutput + kPerProductOfBoth * bumps) * outputs;
  const int team = team_size(c.num_threads, pieces, static_cast<double>(c.rows) * row * (sizeof(T) / sizeof(float)));
  const Workspace<T> spaces(team * (Block<T>::size(c) + 64));
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    Block<T> block(c, spaces.get() + thread_number() * (Block<T>::size(c) + 64));
    const int64_t last = std::min(c.rows, (piece + 1) * kRowsPerSum);
    for (int64_t first = piece * kRowsPerSum; first < last; first += kBlock) {
      const int64_t count = std::min(kBlock, last - first);
      block.read(first, count);
      body(block, first, count, sums + piece * size);
    }
  }
}

template <class T>
void run_terms(const anyattention_distance_terms_call &c, void *terms) {
  over_rows<T>(c, 0, nullptr, [=](Block<T> &block, int64_t first, int64_t count, T *) {
    block.write_terms(first, count, static_cast<T *>(terms));
  });
}

template <class T>
void run_gradients(const anyattention_distance_terms_call &c, const void *by_terms, void *by_displacement, void *by_decay,
                   void *by_radial_weight) {
  const int64_t size = c.heads + c.outputs * c.num_radial, pieces = (c.rows + kRowsPerSum - 1) / kRowsPerSum;
  const Workspace<T> sums(pieces * size);
  over_rows<T>(c, size, sums.get(), [=](Block<T> &block, int64_t first, int64_t count, T *own) {
    block.write_gradients(first, count, static_cast<const T *>(by_terms), static_cast<T *>(by_displacement),
                          by_decay ? own : nullptr, by_radial_weight ? own + block.c.heads : nullptr);
  });
  const auto add_up = [&](void *result, int64_t begin, int64_t count) {
    if (!result) return;
    std::fill_n(static_cast<T *>(result), count, T{0});
    for (int64_t piece = 0; piece < pieces; ++piece) add(static_cast<T *>(result), sums.get() + piece * size + begin, count);
  };
  add_up(by_decay, 0, c.heads);
  add_up(by_radial_weight, c.heads, size - c.heads);
}

template <class Body>
int32_t guarded(const anyattention_distance_terms_call *call, const void *terms, const Body &body) {
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  anyattention_distance_terms_call whole = *call;
  if (!whole.num_radial) whole.outputs = whole.heads;
  if (!is_valid(&whole, terms)) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    body(whole);
    return ANYATTENTION_OK;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace anyattention

extern "C" {

int32_t anyattention_distance_terms(const anyattention_distance_terms_call *call, void *terms) {
  using namespace anyattention;
  return guarded(call, terms, [=](const auto &c) { (c.is_double ? run_terms<double> : run_terms<float>)(c, terms); });
}

int32_t anyattention_distance_terms_backward(const anyattention_distance_terms_backward_call *call,
                                             void *grad_displacement, void *grad_decay, void *grad_radial_weight) {
  using namespace anyattention;
  if (!call) return ANYATTENTION_INVALID_ARGUMENT;
  return guarded(&call->call, call->grad_terms, [=](const auto &c) {
    (c.is_double ? run_gradients<double> : run_gradients<float>)(c, call->grad_terms, grad_displacement, grad_decay,
                                                                 grad_radial_weight);
  });
}
}
