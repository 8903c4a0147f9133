// The slots of each query's largest scores, where a slot's key is a pair of half keys: the best half keys of each half,
// and the best of their pairs.
//
//   t  token     h  head     a  half     i  half key     n  half keys of a half     m  of them that are kept, min(k, n)
//   p, q  ranks among the kept half keys of the first and of the second half
//
// A pair's score is the sum of its halves', so that the k best of all n x n pairs are among the m x m best. Of equal sums
// the lower slot is best. Sums of floats are compared as doubles, which hold them exactly, but where one is 2^29 times the
// other. NaN is larger than any number.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <type_traits>

#include "anyattention.h"
#include "products.h"
#include "rows.h"
#include "simd.h"

namespace anyattention {
namespace {

constexpr int64_t kRows = 4 * kBlockRows;  // tokens of a task
constexpr int64_t kPanel = 128;            // half keys whose columns stay in the first cache
constexpr int64_t kCounted = 256;          // numbers that are sorted by counting, at most

template <class T>
using Ranks = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
// A rank above, and the complement of a place below: a larger one is better.
template <class T>
using Packed = std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>;
template <class T>
using RankLanes = Vector<Ranks<T>, kLane<T>>;

template <class T>
constexpr int kBits = 8 * static_cast<int>(sizeof(T));
template <class T>
constexpr Ranks<T> kLowest = std::numeric_limits<Ranks<T>>::min();  // below that of any number

// Integers in the order of some scores, NaN the largest. Infinity is NaN, as a sum of both infinities is.
template <class T>
ANYATTENTION_INLINE RankLanes<T> ranks_of(Lanes<T> scores) {
  scores += scores * 0;
  scores += 0;  // -0 is 0
  RankLanes<T> bits;
  std::memcpy(&bits, &scores, sizeof bits);
  bits ^= (bits >> (kBits<T> - 1)) & std::numeric_limits<Ranks<T>>::max();
  return scores == scores ? bits : RankLanes<T>{} + std::numeric_limits<Ranks<T>>::max();
}

template <class T>
T score_of(Ranks<T> rank) {
  if (rank == std::numeric_limits<Ranks<T>>::max()) return std::numeric_limits<T>::quiet_NaN();
  rank ^= (rank >> (kBits<T> - 1)) & std::numeric_limits<Ranks<T>>::max();
  T score;
  std::memcpy(&score, &rank, sizeof score);
  return score;
}

template <class T>
Packed<T> packed(Ranks<T> rank, int64_t place) {
  const auto above = static_cast<std::make_unsigned_t<Ranks<T>>>(rank) ^ std::make_unsigned_t<Ranks<T>>{1} << (kBits<T> - 1);
  const auto below = static_cast<std::make_unsigned_t<Ranks<T>>>(~place);
  return Packed<T>{above} << kBits<T> | below;
}

template <class T>
Ranks<T> rank_of(Packed<T> number) {
  using Unsigned = std::make_unsigned_t<Ranks<T>>;
  return static_cast<Ranks<T>>(static_cast<Unsigned>(number >> kBits<T>) ^ Unsigned{1} << (kBits<T> - 1));
}

template <class T>
int64_t place_of(Packed<T> number) {
  return static_cast<int64_t>(static_cast<std::make_unsigned_t<Ranks<T>>>(~number));
}

// The call, and how it is cut into tasks.
struct Memory {
  const anyattention_product_key_indices_call &c;
  int64_t n, padded, m, blocks;

  explicit Memory(const anyattention_product_key_indices_call &call)
      : c(call),
        n(call.num_half_keys),
        padded((n + 15) / 16 * 16),
        m(std::min(call.k, n)),
        blocks((call.tokens + kRows - 1) / kRows) {}

