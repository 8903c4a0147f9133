"""Edge lists of files: edges that are listed again, both directions, self-loops, and the features that go with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention.errors import GraphStructureError
from anyattention.patterns import Graph

__all__ = ["ListedEdges", "graph_of_edges", "is_repeated", "looped_graph"]


class ListedEdges(NamedTuple):
    """Edges as a source lists them.

    Attributes:
        ends: `(2, edges)` int64: source and target.
        features: `(edges, edge_dim)` float32, or None.
    """

    ends: np.ndarray
    features: np.ndarray | None = None

    def once(self, *, directed: bool) -> tuple[ListedEdges, int]:
        """The edges without those that repeat an earlier one with the same features, and how many these are.

        Unless they are directed, an edge the other way round is the same.
        """
        ends = self.ends if directed else np.sort(self.ends, axis=0)
        keys = ends if self.features is None else np.concatenate([ends, self.features.T.view(np.int32)])
        repeated = is_repeated(keys)
        if not repeated.any():
            return self, 0
        kept = ~repeated
        features = None if self.features is None else self.features[kept]
        return ListedEdges(self.ends[:, kept], features), int(repeated.sum())

    def both_ways(self) -> ListedEdges:
        """The edges, and after them each that is no self-loop the other way round, with the same features."""
        turned = self.ends[0] != self.ends[1]
        ends = np.concatenate([self.ends, self.ends[::-1, turned]], axis=1)
        features = None if self.features is None else np.concatenate([self.features, self.features[turned]])
        return ListedEdges(ends, features)


def is_repeated(keys: np.ndarray) -> np.ndarray:
    """Which columns of keys `(2 or more, edges)` int64 repeat an earlier one."""
    # Only edges whose first two keys come again are compared in full. What overflows does so alike.
    with np.errstate(over="ignore"):
        pairs = keys[0] * (keys[1].max(initial=0) + 1) + keys[1]
    order = np.argsort(pairs, kind="stable")
    follows = np.zeros(len(order), dtype=bool)
    follows[1:] = pairs[order[1:]] == pairs[order[:-1]]
    comes_again = follows.copy()
    comes_again[:-1] |= follows[1:]
    some = np.sort(order[comes_again])
    order = some[np.lexsort(keys[:, some])]
    repeated = np.zeros(keys.shape[1], dtype=bool)
    repeated[order[1:]] = (keys[:, order[1:]] == keys[:, order[:-1]]).all(0)
    return repeated


def graph_of_edges(ends: np.ndarray, num_nodes: int, source: str) -> Graph:
    """The graph of edges `(2, edges)` with self-loops; an error names the source."""
    try:
        graph = Graph.from_edge_index(torch.from_numpy(np.ascontiguousarray(ends)), num_nodes)
    except GraphStructureError as fault:
        raise GraphStructureError(f"{source}: {fault}", argument=source) from fault
    return graph.with_self_loops()


def looped_graph(edges: ListedEdges, num_nodes: int, source: str) -> tuple[Graph, Tensor | None]:
    """The graph with self-loops, and the features of its edges, 0 for the loops that were added."""
    graph = graph_of_edges(edges.ends, num_nodes, source)
    if edges.features is None:
        return graph, None
    features = torch.from_numpy(edges.features)
    added = graph.num_edges - len(features)
    return graph, torch.cat([features, features.new_zeros(added, features.shape[1])])
