"""The Graph of an edge list inside a compiled program, whose arrays are found at each run and sorted once."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.ambient import shielded
from anyattention.interop.pyg.remembered import graph_of_programs
from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.ops.handles import names_of
from anyattention.patterns import Graph

__all__ = ["named_graph"]

# As `names_of` has them: key_index, query_index and then the others.
_FIELDS = tuple(reversed(GraphArrays.__dataclass_fields__))
_library = torch.library.Library("anyattention", "FRAGMENT")
_library.define("remembered_graph(Tensor edges, SymInt num_sources, SymInt num_targets, SymInt num_loops) -> Tensor")


def named_graph(edge_index: Tensor, num_sources: int, num_targets: int, num_loops: int | None, num_edges: int) -> Graph:
    """While a compiler traces: a Graph for operators alone, whose arrays are names; see `ops.handles`.

    Args:
        edge_index, num_sources, num_targets, num_loops: as `prepared_graph`; a plain tensor.
        num_edges: the number of edges, self-loops included; where no number for each edge is given or taken, any.
    """
    loops = -1 if num_loops is None else num_loops
    names = torch.ops.anyattention.remembered_graph(edge_index, num_sources, num_targets, loops)
    sizes = {"query_offsets": num_targets + 1, "key_offsets": num_sources + 1}
    # Views alone, without memory for each edge.
    arrays = {field: names[place].expand(sizes.get(field, num_edges)) for place, field in enumerate(_FIELDS)}
    del arrays["key_index"], arrays["query_index"]
    return Graph(names[:2, None].expand(2, num_edges), **arrays)


@torch.library.register_fake("anyattention::remembered_graph", lib=_library)
def _fake(edges: Tensor, num_sources: int, num_targets: int, num_loops: int) -> Tensor:
    return edges.new_empty(len(_FIELDS), dtype=torch.int64)


def _remembered_graph(edges: Tensor, num_sources: int, num_targets: int, num_loops: int) -> Tensor:
    with shielded():
        prepared = graph_of_programs(edges, num_sources, num_targets, None if num_loops < 0 else num_loops)
        return names_of(arrays_of(prepared.graph))


_library.impl("remembered_graph", _remembered_graph, "CPU")
