"""A pattern as the tile kernels read it: for each query runs of neighbouring keys, in parts with orders of their own.

Keys `step` apart become neighbours where all positions are put in order of their residue. One part takes the runs of a
pattern, one more each length of step; the parts share no pair, and their results are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from anyattention.ambient import shielded
from anyattention.native.structures import Indices, Order, Part
from anyattention.patterns import Pattern
from anyattention.patterns.spans import Spans, concatenate

__all__ = ["RunPart", "pairs_of", "runs_of"]


@dataclass(frozen=True, eq=False)
class RunPart(Part):
    """Some of a pattern's pairs.

    Attributes:
        query_order, key_order: int64, which query or key stands at each place; empty where each stands at its own.
        offsets: `(num_queries + 1,)` int64, the query at place i sees runs offsets[i] up to offsets[i + 1].
        begins, ends: `(runs,)` int64, places of keys, from a begin up to an end.
    """

    query_order: Annotated[Tensor, Order("num_queries")]
    key_order: Annotated[Tensor, Order("num_keys")]
    offsets: Annotated[Tensor, Indices("num_queries+1")]
    begins: Annotated[Tensor, Indices("num_runs")]
    ends: Annotated[Tensor, Indices("num_runs")]

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """The five arrays."""
        return self.query_order, self.key_order, self.offsets, self.begins, self.ends

    @property
    def num_pairs(self) -> int:
        """How many pairs these are."""
        return int((self.ends - self.begins).sum())


@lru_cache(maxsize=8)
def runs_of(pattern: Pattern, num_queries: int, num_keys: int, *, in_order: bool = False) -> tuple[RunPart, ...]:
    """A pattern as parts, which share no pair; the last few are kept, since the layers of a model share one.

    `in_order` makes one part, which takes the positions in order: keys of longer steps are runs of one.
    """
    parts = []
    with shielded():
        spans = pattern.spans(num_queries, num_keys, device="cpu")
        if in_order:
            query, key = spans.where(spans.step > 1).pairs()
            spans = concatenate([spans.where(spans.step == 1), Spans.of(query, key, key)])
        for step in spans.step.unique().tolist():
            chosen = spans.where(spans.step == step)
            is_run = step == 1
            parts.append(_runs(chosen, num_queries) if is_run else _progressions(chosen, step, num_queries, num_keys))
    return tuple(parts)


def pairs_of(parts: Sequence[RunPart]) -> tuple[Tensor, Tensor]:
    """Query and key of each pair of all parts, `(pairs,)`."""
    queries, keys = [], []
    for part in parts:
        places = torch.arange(part.offsets.numel() - 1, device=part.offsets.device).repeat_interleave(
            part.offsets.diff()
        )
        query, key = Spans.of(places, part.begins, part.ends - 1).pairs()
        queries.append(part.query_order[query] if part.query_order.numel() else query)
        keys.append(part.key_order[key] if part.key_order.numel() else key)
    empty = torch.empty(0, dtype=torch.int64, device=parts[0].offsets.device if parts else "cpu")
    return torch.cat([empty, *queries]), torch.cat([empty, *keys])


def _runs(spans: Spans, num_queries: int) -> RunPart:
    empty = spans.query.new_empty(0)
    return _sorted(empty, empty, spans.query, spans.start, spans.last + 1, num_queries)


def _progressions(spans: Spans, step: int, num_queries: int, num_keys: int) -> RunPart:
    """Spans of one step as runs, with keys in order of their residue and queries in that of their first span's."""
    key = torch.arange(num_keys, device=spans.query.device)
    key_order = torch.argsort(key % step, stable=True)
    residue = key.new_full((num_queries,), step).scatter_reduce(0, spans.query, spans.start % step, "amin")
    query_order = torch.argsort(residue, stable=True)
    place_of_query = torch.empty_like(query_order)
    place_of_query[query_order] = torch.arange(num_queries, device=key.device)
    place_of_key = torch.empty_like(key_order)
    place_of_key[key_order] = key
    begin = place_of_key[spans.start]
    return _sorted(query_order, key_order, place_of_query[spans.query], begin, begin + spans.count, num_queries)


def _sorted(
    query_order: Tensor, key_order: Tensor, place: Tensor, begin: Tensor, end: Tensor, num_queries: int
) -> RunPart:
    order = torch.argsort(begin, stable=True)
    order = order[torch.argsort(place[order], stable=True)]
    offsets = place.new_zeros(num_queries + 1)
    torch.cumsum(torch.bincount(place, minlength=num_queries), 0, out=offsets[1:])
    return RunPart(query_order, key_order, offsets, begin[order], end[order])
