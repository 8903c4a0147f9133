// Drives product-key memory over random calls, as properties.cpp does the other functions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>

#include "../anyattention.h"
#include "random_arrays.h"

namespace {

using namespace tests;

template <class T>
Array<T> random_numbers(int64_t count) {
  Array<T> numbers(count);
  std::normal_distribution<double> normal;
  const bool is_coarse = chance(0.3), has_odd = chance(0.2);
  for (int64_t i = 0; i < count; ++i) {
    const double x = is_coarse ? static_cast<double>(up_to(2)) - 1 : normal(generator);
    numbers[i] = static_cast<T>(has_odd && chance(0.02) ? one_of<double>({NAN, INFINITY, -INFINITY, 1e30}) : x);
  }
  return numbers;
}

struct MemorySizes {
  int64_t tokens, heads, half_dim, n, value_dim, k;
  int64_t entries() const { return tokens * heads * k; }
  int64_t slots() const { return n * n; }
};

template <class T>
bool same(const Array<T> &a, const Array<T> &b) {
  return a.count == b.count && (a.count == 0 || std::memcmp(a.get(), b.get(), static_cast<std::size_t>(a.count) * sizeof(T)) == 0);
}

// Each query's slots are different and there, and the same for any number of threads.
template <class T>
void drive_choice(const MemorySizes &s, const Array<T> &query, const Array<T> &half_keys, const Array<int64_t> &indices,
                  const Array<T> &scores) {
  const Array<int64_t> others(s.entries());
  const Array<T> other_scores(s.entries());
  anyattention_product_key_indices_call call{s.tokens, s.heads, 2, s.half_dim, s.n, query.get(), half_keys.get(),
                                             s.k,      1,       sizeof(T) == 8};
  require(anyattention_product_key_indices(&call, indices.get(), scores.get()) == ANYATTENTION_OK, "choosing slots");
  call.num_threads = 3;
  require(anyattention_product_key_indices(&call, others.get(), other_scores.get()) == ANYATTENTION_OK, "choosing slots in threads");
  require(same(indices, others) && same(scores, other_scores), "the same slots for any number of threads");
  for (int64_t row = 0; row < s.tokens * s.heads; ++row) {
    int64_t *chosen = others.get() + row * s.k;
    std::sort(chosen, chosen + s.k);
    require(chosen[0] >= 0 && chosen[s.k - 1] < s.slots(), "slots that are there");
    require(std::adjacent_find(chosen, chosen + s.k) == chosen + s.k, "no slot twice");
  }
  call.k = s.slots() + 1;
  require(anyattention_product_key_indices(&call, others.get(), other_scores.get()) == ANYATTENTION_INVALID_ARGUMENT, "more slots than there are");
  call.k = 0;
  require(anyattention_product_key_indices(&call, others.get(), other_scores.get()) == ANYATTENTION_INVALID_ARGUMENT, "no slots");
}

template <class T>
struct Gradients {
  Array<T> query, half_keys, values;
  Gradients(const MemorySizes &s, int64_t rows)
      : query(s.tokens * s.heads * 2 * s.half_dim), half_keys(2 * s.heads * s.n * s.half_dim), values(rows * s.value_dim) {}
};

template <class T>
void drive_backward(const MemorySizes &s, const anyattention_slot_attention_call &forward, const Array<T> &weights,
                    bool broken) {
  const int64_t E = s.entries();
  const Array<int64_t> slots(E), offsets(E + 1), entries(E);
  int64_t num_used = 0;
  const int32_t sorted = anyattention_sorted_slots(forward.indices, E, s.slots(), slots.get(), offsets.get(), entries.get(),
                                                   &num_used);
  require(sorted == (broken ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK), "sorting slots", sorted);
  if (sorted != ANYATTENTION_OK) return;
  require(std::is_sorted(slots.get(), slots.get() + num_used) && offsets[num_used] == E, "slots in order");
  const Array<T> grad_output = random_numbers<T>(s.tokens * s.value_dim), grad_weights = random_numbers<T>(E);
  anyattention_slot_attention_backward_call call{forward, weights.get(), chance(0.9) ? grad_output.get() : nullptr,
                                                 chance(0.5) ? grad_weights.get() : nullptr, 1, forward.is_double};
  const anyattention_used_slots used{num_used, E, slots.get(), offsets.get(), entries.get()};
  const auto meddler = meddler_of({&slots, &offsets, &entries});
  const bool by_query = chance(0.7), by_keys = chance(0.7), by_values = chance(0.7), at_slots = chance(0.3);
  const auto run = [&](int64_t threads, const Gradients<T> &found) {
    call.call.num_threads = threads;
    const int32_t status = anyattention_slot_attention_backward(
        &call, &used, at_slots, by_query ? found.query.get() : nullptr, by_keys ? found.half_keys.get() : nullptr,
        by_values ? found.values.get() : nullptr);
    require(status == ANYATTENTION_OK, "gradients of slots", status);
  };
  const int64_t rows = at_slots ? s.slots() : num_used;
  const Gradients<T> one(s, rows), three(s, rows);
  run(1, one), run(3, three);
  require(same(one.query, three.query) && same(one.half_keys, three.half_keys) && same(one.values, three.values),
          "the same gradients for any number of threads");
  const Array<T> alone(num_used * s.value_dim);
  const int32_t status = anyattention_slot_rows(weights.get(), grad_output.get(), E, s.heads * s.k, s.value_dim, &used, 2,
                                                forward.is_double, alone.get());
  require(status == ANYATTENTION_OK, "rows of slots", status);
  if (by_values && !at_slots && call.grad_output && !forward.keep) require(same(one.values, alone), "the same rows alone");
  if (E > 0 && !is_meddled) {
    entries[up_to(E - 1)] = one_of<int64_t>({-1, E, INT64_MAX, INT64_MIN});
    const int32_t refused = anyattention_slot_attention_backward(&call, &used, at_slots, one.query.get(), nullptr, nullptr);
    require(refused == (call.grad_output ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK), "an entry that is not there", refused);
  }
}

template <class T>
void drive(bool faulty) {
  const bool large = chance(0.03);
  MemorySizes s{up_to(large ? 90 : 9), 1 + up_to(2), 1 + up_to(20), 1 + up_to(large ? 160 : 11), up_to(40), 1};
  s.k = 1 + up_to(std::min<int64_t>(s.slots() - 1, chance(0.2) ? 130 : 8));
  // Now and then all tokens use the same few slots, which are cut into pieces.
  if (large && chance(0.5)) s.tokens = 900, s.n = 3, s.k = 9, s.value_dim = 3;
  const Array<T> query = random_numbers<T>(s.tokens * s.heads * 2 * s.half_dim);
  const Array<T> half_keys = random_numbers<T>(2 * s.heads * s.n * s.half_dim), keep = random_numbers<T>(s.entries());
  const Array<int64_t> indices(s.entries());
  const Array<T> scores(s.entries());
  drive_choice(s, query, half_keys, indices, scores);
  const int64_t type = sizeof(T) == 4 ? one_of<int64_t>({ANYATTENTION_FULL, ANYATTENTION_BFLOAT16, ANYATTENTION_FLOAT16}) : 0;
  const int64_t stride = s.value_dim + up_to(2), size = (s.slots() - 1) * stride + s.value_dim;
  const Array<T> full = random_numbers<T>(type == 0 ? size : 0);
  const Array<uint16_t> half(type == 0 ? 0 : size);
  for (int64_t n = 0; n < half.count; ++n) half[n] = static_cast<uint16_t>(up_to(0xffff));
  const void *values = type == 0 ? static_cast<const void *>(full.get()) : half.get();
  const anyattention_slot_attention_call call{
      s.tokens,       s.heads, 2, s.half_dim, s.n, s.slots(), s.value_dim, s.k, query.get(), half_keys.get(), {values, 0, stride, 0, type},
      indices.get(), scores.get(), chance(0.3) ? keep.get() : nullptr, 1 + up_to(2), sizeof(T) == 8};
  const bool broken = faulty && s.entries() > 0;
  if (broken) indices[up_to(s.entries() - 1)] = one_of<int64_t>({-1, s.slots(), INT64_MAX, INT64_MIN});
  const Array<T> output(s.tokens * s.value_dim), weights(s.entries());
  const auto meddler = meddler_of({&indices});
  const int32_t status = anyattention_slot_attention(&call, output.get(), weights.get());
  require(status == (broken ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK), "attention to slots", status);
  drive_backward<T>(s, call, weights, broken);
}

void refuse() {
  require(anyattention_product_key_indices(nullptr, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  require(anyattention_slot_attention(nullptr, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no call");
  require(anyattention_slot_attention_backward(nullptr, nullptr, 0, nullptr, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT,
          "no call");
  require(anyattention_sorted_slots(nullptr, 1, 4, nullptr, nullptr, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT,
          "no arrays");
  require(anyattention_slot_rows(nullptr, nullptr, 1, 1, 1, nullptr, 1, 0, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no slots");
  anyattention_slot_attention_call sizes{};
  sizes.halves = 2, sizes.half_dim = sizes.num_half_keys = sizes.k = sizes.num_threads = 1, sizes.num_slots = 2;
  require(anyattention_slot_attention(&sizes, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "slots that are no square");
  sizes.num_slots = 1, sizes.values.type = 3;
  require(anyattention_slot_attention(&sizes, nullptr, nullptr) == ANYATTENTION_INVALID_ARGUMENT, "no such type");
  sizes.values.type = 0;
  require(anyattention_slot_attention(&sizes, nullptr, nullptr) == ANYATTENTION_OK, "no tokens");
}

}  // namespace

void drive_product_keys(bool faulty) {
  refuse();
  chance(0.6) ? drive<float>(faulty) : drive<double>(faulty);
}
