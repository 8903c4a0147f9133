"""Keys and values whose heads are shared, for what needs one for each head of the query."""

from __future__ import annotations

from torch import Tensor

from anyattention.ops.arguments import Arguments

__all__ = ["with_all_heads"]


def with_all_heads(call: Arguments) -> tuple[Tensor, Tensor]:
    """Key and value `(B, S, H, D)`, each key head once for each of the heads in a row that it serves."""
    heads, key_heads = call.query.shape[2], call.key.shape[2]
    if heads == key_heads:
        return call.key, call.value
    group = heads // key_heads
    return call.key.repeat_interleave(group, dim=2), call.value.repeat_interleave(group, dim=2)
