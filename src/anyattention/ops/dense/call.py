"""One dense attention call after its checks: what every implementation of it receives.

Axes: B batch, H heads, L query_length, S key_length, D head_dim, E value_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anyattention.scores import Score

__all__ = ["DenseCall"]


@dataclass(frozen=True, eq=False)
class DenseCall:
    """Checked arguments of dense attention.

    Attributes:
        query, key, value: `(B, L, H, D)`, `(B, S, H, D)`, `(B, S, H, E)`, one dtype and device.
        score: how a pair is scored.
        allowed: boolean, each of its four axes (B, H, L, S) whole or 1; None allows every pair.
        causal: besides, query i may attend to keys 0 to i only.
        bias: floating, axes as `allowed`, finite where allowed; None adds nothing.
        scale: the factor of the raw score.
        softcap: c in c tanh(score / c), or None.
        dropout: probability with which a weight is dropped.
        seed: 0-d int64, None without dropout.
        needs_weights, needs_logsumexp: what to return besides the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    score: Score
    allowed: Tensor | None
    causal: bool
    bias: Tensor | None
    scale: float
    softcap: float | None
    dropout: float
    seed: Tensor | None
    needs_weights: bool
    needs_logsumexp: bool

    def pairs(self) -> Tensor | None:
        """`allowed` and `causal` together, or None when every pair is allowed."""
        if not self.causal:
            return self.allowed
        lengths = (self.query.shape[1], self.key.shape[1])
        past = torch.ones(lengths, dtype=torch.bool, device=self.query.device).tril()
        return past[None, None] if self.allowed is None else self.allowed & past
