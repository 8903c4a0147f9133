"""The products of edges that scores are made of, over one graph.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, F edge_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anyattention.ops.edges.arrays import GraphArrays
from anyattention.ops.edges.dynamic import dynamic_scores
from anyattention.ops.edges.operators import edge_dot, edge_spread

__all__ = ["GraphProducts"]


@dataclass(frozen=True, eq=False)
class GraphProducts:
    """`scores.EdgeProducts` in the primitives."""

    graph: GraphArrays

    def dot(self, query: Tensor, key: Tensor) -> Tensor:
        """`query[i] . key[j]`."""
        return edge_dot(query, key, self.graph)

    def of_queries(self, numbers: Tensor) -> Tensor:
        """Each query's numbers."""
        return edge_spread(numbers, self.graph)

    def of_keys(self, numbers: Tensor) -> Tensor:
        """Each key's numbers."""
        return edge_spread(numbers, self.graph.transposed)

    def rectified(self, query: Tensor, key: Tensor, vector: Tensor, negative_slope: float) -> Tensor:
        """`vector . LeakyReLU(query[i] + key[j])`."""
        return dynamic_scores(query, key, vector, None, None, self.graph, negative_slope)
