"""Patterns made of two: the pairs that both allow, and the pairs that either does. Two Graphs make one Graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from anyattention.errors import InvalidConfigError
from anyattention.patterns.base import Align, Pattern
from anyattention.patterns.graph import Graph
from anyattention.patterns.graph_sets import repeated_edge
from anyattention.patterns.spans import Spans, concatenate

__all__ = ["Intersection", "Union", "require_simple"]


@dataclass(frozen=True)
class _Composed(Pattern):
    first: Pattern
    second: Pattern

    def __post_init__(self) -> None:
        for pattern in (self.first, self.second):
            require_simple(pattern)
        aligns = {pattern.align for pattern in (self.first, self.second) if pattern.align is not None}
        if len(aligns) > 1:
            raise InvalidConfigError(
                argument="align", expected="one alignment in a composed pattern", actual=" and ".join(sorted(aligns))
            )

    @property
    def align(self) -> Align | None:  # pyright: ignore[reportIncompatibleVariableOverride]  # made of the two
        """The alignment of the patterns that have one."""
        return self.first.align or self.second.align


@dataclass(frozen=True)
class Intersection(_Composed):
    """The pairs that both patterns allow: `first & second`.

    Raises:
        InvalidConfigError: the patterns have different alignments.
        GraphStructureError: one is a Graph in which an edge is repeated.

    Example:
        >>> from anyattention import Causal, Strided
        >>> (Strided(2, 0) & Causal()).to_dense(3, 3)
        tensor([[ True, False, False],
                [False,  True, False],
                [ True, False,  True]])
    """

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where both are."""
        both = (pattern.allows(query, key, num_queries, num_keys) for pattern in (self.first, self.second))
        return reduce(torch.logical_and, both)

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """One pattern's spans cut by the other's run; pair by pair where neither has one run for each query."""
        first, second = (x.spans(num_queries, num_keys, device=device) for x in (self.first, self.second))
        for spans, other in ((first, second), (second, first)):
            bounds = spans.bounds(num_queries)
            if bounds is not None:
                return other.within(*bounds)
        few, pattern = (first, self.second) if first.num_pairs <= second.num_pairs else (second, self.first)
        query, key = few.pairs()
        is_allowed = pattern.allows(query, key, num_queries, num_keys)
        return Spans.of(query[is_allowed], key[is_allowed], key[is_allowed])

    def __str__(self) -> str:
        return " & ".join(f"({each})" if isinstance(each, Union) else str(each) for each in (self.first, self.second))


@dataclass(frozen=True)
class Union(_Composed):
    """The pairs that at least one of the patterns allows: `first | second`.

    Raises:
        InvalidConfigError: the patterns have different alignments.
        GraphStructureError: one is a Graph in which an edge is repeated.

    Example:
        >>> from anyattention import Global, Window
        >>> (Window(0, 0) | Global(1)).to_dense(3, 3)
        tensor([[ True,  True,  True],
                [ True,  True, False],
                [ True, False,  True]])
    """

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where either is."""
        both = (pattern.allows(query, key, num_queries, num_keys) for pattern in (self.first, self.second))
        return reduce(torch.logical_or, both)

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """The runs of both merged; keys of longer steps one by one, where no run holds them."""
        both = concatenate([x.spans(num_queries, num_keys, device=device) for x in (self.first, self.second)])
        is_run = both.step == 1
        runs = _merged(both.where(is_run), num_keys)
        if bool(is_run.all()):
            return runs
        query, key = both.where(~is_run).pairs()
        code = torch.unique(query * num_keys + key)
        query, key = code // max(num_keys, 1), code % max(num_keys, 1)
        is_new = ~_holds(runs, query, key, num_keys)
        return concatenate([runs, Spans.of(query[is_new], key[is_new], key[is_new])])

    def __str__(self) -> str:
        return f"{self.first} | {self.second}"


def require_simple(pattern: Pattern) -> None:
    """Raise where a pattern is a Graph in which an edge is repeated: in a composed one a pair has no count."""
    if isinstance(pattern, Graph) and not pattern.is_simple():
        raise repeated_edge()


def _merged(runs: Spans, num_keys: int) -> Spans:
    """Runs that may overlap as runs that do not touch, ordered by query, then key."""
    if runs.query.numel() == 0:
        return runs
    width = num_keys + 1  # a gap between the rows, so that no run reaches into the next
    start, order = torch.sort(runs.query * width + runs.start)
    last = (runs.query * width + runs.last)[order]
    reach = torch.cummax(last, 0).values
    begins = torch.ones_like(start, dtype=torch.bool)
    begins[1:] = start[1:] > reach[:-1] + 1
    begin = start[begins]
    ends = begins.roll(-1)
    ends[-1] = True
    query = begin // width
    return Spans.of(query, begin - query * width, reach[ends] - query * width)


def _holds(runs: Spans, query: Tensor, key: Tensor, num_keys: int) -> Tensor:
    """Whether one of the runs, ordered by query, then key, holds each pair."""
    if runs.query.numel() == 0:
        return torch.zeros_like(query, dtype=torch.bool)
    width = num_keys + 1
    pair = query * width + key
    before = torch.searchsorted(runs.query * width + runs.start, pair, right=True) - 1
    return (before >= 0) & (pair <= (runs.query * width + runs.last)[before.clamp(min=0)])
