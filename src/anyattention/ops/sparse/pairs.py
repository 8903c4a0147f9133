"""Attention over a sparse pattern as dense attention under a mask, whose operations ONNX has at any lengths.

Axes: B batch, L query_length, S key_length, H heads, E pairs.
"""

from __future__ import annotations

from anyattention.ops.arguments import Arguments
from anyattention.ops.dense import dense_attention
from anyattention.output import AttentionResult
from anyattention.patterns import Full, Pattern

__all__ = ["over_pairs"]


def over_pairs(call: Arguments) -> AttentionResult:
    """Output `(B, L, H, C)`, weights `(B, E, H)` or `(B, E)` and logsumexp `(B, L, H)`, in plain PyTorch.

    Cost: that of the reference of dense attention, B x H x L x S numbers, several times over.
    """
    assert isinstance(call.pattern, Pattern)
    pairs = call.pattern.to_dense(call.query.shape[1], call.key.shape[1], device=call.query.device)
    mask = pairs[None, None] if call.mask is None else pairs & call.mask
    asks = False if call.weights is None else "heads"
    result = dense_attention(call.changed(pattern=Full(), mask=mask, return_weights=asks, implementation="reference"))
    if result.weights is None:
        return result
    # In the order of `to_graph`: by query, then key.
    query, key = pairs.nonzero().unbind(1)
    weights = result.weights[:, :, query, key].transpose(1, 2)
    return result._replace(weights=weights.mean(-1) if call.weights == "mean" else weights)
