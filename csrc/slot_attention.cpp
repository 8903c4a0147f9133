// Attention to chosen slots of a product-key memory, its gradients, and the rows of slots that the gradient of the values
// has. A slot's key is a pair of half keys; its value is a row that every head reads.
//
//   t  token     h  head     a  half     e  entry: a token, a head and a place among its k slots     s  slot = i n + j
//   u  row of the values that is used, in order     w  weight of an entry     D  half_dim     C  value_dim
//
// Forward goes by token. Backward goes by slot, so that each used row is read once, and its gradient is complete as soon as
// it is read: it is written once, and a slot that many tokens use is cut at fixed places (rows.h).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "anyattention.h"
#include "half.h"
#include "once.h"
#include "pages.h"
#include "rows.h"
#include "simd.h"
#include "workspace.h"

namespace anyattention {
namespace {

constexpr int64_t kRowsAhead = 8;
constexpr int64_t kTokensPerTurn = 8;
constexpr int64_t kChannels = 32;  // of half keys whose gradient one thread sums

// The rows of the values, as T.
template <class T>
class ValueRows {
 public:
  explicit ValueRows(const anyattention_slot_attention_call &c)
      : numbers_(static_cast<const char *>(c.values.numbers)),
        type_(c.values.type),
        bytes_(type_ == ANYATTENTION_FULL ? static_cast<int64_t>(sizeof(T)) : 2),
        stride_(c.values.row_stride),
        width_(c.value_dim) {}

  // A row where it lies, or widened to `width` numbers.
  const T *row(int64_t slot, T *width) const {
    const char *at = numbers_ + slot * stride_ * bytes_;
    if (type_ == ANYATTENTION_FULL) return reinterpret_cast<const T *>(at);
    with_type_of<T>(type_, [=](auto kind) { widen(reinterpret_cast<const decltype(kind) *>(at), width); });
    return width;
  }
  // Where a row is, or would be: for prefetches.
  ANYATTENTION_INLINE const void *address(int64_t slot) const { return address_of(numbers_, slot, stride_ * bytes_); }

 private:
  template <class Half>
  void widen(const Half *from, T *to) const {
    constexpr int lanes = 64 / static_cast<int>(sizeof(T));
    int64_t c = 0;
    for (; c + lanes <= width_; c += lanes) store<T, lanes>(to + c, load_wide<T, lanes>(from + c));
    for (; c < width_; ++c) to[c] = load_wide<T, 1>(from + c)[0];
  }

  const char *numbers_;
  int64_t type_, bytes_, stride_, width_;
};

// Vectors of sums that stay in registers: half of these, or less.
#if defined(__AVX512F__)
constexpr int kSums = 16;
#elif defined(__AVX__)
constexpr int kSums = 4;
#else
constexpr int kSums = 2;
#endif
template <class T>
constexpr int kWide = 64 / static_cast<int>(sizeof(T));

// Calls body(vectors, c) for blocks of channels from c on, `vectors` (a constant) of kWide each, and rest(c) for the last
// channels, which fill no vector.
template <class T, class Body, class Rest>
ANYATTENTION_INLINE void each_block(int64_t count, const Body &body, const Rest &rest) {
  int64_t c = 0;
  for (; c + kSums * kWide<T> <= count; c += kSums * kWide<T>) body(std::integral_constant<int, kSums>{}, c);
  for (; c + kWide<T> <= count; c += kWide<T>) body(std::integral_constant<int, 1>{}, c);
  if (c < count) rest(c);
}

// sum[c] = sum over n of weights[n] rows[n][c]. Waiting for rows is all that this does: sums stay in registers, so that a row
// takes few instructions and several are waited for at once, and a row is asked for line by line between the products of
// another.
template <class T, class Stored>
void sum_rows(const T *weights, const Stored *const *rows, int64_t num_rows, int64_t count, T *sum) {
  const auto block = [=](auto vectors, int64_t c) {
    Vector<T, kWide<T>> sums[vectors]{};
    for (int64_t n = 0; n < num_rows; ++n) {
      const Stored *row = rows[n] + c, *ahead = rows[n + kRowsAhead < num_rows ? n + kRowsAhead : n] + c;
      for (int v = 0; v < vectors; ++v) {
        __builtin_prefetch(ahead + v * kWide<T>, 0, 3);
        sums[v] += weights[n] * load_wide<T, kWide<T>>(row + v * kWide<T>);
      }
    }
    for (int v = 0; v < vectors; ++v) store<T, kWide<T>>(sum + c + v * kWide<T>, sums[v]);
  };
  each_block<T>(count, block, [=](int64_t c) {
    for (; c < count; ++c) {
      T total = 0;
      for (int64_t n = 0; n < num_rows; ++n) total += weights[n] * load_wide<T, 1>(rows[n] + c)[0];
      sum[c] = total;
    }
  });
}

// A slot's half keys.
struct HalfKeys {
  int64_t i, j;
};

struct Sizes {
  int64_t H, D, n, C, k, of_token, entries;  // entries of a token, and all

