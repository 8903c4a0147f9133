"""How strongly a query attends to a key: score functions, as data. The ops do the arithmetic."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Additive", "Dot", "Dynamic", "EdgeFeatures", "Score"]


@dataclass(frozen=True)
class Dot:
    """Scaled dot product: `raw = query . key`; the scale defaults to 1 / sqrt(head_dim).

    Source: Vaswani et al., 2017, equation 1.

    Example:
        >>> Dot()
        Dot()
    """


@dataclass(frozen=True)
class Additive:
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


@dataclass(frozen=True, eq=False)
class Dynamic:
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


Score = Dot | Additive | Dynamic


@dataclass(frozen=True, eq=False)
class EdgeFeatures:
    """Features of a Graph's edges, projected and added to the key and the value of each edge.

    `key' = key_j + key_weight e` and `value' = value_j + value_weight e`; a weight that is None adds nothing.

    Args:
        features: `(edges, edge_dim)`, in the caller's edge order.
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
