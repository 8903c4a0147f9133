"""The choice of keys by their scores, as an operator; it has no gradient.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, k keys chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.native.structures import Choice, Indices, Numbers, Pairs
from anyattention.ops.operator import Result, operator

__all__ = ["TopkIndices", "topk_indices"]


@dataclass(frozen=True, eq=False)
class TopkIndices:
    """The keys of each query's largest scores, `(B, L, H, k)`, the largest first, -1 in slots that are not used.

    NaN is larger than any number, and of equal scores the first key is taken. A softcap alone changes no order.

    Attributes:
        query, key: float32.
        key_begins, key_ends: query i sees the keys key_begins[i] up to key_ends[i]; None lets each see all.
        mask: boolean, axes (B, H, L, S) whole or 1; False hides.
        bias: axes as the mask, added to the scores; -inf hides.
        scale: the factor of the dot product.
        k: how many, at least 1.
    """

    query: Annotated[Tensor, Numbers("batch num_queries heads head_dim")]
    key: Annotated[Tensor, Numbers("batch num_keys key_heads head_dim")]
    key_begins: Annotated[Tensor | None, Indices("num_queries")]
    key_ends: Annotated[Tensor | None, Indices("num_queries")]
    mask: Annotated[Tensor | None, Choice("batch heads num_queries num_keys")]
    bias: Annotated[Tensor | None, Pairs("batch heads num_queries num_keys")]
    scale: float
    k: int

    def __post_init__(self) -> None:
        if self.query.dtype != torch.float32:
            raise InvalidInputError(argument="query", expected="torch.float32", actual=str(self.query.dtype))


topk_indices = operator(TopkIndices, [Result("indices", "batch num_queries heads k", dtype=torch.int64)])

topk_indices.c_kernel()
