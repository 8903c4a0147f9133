"""Numbers of pairs at chosen keys.

Axes: B batch, H heads, L query_length, S key_length, k keys chosen.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["at_keys"]


def at_keys(pairs: Tensor, keys: Tensor) -> Tensor:
    """`(B, H, L, k)`: the numbers of pairs, axes (B, H, L, S) whole or 1, at the keys `(B, H, L, k)`."""
    batch, heads, queries, _ = keys.shape
    whole = pairs.expand(batch, heads, queries, pairs.shape[3])
    if pairs.shape[3] == 0:  # and each slot is unused
        return whole.new_zeros(keys.shape)
    return whole.expand(*keys.shape) if pairs.shape[3] == 1 else whole.gather(3, keys)
