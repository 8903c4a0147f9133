// The scores of graph attention: one struct for each, with everything that the kernels must know of it.
//
// To add a score, write its struct and add it to the list at the end. A score has
//
//   kName                     what anyattention_score knows it by
//   kHeadDim                  its only head_dim, 0 where it has any
//   kHasVector                whether it has a vector (H, D), and a gradient of that
//   kQueryGradientReadsKeys   whether the gradient of a query takes more than the gradients of its raw scores
//
// and, for a Call `c` (graph_call.h), the rows q (H, D) of a query and k (G, D) of a key, and gradients `by_raw`
//
//   raw_scores(c, q, k, e, raw, slopes)            the raw scores (H) of edge e, its term added, and their derivatives
//                                                  (H) by what the term is added to; by_raw is by that
//   add_by_key(c, h, tile, k, by_key, by_vector)   adds head h's part of a tile to the gradients (G, D) of the key and
//                                                  (H, D) of the vector
//   add_by_query(c, e, by_raw, q, k, by_query)     adds an edge's part to the gradient (H, D) of the query
//
// A head hidden from an edge (c.hides) adds nothing, whatever the rows hold. The same in registers, for `Heads` heads of
// `Width` channels, of value too, without term and bias:
//
//   scaled_scores<Heads>(c, q, k, slopes)   scores times c.scale; `slopes` come as c.scale, and leave as derivatives
//   KeySums<Heads, Width>                   sums over a key's edges: add(c, by_raw, q, k) for each edge, and then
//                                           write(c, by_key, by_vector)
//   QuerySums<Heads, Width>                 sums over a query's edges: add(c, by_raw, q, k) and write(c, by_query); k is
//                                           there where kQueryGradientReadsKeys
#ifndef ANYATTENTION_SCORES_H
#define ANYATTENTION_SCORES_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace anyattention {

// Some slots of a key, up to kTile: their edges, the rows of their queries and the gradients (count, H) by raw scores.
template <class T>
struct Tile {
  int64_t count;
  const int64_t *edges;
  const T *const *queries;
  const T *by_raw;
};

// query . key + term
struct Dot {
  static constexpr const char *kName = "Dot";
  static constexpr int kHeadDim = 0;
  static constexpr bool kHasVector = false, kQueryGradientReadsKeys = true;

  template <class Call, class T>
  static void raw_scores(const Call &c, const T *q, const T *k, int64_t e, T *raw, T *slopes) {
    head_dots<Call::kHeadDim>(q, k, c.H, c.group, channels<Call::kHeadDim>(c.D), raw);
    each_head(c.H, [=](int64_t h) { slopes[h] = 1; });
    if (c.term.data) {
      for (int64_t h = 0; h < c.H; ++h) raw[h] += c.term.at(e, h);
    }
  }

  template <class Call, class T>
  static void add_by_key(const Call &c, int64_t h, const Tile<T> &tile, const T *, T *by_key, T *) {
    const int64_t d = channels<Call::kHeadDim>(c.D);
    c.template add_visible<Call::kHeadDim>(h, tile.edges, by_key + c.key_head(h) * d, tile.by_raw + h, tile.queries,
                                           h * d, tile.count, d);
  }

  template <class Call, class T>
  static void add_by_query(const Call &c, int64_t e, const T *by_raw, const T *, const T *k, T *by_query) {
    const int64_t d = channels<Call::kHeadDim>(c.D);
    for (int64_t h = 0; h < c.H; ++h) {
      if (!c.hides(e, h)) add_scaled<Call::kHeadDim>(by_query + h * d, by_raw[h], k + c.key_head(h) * d, d);
    }
  }

  template <int Heads, class Call>
  static Vector<float, Heads> scaled_scores(const Call &c, const float *q, const float *k, Vector<float, Heads> &) {
    return RegisterRow<Heads, Call::kHeadDim>::dots(q, k) * c.scale;
  }

  template <int Heads, int Width>
  struct KeySums {
    RegisterRow<Heads, Width> by_key{};

    template <class Call>
    void add(const Call &, Vector<float, Heads> by_raw, const float *q, const float *) {
      by_key.add(by_raw, q);
    }
    template <class Call>
    void write(const Call &, float *to_key, float *) const {
      by_key.write(to_key);
    }
  };

  template <int Heads, int Width>
  struct QuerySums {
    RegisterRow<Heads, Width> by_query{};

    template <class Call>
    void add(const Call &, Vector<float, Heads> by_raw, const float *, const float *k) {
      by_query.add(by_raw, k);
    }
    template <class Call>
    void write(const Call &, float *to_query) const {
      by_query.write(to_query);
    }
  };
};