  explicit Sizes(const anyattention_slot_attention_call &c)
      : H(c.heads), D(c.half_dim), n(c.num_half_keys), C(c.value_dim), k(c.k), of_token(H * k), entries(c.tokens * of_token) {}

  // Slots are below 2^32.
  HalfKeys half_keys(int64_t slot) const {
    const auto whole = static_cast<uint32_t>(slot), size = static_cast<uint32_t>(n);
    return {whole / size, whole % size};
  }
  double nanoseconds() const { return static_cast<double>(entries) * (static_cast<double>(C) * kPerNumber + 40); }
};

bool is_valid(const anyattention_slot_attention_call &c) {
  if (c.tokens < 0 || c.heads < 0 || c.halves != 2 || c.half_dim < 1 || c.num_half_keys < 1 || c.value_dim < 0) return false;
  if (c.num_half_keys > ANYATTENTION_MOST_HALF_KEYS || c.num_slots != c.num_half_keys * c.num_half_keys) return false;
  if (c.k < 1 || c.num_threads < 1 || c.values.type < 0 || c.values.type > ANYATTENTION_FLOAT16) return false;
  if ((c.is_double && c.values.type != ANYATTENTION_FULL) || c.values.row_stride < 0) return false;
  if (c.tokens == 0 || c.heads == 0) return true;
  if (c.tokens > (int64_t{1} << 32) / c.heads / c.k) return false;
  return c.query && c.half_keys && c.indices && c.scores && (c.values.numbers || c.value_dim == 0);
}

// The softmax of `count` scores where they lie, with room up to a vector's width.
template <class T>
void softmax(T *scores, int64_t count) {
  T largest = scores[0];
  for (int64_t e = 1; e < count; ++e) largest = std::max(largest, scores[e]);
  for (int64_t e = 0; e < count; ++e) scores[e] -= largest;
  exponentials(scores, count);
  T sum = 0;
  for (int64_t e = 0; e < count; ++e) sum += scores[e];
  for (int64_t e = 0; e < count; ++e) scores[e] /= sum;
}

template <class T>
class Forward {
 public:
  Forward(const anyattention_slot_attention_call &call, T *output, T *weights)
      : c_(call), s_(call), values_(call), output_(output), weights_(weights) {}

  // Whether all slots of a token are there; with memory for a number and a pointer of each of its entries, and a vector more.
  bool run(int64_t t, T *kept, const void **rows) const {
    const int64_t first = t * s_.of_token;
    for (int64_t e = 0; e < s_.of_token; ++e) {
      const int64_t slot = read_once(c_.indices + first + e);
      if (!is_below(slot, c_.num_slots)) return false;
      rows[e] = values_.address(slot);
    }
    const T *scores = static_cast<const T *>(c_.scores) + first, *keep = static_cast<const T *>(c_.keep);
    for (int64_t h = 0; h < s_.H; ++h) {
      T *own = kept + h * s_.k, *weights = weights_ + first + h * s_.k;
      for (int64_t e = 0; e < s_.k; ++e) own[e] = scores[h * s_.k + e] + scores[h * s_.k + e] * 0;  // infinity is NaN
      softmax(own, s_.k);
      std::copy_n(own, s_.k, weights);
      for (int64_t e = 0; keep && e < s_.k; ++e) own[e] *= keep[first + h * s_.k + e];
    }
    with_type_of<T>(c_.values.type, [=](auto kind) {
      using Stored = decltype(kind);
      sum_rows(kept, reinterpret_cast<const Stored *const *>(rows), s_.of_token, s_.C, output_ + t * s_.C);
    });
    return true;
  }

