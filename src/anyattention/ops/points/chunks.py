"""Functions of many rows, a chunk at a time.

A chain of elementwise operations over millions of rows writes and reads each result in memory, and autograd keeps them
all. In chunks they stay in the cache and none is kept: derivatives compute the chain anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention.ambient import Moment, moment_of

__all__ = ["gradients_in_chunks", "in_chunks"]

# Sixteen float32 numbers for each of so many rows are 1 MiB.
_ROWS = 1 << 14

# From tensors with a row for each row, and shared ones, to results by row, and to sums over the rows.
_Function = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]


def in_chunks(function: Callable[..., tuple[Tensor, ...]], rows: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
    """`function(rows, *shared)`, whose results have a row for each row and need no other; differentiable to any order.

    Chunks are cut at fixed places, and what shared tensors get is added up in order.
    """
    if len(rows) <= _ROWS:
        return function(rows, *shared)
    return _applied(_by_rows(function), 1, rows, *shared)


def gradients_in_chunks(
    function: Callable[..., tuple[Tensor, ...]], rows: Tensor, shared: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of rows and shared tensors of `in_chunks`, for those of its results; differentiable."""
    return _gradients(_by_rows(function), [rows], shared, gradients, ())


def _by_rows(function: Callable[..., tuple[Tensor, ...]]) -> _Function:
    return lambda rows, shared: (function(*rows, *shared), ())


def _applied(function: _Function, num_rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """In chunks where nobody but autograd's backward has to see it, else at once."""
    if tensors[0].is_cpu and moment_of(tensors) is Moment.PLAIN:
        return _InChunks.apply(function, num_rows, *tensors)
    results, sums = function(tensors[:num_rows], tensors[num_rows:])
    return *results, *sums


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: _Function, num_rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(tensors[0].device.type, enabled=False):
            results, sums = _run(function, tensors[:num_rows], tensors[num_rows:])
        ctx.function, ctx.num_rows, ctx.num_results = function, num_rows, len(results)
        ctx.save_for_backward(*tensors)
        return *results, *sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, shared = ctx.saved_tensors[: ctx.num_rows], ctx.saved_tensors[ctx.num_rows :]
        by_results, by_sums = gradients[: ctx.num_results], gradients[ctx.num_results :]
        return None, None, *_gradients(ctx.function, rows, shared, by_results, by_sums)


def _gradients(
    function: _Function,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    by_results: Sequence[Tensor],
    by_sums: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Again a function of rows and shared tensors, so that its own derivative is taken in the same way."""
    num_rows, num_shared = len(rows), len(shared)

    def joined(*inputs: Tensor) -> tuple[Tensor, ...]:
        results, sums = function(inputs[:num_rows], inputs[num_rows:])
        return *results, *sums

    def gradient(rows: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        pull = torch.func.vjp(joined, *rows[:num_rows], *shared[:num_shared])[1]
        found = pull((*rows[num_rows:], *shared[num_shared:]))
        return found[:num_rows], found[num_rows:]

    return _applied(gradient, num_rows + len(by_results), *rows, *by_results, *shared, *by_sums)


def _run(function: _Function, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """All chunks, one after the other."""
    count = len(rows[0])
    results: list[Tensor] = []
    sums: list[Tensor] = []
    # One chunk of no rows says what results there would be.
    for start in range(0, max(count, 1), _ROWS):
        chunk = slice(start, start + _ROWS)
        parts, terms = function([each[chunk] for each in rows], shared)
        if start == 0:
            results = [part.new_empty(count, *part.shape[1:]) for part in parts]
            sums = [torch.zeros_like(term) for term in terms]
        for result, part in zip(results, parts, strict=True):
            result[chunk] = part
        for total, term in zip(sums, terms, strict=True):
            total += term
    return results, sums
