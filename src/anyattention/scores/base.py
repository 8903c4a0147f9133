"""What a score is to the operations: a check, a default scale, formulas, and operands for the kernels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor

from anyattention._checks import Axes

__all__ = ["EdgeProducts", "FeatureProducts", "Score"]


class EdgeProducts(Protocol):
    """Differentiable products of a graph's edges `(B, E, H)`, none of which keeps a channel for each edge."""

    def dot(self, query: Tensor, key: Tensor) -> Tensor:
        """`query[i] . key[j]`, from `(B, N, H, D)` and `(B, M, G, D)`."""
        ...

    def of_queries(self, numbers: Tensor) -> Tensor:
        """Each query's numbers `(B, N, H)`."""
        ...

    def of_keys(self, numbers: Tensor) -> Tensor:
        """Each key's numbers `(B, M, H)`."""
        ...

    def rectified(self, query: Tensor, key: Tensor, vector: Tensor, negative_slope: float) -> Tensor:
        """`vector . LeakyReLU(query[i] + key[j])`, vector `(H, D)`."""
        ...


class FeatureProducts(Protocol):
    """The same with the edges' features `(E, F)`, which count as 0 where an edge is hidden."""

    def mapped(self, weight: Tensor) -> Tensor:
        """`weight features[e]`, weight `(H, F)`."""
        ...

    def dot(self, query: Tensor) -> Tensor:
        """`query[i] . features[e]`, from `(B, N, H, F)`."""
        ...

    def seeing(self, query: Tensor) -> Tensor:
        """Queries `(B, N, H, D)`, 0 where all of a query's edges are hidden."""
        ...

    def rectified(self, query: Tensor, key: Tensor, vector: Tensor, negative_slope: float, weight: Tensor) -> Tensor:
        """`vector . LeakyReLU(query[i] + key[j] + weight features[e])`, weight `(H, D, F)`."""
        ...


class Score:
    """How strongly a query attends to a key; abstract. Axes: as in the operations."""

    is_product: ClassVar[bool] = False
    """Whether the raw score is `query . key`, so that matrix products give it in tiles. Not inherited."""

    features_are_inside: ClassVar[bool] = False
    """Whether edge features cannot be added to the raw score of the nodes: `with_features` then gives all of it."""

    def __init_subclass__(cls) -> None:
        """A subclass may have another formula, and says by itself whether it is the product."""
        cls.is_product = vars(cls).get("is_product", False)

    def check(self, axes: Axes, query: Tensor) -> None:
        """Raise unless the score's own arguments fit the heads and the head_dim."""

    def default_scale(self, head_dim: int) -> float:
        """The factor of the raw score where the caller gives none."""
        return 1.0

    def cast(self, cast: Callable[[Tensor], Tensor]) -> Score:
        """This score with its tensors cast."""
        return self

    @property
    def operands(self) -> tuple[Tensor | None, float]:
        """What the kernels take: a vector `(H, D)` or None, and a negative slope."""
        return None, 0.0

    @classmethod
    @abstractmethod
    def of_operands(cls, vector: Tensor | None, negative_slope: float) -> Score:
        """The score of these operands."""

    @abstractmethod
    def raw(self, query: Tensor, key: Tensor) -> Tensor:
        """The formula: `(..., H)` from `(..., H, D)` twice."""

    @abstractmethod
    def raw_of_pairs(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """`scale` times the raw score of every pair: `(B, H, L, S)` from `(B, H, L, D)` and `(B, H, S, D)`."""

    @abstractmethod
    def raw_of_edges(self, products: EdgeProducts, query: Tensor, key: Tensor, term: Tensor | None) -> Tensor:
        """The raw score of each edge and head, `(B, E, H)`; `term` is what `with_features` gave."""

    @abstractmethod
    def with_features(self, products: FeatureProducts, query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        """What `weight features[e]`, added to the key, adds to the raw score, `(B, E, H)`; weight `(H, D, F)`."""