 private:
  const anyattention_slot_attention_call &c_;
  Sizes s_;
  ValueRows<T> values_;
  T *output_, *weights_;
};

template <class T>
bool run_forward(const anyattention_slot_attention_call &c, T *output, T *weights) {
  const Sizes s(c);
  if (s.entries == 0) {
    std::fill_n(output, c.tokens * c.value_dim, T{0});
    return true;
  }
  const Forward<T> forward(c, output, weights);
  const int64_t turns = (c.tokens + kTokensPerTurn - 1) / kTokensPerTurn;
  const int team = team_size(c.num_threads, turns, s.nanoseconds());
  const int64_t own = s.of_token + 32;
  const Workspace<T> kept(team * own);
  const Workspace<const void *> rows(team * own, false);
  std::atomic<bool> valid{true};
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t thread = thread_number(), last = std::min(c.tokens, (turn + 1) * kTokensPerTurn);
    for (int64_t t = turn * kTokensPerTurn; t < last; ++t) {
      if (!forward.run(t, kept.get() + thread * own, rows.get() + thread * own)) valid = false;
    }
  }
  return valid;
}

// Where the rows of the values' gradient go.
template <class T>
struct GradRows {
  T *rows;
  bool at_slots;  // at the place of the slot, or of the used row
};

// Sums of the output's gradient over the entries of each used row, and its products with the row where it is there.
template <class T>
class SlotRows {
 public:
  int64_t C, of_token, num_slots;
  const T *weights, *keep, *grad_output;
  const int64_t *slots = nullptr;
  const ValueRows<T> *values = nullptr;
  T *by_weight = nullptr;
  GradRows<T> to;
  CompressedRows rows;

  int64_t accumulator_size() const { return C; }
  int64_t scratch_size(int64_t) const { return C + 16; }
  int64_t slot_size() const { return 2 * C + 200; }
  void start(T *) const {}  // reduce writes all of it
  void combine(T *sum, const T *next) const { add(sum, next, C); }

  bool reduce(int64_t u, int64_t begin, int64_t end, T *sum, T *scratch) const {
    const T *value = nullptr;
    if (values) {
      const int64_t slot = read_once(slots + u);
      if (!is_below(slot, num_slots)) return false;
      value = values->row(slot, scratch);
    }
    const void *ahead = values ? values->address(slots[std::min(u + kRowsAhead, rows.num_rows - 1)]) : nullptr;
    add_entries(begin, end, value, static_cast<const char *>(ahead), sum);
    return true;
  }
  void finish(int64_t u, const T *sum) const {
    T *row = row_of(u);
    if (row) std::copy_n(sum, C, row);
  }

  bool takes_rows_together() const { return true; }
  // Sums of short rows go to their places at once.
  bool reduce_together(int64_t first, int64_t count, const int64_t *bounds, T *sum, T *scratch, T *) const {
    bool valid = true;
    for (int64_t u = first; u < first + count; ++u) {
      T *row = row_of(u);
      valid &= reduce(u, bounds[u - first], bounds[u - first + 1], row ? row : sum, scratch);
    }
    return valid;
  }

 private:
  T *row_of(int64_t u) const {
    if (!to.rows || !to.at_slots) return to.rows ? to.rows + u * C : nullptr;
    const int64_t slot = read_once(slots + u);
    return is_below(slot, num_slots) ? to.rows + slot * C : nullptr;
  }

