"""Graph attention in plain PyTorch: the definition, and the oracle of every other implementation.

Axes: ... batch or nothing, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim, F edge_dim.
"""

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.edges.plain import softmax_by_query, sum_by_query, to_heads
from anyattention.ops.normalizer import with_normalizer
from anyattention.output import AttentionResult

__all__ = ["refusal", "run"]


def refusal(call: Arguments) -> str | None:
    """The reference runs every call."""
    return None


def run(call: Arguments) -> AttentionResult:
    """Output `(..., N, H, C)`, weights `(..., E, H)` and logsumexp `(..., N, H)`.

    Cost: O(E x H x (D + C)) time and memory; float16 and bfloat16 are computed in float32.
    """
    dtype = call.sums_dtype
    target = call.graph.query_index
    num_queries = call.graph.num_queries
    heads = call.query.shape[-2]
    call = call.changed(key=to_heads(call.key, heads), value=to_heads(call.value, heads))
    scores = _scores(call, dtype)
    if call.mask is not None:
        scores = torch.where(call.mask, scores, -torch.inf)
    largest = log_sum = None
    if call.normalize:
        weights, largest, log_sum = softmax_by_query(scores, target, num_queries)
    else:
        weights = scores.sigmoid()
    if call.mask is not None:
        weights = torch.where(call.mask, weights, 0.0)

    kept = weights
    if call.dropout > 0:
        kept = weights * keep_factors(tuple(weights.shape), call.dropout, draw_seed(weights.device), dtype)
    messages = kept[..., None] * _edge_values(call, dtype)
    if call.aggregation == "max":
        output = _maximum(messages, call.mask, target, num_queries)
    else:
        output = sum_by_query(messages, -3, target, num_queries)
        if call.aggregation == "mean":
            pairs = torch.ones_like(weights) if call.mask is None else call.mask.to(dtype)
            pairs = sum_by_query(pairs.expand_as(weights), -2, target, num_queries)
            output = output / pairs.clamp(min=1.0)[..., None]
    result = AttentionResult(
        output.to(call.results_dtype), None if call.weights is None else weights.to(call.results_dtype)
    )
    if not call.return_logsumexp:
        return result
    assert largest is not None
    assert log_sum is not None
    return with_normalizer(result, largest, log_sum)


def _scores(call: Arguments, dtype: torch.dtype) -> Tensor:
    """The score of each edge and head, `(..., E, H)`."""
    query = _gather(call.query, call.graph.query_index, call.mask, dtype)
    key = _gather(call.key, call.graph.key_index, call.mask, dtype)
    if call.edges is not None and call.edges.key_weight is not None:
        key = key + _project(call.edges.features, call.edges.key_weight, call.mask, dtype)
    scores = call.scaling.of(call.score.raw(query, key))
    assert not isinstance(call.bias, RelativeBias)
    return scores if call.bias is None else scores + call.bias.to(dtype)


def _edge_values(call: Arguments, dtype: torch.dtype) -> Tensor:
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


def _maximum(messages: Tensor, mask: Tensor | None, target: Tensor, num_queries: int) -> Tensor:
    """The elementwise maximum of the visible messages `(..., E, H, C)` by query; ties go to the first edge."""
    if mask is not None:
        messages = torch.where(mask[..., None], messages, -torch.inf)
    num_edges = messages.shape[-3]
    if num_edges == 0:
        # Zeros, by a way that gradients take too.
        return sum_by_query(messages, -3, target, num_queries)
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
