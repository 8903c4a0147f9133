"""Which pairs a dense call allows, as one mask."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.ops.arguments import Arguments
from anyattention.patterns import Causal

__all__ = ["allowed_pairs"]


def allowed_pairs(call: Arguments) -> Tensor | None:
    """The mask, `(B | 1, H | 1, L, S)`, and what Causal leaves of it; None where every pair is allowed."""
    if not isinstance(call.pattern, Causal):
        return call.mask
    lengths = (call.query.shape[1], call.key.shape[1])
    past = torch.ones(lengths, dtype=torch.bool, device=call.query.device).tril(call.pattern.offset(*lengths))
    return past[None, None] if call.mask is None else call.mask & past