  // `ahead` is the row of values of a slot that comes later.
  void add_entries(int64_t begin, int64_t end, const T *value, const char *ahead, T *sum) const {
    const auto block = [=](auto vectors, int64_t c) {
      Vector<T, kWide<T>> sums[vectors]{};
      for (int64_t s = begin; s < end; ++s) {
        const int64_t e = rows.columns[s];
        const T *grad = grad_output + e / of_token * C + c, weight = weight_of(e);
        Vector<T, kWide<T>> products{};
        for (int v = 0; v < vectors; ++v) {
          const Vector<T, kWide<T>> part = load<kWide<T>>(grad + v * kWide<T>);
          if (value) __builtin_prefetch(ahead + (c + v * kWide<T>) * int64_t{sizeof(T)}, 0, 3);
          if (value) products += part * load<kWide<T>>(value + c + v * kWide<T>);
          sums[v] += weight * part;
        }
        if (value) by_weight[e] += sum_of<T, kWide<T>>(products);
      }
      for (int v = 0; v < vectors; ++v) store<T, kWide<T>>(sum + c + v * kWide<T>, sums[v]);
    };
    each_block<T>(C, block, [=](int64_t c) {
      std::fill_n(sum + c, C - c, T{0});
      for (int64_t s = begin; s < end; ++s) {
        const int64_t e = rows.columns[s];
        const T *grad = grad_output + e / of_token * C;
        if (value) by_weight[e] += dot<0>(grad + c, value + c, C - c);
        add_scaled<0>(sum + c, weight_of(e), grad + c, C - c);
      }
    });
  }
  T weight_of(int64_t e) const { return keep ? weights[e] * keep[e] : weights[e]; }
};

// The same over all entries, each of which must be there.
template <class T>
struct AllSlotRows : SlotRows<T> {
  static constexpr bool kWritesEdges = true;
};

template <class T>
class Backward {
 public:
  Backward(const anyattention_slot_attention_backward_call &call, T *grad_query, T *grad_half_keys)
      : c_(call.call),
        b_(call),
        s_(call.call),
        grad_query_(grad_query),
        grad_half_keys_(grad_half_keys),
        by_score_(s_.entries),
        half_keys_(2 * s_.entries, false) {}

  // Gradients by weights, of the output alone; 0 to begin with.
  T *by_weight() const { return by_score_.get(); }

  // Of each token: gradients by scores in the place of those by weights, and by the query. Whether all slots are there.
  bool run_token(int64_t t) const {
    const int64_t k = s_.k, D = s_.D;
    for (int64_t h = 0; h < s_.H; ++h) {
      const int64_t first = t * s_.of_token + h * k;
      differentiate_softmax(first);
      T *grad = grad_query_ ? grad_query_ + (t * s_.H + h) * 2 * D : nullptr;
      if (grad) std::fill_n(grad, 2 * D, T{0});
      const T *first_keys = static_cast<const T *>(c_.half_keys) + h * s_.n * D, *second_keys = first_keys + s_.H * s_.n * D;
      for (int64_t e = first; e < first + k; ++e) {
        const int64_t slot = read_once(c_.indices + e);
        if (!is_below(slot, c_.num_slots)) return false;
        const HalfKeys at = s_.half_keys(slot);
        half_keys_.get()[e] = static_cast<int32_t>(at.i);
        half_keys_.get()[s_.entries + e] = static_cast<int32_t>(at.j);
        if (!grad) continue;
        add_scaled<0>(grad, by_weight()[e], first_keys + at.i * D, D);
        add_scaled<0>(grad + D, by_weight()[e], second_keys + at.j * D, D);
      }
    }
    return true;
  }

  int64_t num_parts() const { return (s_.D + kChannels - 1) / kChannels; }

  // Some channels of the gradient of one head's half keys, token by token.
  void sum_half_keys(int64_t a, int64_t h, int64_t part) const {
    const int64_t D = s_.D, k = s_.k, channel = part * kChannels, width = std::min(kChannels, D - channel);
    T *to = grad_half_keys_ + (a * s_.H + h) * s_.n * D + channel;
    for (int64_t i = 0; i < s_.n; ++i) std::fill_n(to + i * D, width, T{0});
    const int32_t *places = half_keys_.get() + a * s_.entries;
    for (int64_t t = 0; t < c_.tokens; ++t) {
      const T *query = static_cast<const T *>(c_.query) + ((t * s_.H + h) * 2 + a) * D + channel;
      const int64_t first = t * s_.of_token + h * k;
      for (int64_t e = first; e < first + k; ++e) add_scaled<0>(to + places[e] * D, by_weight()[e], query, width);
    }
  }