  double nanoseconds(int64_t size) const {
    const double products = static_cast<double>(c.half_dim) * kPerProduct * static_cast<double>(size / 4);
    return static_cast<double>(2 * c.tokens * c.heads) * (static_cast<double>(n) * (products + 0.2) + 20.0 * static_cast<double>(c.k));
  }
};

// A thread's own numbers.
template <class T>
struct Scratch {
  T *scores;             // (kRows, padded), then their ranks
  Ranks<T> *largest;     // of groups
  Packed<T> *candidates;
  T *half_scores;        // (2, kRows, m), the best half keys' of each query
  int64_t *half_keys;    // (2, kRows, m)
  double *sums;          // (m), the next pair of each rank p
  int64_t *ids, *next;   // (m), its slot and its rank q
};

// A lower bound of the m-th largest of `vectors` vectors of ranks, of which at least m are not below it.
template <class T>
Ranks<T> bound_of(const Ranks<T> *ranks, int64_t vectors, int64_t m) {
  using Unsigned = std::make_unsigned_t<Ranks<T>>;
  constexpr Unsigned sign = Unsigned{1} << (kBits<T> - 1);
  Unsigned bound = 0;
  // The upper bits say enough.
  for (int bit = kBits<T> - 1; bit >= kBits<T> - 20; --bit) {
    const Unsigned tried = bound | Unsigned{1} << bit;
    const auto least = static_cast<Ranks<T>>(tried ^ sign);
    RankLanes<T> counts{};
    for (int64_t v = 0; v < vectors; ++v) counts -= load<kLane<T>>(ranks + v * kLane<T>) >= least;
    Ranks<T> count = 0;
    for (int lane = 0; lane < kLane<T>; ++lane) count += counts[lane];
    if (count >= m) bound = tried;
  }
  return static_cast<Ranks<T>>(bound ^ sign);
}

// Takes the places whose ranks are at least `bound`.
template <class T>
int64_t take(const Ranks<T> *ranks, int64_t padded, Ranks<T> bound, Packed<T> *candidates) {
  constexpr int lanes = kLane<T>;
  int64_t count = 0;
  for (int64_t j = 0; j < padded; j += lanes) {
#ifdef __AVX512F__
    if constexpr (lanes == 16) {
      uint32_t above = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(ranks + j), _mm512_set1_epi32(bound));
      for (; above; above &= above - 1) {
        const int64_t place = j + __builtin_ctz(above);
        candidates[count++] = packed<T>(ranks[place], place);
      }
      continue;
    }
#endif
    const RankLanes<T> above = load<lanes>(ranks + j) >= bound;
    Ranks<T> any = 0;
    for (int lane = 0; lane < lanes; ++lane) any |= above[lane];
    if (!any) continue;
    for (int lane = 0; lane < lanes; ++lane) {
      candidates[count] = packed<T>(ranks[j + lane], j + lane);
      count += above[lane] != 0;
    }
  }
  return count;
}

// The m best of `count` candidates, the best first.
template <class T>
void sort_best(Packed<T> *candidates, int64_t count, int64_t m) {
  if constexpr (sizeof(T) == 4) {
    if (count <= kCounted) {
      // The place of each is how many are better: a sort would guess half of its branches wrong.
      constexpr int lanes = 8;
      const int64_t whole = (count + lanes - 1) / lanes * lanes;
      uint64_t numbers[kCounted + lanes];
      std::fill(std::copy_n(candidates, count, numbers), numbers + whole, uint64_t{0});
      for (int64_t i = 0; i < whole; i += lanes) {
        const Vector<uint64_t, lanes> own = load<lanes>(numbers + i);
        Vector<int64_t, lanes> better{};
        for (int64_t j = 0; j < count; ++j) better -= numbers[j] > own;
        for (int lane = 0; lane < lanes; ++lane) {
          if (i + lane < count && better[lane] < m) candidates[better[lane]] = numbers[i + lane];
        }
      }
      return;
    }
  }
  if (count > m) std::nth_element(candidates, candidates + m - 1, candidates + count, std::greater<Packed<T>>());
  std::sort(candidates, candidates + m, std::greater<Packed<T>>());
}

template <class T>
class Task {
 public:
  Task(const Memory &memory, const T *turned, const Scratch<T> &scratch) : s_(memory), turned_(turned), own_(scratch) {}

