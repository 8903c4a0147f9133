"""One call of top-k attention after its checks: what every implementation of it receives.

Axes: B batch, H heads, G key heads, L query_length, S key_length, D head_dim, C value_dim, k keys chosen.
"""

from dataclasses import dataclass

from torch import Tensor

from anyattention.patterns import TopK

__all__ = ["TopKCall", "at_keys"]


@dataclass(frozen=True, eq=False)
class TopKCall:
    """Checked arguments of top-k attention.

    Attributes:
        query, key, value: `(B, L, H, D)`, `(B, S, G, D)`, `(B, S, G, C)`, one dtype and device; G divides H.
        selection: how many keys, among which pairs.
        mask: boolean, each of its four axes (B, H, L, S) whole or 1; None allows every pair.
        bias: floating, axes as the mask, finite where allowed; None adds nothing.
        scale: the factor of the dot product.
        softcap: c in c tanh(score / c), or None.
        dropout: probability with which a weight is dropped.
        needs_weights: whether to return the weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    selection: TopK
    mask: Tensor | None
    bias: Tensor | None
    scale: float
    softcap: float | None
    dropout: float
    needs_weights: bool


def at_keys(pairs: Tensor, keys: Tensor) -> Tensor:
    """`(B, H, L, k)`: the numbers of pairs, axes (B, H, L, S) whole or 1, at the keys `(B, H, L, k)`."""
    batch, heads, queries, _ = keys.shape
    whole = pairs.expand(batch, heads, queries, pairs.shape[3])
    if pairs.shape[3] == 0:  # and each slot is unused
        return whole.new_zeros(keys.shape)
    return whole.expand(*keys.shape) if pairs.shape[3] == 1 else whole.gather(3, keys)
