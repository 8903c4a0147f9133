"""Graph attention in plain PyTorch: the definition, and the oracle of every other implementation.

Axes: ... batch or nothing, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim, F edge_dim.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ops.graph.call import GraphCall
from anyattention.ops.random import keep_factors
from anyattention.patterns import Graph
from anyattention.scores import Additive, Dot, Score

__all__ = ["edge_dot", "edge_softmax", "edge_sum", "refusal", "run"]


def refusal(call: GraphCall) -> str | None:
    """The reference runs every call."""
    return None


def run(call: GraphCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output `(..., N, H, C)`, weights `(..., E, H)` and logsumexp `(..., N, H)`.

    Cost: O(E x H x (D + C)) time and memory; float16 and bfloat16 are computed in float32.
    """
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    target = call.graph.query_index
    num_queries = call.graph.num_queries
    heads = call.query.shape[-2]
    call = replace(call, key=_to_heads(call.key, heads), value=_to_heads(call.value, heads))
    scores = _scores(call, dtype)
    if call.mask is not None:
        scores = torch.where(call.mask, scores, -torch.inf)
    logsumexp = None
    if call.normalize:
        weights, logsumexp = _softmax(scores, target, num_queries)
    else:
        weights = scores.sigmoid()
    if call.mask is not None:
        weights = torch.where(call.mask, weights, 0.0)

    kept = weights
    if call.seed is not None:
        kept = weights * keep_factors(tuple(weights.shape), call.dropout, call.seed, dtype)
    messages = kept[..., None] * _edge_values(call, dtype)
    if call.aggregation == "max":
        output = _maximum(messages, call.mask, target, num_queries)
    else:
        output = _sum_by_query(messages, -3, target, num_queries)
        if call.aggregation == "mean":
            pairs = torch.ones_like(weights) if call.mask is None else call.mask.to(dtype)
            pairs = _sum_by_query(pairs.expand_as(weights), -2, target, num_queries)
            output = output / pairs.clamp(min=1.0)[..., None]
    weights = weights.to(call.query.dtype) if call.needs_weights else None
    return output.to(call.value.dtype), weights, logsumexp if call.needs_logsumexp else None


def edge_dot(query: Tensor, key: Tensor, graph: Graph) -> Tensor:
    """Products `(B, E, H)` of each edge's query `(B, N, H, D)` and key `(B, M, G, D)`."""
    key = _to_heads(key, query.shape[2])
    return (query.index_select(1, graph.query_index) * key.index_select(1, graph.key_index)).sum(-1)


def edge_sum(weights: Tensor, value: Tensor, graph: Graph) -> Tensor:
    """Sums `(B, N, H, C)` of values `(B, M, G, C)` by weights `(B, E, H)`; an edge of weight 0 is not there."""
    values = _to_heads(value, weights.shape[2]).index_select(1, graph.key_index)
    # 0 x NaN; a finite value stays, for the gradient of its weight.
    is_absent = (weights == 0) & ~values.isfinite().all(-1)
    values = torch.where(is_absent[..., None], 0.0, values)
    return _sum_by_query(weights[..., None] * values, -3, graph.query_index, graph.num_queries)


def edge_softmax(scores: Tensor, graph: Graph) -> Tensor:
    """The softmax of the scores `(B, E, H)` of each query's edges."""
    scores = torch.where(scores == torch.inf, torch.nan, scores)
    weights = _softmax(scores, graph.query_index, graph.num_queries)[0]
    # What comes back to a hidden edge may be NaN, and 0 x NaN is.
    return torch.where(scores == -torch.inf, 0.0, weights)


