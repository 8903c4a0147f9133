"""Patterns of blocks: a matrix that says which block of queries sees which block of keys, given or random."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ambient import is_mapped, lasting
from anyattention.errors import DimensionMismatchError, InvalidMaskError, UnsupportedError
from anyattention.patterns.base import Pattern, keep_int
from anyattention.patterns.spans import Spans

__all__ = ["Blocks", "RandomBlocks"]


class _BlockPattern(Pattern):
    """A pattern that is a matrix of blocks; the last ones may be cut off by the lengths."""

    size: int

    @abstractmethod
    def _blocks(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Boolean `(query blocks, key blocks)`."""

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where the block of the pair is."""
        return self._blocks(num_queries, num_keys, query.device)[query // self.size, key // self.size]

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """For each query the runs of neighbouring blocks."""
        place = torch.arange(min(self.size, num_queries), device=device)
        blocks = self._blocks(num_queries, num_keys, place.device)
        change = F.pad(blocks.to(torch.int8), (1, 1)).diff(dim=1)
        row, first = (change == 1).nonzero().unbind(1)
        last = (change == -1).nonzero()[:, 1]  # one after the run, in the same order
        query = row[:, None] * self.size + place
        begin, end = (first * self.size)[:, None], (last * self.size).clamp(max=num_keys)[:, None] - 1
        is_there = query < num_queries
        return Spans.of(query[is_there], begin.expand_as(query)[is_there], end.expand_as(query)[is_there])


@dataclass(frozen=True, eq=False)
class Blocks(_BlockPattern):
    """A query may attend to the keys of the blocks that a matrix names.

    Args:
        mask: boolean `(query blocks, key blocks)`, True = may attend; a copy is kept.
        size: number of positions in a block.

    Raises:
        InvalidMaskError: the mask is not a boolean matrix.
        UnsupportedError: a mask that vmap maps.
        InvalidConfigError: a size below 1.
        DimensionMismatchError: the mask has not as many blocks as a call's lengths.

    Example:
        >>> Blocks(torch.tensor([[True, False], [True, True]]), 2).to_dense(3, 4)
        tensor([[ True,  True, False, False],
                [ True,  True, False, False],
                [ True,  True,  True,  True]])
    """

    mask: Tensor
    size: int

    def __post_init__(self) -> None:
        keep_int(self, "size", 1)
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool or self.mask.ndim != 2:
            found = f"{self.mask.dtype} {tuple(self.mask.shape)}" if isinstance(self.mask, Tensor) else repr(self.mask)
            raise InvalidMaskError(
                argument="mask", expected="a boolean matrix (query blocks, key blocks)", actual=found
            )
        if is_mapped(self.mask):
            raise UnsupportedError(
                "Blocks under vmap: each entry has other pairs. Give them as mask= of the pairs", argument="mask"
            )
        # A call may remember the pattern's Graph, which a change in place would not reach.
        with lasting(self.mask):
            object.__setattr__(self, "mask", self.mask.clone())

    def __repr__(self) -> str:
        rows, columns = self.mask.shape
        return f"Blocks({rows} x {columns}, size={self.size})"

    def _blocks(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        grid = (-(-num_queries // self.size), -(-num_keys // self.size))
        if tuple(self.mask.shape) != grid:
            raise DimensionMismatchError(
                argument="mask",
                expected=f"{grid}, blocks of {self.size} for {num_queries} queries and {num_keys} keys",
                actual=tuple(self.mask.shape),
            )
        return self.mask.to(device)


@dataclass(frozen=True)
class RandomBlocks(_BlockPattern):
    """Each block of queries may attend to some blocks of keys, drawn at random.

    Which ones depends on the seed, the block and the number of key blocks alone: the same on every machine, and where
    a sequence grows, a block keeps its choice or exchanges it for a new block.

    Args:
        per_row: how many blocks of keys, fewer where there are not as many.
        seed: another seed is another draw.
        size: number of positions in a block.

    Raises:
        InvalidConfigError: a negative number, or a size below 1.

    Cost: O((length / size)^2) integers for the draw.

    Source: Zaheer et al., 2020 (BigBird), section 2: `RandomBlocks(3) | Window(96, 96) | Global(128)`.

    Example:
        >>> RandomBlocks(1, seed=3, size=2).density(8)
        0.25
    """

    per_row: int
    seed: int = 0
    size: int = 64

    def __post_init__(self) -> None:
        keep_int(self, "per_row", 0)
        keep_int(self, "seed", 0)
        keep_int(self, "size", 1)

    def _blocks(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        # Of numbers above 0, since ONNX rounds a quotient towards it.
        rows, columns = (num_queries + self.size - 1) // self.size, (num_keys + self.size - 1) // self.size
        row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)[None, :]
        seed = _hashed(torch.tensor(self.seed, dtype=torch.int64, device=device))
        order = _hashed(_hashed(seed + row) + column)
        # Not min, which decides where a length is a symbol.
        count: Any = torch.sym_min(self.per_row, columns)
        chosen = order.topk(count, dim=1, largest=False).indices
        return torch.zeros(rows, columns, dtype=torch.bool, device=device).scatter_(1, chosen, True)


def _hashed(number: Tensor) -> Tensor:
    """A number below 2^62 that looks random, from an int64: the finalizer of splitmix64, in 62 bits."""
    mask = (1 << 62) - 1
    number = (number * 0x1B03738712FAD5C9) & mask
    number = ((number ^ (number >> 30)) * 0x3F58476D1CE4E5B9) & mask
    number = ((number ^ (number >> 27)) * 0x14D049BB133111EB) & mask
    return number ^ (number >> 31)
