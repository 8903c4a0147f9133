// Drives neighbour sampling over random rows, as properties.cpp does the other functions.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../anyattention.h"
#include "random_arrays.h"

namespace {

using namespace tests;

// Compressed rows, weights of which some are 0, and nodes to draw for.
struct Sampled {
  int64_t rows, columns, edges;
  Array<int64_t> offsets, slot_columns, slot_edges, nodes;
  Array<float> floats;
  Array<double> doubles;
  bool has_weights, is_double, has_places;

  Sampled(int64_t rows, int64_t columns, int64_t edges, int64_t nodes)
      : rows(rows),
        columns(columns),
        edges(edges),
        offsets(rows + 1),
        slot_columns(edges),
        slot_edges(edges),
        nodes(nodes),
        floats(edges),
        doubles(edges),
        has_weights(chance(0.4)),
        is_double(chance(0.5)),
        has_places(chance(0.5)) {
    for (int64_t r = 1; r < rows; ++r) offsets[r] = std::min(edges, offsets[r - 1] + (chance(0.2) ? up_to(edges) : up_to(9)));
    if (rows > 0) offsets[rows] = edges;
    for (int64_t s = 0; s < edges; ++s) {
      slot_columns[s] = up_to(columns - 1);
      slot_edges[s] = s;
      doubles[s] = chance(0.3) ? 0 : static_cast<double>(1 + up_to(5)) / 4;
      floats[s] = static_cast<float>(doubles[s]);
    }
    std::shuffle(slot_edges.get(), slot_edges.get() + edges, generator);
    for (int64_t i = 0; i < nodes; ++i) this->nodes[i] = up_to(rows - 1);
  }

  const void *weights() const {
    if (!has_weights) return nullptr;
    return is_double ? static_cast<const void *>(doubles.get()) : floats.get();
  }
  const int64_t *places() const { return has_weights && has_places ? slot_edges.get() : nullptr; }

  int32_t count(int64_t fanout, int64_t threads, const Array<int64_t> &found) const {
    return anyattention_sampled_offsets(offsets.get(), rows, edges, weights(), places(), is_double, nodes.get(), nodes.count,
                                        fanout, threads, found.get());
  }
  int32_t draw(const Array<int64_t> &found, int64_t num_places, int64_t threads, const Array<int64_t> &drawn_columns,
               const Array<int64_t> &positions, const Array<int64_t> &drawn_edges) const {
    return anyattention_sampled_rows(offsets.get(), slot_columns.get(), slot_edges.get(), rows, columns, edges, weights(),
                                     places(), is_double, nodes.get(), nodes.count, found.get(), num_places, 3, 5, 2,
                                     threads, drawn_columns.get(), positions.get(), drawn_edges.get());
  }
};

int64_t wild_below(int64_t limit) { return one_of<int64_t>({-1, INT64_MIN, INT64_MAX, int64_t{1} << 40, limit}); }

void require_drawn(const Sampled &given, int64_t fanout, const Array<int64_t> &found, const Array<int64_t> &columns,
                   const Array<int64_t> &positions, const Array<int64_t> &edges) {
  std::vector<int64_t> slot_of(static_cast<std::size_t>(given.edges));
  for (int64_t s = 0; s < given.edges; ++s) slot_of[static_cast<std::size_t>(given.slot_edges[s])] = s;
  for (int64_t i = 0; i < given.nodes.count; ++i) {
    const int64_t begin = given.offsets[given.nodes[i]], end = given.offsets[given.nodes[i] + 1];
    int64_t there = 0, last = begin - 1;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t place = given.places() ? given.slot_edges[s] : s;
      there += !given.has_weights || given.doubles[place] > 0;
    }
    require(found[i + 1] - found[i] == (fanout < 0 ? there : std::min(there, fanout)), "as many as there are", i);
    for (int64_t p = found[i]; p < found[i + 1]; ++p) {
      const int64_t slot = slot_of[static_cast<std::size_t>(edges[p])];
      require(last < slot && slot < end, "slots of the row, ascending", slot);
      require(columns[p] == given.slot_columns[slot] && positions[p] == 3 + i, "a column and a position", p);
      require(!given.has_weights || given.doubles[given.places() ? edges[p] : slot] > 0, "no slot without weight", slot);
      last = slot;
    }
  }
}

