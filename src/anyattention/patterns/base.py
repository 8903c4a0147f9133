"""What every pattern offers: the pairs it allows, as a boolean matrix or as a Graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from anyattention.errors import DimensionMismatchError, InvalidConfigError

if TYPE_CHECKING:
    from anyattention.patterns.graph import Graph

__all__ = ["Align", "Pattern"]

Align = Literal["top_left", "bottom_right"]


class Pattern(ABC):
    """Says which (query, key) pairs exist. Data only; not tied to a length unless it is a Graph.

    Example:
        >>> from anyattention import Causal
        >>> isinstance(Causal(), Pattern), Causal().to_graph(2, 2).num_edges
        (True, 3)
    """

    @abstractmethod
    def to_dense(self, num_queries: int, num_keys: int, *, device: torch.device | str | None = None) -> Tensor:
        """The pairs as a boolean matrix `(num_queries, num_keys)`, True where the query may attend.

        Cost: num_queries x num_keys bytes.
        """

    def to_graph(self, num_queries: int, num_keys: int, *, device: torch.device | str | None = None) -> Graph:
        """The pairs as a Graph, ordered by query, then key."""
        from anyattention.patterns.graph import Graph

        return Graph.from_adjacency(self.to_dense(num_queries, num_keys, device=device))


def check_align(align: Align | None) -> None:
    """Raise unless `align` is one of the two corners, or None."""
    if align not in (None, "top_left", "bottom_right"):
        raise InvalidConfigError(argument="align", expected="'top_left', 'bottom_right' or None", actual=repr(align))


def diagonal_offset(pattern: str, align: Align | None, num_queries: int, num_keys: int) -> int:
    """By how much query i's own position is ahead of key i: query i stands at key i + offset."""
    if num_queries == num_keys or align == "top_left":
        return 0
    if align == "bottom_right":
        return num_keys - num_queries
    raise DimensionMismatchError(
        argument=pattern,
        expected="as many queries as keys, or an alignment",
        actual=f"{num_queries} queries and {num_keys} keys",
        hint="give align='top_left' (query i sees keys 0 to i) or align='bottom_right' (the last query sees all keys)",
    )
