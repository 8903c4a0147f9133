"""Features of edges in graph attention: what they add to scores and to outputs, projected once for each node.

Axes: B batch, N queries, M keys, E edges, H heads, D head_dim, C value_dim, F edge_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyattention.ambient import is_compiling
from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.ops.edges.dynamic import dynamic_scores
from anyattention.ops.edges.operators import edge_dot, edge_sum, edge_total
from anyattention.patterns import Graph

__all__ = ["EdgeFeatureProducts", "pair_counts"]


@dataclass(frozen=True, eq=False)
class EdgeFeatureProducts:
    """`scores.FeatureProducts` over one graph.

    Attributes:
        graph: the edges.
        features: `(E, F)`.
        mask: `(E, 1)`, `(E, H)` or `(B, E, H)`, False hides the edge; None hides none.
        shape: (B, E, H).
    """

    graph: Graph
    features: Tensor
    mask: Tensor | None
    shape: tuple[int, ...]

    @property
    def _shown(self) -> Tensor:
        """The features `(B | 1, E, 1, F)`, 0 on hidden edges; `(B | 1, E, H, F)` where heads see different edges."""
        features = self.features[None, :, None]
        if self.mask is None:
            return features
        mask = self.mask if self.mask.ndim == 3 else self.mask[None]
        return torch.where(mask[..., None], features, 0.0)

    @property
    def _edges_as_keys(self) -> GraphArrays:
        return arrays_of(self.graph.edges_as_keys())

    def mapped(self, weight: Tensor) -> Tensor:
        """`weight features[e]`."""
        each = self._shown.shape[2] > 1
        term = torch.einsum("behf,hf->beh", self._shown, weight) if each else self._shown[:, :, 0] @ weight.T
        return term.expand(self.shape)

    def dot(self, query: Tensor) -> Tensor:
        """`query[i] . features[e]`."""
        return edge_dot(query, self._shown.expand(self.shape[0], -1, -1, -1), self._edges_as_keys)

    def seeing(self, query: Tensor) -> Tensor:
        """Queries, 0 where all of a query's edges are hidden."""
        counts = pair_counts(self.graph, self.mask, query.dtype)
        return torch.where(counts[..., None] > 0, query, 0.0)

    def rectified(self, query: Tensor, key: Tensor, vector: Tensor, negative_slope: float, weight: Tensor) -> Tensor:
        """`vector . LeakyReLU(query[i] + key[j] + weight features[e])`; 0 on hidden edges, and so is its gradient."""
        graph = arrays_of(self.graph)
        scores = dynamic_scores(query, key, vector, weight, self.features, graph, negative_slope)
        return scores if self.mask is None else torch.where(self.mask.expand(self.shape), scores, 0.0)

    def summed(self, weights: Tensor, value_weight: Tensor) -> Tensor:
        """`value_weight (sum of weights[e] features[e])`: what the features add to the output, `(B, N, H, C)`."""
        sums = edge_sum(weights, self._shown.expand(self.shape[0], -1, -1, -1), self._edges_as_keys)
        return torch.einsum("bnhf,hcf->bnhc", sums, value_weight)


def pair_counts(graph: Graph, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The number of visible edges of each query, `(1, N, 1)` or `(B, N, H)`."""
    if mask is None:
        if is_compiling():
            # The graph's arrays may be names, which only operators read.
            ones = torch.ones(1, graph.num_edges, 1, dtype=dtype, device=graph.device)
            return edge_total(ones, arrays_of(graph))
        return graph.query_offsets.diff().to(dtype)[None, :, None]
    mask = mask if mask.ndim == 3 else mask[None]
    return edge_total(mask.to(dtype), arrays_of(graph))