void drive_numbers(bool faulty) {
  const int64_t nodes = 1 + up_to(40), ids = up_to(200), known = up_to(std::min<int64_t>(nodes, 5));
  const bool is_wide = chance(0.5);
  const Array<int64_t> given(ids), numbers(ids), found(nodes), wide(nodes);
  const Array<int32_t> narrow(nodes);
  for (int64_t n = 0; n < nodes; ++n) {
    // Whatever is there.
    wide[n] = chance(0.3) ? wild_below(nodes) : up_to(nodes);
    narrow[n] = static_cast<int32_t>(wide[n]);
    found[n] = n;
  }
  std::shuffle(found.get(), found.get() + nodes, generator);
  for (int64_t n = 0; n < known; ++n) wide[found[n]] = n, narrow[found[n]] = static_cast<int32_t>(n);
  for (int64_t p = 0; p < ids; ++p) given[p] = numbers[p] = up_to(nodes - 1);
  const bool broken = faulty && ids > 0;
  if (broken) numbers[up_to(ids - 1)] = wild_below(nodes);
  int64_t count = known;
  void *places = is_wide ? static_cast<void *>(wide.get()) : narrow.get();
  auto meddler = meddler_of({&numbers});
  const int32_t status = anyattention_numbered_nodes(numbers.get(), ids, nodes, places, is_wide, found.get(), nodes, &count);
  meddler.reset();
  require(status == (broken ? ANYATTENTION_OUT_OF_RANGE : ANYATTENTION_OK), "numbers of nodes", status);
  if (broken || is_meddled) return;
  int64_t next = known;
  for (int64_t p = 0; p < ids; ++p) {
    require(0 <= numbers[p] && numbers[p] <= next && found[numbers[p]] == given[p], "a number has its node", p);
    next = std::max(next, numbers[p] + 1);
  }
  require(next == count, "numbers in order", count);
}

}  // namespace

void drive_neighbour_sampling(bool faulty) {
  drive_numbers(faulty);
  const int64_t rows = 1 + up_to(chance(0.2) ? 400 : 12), columns = 1 + up_to(20), edges = up_to(chance(0.3) ? 9000 : 90);
  const Sampled given(rows, columns, edges, up_to(chance(0.2) ? 700 : 20));
  const int64_t fanout = one_of<int64_t>({-1, 1, 3, 15, 70, 300});
  const Array<int64_t> found(given.nodes.count + 1);
  auto meddler = meddler_of({&given.offsets, &given.slot_columns, &given.slot_edges, &given.nodes});
  const int32_t counted = given.count(fanout, 1 + up_to(2), found);
  require(counted == ANYATTENTION_OK, "counts of what is drawn", counted);
  if (counted != ANYATTENTION_OK) return;
  const int64_t drawn = std::max<int64_t>(found[given.nodes.count], 0);
  if (faulty && given.nodes.count > 0 && edges > 0) {
    const int64_t row = up_to(rows - 1), kind = up_to(2);
    if (kind == 0) given.nodes[up_to(given.nodes.count - 1)] = wild_below(rows);
    if (kind == 1) found[1 + up_to(given.nodes.count - 1)] = wild_below(drawn + edges + 1);
    if (kind == 2) {
      given.nodes[0] = row;
      given.offsets[row] = one_of<int64_t>({-1, INT64_MIN, INT64_MAX, edges + 1});
    }
    const Array<int64_t> out[] = {Array<int64_t>(drawn), Array<int64_t>(drawn), Array<int64_t>(drawn)};
    const int32_t status = given.draw(found, drawn, 1 + up_to(2), out[0], out[1], out[2]);
    require(status == (drawn > 0 || kind != 2 ? ANYATTENTION_OUT_OF_RANGE : status), "a planted fault of rows", status);
    return;
  }
  const Array<int64_t> drawn_columns(drawn), positions(drawn), drawn_edges(drawn);
  const int32_t status = given.draw(found, drawn, 1 + up_to(2), drawn_columns, positions, drawn_edges);
  meddler.reset();
  require(status == ANYATTENTION_OK, "what is drawn", status);
  if (!is_meddled) require_drawn(given, fanout, found, drawn_columns, positions, drawn_edges);
}
