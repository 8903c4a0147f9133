"""Graph attention written in the primitives: differentiable to any order, and no channel per edge for Dot and Additive.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ops.graph.edge_operators import edge_dot, edge_spread, edge_sum, edge_total
from anyattention.ops.graph.kernels import Settings
from anyattention.ops.random import keep_factors

__all__ = ["composed_attention", "edge_scores"]


def edge_scores(
    query: Tensor,
    key: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
) -> Tensor:
    """The score `(B, E, H)` of each edge in differentiable primitives; -inf on hidden edges."""
    hidden = None if bias is None else bias == -torch.inf
    if settings.score == "Dot":
        raw = edge_dot(query, key, graph)
        raw = raw if term is None else raw + term
    elif settings.score == "Additive":
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        raw = edge_spread(query.squeeze(-1), graph) + edge_spread(key.squeeze(-1), graph, True)
        raw = F.leaky_relu(raw if term is None else raw + term, settings.negative_slope)
    else:
        raw = _dynamic_scores(query, key, vector, hidden, graph, settings)
    if hidden is not None:
        # A gradient of 0 through NaN would be NaN.
        raw = torch.where(hidden, 0.0, raw)
    # Infinity becomes NaN: -inf would pass for a hidden edge.
    scores = raw * torch.where(raw.isfinite(), 1.0, torch.nan) * settings.scale
    if settings.softcap > 0:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    return scores if hidden is None or bias is None else torch.where(hidden, -torch.inf, scores + bias)


def _dynamic_scores(
    query: Tensor,
    key: Tensor,
    vector: Tensor | None,
    hidden: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
) -> Tensor:
    """`vector . LeakyReLU(query + key)` of each edge, head by head: E x D numbers at a time."""
    assert vector is not None
    group = query.shape[2] // key.shape[2]
    heads = []
    for head in range(query.shape[2]):
        own = query[:, :, head].index_select(1, graph[6]) + key[:, :, head // group].index_select(1, graph[7])
        if hidden is not None:
            own = torch.where(hidden[:, :, head, None], 0.0, own)
        # Not a matrix product, whose bits depend on the number of threads.
        heads.append((F.leaky_relu(own, settings.negative_slope) * vector[head]).sum(-1))
    return torch.stack(heads, dim=-1)


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp in the primitives, differentiable to any order; `shift` is a constant near logsumexp."""
    scores = edge_scores(query, key, vector, term, bias, graph, settings)
    hidden = scores == -torch.inf
    if settings.normalize:
        shift = torch.where(shift == -torch.inf, 0.0, shift)
        terms = torch.where(hidden, 0.0, torch.exp(scores - edge_spread(shift, graph)))
        total = edge_total(terms, graph)
        is_empty = total == 0
        total = torch.where(is_empty, 1.0, total)
        weights = terms / edge_spread(total, graph)
        logsumexp = torch.where(is_empty, -torch.inf, total.log() + shift)
    else:
        weights = torch.where(hidden, 0.0, torch.sigmoid(scores))
        logsumexp = shift
    if seed is not None:
        weights = weights * keep_factors(tuple(weights.shape), settings.dropout, seed, weights.dtype)
    return edge_sum(weights, value, graph), logsumexp
