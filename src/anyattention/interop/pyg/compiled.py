"""The Graph of an edge list inside a compiled program, whose arrays are found at each run and sorted once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattention.ambient import shielded
from anyattention.interop.pyg.remembered import prepared_graph, prepared_types
from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.ops.handles import names_of
from anyattention.patterns import Graph, HeterogeneousGraph

__all__ = ["named_graph", "named_joint_graph"]

# As `names_of` has them: key_index, query_index and then the others.
_FIELDS = tuple(reversed(GraphArrays.__dataclass_fields__))
_library = torch.library.Library("anyattention", "FRAGMENT")
_library.define("remembered_joint_graph(Tensor[] edges, int[] ends, SymInt[] counts, bool by_relation) -> Tensor")
_library.define("remembered_graph(Tensor edges, SymInt num_sources, SymInt num_targets, SymInt num_loops) -> Tensor")


def named_graph(edge_index: Tensor, num_sources: int, num_targets: int, num_loops: int | None, num_edges: int) -> Graph:
    """While a compiler traces: a Graph for operators alone, whose arrays are names; see `ops.handles`.

    Args:
        edge_index, num_sources, num_targets, num_loops: as `prepared_graph`; a plain tensor.
        num_edges: the number of edges, self-loops included; where no number for each edge is given or taken, any.
    """
    loops = -1 if num_loops is None else num_loops
    names = torch.ops.anyattention.remembered_graph(edge_index, num_sources, num_targets, loops)
    return _of_names(names, num_sources, num_targets, num_edges)


def named_joint_graph(graph: HeterogeneousGraph, by_relation: bool) -> Graph:
    """While a compiler traces: `graph.joint(by_relation=by_relation)` for operators alone, of the edges as they are."""
    edges = list(graph.edge_index.values())
    ends = [graph.node_types.index(end) for source, _, target in graph.relations for end in (source, target)]
    counts = list(graph.num_nodes.values())
    names = torch.ops.anyattention.remembered_joint_graph(edges, ends, counts, by_relation)
    num_queries, num_keys = graph.joint_sizes(by_relation=by_relation)
    return _of_names(names, num_keys, num_queries, graph.num_edges)


def _of_names(names: Tensor, num_sources: int, num_targets: int, num_edges: int) -> Graph:
    sizes = {"query_offsets": num_targets + 1, "key_offsets": num_sources + 1}
    # Views alone, without memory for each edge.
    arrays: dict[str, Any] = {
        field: names[place].expand(sizes.get(field, num_edges)) for place, field in enumerate(_FIELDS)
    }
    del arrays["key_index"], arrays["query_index"]
    return Graph(names[:2, None].expand(2, num_edges), **arrays)


@torch.library.register_fake("anyattention::remembered_graph", lib=_library)
def _fake(edges: Tensor, num_sources: int, num_targets: int, num_loops: int) -> Tensor:
    return edges.new_empty(len(_FIELDS), dtype=torch.int64)


def _remembered_graph(edges: Tensor, num_sources: int, num_targets: int, num_loops: int) -> Tensor:
    with shielded():
        prepared = prepared_graph(None, edges, num_sources, num_targets, None if num_loops < 0 else num_loops)
        return names_of(arrays_of(prepared.graph))


_library.impl("remembered_graph", _remembered_graph, "CPU")


@torch.library.register_fake("anyattention::remembered_joint_graph", lib=_library)
def _fake_joint(edges: list[Tensor], ends: list[int], counts: list[int], by_relation: bool) -> Tensor:
    return edges[0].new_empty(len(_FIELDS), dtype=torch.int64)


def _remembered_joint_graph(edges: list[Tensor], ends: list[int], counts: list[int], by_relation: bool) -> Tensor:
    # Types and relations by their places: an operator takes no names.
    lists = {(str(ends[2 * place]), str(place), str(ends[2 * place + 1])): each for place, each in enumerate(edges)}
    with shielded():
        graph = prepared_types(None, lists, {str(place): count for place, count in enumerate(counts)})
        return names_of(arrays_of(graph.joint(by_relation=by_relation)))


_library.impl("remembered_joint_graph", _remembered_joint_graph, "CPU")
