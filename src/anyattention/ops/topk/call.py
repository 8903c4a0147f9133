"""One call of top-k attention after its checks: what every implementation of it receives.

Axes: B batch, H heads, G key heads, L query_length, S key_length, D head_dim, C value_dim.
"""

from dataclasses import dataclass

from torch import Tensor

from anyattention.patterns import TopK

__all__ = ["TopKCall"]


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
        seed: 0-d int64, None without dropout.
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
    seed: Tensor | None
