"""Graphs as sets of pairs: those of either, and those of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyattention._checks import require_device
from anyattention.ambient import lasting
from anyattention.errors import DimensionMismatchError, GraphStructureError
from anyattention.native.compressed_rows import compressed_rows

if TYPE_CHECKING:
    from anyattention.patterns.graph import Graph

__all__ = ["repeated_edge", "shared_pairs", "united_pairs"]


def united_pairs(first: Graph, second: Graph) -> Tensor:
    """`(2, edges)` int64, the pairs of either graph, each once, by query, then key.

    Raises:
        DimensionMismatchError: the graphs are of other sizes.
        GraphStructureError: an edge is repeated in one of them.
        InvalidInputError: they are on different devices.

    Cost: O(edges + nodes), by counting sorts.
    """
    edges, is_again = _in_order(first, second)
    return edges[:, ~is_again]


def shared_pairs(first: Graph, second: Graph) -> Tensor:
    """`(2, edges)` int64, the pairs of both graphs, by query, then key; otherwise as `united_pairs`."""
    edges, is_again = _in_order(first, second)
    return edges[:, is_again]


def _in_order(first: Graph, second: Graph) -> tuple[Tensor, Tensor]:
    """The edges of both by query, then key, and whether each is that before it once more."""
    sizes = [(graph.num_queries, graph.num_keys) for graph in (first, second)]
    if sizes[0] != sizes[1]:
        raise DimensionMismatchError(
            argument="graph",
            expected=f"(num_queries, num_keys) = {sizes[0]}, those of the other graph",
            actual=sizes[1],
        )
    require_device("graph", second.edge_index, first.device, "the other graph")
    num_queries, num_keys = sizes[0]
    with lasting(first.edge_index, second.edge_index):
        keys, queries = torch.cat([first.edge_index, second.edge_index], dim=1)
        by_key = compressed_rows(keys, queries, num_keys, num_queries).edges
        by_query = compressed_rows(queries[by_key], keys[by_key], num_queries, num_keys).edges
        order = by_key[by_query]
        edges = torch.stack([keys[order], queries[order]])
        is_again = torch.zeros(edges.shape[1], dtype=torch.bool, device=edges.device)
        is_again[1:] = (edges[:, 1:] == edges[:, :-1]).all(0)
        # Equal pairs stand in the order of the graphs.
        is_second = order >= first.num_edges
        if (is_again[1:] & (is_second[1:] == is_second[:-1])).any():
            raise repeated_edge()
        return edges, is_again


def repeated_edge() -> GraphStructureError:
    """The error of a Graph in which an edge is repeated: in a composed pattern a pair has no count."""
    return GraphStructureError(
        argument="graph", expected="each edge once in a composed pattern", actual="an edge that is repeated"
    )