 private:
  void differentiate_softmax(int64_t first) const {
    T *by = by_weight() + first, total = 0;
    const T *weights = static_cast<const T *>(b_.weights) + first;
    const T *keep = static_cast<const T *>(c_.keep), *more = static_cast<const T *>(b_.grad_weights);
    for (int64_t e = 0; e < s_.k; ++e) {
      if (keep) by[e] *= keep[first + e];
      if (more) by[e] += more[first + e];
      total += weights[e] * by[e];
    }
    for (int64_t e = 0; e < s_.k; ++e) by[e] = weights[e] * (by[e] - total);
  }

  const anyattention_slot_attention_call &c_;
  const anyattention_slot_attention_backward_call &b_;
  Sizes s_;
  T *grad_query_, *grad_half_keys_;
  Workspace<T> by_score_;
  Workspace<int32_t> half_keys_;
};

template <class T>
bool reduce_slots(const anyattention_slot_attention_backward_call &b, const anyattention_used_slots &used, GradRows<T> to,
              T *by_weight) {
  const anyattention_slot_attention_call &c = b.call;
  const Sizes s(c);
  const ValueRows<T> values(c);
  const AllSlotRows<T> reduction{{s.C,
                                  s.of_token,
                                  c.num_slots,
                                  static_cast<const T *>(b.weights),
                                  static_cast<const T *>(c.keep),
                                  static_cast<const T *>(b.grad_output),
                                  used.slots,
                                  &values,
                                  by_weight,
                                  to,
                                  {used.num_used, s.entries, s.entries, used.offsets, used.entries, used.entries}}};
  return reduce_rows<T>(reduction.rows, c.num_threads, reduction);
}

template <class T>
bool run_backward(const anyattention_slot_attention_backward_call &b, const anyattention_used_slots &used, T *grad_query,
                  T *grad_half_keys, GradRows<T> to) {
  const anyattention_slot_attention_call &c = b.call;
  const Sizes s(c);
  const Backward<T> backward(b, grad_query, grad_half_keys);
  if (b.grad_output && s.entries > 0 && !reduce_slots(b, used, to, backward.by_weight())) return false;
  if (!grad_query && !grad_half_keys) return true;
  std::atomic<bool> valid{true};
  const int64_t turns = (c.tokens + kTokensPerTurn - 1) / kTokensPerTurn, parts = backward.num_parts();
  const int team = team_size(c.num_threads, turns, static_cast<double>(s.entries) * static_cast<double>(s.D) * 0.5);
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
  for (int64_t turn = 0; turn < turns; ++turn) {
    for (int64_t t = turn * kTokensPerTurn; t < std::min(c.tokens, (turn + 1) * kTokensPerTurn); ++t) {
      if (!backward.run_token(t)) valid = false;
    }
  }
  if (!valid || !grad_half_keys) return valid;
  const int64_t tasks = 2 * s.H * parts;
  const int workers = team_size(c.num_threads, tasks, static_cast<double>(s.entries) * static_cast<double>(s.D) * 0.5);
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1) if (workers > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    backward.sum_half_keys(task / parts / s.H, task / parts % s.H, task % parts);
  }
  return true;
}

}  // namespace
}  // namespace anyattention

