// Graph attention on rows that are a little narrower than those that have code of their own: on copies whose heads end with
// zeros, which add nothing to a product. A row is copied once, and read once for each of its edges.
#ifndef ANYATTENTION_PADDED_CALL_H
#define ANYATTENTION_PADDED_CALL_H

#include <cstdint>
#include <type_traits>

#include "anyattention.h"
#include "rows.h"
#include "team.h"
#include "workspace.h"

namespace anyattention {

// The width that a call's heads are padded to; 0 where the call runs as it is.
inline int64_t padded_width(const anyattention_graph_attention_call &c, bool has_head_dim) {
  const bool is_plain = c.normalize && c.softcap == 0 && !c.bias.data && !c.term.data && !c.is_double;
  const bool has_heads = c.heads == c.key_heads && c.heads <= 8 && (c.heads & (c.heads - 1)) == 0;
  const bool has_edges = c.graph.num_edges > 0 && c.graph.num_edges >= c.graph.num_queries + c.graph.num_keys;
  if (!is_plain || !has_heads || !has_edges || (has_head_dim && c.head_dim != c.value_dim)) return 0;
  if (!has_head_dim && c.key == c.value) return 0;  // rows of one gradient, of which values alone would be padded
  for (int64_t width : {8, 16, 32, 64}) {
    if (width < c.value_dim) continue;
    // A wide row that is half zeros would take longer than a narrow one without vectors.
    const bool is_near = width == 8 || 4 * c.value_dim >= 3 * width;
    return width > c.value_dim && is_near && c.heads * width <= 128 ? width : 0;
  }
  return 0;
}

class PaddedCall {
 public:
  anyattention_graph_attention_call call;

  // Throws std::bad_alloc.
  PaddedCall(const anyattention_graph_attention_call &c, int64_t width, bool has_head_dim)
      : call(c),
        width_(width),
        has_head_dim_(has_head_dim),
        value_(keys() * heads_width(), false),
        key_(has_head_dim && !is_shared(c) ? keys() * heads_width() : 0, false),
        query_(has_head_dim ? queries() * heads_width() : 0, false),
        vector_(c.vector ? heads_width() : 0, false) {
    pad(c.value, keys(), c.value_stride, c.value_dim, value_.get());
    call.value = value_.get();
    call.value_dim = width;
    call.value_stride = heads_width();
    if (!has_head_dim) return;
    call.key = call.value;
    if (!is_shared(c)) {
      pad(c.key, keys(), c.key_stride, c.head_dim, key_.get());
      call.key = key_.get();
    }
    pad(c.query, queries(), c.query_stride, c.head_dim, query_.get());
    call.query = query_.get();
    if (c.vector) {
      pad(c.vector, 1, c.heads * c.head_dim, c.head_dim, vector_.get());
      call.vector = vector_.get();
    }
    call.head_dim = width;
    call.key_stride = call.query_stride = heads_width();
  }

  int64_t keys() const { return call.batch * call.graph.num_keys; }
  int64_t queries() const { return call.batch * call.graph.num_queries; }
  int64_t heads_width() const { return call.heads * width_; }
  bool pads_keys() const { return has_head_dim_; }

  void pad(const void *from, int64_t rows, int64_t stride, int64_t width, float *to) const {
    const float *const narrow = static_cast<const float *>(from);
    each_head_of(rows, [=](auto wide, int64_t row, int64_t h) {
      const float *own = narrow + row * stride + h * width;
      float *padded = to + row * heads_width() + h * wide();
      for (int64_t c = 0; c < wide(); ++c) padded[c] = c < width ? own[c] : 0.0f;
    });
  }
  void unpad(const float *from, int64_t rows, void *to, int64_t stride, int64_t width) const {
    float *const narrow = static_cast<float *>(to);
    each_head_of(rows, [=](auto wide, int64_t row, int64_t h) {
      const float *padded = from + row * heads_width() + h * wide();
      float *own = narrow + row * stride + h * width;
      for (int64_t c = 0; c < wide(); ++c) {
        if (c < width) own[c] = padded[c];
      }
    });
  }

 private:
  int64_t width_;
  bool has_head_dim_;
  Workspace<float> value_, key_, query_, vector_;

  static bool is_shared(const anyattention_graph_attention_call &c) {
    return c.key == c.value && c.key_stride == c.value_stride;
  }

  // Calls body(width, row, head), the padded width known to the compiler, which copies with masks instead of calls.
  template <class Body>
  void each_head_of(int64_t rows, const Body &body) const {
    switch (width_) {
      case 8: return each_head_of(rows, std::integral_constant<int64_t, 8>(), body);
      case 16: return each_head_of(rows, std::integral_constant<int64_t, 16>(), body);
      case 32: return each_head_of(rows, std::integral_constant<int64_t, 32>(), body);
      default: return each_head_of(rows, std::integral_constant<int64_t, 64>(), body);
    }
  }

  template <class Width, class Body>
  void each_head_of(int64_t rows, Width width, const Body &body) const {
    const int64_t heads = call.heads;
    const int team = team_size(call.num_threads, rows, static_cast<double>(rows * heads * width()) * kPerNumber);
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t h = 0; h < heads; ++h) body(width, row, h);
    }
  }
};

}  // namespace anyattention

#endif
