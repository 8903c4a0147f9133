"""Attention sinks: a logit of each head that takes part in the softmax and has no value.

That is a merge with a part of output 0 and normalizer (sink, 0): whatever computed the attention over the keys, its
output and weights are scaled by the share that the keys have in the denominator.

Axes: B batch, L query_length, S key_length, H heads, E edges, k keys chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anyattention.ambient import is_transformed
from anyattention.ops.arguments import Arguments
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.operators import edge_spread
from anyattention.ops.normalizer import joined
from anyattention.ops.refusals import refusal_of_device
from anyattention.ops.sparse.edges import graph_of
from anyattention.output import AttentionResult
from anyattention.patterns import Causal, Full, Graph, TopK

__all__ = ["with_sinks"]


def with_sinks(attention: Callable[[Arguments], AttentionResult], call: Arguments) -> AttentionResult:
    """What an operation returns for a call, its sinks in each row's denominator. Without a normalizer.

    Cost: O(B x L x H) beside the output and the weights; their mean over heads takes the weights of all heads.
    """
    assert call.sinks is not None
    asks = False if call.weights is None else "heads"
    result = attention(call.changed(return_weights=asks, return_logsumexp=True))
    assert result.normalizer is not None
    largest, log_sum = result.normalizer
    all_largest, all_log_sum, shares = joined([(largest, log_sum), _normalizer_of(call.sinks, log_sum)])
    has_keys = (largest != -torch.inf) | log_sum.isnan()
    # A broken gradient of a row without keys, whose output is 0, must not reach the sinks.
    share = torch.where(has_keys, shares[0], 0.0)
    output = torch.where(has_keys.unsqueeze(-1), result.output * share.unsqueeze(-1), 0.0)
    weights = result.weights
    if weights is not None:
        weights = weights * _at_weights(share, call)
        if call.weights == "mean" and not isinstance(call.pattern, TopK):
            weights = weights.mean(1 if isinstance(call.pattern, Full | Causal) else -1)
        weights = weights.to(call.query.dtype)
    logsumexp = all_largest + all_log_sum if call.return_logsumexp else None
    return AttentionResult(output.to(call.value.dtype), weights, logsumexp, result.indices)


def _normalizer_of(sinks: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The sinks `(H,)` as the normalizer of a part of each row `(..., H)`; that of no key where a sink is -inf."""
    is_absent = sinks == -torch.inf
    shown = torch.where(is_absent, 0.0, sinks.to(like.dtype))
    largest = torch.where(is_absent, -torch.inf, shown.detach())
    # 0, with the gradient; NaN for a sink that is NaN or infinite.
    return largest.expand_as(like), (shown - shown.detach()).expand_as(like)


def _at_weights(share: Tensor, call: Arguments) -> Tensor:
    """Numbers of rows `(..., L, H)` as factors of the weights of all heads."""
    if isinstance(call.pattern, TopK):
        return share.unsqueeze(-1)
    if isinstance(call.pattern, Full | Causal):
        return share.transpose(1, 2).unsqueeze(-1)
    graph = call.pattern if isinstance(call.pattern, Graph) else graph_of(call)
    if refusal_of_device(share, "query is") is None and not is_transformed(share):
        return edge_spread(share, arrays_of(graph))
    return share.index_select(-2, graph.query_index)
