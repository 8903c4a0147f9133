"""Graph attention by the compiled kernels: one pass forward, two backward, and no channel per edge.

Axes: ... batch or nothing, N queries, M keys, E edges, H heads, D head_dim, C value_dim, F edge_dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anyattention import _native
from anyattention.ops.eager import are_transformed
from anyattention.ops.graph.autograd import attention, attention_weights
from anyattention.ops.graph.call import GraphCall
from anyattention.ops.graph.composed import edge_scores
from anyattention.ops.graph.dynamic import dynamic_scores
from anyattention.ops.graph.edge_operators import arrays_of, edge_dot, edge_softmax, edge_sum, edge_total
from anyattention.ops.graph.kernels import Settings
from anyattention.ops.graph.maximum import edge_maximum
from anyattention.ops.random import keep_factors
from anyattention.scores import Additive, Dynamic

__all__ = ["refusal", "refusal_of_rows", "run"]


def refusal(call: GraphCall) -> str | None:
    """Why the kernels cannot run a call."""
    return refusal_of_rows(call.query, call.key, call.value, call.bias)


def refusal_of_rows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> str | None:
    """Why no compiled kernel can take these."""
    if query.device.type != "cpu":
        return f"the kernels run on the CPU, and the query is on {query.device}"
    if not _native.available():
        return "no kernels are compiled (see `anyattention info`)"
    if 0 in (*query.shape[-2:], value.shape[-1]):
        return "a size is 0"
    if are_transformed(query, key, value, bias):
        return "the kernels have no forward derivatives and no rules for the transforms of torch.func"
    return None


def run(call: GraphCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output `(..., N, H, C)`, weights `(..., E, H)` and logsumexp `(..., N, H)`.

    Cost: O(E x H x (D + C)) time; memory O(E x H) above the results, for "max" O(N x H x C) too. float16 and bfloat16
    are computed in float32.
    """
    has_batch = call.query.ndim == 4
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (_with_batch(x.to(dtype), has_batch) for x in (call.query, call.key, call.value))
    value = key if call.value is call.key else value
    graph = arrays_of(call.graph)
    settings = Settings(
        score=type(call.score).__name__,
        normalize=call.normalize,
        scale=call.scale,
        softcap=call.softcap or 0.0,
        negative_slope=call.score.negative_slope if isinstance(call.score, Additive | Dynamic) else 0.0,
        dropout=call.dropout,
    )
    vector = call.score.vector.to(dtype) if isinstance(call.score, Dynamic) else None
    edges = (query.shape[0], call.graph.num_edges, query.shape[2])
    bias = _bias(call, edges, dtype)
    if vector is not None and call.edges is not None and call.edges.key_weight is not None:
        # The scores come whole, as a term beside the product of nothing.
        term: Tensor | None = _dynamic_term(call, query, key, vector, bias, settings.negative_slope)
        query, key, vector = query.new_zeros(*query.shape[:3], 1), key.new_zeros(*key.shape[:3], 1), None
        settings = replace(settings, score="Dot")
    else:
        term = _term(call, query, edges, dtype)
    is_maximum = call.aggregation == "max"
    # The kernel sums; of a call that takes the maximum it finds the logsumexp, beside one channel of nothing.
    summed = value.new_zeros(*value.shape[:3], 1) if is_maximum else value
    summed = None if summed is key else summed
    output, logsumexp = attention(query, key, summed, vector, term, bias, call.seed, graph, settings)

    def weights() -> Tensor:
        """Computed once more; the kernel's have no gradient."""
        differentiable = (query, key, vector, term, bias)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
            scores = edge_scores(query, key, vector, term, bias, graph, settings)
            shares = edge_softmax(scores, graph) if settings.normalize else scores.sigmoid()
            return torch.where(scores == -torch.inf, 0.0, shares)
        return attention_weights(query, key, summed, vector, term, bias, logsumexp, graph, settings)

    computed = None
    value_weight = None if call.edges is None or call.edges.value_weight is None else call.edges.value_weight.to(dtype)
    if call.needs_weights or value_weight is not None or is_maximum:
        computed = weights()
    if computed is not None and is_maximum:
        hidden = None if bias is None else bias == -torch.inf
        features = None if call.edges is None or value_weight is None else call.edges.features.to(dtype)
        output = edge_maximum(_kept(call, computed), hidden, value, features, value_weight, graph)
    elif computed is not None and value_weight is not None:
        output = output + _edge_values(call, _kept(call, computed), value_weight)
    if call.aggregation == "mean":
        output = output / _pair_counts(call, dtype).clamp(min=1.0)[..., None]
    if not has_batch:
        # Not output[0], whose gradient is a tensor of zeros, written over.
        output, logsumexp = output.squeeze(0), logsumexp.squeeze(0)
        computed = None if computed is None else computed.squeeze(0)
    weights_result = computed.to(call.query.dtype) if computed is not None and call.needs_weights else None
    return output.to(call.value.dtype), weights_result, logsumexp if call.needs_logsumexp else None