  void run(int64_t h, int64_t block, int64_t *indices, T *scores) const {
    const int64_t first = block * kRows, rows = std::min(kRows, s_.c.tokens - first);
    for (int64_t a = 0; a < 2; ++a) {
      multiply(h, a, first, rows);
      for (int64_t r = 0; r < rows; ++r) choose_half_keys(a, r);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = ((first + r) * s_.c.heads + h) * s_.c.k;
      choose_pairs(r, indices + place, scores + place);
    }
  }

 private:
  void multiply(int64_t h, int64_t a, int64_t first, int64_t rows) const {
    const int64_t D = s_.c.half_dim, H = s_.c.heads;
    const T *query = static_cast<const T *>(s_.c.query) + ((first * H + h) * 2 + a) * D;
    const Product<T> products{query, 2 * H * D, 1, turned_ + (a * H + h) * D * s_.padded, s_.padded, own_.scores, s_.padded};
    for (int64_t j = 0; j < s_.padded; j += kPanel) {
      const Extent panel{j, std::min(kPanel, s_.padded - j), 0, D};
      product<false>(rows, products, [=](int64_t, int64_t) { return panel; });
    }
  }

  // The m best half keys of one half and of one row of scores.
  void choose_half_keys(int64_t a, int64_t r) const {
    constexpr int lanes = kLane<T>;
    T *scores = own_.scores + r * s_.padded;
    auto *ranks = reinterpret_cast<Ranks<T> *>(scores);
    // Where there are far more scores than are wanted, those below the m-th largest of groups' largest are left out.
    const int64_t vectors = (2 * s_.m + lanes - 1) / lanes, step = vectors * lanes;
    const bool bounds = s_.n >= 4 * step;
    if (bounds) std::fill_n(own_.largest, step, kLowest<T>);
    for (int64_t j = 0, group = 0; j < s_.padded; j += lanes) {
      RankLanes<T> mine = ranks_of<T>(load<lanes>(scores + j));
      for (int64_t lane = std::max<int64_t>(s_.n - j, 0); lane < lanes; ++lane) mine[lane] = kLowest<T>;
      store<Ranks<T>, lanes>(ranks + j, mine);
      if (!bounds) continue;
      const RankLanes<T> before = load<lanes>(own_.largest + group);
      store<Ranks<T>, lanes>(own_.largest + group, mine > before ? mine : before);
      group = group + lanes < step ? group + lanes : 0;
    }
    const Ranks<T> bound = bounds ? bound_of<T>(own_.largest, vectors, s_.m) : kLowest<T>;
    int64_t count = take<T>(ranks, s_.padded, std::max<Ranks<T>>(bound, kLowest<T> + 1), own_.candidates);
    sort_best<T>(own_.candidates, count, s_.m);
    for (int64_t p = 0; p < s_.m; ++p) {
      own_.half_scores[(a * kRows + r) * s_.m + p] = score_of<T>(rank_of<T>(own_.candidates[p]));
      own_.half_keys[(a * kRows + r) * s_.m + p] = place_of<T>(own_.candidates[p]);
    }
  }

  // The k best pairs of one row. A pair is looked at once those that are surely better are taken: the one before it of its
  // first half, and the first one of the first half before.
  void choose_pairs(int64_t r, int64_t *indices, T *scores) const {
    const int64_t m = s_.m;
    const T *first = own_.half_scores + r * m, *second = own_.half_scores + (kRows + r) * m;
    const int64_t *i = own_.half_keys + r * m, *j = own_.half_keys + (kRows + r) * m;
    const auto look_at = [&](int64_t p, int64_t q) {
      const double sum = static_cast<double>(first[p]) + static_cast<double>(second[q]);
      own_.sums[p] = sum == sum ? sum : std::numeric_limits<double>::infinity();
      own_.ids[p] = i[p] * s_.n + j[q];
      own_.next[p] = q;
    };
    int64_t count = 1;
    look_at(0, 0);
    for (int64_t taken = 0; taken < s_.c.k; ++taken) {
      int64_t best = 0;
      for (int64_t p = 1; p < count; ++p) {
        const bool is_better = own_.sums[p] > own_.sums[best] ||
                               (own_.sums[p] == own_.sums[best] && own_.ids[p] < own_.ids[best]);
        best = is_better ? p : best;
      }
      indices[taken] = own_.ids[best];
      scores[taken] = first[best] + second[own_.next[best]];
      if (own_.next[best] == 0 && count < m) look_at(count++, 0);
      if (own_.next[best] + 1 < m) {
        look_at(best, own_.next[best] + 1);
      } else {
        own_.sums[best] = -std::numeric_limits<double>::infinity();
        own_.ids[best] = std::numeric_limits<int64_t>::max();
      }
    }
  }

