"""The score of GAT."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from anyattention._checks import Axes, keep_plain, require_number
from anyattention.errors import DimensionMismatchError
from anyattention.scores.base import EdgeProducts, FeatureProducts, Score

__all__ = ["Additive"]


@dataclass(frozen=True)
class Additive(Score):
    """The score of GAT: `raw = LeakyReLU(query + key)`, where query and key have head_dim 1.

    Each is a node's term: its projected features times half of the attention vector. The scale defaults to 1.

    Args:
        negative_slope: the LeakyReLU's slope below zero.

    Source: Velickovic et al., 2018, equation 3.

    Example:
        >>> Additive()
        Additive(negative_slope=0.2)
    """

    negative_slope: float = 0.2

    def __post_init__(self) -> None:
        keep_plain(self, "negative_slope")

    def check(self, axes: Axes, query: Tensor) -> None:
        """A head_dim of 1."""
        require_number("score.negative_slope", self.negative_slope)
        if axes.sizes["head_dim"] != 1:
            raise DimensionMismatchError(
                argument="query",
                expected="head_dim 1 with the score Additive (one term per node and head)",
                actual=f"head_dim {axes.sizes['head_dim']}",
            )

    @property
    def operands(self) -> tuple[None, float]:
        """The slope."""
        return None, self.negative_slope

    @classmethod
    def of_operands(cls, vector: Tensor | None, negative_slope: float) -> Additive:
        """The slope."""
        return cls(negative_slope)

    def raw(self, query: Tensor, key: Tensor) -> Tensor:
        """`LeakyReLU(query + key)`."""
        return F.leaky_relu(query + key, self.negative_slope).squeeze(-1)

    def raw_of_pairs(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Every sum."""
        return self.raw(query[..., :, None, :], key[..., None, :, :]) * scale

    def raw_of_edges(self, products: EdgeProducts, query: Tensor, key: Tensor, term: Tensor | None) -> Tensor:
        """The ends' terms, and that of the features, inside the LeakyReLU."""
        key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
        raw = products.of_queries(query.squeeze(-1)) + products.of_keys(key.squeeze(-1))
        return F.leaky_relu(raw if term is None else raw + term, self.negative_slope)

    def with_features(self, products: FeatureProducts, query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        """One more term, inside the LeakyReLU."""
        return products.mapped(weight[:, 0])
