"""Graph attention written in the primitives: differentiable to any order, and no channel per edge.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ops.graph.dynamic import dynamic_scores
from anyattention.ops.graph.edge_operators import edge_dot, edge_spread, edge_sum, edge_total
from anyattention.ops.graph.kernels import Settings

__all__ = ["composed_attention", "composed_gradients", "edge_scores"]


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
        assert vector is not None
        raw = dynamic_scores(query, key, vector, None, None, graph, settings.negative_slope)
    if hidden is not None:
        # A gradient of 0 through NaN would be NaN.
        raw = torch.where(hidden, 0.0, raw)
    # Infinity becomes NaN: -inf would pass for a hidden edge.
    scores = raw * settings.scale
    scores = scores * torch.where(scores.isfinite(), 1.0, torch.nan)
    if settings.softcap > 0:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    return scores if hidden is None or bias is None else torch.where(hidden, -torch.inf, scores + bias)


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp in the primitives, differentiable to any order.

    `kept` `(B, E, H)` are the factors of dropout, and `shift` is a constant near logsumexp.
    """
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
    return edge_sum(weights if kept is None else weights * kept, value, graph), logsumexp


def composed_gradients(
    needed: Sequence[bool],
    tensors: Sequence[Any],
    graph: list[Tensor],
    settings: Settings,
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    logsumexp: Tensor,
) -> list[Tensor | None]:
    """The gradients of `composed_attention`'s first six tensors, which autograd differentiates again.

    `needed` says which of these are; `tensors` are the seven, the last `kept`.
    """
    places = [n for n in range(6) if needed[n]]
    # One input may be computed from another (the term from the query): a node of its own for each keeps them apart.
    own: Any = [x.view_as(x) if n in places else x for n, x in enumerate(tensors)]
    own[2] = own[1] if own[2] is None else own[2]
    outputs = list(composed_attention(*own, graph=graph, settings=settings, shift=logsumexp.detach()))
    cotangents: list[Tensor | None] = [grad_output, grad_logsumexp]
    pairs = [
        (out, grad) for out, grad in zip(outputs, cotangents, strict=True) if grad is not None and out.requires_grad
    ]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [own[n] for n in places],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    by_position = dict(zip(places, found, strict=True))
    return [by_position.get(n) for n in range(6)]