def _with_batch(x: Tensor, has_batch: bool) -> Tensor:
    return x if has_batch else x.unsqueeze(0)


def _bias(call: GraphCall, edges: tuple[int, int, int], dtype: torch.dtype) -> Tensor | None:
    """Bias and mask as one `(B, E, H)`, -inf where hidden; broadcast axes keep stride 0."""
    if call.mask is None:
        return None if call.bias is None else call.bias.to(dtype).expand(edges)
    bias = torch.zeros((), dtype=dtype, device=call.mask.device) if call.bias is None else call.bias.to(dtype)
    return torch.where(call.mask, bias, -torch.inf).expand(edges)


def _term(call: GraphCall, query: Tensor, edges: tuple[int, int, int], dtype: torch.dtype) -> Tensor | None:
    """What edge features add to the raw score, `(B, E, H)`; projected once per node, never once per edge."""
    if call.edges is None or call.edges.key_weight is None:
        return None
    weight = call.edges.key_weight.to(dtype)
    features = _shown_features(call, dtype)
    if isinstance(call.score, Additive):
        weight = weight[:, 0]
        each = features.shape[2] > 1
        term = torch.einsum("behf,hf->beh", features, weight) if each else features[:, :, 0] @ weight.T
        return term.expand(edges)
    # A query that sees nothing may hold NaN, and its gradient of 0 would carry that into the weight.
    query = torch.where(_pair_counts(call, dtype)[..., None] > 0, query, 0.0)
    projected = torch.einsum("bnhd,hdf->bnhf", query, weight)
    rows = features.expand(query.shape[0], -1, -1, -1)
    return edge_dot(projected, rows, _edges_as_keys(call))


def _dynamic_term(
    call: GraphCall, query: Tensor, key: Tensor, vector: Tensor, bias: Tensor | None, negative_slope: float
) -> Tensor:
    """The raw scores `(B, E, H)` by Dynamic with edge features inside; 0 on hidden edges, and so is their gradient."""
    assert call.edges is not None
    assert call.edges.key_weight is not None
    features, weight = call.edges.features.to(query.dtype), call.edges.key_weight.to(query.dtype)
    scores = dynamic_scores(query, key, vector, weight, features, arrays_of(call.graph), negative_slope)
    return scores if bias is None else torch.where(bias == -torch.inf, 0.0, scores)


def _kept(call: GraphCall, weights: Tensor) -> Tensor:
    """The weights after dropout."""
    if call.seed is None:
        return weights
    return weights * keep_factors(tuple(weights.shape), call.dropout, call.seed, weights.dtype)


def _edge_values(call: GraphCall, weights: Tensor, value_weight: Tensor) -> Tensor:
    """`value_weight (sum of p e)`: what edge features add to the output, `(B, N, H, C)`."""
    rows = _shown_features(call, weights.dtype).expand(weights.shape[0], -1, -1, -1)
    sums = edge_sum(weights, rows, _edges_as_keys(call))
    return torch.einsum("bnhf,hcf->bnhc", sums, value_weight)


def _shown_features(call: GraphCall, dtype: torch.dtype) -> Tensor:
    """The edge features `(B | 1, E, 1, F)`, 0 on hidden edges; `(B | 1, E, H, F)` where heads see different edges."""
    assert call.edges is not None
    features = call.edges.features.to(dtype)[None, :, None]
    if call.mask is None:
        return features
    mask = call.mask if call.mask.ndim == 3 else call.mask[None]
    return torch.where(mask[..., None], features, 0.0)


def _edges_as_keys(call: GraphCall) -> list[Tensor]:
    """The graph in which each edge is a key of its own, so that the primitives read edge features."""
    graph, device = call.graph, call.query.device
    edges = torch.arange(graph.num_edges, device=device)
    offsets = torch.arange(graph.num_edges + 1, device=device)
    by_query = [graph.query_offsets, graph.edges_by_query, graph.edges_by_query]
    return [*by_query, offsets, graph.query_index, edges, graph.query_index, edges]


def _pair_counts(call: GraphCall, dtype: torch.dtype) -> Tensor:
    """The number of visible edges of each query, `(1, N, 1)` or `(B, N, H)`."""
    if call.mask is None:
        return call.graph.query_offsets.diff().to(dtype)[None, :, None]
    mask = call.mask if call.mask.ndim == 3 else call.mask[None]
    return edge_total(mask.to(dtype), arrays_of(call.graph))
