"""The score of GATv2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention._checks import Axes, keep_plain, require_floating, require_number, require_same_kind
from anyattention.scores.base import EdgeProducts, FeatureProducts, Score

__all__ = ["Dynamic"]


@dataclass(frozen=True, eq=False)
class Dynamic(Score):
    """The score of GATv2: `raw = vector . LeakyReLU(query + key)`. The scale defaults to 1.

    Args:
        vector: `(heads, head_dim)`, trainable.
        negative_slope: the LeakyReLU's slope below zero.

    Source: Brody et al., 2022, equation 7.

    Example:
        >>> import torch
        >>> Dynamic(torch.ones(2, 3)).negative_slope
        0.2
    """

    vector: Tensor
    negative_slope: float = 0.2

    features_are_inside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        keep_plain(self, "negative_slope")

    def check(self, axes: Axes, query: Tensor) -> None:
        """A vector for each head."""
        require_number("score.negative_slope", self.negative_slope)
        require_floating("score.vector", self.vector)
        require_same_kind("score.vector", self.vector, "query", query)
        axes.bind("score.vector", self.vector, "heads head_dim")

    def cast(self, cast: Callable[[Tensor], Tensor]) -> Dynamic:
        """The vector cast."""
        return replace(self, vector=cast(self.vector))

    @property
    def operands(self) -> tuple[Tensor, float]:
        """The vector and the slope."""
        return self.vector, self.negative_slope

    @classmethod
    def of_operands(cls, vector: Tensor | None, negative_slope: float) -> Dynamic:
        """The vector and the slope."""
        assert vector is not None
        return cls(vector, negative_slope)

    def raw(self, query: Tensor, key: Tensor) -> Tensor:
        """`vector . LeakyReLU(query + key)`."""
        rectified = F.leaky_relu(query + key, self.negative_slope)
        return (rectified * self.vector.to(query.dtype)).sum(-1)

    def raw_of_pairs(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Every sum; B x H x L x S x D numbers in memory."""
        rectified = F.leaky_relu(query[..., :, None, :] + key[..., None, :, :], self.negative_slope)
        return torch.einsum("bhlsd,hd->bhls", rectified, self.vector.to(query.dtype)) * scale

    def raw_of_edges(self, products: EdgeProducts, query: Tensor, key: Tensor, term: Tensor | None) -> Tensor:
        """A primitive of its own."""
        return products.rectified(query, key, self.vector, self.negative_slope)

    def with_features(self, products: FeatureProducts, query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        """The whole score, since the features are inside the LeakyReLU."""
        return products.rectified(query, key, self.vector, self.negative_slope, weight)