// LeakyReLU(query + key + term), of one number each (GAT)
struct Additive {
  static constexpr const char *kName = "Additive";
  static constexpr int kHeadDim = 1;
  static constexpr bool kHasVector = false, kQueryGradientReadsKeys = false;

  template <class Call, class T>
  static void raw_scores(const Call &c, const T *q, const T *k, int64_t e, T *raw, T *slopes) {
    if (c.G == c.H) {
      each_head(c.H, [=](int64_t h) { raw[h] = q[h] + k[h]; });
    } else {
      for (int64_t h = 0; h < c.H; ++h) raw[h] = q[h] + k[h / c.group];
    }
    if (c.term.data) {
      for (int64_t h = 0; h < c.H; ++h) raw[h] += c.term.at(e, h);
    }
    const T below = c.slope;
    each_head(c.H, [=](int64_t h) { slopes[h] = raw[h] > 0 ? T{1} : below; });
    each_head(c.H, [=](int64_t h) { raw[h] *= slopes[h]; });
  }

  template <class Call, class T>
  static void add_by_key(const Call &c, int64_t h, const Tile<T> &tile, const T *, T *by_key, T *) {
    const int64_t g = c.key_head(h);
    for (int64_t n = 0; n < tile.count; ++n) by_key[g] += tile.by_raw[n * c.H + h];
  }

  template <class Call, class T>
  static void add_by_query(const Call &c, int64_t, const T *by_raw, const T *, const T *, T *by_query) {
    each_head(c.H, [=](int64_t h) { by_query[h] += by_raw[h]; });
  }

  template <int Heads, class Call>
  static Vector<float, Heads> scaled_scores(const Call &c, const float *q, const float *k,
                                            Vector<float, Heads> &slopes) {
    const Vector<float, Heads> sum = load<Heads>(q) + load<Heads>(k);
    slopes = sum > 0 ? slopes : slopes * c.slope;
    return sum * slopes;
  }

  template <int Heads, int>
  struct KeySums {
    Vector<float, Heads> by_key{};

    template <class Call>
    void add(const Call &, Vector<float, Heads> by_raw, const float *, const float *) {
      by_key += by_raw;
    }
    template <class Call>
    void write(const Call &, float *to_key, float *) const {
      store<float, Heads>(to_key, by_key);
    }
  };

  template <int Heads, int>
  struct QuerySums {
    Vector<float, Heads> by_query{};

    template <class Call>
    void add(const Call &, Vector<float, Heads> by_raw, const float *, const float *) {
      by_query += by_raw;
    }
    template <class Call>
    void write(const Call &, float *to_query) const {
      store<float, Heads>(to_query, by_query);
    }
  };
};

// vector . LeakyReLU(query + key) (GATv2)
struct Dynamic {
  static constexpr const char *kName = "Dynamic";
  static constexpr int kHeadDim = 0;
  static constexpr bool kHasVector = true, kQueryGradientReadsKeys = true;

  template <class Call, class T>
  static void raw_scores(const Call &c, const T *q, const T *k, int64_t, T *raw, T *slopes) {
    const int64_t d = channels<Call::kHeadDim>(c.D);
    for (int64_t h = 0; h < c.H; ++h) {
      raw[h] = rectified_dot<Call::kHeadDim>(c.vector + h * d, q + h * d, k + c.key_head(h) * d, c.slope, d);
    }
    each_head(c.H, [=](int64_t h) { slopes[h] = 1; });
  }

  template <class Call, class T>
  static void add_by_key(const Call &c, int64_t h, const Tile<T> &tile, const T *k, T *by_key, T *by_vector) {
    const int64_t d = channels<Call::kHeadDim>(c.D), g = c.key_head(h);
    for (int64_t n = 0; n < tile.count; ++n) {
      if (c.hides(tile.edges[n], h)) continue;
      add_gradients<Call::kHeadDim>(tile.by_raw[n * c.H + h], c.vector + h * d, tile.queries[n] + h * d, k + g * d,
                                    c.slope, d, by_key + g * d, by_vector + h * d);
    }
  }

  template <class Call, class T>
  static void add_by_query(const Call &c, int64_t e, const T *by_raw, const T *q, const T *k, T *by_query) {
    const int64_t d = channels<Call::kHeadDim>(c.D);
    for (int64_t h = 0; h < c.H; ++h) {
      if (c.hides(e, h)) continue;
      add_gradients<Call::kHeadDim>(by_raw[h], c.vector + h * d, q + h * d, k + c.key_head(h) * d, c.slope, d,
                                    by_query + h * d, static_cast<T *>(nullptr));
    }
  }

  template <int Heads, class Call>
  static Vector<float, Heads> scaled_scores(const Call &c, const float *q, const float *k, Vector<float, Heads> &) {
    using Row = RegisterRow<Heads, Call::kHeadDim>;
    Row parts;
    for (int n = 0; n < Heads * Row::kParts; ++n) {
      const auto x = Row::part_of(q, n) + Row::part_of(k, n);
      parts.part[n] = Row::part_of(c.vector, n) * (x > 0 ? x : x * c.slope);
    }
    return parts.sums() * c.scale;
  }

