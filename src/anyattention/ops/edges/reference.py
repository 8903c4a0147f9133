"""The primitives in plain PyTorch: the definition, and the oracle of every other implementation.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.ops.edges.plain import softmax_by_query, sum_by_query, to_heads
from anyattention.patterns import Graph

__all__ = ["edge_dot", "edge_softmax", "edge_sum"]


def edge_dot(query: Tensor, key: Tensor, graph: Graph) -> Tensor:
    """Products `(B, E, H)` of each edge's query `(B, N, H, D)` and key `(B, M, G, D)`."""
    key = to_heads(key, query.shape[2])
    return (query.index_select(1, graph.query_index) * key.index_select(1, graph.key_index)).sum(-1)


def edge_sum(weights: Tensor, value: Tensor, graph: Graph) -> Tensor:
    """Sums `(B, N, H, C)` of values `(B, M, G, C)` by weights `(B, E, H)`; an edge of weight 0 is not there."""
    values = to_heads(value, weights.shape[2]).index_select(1, graph.key_index)
    # 0 x NaN; a finite value stays, for the gradient of its weight.
    is_absent = (weights == 0) & ~values.isfinite().all(-1)
    values = torch.where(is_absent[..., None], 0.0, values)
    return sum_by_query(weights[..., None] * values, -3, graph.query_index, graph.num_queries)


def edge_softmax(scores: Tensor, graph: Graph) -> Tensor:
    """The softmax of the scores `(B, E, H)` of each query's edges."""
    scores = torch.where(scores == torch.inf, torch.nan, scores)
    weights = softmax_by_query(scores, graph.query_index, graph.num_queries)[0]
    # What comes back to a hidden edge may be NaN, and 0 x NaN is.
    return torch.where(scores == -torch.inf, 0.0, weights)
