"""The keys of each query as arithmetic progressions: what a pattern is on its way to a Graph or a kernel.

A pattern over 131,072 positions has some hundred thousand spans where it has millions of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spans", "concatenate"]


@dataclass(frozen=True, eq=False)
class Spans:
    """Progressions of keys, each of one query; no pair is in two of them.

    Attributes:
        query: `(spans,)` int64.
        start: `(spans,)` int64, the first key.
        step: `(spans,)` int64, at least 1.
        count: `(spans,)` int64, at least 1.
    """

    query: Tensor
    start: Tensor
    step: Tensor
    count: Tensor

    @classmethod
    def of(cls, query: Tensor, first: Tensor | int, last: Tensor | int, step: Tensor | int = 1) -> Spans:
        """The keys `first, first + step, ...` up to `last`, where there are any; the arguments broadcast."""
        given = [torch.as_tensor(each, device=query.device) for each in (first, last, step)]
        query, begin, end, steps = torch.broadcast_tensors(query, *given)
        count = torch.div(end - begin, steps, rounding_mode="floor") + 1
        return cls(query, begin, steps, count).where(count > 0)

    @property
    def last(self) -> Tensor:
        """The last key of each span."""
        return self.start + self.step * (self.count - 1)

    @property
    def num_pairs(self) -> int:
        """How many pairs there are in all spans."""
        return int(self.count.sum())

    def where(self, chosen: Tensor) -> Spans:
        """Some of the spans, by a boolean for each."""
        return Spans(self.query[chosen], self.start[chosen], self.step[chosen], self.count[chosen])

    def within(self, low: Tensor, high: Tensor) -> Spans:
        """The keys of each span from its query's `low` to its `high`, `(num_queries,)`, both included."""
        low, high = low[self.query], high[self.query]
        skipped = torch.div(low - self.start + self.step - 1, self.step, rounding_mode="floor").clamp(min=0)
        return Spans.of(self.query, self.start + skipped * self.step, torch.minimum(self.last, high), self.step)

    def bounds(self, num_queries: int) -> tuple[Tensor, Tensor] | None:
        """The first and last key of each query, where its keys are a single run; None where one has more.

        A query without keys has a first key after its last.
        """
        if not bool((self.step == 1).all()) or self.query.unique().numel() != self.query.numel():
            return None
        low = self.query.new_ones(num_queries).index_copy(0, self.query, self.start)
        return low, self.query.new_zeros(num_queries).index_copy(0, self.query, self.last)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Query and key of each pair, `(pairs,)`, ordered by query, then key."""
        query = self.query.repeat_interleave(self.count)
        first = (self.count.cumsum(0) - self.count).repeat_interleave(self.count)
        place = torch.arange(query.numel(), device=query.device) - first
        key = self.start.repeat_interleave(self.count) + place * self.step.repeat_interleave(self.count)
        order = torch.argsort(key, stable=True)
        order = order[torch.argsort(query[order], stable=True)]
        return query[order], key[order]

    def counts(self, num_queries: int) -> Tensor:
        """The number of keys of each query, `(num_queries,)`."""
        return self.count.new_zeros(num_queries).index_add(0, self.query, self.count)


def concatenate(parts: Sequence[Spans]) -> Spans:
    """The spans of all parts, which must share no pair."""
    return Spans(*(torch.cat([getattr(part, name) for part in parts]) for name in ("query", "start", "step", "count")))
