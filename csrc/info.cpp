#include <cstring>

#include "anyattention.h"
#include "pages.h"
#include "team.h"

namespace {

struct Structure {
  const char *name;
  int64_t size;
};

// Every structure that crosses the interface.
constexpr Structure kStructures[] = {
    {"graph_arrays", sizeof(anyattention_graph_arrays)},
    {"edge_numbers", sizeof(anyattention_edge_numbers)},
    {"pairs", sizeof(anyattention_pairs)},
    {"head_rows", sizeof(anyattention_head_rows)},
    {"run_part", sizeof(anyattention_run_part)},
    {"edge_dot", sizeof(anyattention_edge_dot_call)},
    {"edge_sum", sizeof(anyattention_edge_sum_call)},
    {"edge_softmax", sizeof(anyattention_edge_softmax_call)},
    {"edge_total", sizeof(anyattention_edge_total_call)},
    {"edge_argmax", sizeof(anyattention_edge_argmax_call)},
    {"graph_attention", sizeof(anyattention_graph_attention_call)},
    {"graph_attention_weights", sizeof(anyattention_graph_attention_weights_call)},
    {"graph_attention_backward", sizeof(anyattention_graph_attention_backward_call)},
    {"dynamic_dot", sizeof(anyattention_dynamic_dot_call)},
    {"dynamic_sums", sizeof(anyattention_dynamic_sums_call)},
    {"run_attention", sizeof(anyattention_run_attention_call)},
    {"run_attention_backward", sizeof(anyattention_run_attention_backward_call)},
    {"run_attention_double_backward", sizeof(anyattention_run_attention_double_backward_call)},
    {"run_attention_weights", sizeof(anyattention_run_attention_weights_call)},
    {"run_attention_weights_backward", sizeof(anyattention_run_attention_weights_backward_call)},
    {"topk_indices", sizeof(anyattention_topk_indices_call)},
    {"cluster_search", sizeof(anyattention_cluster_search_call)},
    {"product_key_indices", sizeof(anyattention_product_key_indices_call)},
    {"slot_attention", sizeof(anyattention_slot_attention_call)},
    {"used_slots", sizeof(anyattention_used_slots)},
    {"slot_attention_backward", sizeof(anyattention_slot_attention_backward_call)},
    {"distance_terms", sizeof(anyattention_distance_terms_call)},
    {"distance_terms_backward", sizeof(anyattention_distance_terms_backward_call)},
};

}  // namespace

extern "C" {

int64_t anyattention_size_of(const char *structure) {
  for (const Structure &known : kStructures) {
    if (structure && std::strcmp(structure, known.name) == 0) return known.size;
  }
  return -1;
}

const char *anyattention_version(void) { return ANYATTENTION_VERSION; }

const char *anyattention_level(void) { return ANYATTENTION_LEVEL; }

int32_t anyattention_threaded(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int32_t anyattention_team_size(int64_t threads, int64_t pieces, double nanoseconds) {
  return anyattention::team_size(threads, pieces, nanoseconds);
}

int32_t anyattention_prefer_large_pages(void *pointer, int64_t bytes) {
  if (!pointer || bytes < 0) return ANYATTENTION_INVALID_ARGUMENT;
  anyattention::prefer_large_pages(pointer, bytes);
  return ANYATTENTION_OK;
}
}