  template <int Heads, int Width>
  struct KeySums {
    using Row = RegisterRow<Heads, Width>;
    Row by_key{}, by_vector{};

    template <class Call>
    void add(const Call &c, Vector<float, Heads> by_raw, const float *q, const float *k) {
      for (int n = 0; n < Heads * Row::kParts; ++n) {
        const auto x = Row::part_of(q, n) + Row::part_of(k, n);
        const typename Row::Part above = typename Row::Part{} + by_raw[n / Row::kParts];
        const typename Row::Part part = x > 0 ? above : above * c.slope;
        by_key.part[n] += part;
        by_vector.part[n] += part * x;
      }
    }
    template <class Call>
    void write(const Call &c, float *to_key, float *to_vector) {
      for (int n = 0; n < Heads * Row::kParts; ++n) by_key.part[n] *= Row::part_of(c.vector, n);
      by_key.write(to_key);
      by_vector.write(to_vector);
    }
  };

  template <int Heads, int Width>
  struct QuerySums {
    using Row = RegisterRow<Heads, Width>;
    Row by_query{};

    template <class Call>
    void add(const Call &c, Vector<float, Heads> by_raw, const float *q, const float *k) {
      for (int n = 0; n < Heads * Row::kParts; ++n) {
        const auto x = Row::part_of(q, n) + Row::part_of(k, n);
        const typename Row::Part above = typename Row::Part{} + by_raw[n / Row::kParts];
        by_query.part[n] += x > 0 ? above : above * c.slope;
      }
    }
    template <class Call>
    void write(const Call &c, float *to_query) {
      for (int n = 0; n < Heads * Row::kParts; ++n) by_query.part[n] *= Row::part_of(c.vector, n);
      by_query.write(to_query);
    }
  };

 private:
  // a . LeakyReLU(q + k)
  template <int Width, class T>
  static T rectified_dot(const T *a, const T *q, const T *k, T slope, int64_t count) {
    if constexpr (Width > 1) {
      constexpr int lanes = kLanes<Width, T>;
      Vector<T, lanes> sum{};
      for (int c = 0; c < Width; c += lanes) {
        const Vector<T, lanes> x = load<lanes>(q + c) + load<lanes>(k + c);
        sum += load<lanes>(a + c) * (x > 0 ? x : x * slope);
      }
      return sum_of<T, lanes>(sum);
    } else {
      T sum = 0;
      for (int64_t c = 0; c < count; ++c) {
        const T x = q[c] + k[c];
        sum += a[c] * (x > 0 ? x : slope * x);
      }
      return sum;
    }
  }

  // Adds the gradients of `factor * rectified_dot`: by q (or k, they are equal) and, where `by_a` is given, by a.
  template <int Width, class T>
  static void add_gradients(T factor, const T *a, const T *q, const T *k, T slope, int64_t count, T *by_row, T *by_a) {
    if constexpr (Width > 1) {
      constexpr int lanes = kLanes<Width, T>;
      const Vector<T, lanes> above = Vector<T, lanes>{} + factor, below = above * slope;
      for (int c = 0; c < Width; c += lanes) {
        const Vector<T, lanes> x = load<lanes>(q + c) + load<lanes>(k + c);
        const Vector<T, lanes> part = x > 0 ? above : below;
        store<T, lanes>(by_row + c, load<lanes>(by_row + c) + part * load<lanes>(a + c));
        if (by_a) store<T, lanes>(by_a + c, load<lanes>(by_a + c) + part * x);
      }
    } else {
      for (int64_t c = 0; c < count; ++c) {
        const T x = q[c] + k[c];
        const T part = x > 0 ? factor : factor * slope;
        by_row[c] += part * a[c];
        if (by_a) by_a[c] += part * x;
      }
    }
  }
};

template <class... Each>
struct List {
  // The number of a score by its name, -1 where there is none of that name.
  static int32_t number_of(const char *name) {
    const char *const names[] = {Each::kName...};
    for (std::size_t number = 0; name && number < sizeof...(Each); ++number) {
      if (std::strcmp(name, names[number]) == 0) return static_cast<int32_t>(number);
    }
    return -1;
  }

  // body(Score{}) for the score of a number, else false.
  template <class Body>
  static bool with(int32_t number, const Body &body) {
    int32_t next = 0;
    bool result = false;
    ((next++ == number && (result = body(Each{}), true)) || ...);
    return result;
  }
};

// A score's place in this list is its number.
using Scores = List<Dot, Additive, Dynamic>;

}  // namespace anyattention

#endif