def _to_heads(rows: Tensor, heads: int) -> Tensor:
    """Rows `(..., G, D)` for each of the heads that share them, `(..., H, D)`."""
    key_heads = rows.shape[-2]
    return rows if key_heads == heads else rows.repeat_interleave(heads // key_heads, dim=-2)


def _scores(call: GraphCall, dtype: torch.dtype) -> Tensor:
    """The score of each edge and head, `(..., E, H)`."""
    query = _gather(call.query, call.graph.query_index, call.mask, dtype)
    key = _gather(call.key, call.graph.key_index, call.mask, dtype)
    if call.edges is not None and call.edges.key_weight is not None:
        key = key + _project(call.edges.features, call.edges.key_weight, call.mask, dtype)
    raw = _raw_scores(query, key, call.score)
    # An infinite input shows as NaN: a score of -inf would pass for a hidden edge, and a soft cap would hide it.
    scores = raw * call.scale
    scores = scores * torch.where(scores.isfinite(), 1.0, torch.nan)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return scores if call.bias is None else scores + call.bias.to(dtype)


def _raw_scores(query: Tensor, key: Tensor, score: Score) -> Tensor:
    """Scores `(..., E, H)` of each edge's query and key, `(..., E, H, D)`."""
    if isinstance(score, Dot):
        return (query * key).sum(-1)
    rectified = F.leaky_relu(query + key, score.negative_slope)
    if isinstance(score, Additive):
        return rectified.squeeze(-1)
    return (rectified * score.vector.to(query.dtype)).sum(-1)


def _edge_values(call: GraphCall, dtype: torch.dtype) -> Tensor:
    """The value of each edge, `(..., E, H, C)`."""
    values = _gather(call.value, call.graph.key_index, call.mask, dtype)
    if call.edges is not None and call.edges.value_weight is not None:
        values = values + _project(call.edges.features, call.edges.value_weight, call.mask, dtype)
    return values


def _gather(rows: Tensor, index: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The row of each edge, `(..., E, H, D)`; 0 on hidden edges, so that no NaN passes 0 x NaN."""
    gathered = rows.index_select(-3, index).to(dtype)
    return gathered if mask is None else torch.where(mask[..., None], gathered, 0.0)


def _project(features: Tensor, weight: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Edge features `(E, F)` by a weight `(H, D, F)`, as `(..., E, H, D)`; 0 on hidden edges."""
    features, weight = features.to(dtype), weight.to(dtype)
    if mask is None:
        return torch.einsum("ef,hdf->ehd", features, weight)
    # Hidden before the product too, head by head: its gradient by the weight would else be 0 x NaN.
    shown = torch.where(mask[..., None], features[:, None], 0.0)
    shown = shown.expand(*shown.shape[:-2], weight.shape[0], -1)
    return torch.where(mask[..., None], torch.einsum("...ehf,hdf->...ehd", shown, weight), 0.0)


def _sum_by_query(rows: Tensor, axis: int, target: Tensor, num_queries: int) -> Tensor:
    """Sums of edge rows by query; `axis` is the axis of edges, counted from the end."""
    shape = list(rows.shape)
    shape[axis] = num_queries
    return rows.new_zeros(shape).index_add(axis, target, rows)


def _softmax(scores: Tensor, target: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """The softmax of edge scores `(..., E, H)` by query, and its logsumexp `(..., N, H)`, -inf for empty queries."""
    shape = (*scores.shape[:-2], num_queries, scores.shape[-1])
    index = target[:, None].expand(scores.shape)
    largest = scores.new_full(shape, -torch.inf)
    largest = largest.scatter_reduce(-2, index, scores.detach(), "amax")
    largest = torch.where(largest.isfinite(), largest, 0.0)
    terms = (scores - largest.index_select(-2, target)).exp()
    sums = _sum_by_query(terms, -2, target, num_queries)
    # 0 / 0 is NaN, log(0) = -inf has gradient inf, and inf x 0 is NaN: empty queries take another branch.
    is_empty = sums == 0
    sums = torch.where(is_empty, 1.0, sums)
    # Not exp(scores - logsumexp): beside large scores the logarithm of the sum has no digits left.
    weights = terms / sums.index_select(-2, target)
    return weights, torch.where(is_empty, -torch.inf, sums.log() + largest)


def _maximum(messages: Tensor, mask: Tensor | None, target: Tensor, num_queries: int) -> Tensor:
    """The elementwise maximum of the visible messages `(..., E, H, C)` by query; ties go to the first edge."""
    if mask is not None:
        messages = torch.where(mask[..., None], messages, -torch.inf)
    num_edges = messages.shape[-3]
    if num_edges == 0:
        # Zeros, by a way that gradients take too.
        return _sum_by_query(messages, -3, target, num_queries)
    shape = (*messages.shape[:-3], num_queries, *messages.shape[-2:])
    index = target[:, None, None].expand(messages.shape)
    detached = messages.detach()
    largest = detached.new_full(shape, -torch.inf).scatter_reduce(-3, index, detached, "amax")
    is_largest = detached == largest.index_select(-3, target)
    is_largest |= detached.isnan()
    if mask is not None:
        is_largest &= mask[..., None]
    edge = torch.arange(num_edges, device=target.device)[:, None, None].expand(messages.shape)
    edge = torch.where(is_largest, edge, num_edges)
    first = edge.new_full(shape, num_edges).scatter_reduce(-3, index, edge, "amin")
    has_pairs = first < num_edges
    picked = messages.gather(-3, torch.where(has_pairs, first, 0))
    return torch.where(has_pairs, picked, 0.0)
