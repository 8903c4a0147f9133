"""Patterns over sequences: every pair, and the past."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anyattention.patterns.base import Align, Pattern, check_align, diagonal_offset

__all__ = ["Causal", "Full"]


@dataclass(frozen=True)
class Full(Pattern):
    """Every query may attend to every key.

    Example:
        >>> Full().to_dense(1, 2)
        tensor([[True, True]])
    """

    def to_dense(self, num_queries: int, num_keys: int, *, device: torch.device | str | None = None) -> Tensor:
        """A matrix of True, `(num_queries, num_keys)`."""
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class Causal(Pattern):
    """A query may attend to the keys up to its own position.

    Args:
        align: which corner of the (query, key) matrix the diagonal starts from when the lengths differ.
            "top_left": query i sees keys 0 to i. "bottom_right": the last query sees every key. None raises
            when the lengths differ.

    Raises:
        InvalidConfigError: for another `align`.
        DimensionMismatchError: when the lengths differ and `align` is None.

    Example:
        >>> Causal(align="bottom_right").to_dense(2, 3)
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """

    align: Align | None = None

    def __post_init__(self) -> None:
        check_align(self.align)

    def to_dense(self, num_queries: int, num_keys: int, *, device: torch.device | str | None = None) -> Tensor:
        """True where `key <= query + offset`; the offset is 0 at the top left."""
        offset = self.offset(num_queries, num_keys)
        pairs = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        return pairs.tril(offset)

    def offset(self, num_queries: int, num_keys: int) -> int:
        """The position of query 0 among the keys."""
        return diagonal_offset("Causal", self.align, num_queries, num_keys)
