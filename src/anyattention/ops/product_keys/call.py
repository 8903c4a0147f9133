"""A checked call of product-key memory.

Axes: T tokens, H heads, D half_dim, n half keys of a half, S = n x n slots, C value_dim, k slots chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Call"]


@dataclass(frozen=True, eq=False)
class Call:
    """Checked arguments.

    Attributes:
        query: `(T, H, 2, D)`, in the dtype of the sums.
        half_keys: `(2, H, n, D)`, in that dtype.
        values: `(S, C)`, as they are at rest; None where slots are only chosen.
        k: how many slots each query and head attends to.
        keep: `(T, H, k)`, the factors of dropout; None for none.
        sparse_grad: whether the gradient of the values is sparse.
        hands_on: whether it is sparse and may be empty, since the caller has its factors.
    """

    query: Tensor
    half_keys: Tensor
    values: Tensor | None
    k: int
    keep: Tensor | None = None
    sparse_grad: bool = False
    hands_on: bool = False

    @property
    def sums_dtype(self) -> torch.dtype:
        """The dtype that the call is computed in, at least float32."""
        return self.query.dtype

    @property
    def num_half_keys(self) -> int:
        """How many half keys a half has, n."""
        return self.half_keys.shape[2]
