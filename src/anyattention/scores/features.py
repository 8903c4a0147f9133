"""Features of edges, which add to keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["EdgeFeatures"]


@dataclass(frozen=True, eq=False)
class EdgeFeatures:
    """Features of a Graph's edges, projected and added to the key and the value of each edge.

    `key' = key_j + key_weight e` and `value' = value_j + value_weight e`; a weight that is None adds nothing.

    Args:
        features: `(edges, edge_dim)`, in the caller's edge order; `(edges,)` is taken as `(edges, 1)`.
        key_weight: `(heads, head_dim, edge_dim)` or None.
        value_weight: `(heads, value_dim, edge_dim)` or None.

    Example:
        >>> import torch
        >>> EdgeFeatures(torch.ones(4, 2)).key_weight is None
        True
    """

    features: Tensor
    key_weight: Tensor | None = None
    value_weight: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.features, Tensor) and self.features.ndim == 1:
            object.__setattr__(self, "features", self.features.unsqueeze(-1))
