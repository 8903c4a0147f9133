"""The scaled dot product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anyattention.scores.base import EdgeProducts, FeatureProducts, Score

__all__ = ["Dot"]


@dataclass(frozen=True)
class Dot(Score):
    """Scaled dot product: `raw = query . key`; the scale defaults to 1 / sqrt(head_dim).

    Source: Vaswani et al., 2017, equation 1.

    Example:
        >>> Dot()
        Dot()
    """

    is_product: ClassVar[bool] = True

    def default_scale(self, head_dim: int) -> float:
        """1 / sqrt(head_dim)."""
        return 1.0 / math.sqrt(max(head_dim, 1))

    @classmethod
    def of_operands(cls, vector: Tensor | None, negative_slope: float) -> Dot:
        """Neither."""
        return cls()

    def raw(self, query: Tensor, key: Tensor) -> Tensor:
        """`query . key`."""
        return (query * key).sum(-1)

    def raw_of_pairs(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """A matrix product; the scale goes to the query, which is smaller than the scores."""
        return (query * scale) @ key.mT

    def raw_of_edges(self, products: EdgeProducts, query: Tensor, key: Tensor, term: Tensor | None) -> Tensor:
        """The product, and the term beside it."""
        raw = products.dot(query, key)
        return raw if term is None else raw + term

    def with_features(self, products: FeatureProducts, query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        """`q . (weight e) = (weight' q) . e`: projected once for each node, never once for each edge."""
        # A query that sees nothing may hold NaN, and its gradient of 0 would carry that into the weight.
        return products.dot(torch.einsum("bnhd,hdf->bnhf", products.seeing(query), weight))