extern "C" int32_t anyattention_slot_attention(const anyattention_slot_attention_call *call, void *output, void *weights) {
  using namespace anyattention;
  if (!call || !is_valid(*call)) return ANYATTENTION_INVALID_ARGUMENT;
  const bool has_entries = call->tokens > 0 && call->heads > 0;
  if ((!output && call->tokens * call->value_dim > 0) || (!weights && has_entries)) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    const bool valid = call->is_double
                           ? run_forward(*call, static_cast<double *>(output), static_cast<double *>(weights))
                           : run_forward(*call, static_cast<float *>(output), static_cast<float *>(weights));
    return valid ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

extern "C" int32_t anyattention_sorted_slots(const int64_t *indices, int64_t num_entries, int64_t num_slots, int64_t *slots,
                                             int64_t *offsets, int64_t *entries, int64_t *num_used) {
  using namespace anyattention;
  constexpr int64_t most = int64_t{1} << 32;
  if (num_entries < 0 || num_entries > most || num_slots < 0 || num_slots > most) return ANYATTENTION_INVALID_ARGUMENT;
  if (!offsets || !num_used || (num_entries > 0 && (!indices || !slots || !entries))) return ANYATTENTION_INVALID_ARGUMENT;
  constexpr int digit_bits = 11, digits = 1 << digit_bits;
  try {
    // Slots above, entries below: sorted by digits of the slot, least first.
    const Workspace<uint64_t> first(num_entries, false), second(num_entries, false);
    const Workspace<int64_t> places(digits + 1, false);
    uint64_t *from = first.get(), *to = second.get();
    for (int64_t e = 0; e < num_entries; ++e) {
      const int64_t slot = read_once(indices + e);
      if (!is_below(slot, num_slots)) return ANYATTENTION_OUT_OF_RANGE;
      from[e] = static_cast<uint64_t>(slot) << 32 | static_cast<uint64_t>(e);
    }
    for (int shift = 32; shift < 64 && static_cast<uint64_t>(num_slots - 1) >> (shift - 32); shift += digit_bits) {
      int64_t *place = places.get();
      std::fill_n(place, digits + 1, int64_t{0});
      for (int64_t e = 0; e < num_entries; ++e) ++place[(from[e] >> shift) % digits + 1];
      for (int d = 0; d < digits; ++d) place[d + 1] += place[d];
      for (int64_t e = 0; e < num_entries; ++e) to[place[(from[e] >> shift) % digits]++] = from[e];
      std::swap(from, to);
    }
    int64_t count = 0;
    for (int64_t e = 0; e < num_entries; ++e) {
      const auto slot = static_cast<int64_t>(from[e] >> 32);
      if (count == 0 || slots[count - 1] != slot) slots[count] = slot, offsets[count++] = e;
      entries[e] = static_cast<int64_t>(from[e] & 0xffffffff);
    }
    offsets[count] = num_entries;
    *num_used = count;
    return ANYATTENTION_OK;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

extern "C" int32_t anyattention_slot_attention_backward(const anyattention_slot_attention_backward_call *call,
                                                        const anyattention_used_slots *used, int32_t at_slots,
                                                        void *grad_query, void *grad_half_keys, void *grad_values) {
  using namespace anyattention;
  if (!call || !used || !is_valid(call->call) || used->num_used < 0) return ANYATTENTION_INVALID_ARGUMENT;
  const anyattention_slot_attention_call &c = call->call;
  const bool has_entries = c.tokens > 0 && c.heads > 0;
  if (has_entries && (!call->weights || !used->offsets || !used->slots || !used->entries)) return ANYATTENTION_INVALID_ARGUMENT;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return run_backward<T>(*call, *used, static_cast<T *>(grad_query), static_cast<T *>(grad_half_keys),
                           {static_cast<T *>(grad_values), at_slots != 0});
  };
  try {
    return (c.is_double ? run(double{}) : run(float{})) ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}

extern "C" int32_t anyattention_slot_rows(const void *weights, const void *grad_output, int64_t num_entries,
                                          int64_t of_token, int64_t value_dim, const anyattention_used_slots *used,
                                          int64_t num_threads, int32_t is_double, void *result) {
  using namespace anyattention;
  if (!used || used->num_used < 0 || used->num_entries < 0 || num_entries < 0 || of_token < 1) return ANYATTENTION_INVALID_ARGUMENT;
  if (value_dim < 0 || num_threads < 1 || num_entries % of_token || !used->offsets) return ANYATTENTION_INVALID_ARGUMENT;
  if (used->num_entries > 0 && (!used->entries || !weights)) return ANYATTENTION_INVALID_ARGUMENT;
  if (used->num_entries > 0 && value_dim > 0 && (!grad_output || !result)) return ANYATTENTION_INVALID_ARGUMENT;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const SlotRows<T> reduction{value_dim,
                          of_token,
                          0,
                          static_cast<const T *>(weights),
                          nullptr,
                          static_cast<const T *>(grad_output),
                          nullptr,
                          nullptr,
                          nullptr,
                          {static_cast<T *>(result), false},
                          {used->num_used, num_entries, used->num_entries, used->offsets, used->entries, used->entries}};
    return reduce_rows<T>(reduction.rows, num_threads, reduction);
  };
  try {
    return (is_double ? run(double{}) : run(float{})) ? ANYATTENTION_OK : ANYATTENTION_OUT_OF_RANGE;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}
