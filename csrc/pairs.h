// Numbers of pairs of a query and a key: where they lie, and whether all of them lie inside.
#ifndef ANYATTENTION_PAIRS_H
#define ANYATTENTION_PAIRS_H

#include <algorithm>
#include <cstdint>

#include "anyattention.h"

namespace anyattention {

// Where the numbers of a batch entry's head begin.
inline int64_t place_of_head(const anyattention_pairs &pairs, int64_t b, int64_t h) {
  return pairs.offset + b * pairs.strides[0] + h * pairs.strides[1];
}

// Whether the numbers of all pairs of a call lie below `size`.
template <class Call>
bool is_inside(const anyattention_pairs &pairs, const Call &c) {
  if (!pairs.numbers) return true;
  const int64_t sizes[] = {c.batch, c.heads, c.num_queries, c.num_keys};
  int64_t low = pairs.offset, high = pairs.offset;
  for (int axis = 0; axis < 4; ++axis) {
    if (sizes[axis] == 0) return true;
    const int64_t reach = (sizes[axis] - 1) * pairs.strides[axis];
    low += std::min<int64_t>(reach, 0), high += std::max<int64_t>(reach, 0);
  }
  return low >= 0 && high < pairs.size;
}

}  // namespace anyattention

#endif
