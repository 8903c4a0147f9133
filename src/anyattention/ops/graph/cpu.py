"""Graph attention by the compiled kernels: one pass forward, two backward, and no channel per edge.

Axes: ... batch or nothing, N queries, M keys, E edges, H heads, D head_dim, C value_dim, F edge_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.maximum import edge_maximum
from anyattention.ops.edges.operators import edge_softmax
from anyattention.ops.graph.features import EdgeFeatureProducts, pair_counts
from anyattention.ops.graph.operators import (
    GraphAttention,
    GraphAttentionWeights,
    composed,
    graph_attention,
    graph_attention_weights,
)
from anyattention.ops.normalizer import with_normalizer
from anyattention.output import AttentionResult
from anyattention.scores import Dot

__all__ = ["run"]


def run(call: Arguments) -> AttentionResult:
    """Output `(..., N, H, C)`, weights `(..., E, H)` and logsumexp `(..., N, H)`.

    Cost: O(E x H x (D + C)) time; memory O(E x H) above the results, for "max" O(N x H x C) too. float16 and bfloat16
    are computed in float32.
    """
    dtype, graph, is_maximum = call.sums_dtype, call.graph, call.aggregation == "max"
    # Features and maxima want a batch axis, the operators do not.
    adds_batch = call.query.ndim == 3 and (call.edges is not None or is_maximum)
    query, key, value = call.query, call.key, call.value
    # A value that is the key gets one gradient with it.
    value = None if value is key else value
    if adds_batch or query.dtype is not dtype:
        query, key = _rows(query, dtype, adds_batch), _rows(key, dtype, adds_batch)
        value = None if value is None else _rows(value, dtype, adds_batch)
    bias = None if call.mask is None and call.bias is None else _bias(call, query, dtype)
    seed = draw_seed(query.device) if call.dropout > 0 else None
    score = call.score.cast(lambda x: x.to(dtype))
    features = term = value_weight = None
    if call.edges is not None:
        features = EdgeFeatureProducts(graph, call.edges.features.to(dtype), call.mask, _shape(call, query))
        if call.edges.key_weight is not None:
            term = score.with_features(features, query, key, call.edges.key_weight.to(dtype))
        if call.edges.value_weight is not None:
            value_weight = call.edges.value_weight.to(dtype)
    summed = value
    if is_maximum:
        # The kernel sums; of a call that takes the maximum it finds the denominator, beside one channel of nothing.
        summed = key.new_zeros(*key.shape[:3], 1)
    if term is not None and score.features_are_inside:
        # The scores come whole, as a term beside the product of nothing.
        summed = key if summed is None else summed
        query, key, score = query.new_zeros(*query.shape[:3], 1), key.new_zeros(*key.shape[:3], 1), Dot()
    vector, negative_slope = score.operands
    record = GraphAttention(
        graph=arrays_of(graph),
        query=query,
        key=key,
        value=summed,
        vector=vector,
        term=term,
        bias=bias,
        seed=seed,
        score=type(score).__name__,
        normalize=call.normalize,
        **vars(call.scaling),
        negative_slope=negative_slope,
        dropout=call.dropout,
    )
    output, largest, log_sum = graph_attention(record)
    weights = None
    if call.return_weights or value_weight is not None or is_maximum:
        weights = _weights(record, largest, log_sum)
        kept = weights
        if seed is not None:
            kept = weights * keep_factors(tuple(weights.shape), call.dropout, seed, dtype)
        if is_maximum:
            hidden = None if bias is None else bias == -torch.inf
            part = None if features is None or value_weight is None else features.features
            rows = _rows(call.key, dtype, adds_batch) if value is None else value
            output = edge_maximum(kept, hidden, rows, part, value_weight, record.graph)
        elif features is not None and value_weight is not None:
            output = output + features.summed(kept, value_weight)
    if call.aggregation == "mean":
        counts = pair_counts(graph, call.mask, dtype)
        output = output / (counts if output.ndim == 4 else counts[0]).clamp(min=1.0)[..., None]
    if adds_batch:
        # Not output[0], whose gradient is a tensor of zeros, written over.
        output, largest, log_sum = output.squeeze(0), largest.squeeze(0), log_sum.squeeze(0)
        weights = None if weights is None else weights.squeeze(0)
    result = AttentionResult(
        output if output.dtype is call.results_dtype else output.to(call.results_dtype),
        weights.to(call.results_dtype) if weights is not None and call.return_weights else None,
    )
    return with_normalizer(result, largest, log_sum) if call.return_logsumexp else result


def _rows(x: Tensor, dtype: torch.dtype, adds_batch: bool) -> Tensor:
    return x.to(dtype).unsqueeze(0) if adds_batch else x.to(dtype)


def _shape(call: Arguments, query: Tensor) -> tuple[int, ...]:
    """Of numbers for each edge, `(..., E, H)`."""
    return *query.shape[:-3], call.graph.num_edges, query.shape[-2]


def _bias(call: Arguments, query: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Bias and mask as one `(..., E, H)`, -inf where hidden; broadcast axes keep stride 0."""
    assert not isinstance(call.bias, RelativeBias)
    shape = _shape(call, query)
    if call.mask is None:
        return None if call.bias is None else call.bias.to(dtype).expand(shape)
    bias = torch.zeros((), dtype=dtype, device=call.mask.device) if call.bias is None else call.bias.to(dtype)
    return torch.where(call.mask, bias, -torch.inf).expand(shape)


def _weights(record: GraphAttention, largest: Tensor, log_sum: Tensor) -> Tensor:
    """The weights `(B, E, H)`, computed once more: the kernel's have no gradient."""
    differentiable = (record.query, record.key, record.vector, record.term, record.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        scores = composed(record).scores()
        shares = edge_softmax(scores, record.graph) if record.normalize else scores.sigmoid()
        return torch.where(scores == -torch.inf, 0.0, shares)
    return graph_attention_weights(GraphAttentionWeights(record, largest, log_sum))