  const Memory &s_;
  const T *turned_;
  Scratch<T> own_;
};

// (half_dim, padded) of each half and head: half keys side by side.
template <class T>
void turn_half_keys(const Memory &s, int64_t row, T *turned) {
  const int64_t D = s.c.half_dim;
  const T *keys = static_cast<const T *>(s.c.half_keys) + row * s.n * D;
  T *to = turned + row * D * s.padded;
  for (int64_t d = 0; d < D; ++d) std::fill(to + d * s.padded + s.n, to + (d + 1) * s.padded, T{0});
  for (int64_t j = 0; j < s.n; ++j) {
    for (int64_t d = 0; d < D; ++d) to[d * s.padded + j] = keys[j * D + d];
  }
}

template <class T>
void select(const Memory &s, int64_t *indices, T *scores) {
  const int64_t heads = s.c.heads, tasks = heads * s.blocks;
  const int team = team_size(s.c.num_threads, tasks, s.nanoseconds(sizeof(T)));
  const int64_t groups = (2 * s.m + 2 * kLane<T>), m = s.m;
  const Workspace<T> turned(2 * heads * s.c.half_dim * s.padded, false), products(team * kRows * s.padded, false);
  const Workspace<Ranks<T>> largest(team * groups, false);
  const Workspace<Packed<T>> candidates(team * (s.padded + kLane<T>), false);
  const Workspace<T> half_scores(team * 2 * kRows * m, false);
  const Workspace<int64_t> half_keys(team * 2 * kRows * m, false), ids(team * m, false), next(team * m, false);
  const Workspace<double> sums(team * m, false);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int64_t thread = thread_number();
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < 2 * heads; ++row) turn_half_keys<T>(s, row, turned.get());
    const Scratch<T> own{products.get() + thread * kRows * s.padded,
                         largest.get() + thread * groups,
                         candidates.get() + thread * (s.padded + kLane<T>),
                         half_scores.get() + thread * 2 * kRows * m,
                         half_keys.get() + thread * 2 * kRows * m,
                         sums.get() + thread * m,
                         ids.get() + thread * m,
                         next.get() + thread * m};
    const Task<T> task(s, turned.get(), own);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < tasks; ++n) task.run(n / s.blocks, n % s.blocks, indices, scores);
  }
}

bool is_valid(const anyattention_product_key_indices_call *c) {
  if (!c || c->tokens < 0 || c->heads < 0 || c->halves != 2 || c->half_dim < 1 || c->num_half_keys < 1) return false;
  if (c->num_half_keys > ANYATTENTION_MOST_HALF_KEYS || c->k < 1 || c->num_threads < 1) return false;
  if (c->k > c->num_half_keys * c->num_half_keys) return false;
  return c->tokens == 0 || c->heads == 0 || (c->query && c->half_keys);
}

}  // namespace
}  // namespace anyattention

extern "C" int32_t anyattention_product_key_indices(const anyattention_product_key_indices_call *call, int64_t *indices,
                                                   void *scores) {
  using namespace anyattention;
  if (!is_valid(call)) return ANYATTENTION_INVALID_ARGUMENT;
  if (call->tokens == 0 || call->heads == 0) return ANYATTENTION_OK;
  if (!indices || !scores) return ANYATTENTION_INVALID_ARGUMENT;
  try {
    const Memory memory(*call);
    call->is_double ? select(memory, indices, static_cast<double *>(scores))
                    : select(memory, indices, static_cast<float *>(scores));
    return ANYATTENTION_OK;
  } catch (const std::bad_alloc &) {
    return ANYATTENTION_OUT_OF_MEMORY;
  }
}
