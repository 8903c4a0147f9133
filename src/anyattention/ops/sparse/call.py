"""One call of sparse attention after its checks: what every implementation of it receives.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim, E pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments
from anyattention.ops.sparse.traced import constant_when_traced
from anyattention.patterns import Graph, Pattern
from anyattention.scores import Score

__all__ = ["SparseCall", "bias_at_edges", "masked_bias", "pairs_at_edges", "place_by_distance"]


@dataclass(frozen=True, eq=False)
class SparseCall:
    """Checked arguments of attention over a sparse pattern.

    Attributes:
        arguments: as `attend` got them.
        query, key, value: `(B, L, H, D)`, `(B, S, G, D)`, `(B, S, G, C)`, one dtype and device; G divides H.
        pattern: which pairs there are, one of positions.
        score: how raw scores are made.
        mask: boolean, each of its four axes (B, H, L, S) whole or 1; None allows every pair of the pattern.
        bias: floating, axes as the mask, finite where allowed; or by distance; None adds nothing.
        scale: the factor of the raw score.
        softcap: c in c tanh(score / c), or None.
        dropout: probability with which a weight is dropped.
    """

    arguments: Arguments
    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern
    score: Score
    mask: Tensor | None
    bias: Tensor | RelativeBias | None
    scale: float
    softcap: float | None
    dropout: float

    def graph(self) -> Graph:
        """The pattern's pairs as edges."""
        return Graph(*_graph_fields(self.pattern, self.query.shape[1], self.key.shape[1], self.query.device))


@constant_when_traced
@lru_cache(maxsize=4)
def _graph_fields(pattern: Pattern, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """The fields of the pattern's Graph; the last few are kept, since the layers of a model share one."""
    # Neither inference mode nor a transform may leave its mark on what later calls find here.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        graph = pattern.to_graph(num_queries, num_keys, device=device)
    return tuple(getattr(graph, field.name) for field in fields(graph))


def bias_at_edges(call: SparseCall, graph: Graph) -> Tensor | None:
    """The bias of a graph's edges, `(B | 1, E, H | 1)`."""
    if isinstance(call.bias, RelativeBias):
        return call.bias.at(graph.query_index, graph.key_index, graph.num_queries, graph.num_keys).T[None]
    return None if call.bias is None else pairs_at_edges(call.bias, graph)


def place_by_distance(graph: Graph) -> Tensor:
    """Where a bias by distance, as the kernels take it, has each edge's number, `(E,)`."""
    return graph.query_index - graph.key_index + graph.num_keys - 1


def masked_bias(mask: Tensor | None, bias: Tensor | None, graph: Graph, query: Tensor) -> Tensor | None:
    """Mask and bias, as the kernels take them, as one bias of a graph's edges `(B, E, H)`, -inf where hidden."""
    if mask is None and bias is None:
        return None
    edges = query.new_zeros(())
    if bias is not None:
        edges = bias[:, place_by_distance(graph)].T[None] if bias.ndim == 2 else pairs_at_edges(bias, graph)
    if mask is not None:
        edges = torch.where(pairs_at_edges(mask, graph), edges, -torch.inf)
    return edges.expand(query.shape[0], graph.num_edges, query.shape[2])


def pairs_at_edges(pairs: Tensor, graph: Graph) -> Tensor:
    """`(B | 1, H | 1, L | 1, S | 1)` at a graph's edges: `(B | 1, E, H | 1)`."""
    query = graph.query_index if pairs.shape[2] != 1 else 0
    key = graph.key_index if pairs.shape[3] != 1 else 0
    edges = pairs[:, :, query, key]
    if edges.ndim == 2:
        edges = edges.unsqueeze(-1).expand(-1, -1, graph.num_edges)
    return edges.transpose(1, 2)
