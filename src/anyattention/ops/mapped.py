"""Many calls of an operator as one: what vmap makes of it, torch.func's and autograd's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention import ambient
from anyattention.native.structures import Kind, Layout, Pairs, Seed
from anyattention.ops.records import kinds_of, take_sizes, with_tensors

__all__ = ["mapped_by_autograd", "mapped_calls"]


def mapped_calls(
    call: Callable[[Any], Any],
    layout: Layout,
    results_have_batch: bool,
    record: Any,
    tensors: Sequence[Tensor | None],
    mapped: Sequence[bool],
    count: int,
) -> tuple[Tensor | None, ...]:
    """The results of `count` calls, stacked: calls are entries of the batch where all that is mapped has one.

    Args:
        call: the operator.
        layout: that of its record.
        results_have_batch: whether all of its results have a batch axis.
        record: a call.
        tensors: those of the calls, in the record's order; the mapped ones with an axis of calls, first.
        mapped: which those are.
        count: how many calls there are.
    """
    kinds = kinds_of(layout, record)
    # Dropout's numbers, and numbers of pairs, belong to places in the batch.
    is_placed = any(isinstance(kind, Seed | Pairs) and x is not None for kind, x in zip(kinds, tensors, strict=True))
    can_fold = all(_has_batch(kind) for kind, is_mapped in zip(kinds, mapped, strict=True) if is_mapped)
    if results_have_batch and can_fold and not is_placed:
        folded = [
            x if x is None or not _has_batch(kind) else _folded(x, kind, is_mapped, count)
            for x, kind, is_mapped in zip(tensors, kinds, mapped, strict=True)
        ]
        had_batch = take_sizes(layout, record, {})
        results = _as_tuple(call(with_tensors(layout, record, iter(folded))))
        return tuple([x.unflatten(0, (count, -1)) if had_batch and x is not None else x for x in results])
    each = []
    for n in range(count):
        some = [x[n] if is_mapped and x is not None else x for x, is_mapped in zip(tensors, mapped, strict=True)]
        each.append(_as_tuple(call(with_tensors(layout, record, iter(some)))))
    return tuple([None if x[0] is None else torch.stack(x) for x in zip(*each, strict=True)])


def mapped_by_autograd(
    call: Callable[[Any], Any],
    layout: Layout,
    results_have_batch: bool,
    record: Any,
    tensors: Sequence[Tensor | None],
) -> Any:
    """The results of a call that `ambient.Moment.BATCHED` is said of; arguments as in `mapped_calls`."""
    level, count, given, mapped = ambient.mapped_last(tensors)
    results = mapped_calls(call, layout, results_have_batch, record, given, mapped, count)
    found = tuple([None if x is None else ambient.mapped_at(level, x) for x in results])
    return found[0] if len(found) == 1 else found


def _as_tuple(found: Any) -> tuple[Tensor | None, ...]:
    return found if isinstance(found, tuple) else (found,)


def _has_batch(kind: Kind) -> bool:
    return kind.is_exact and kind.axes.startswith("batch ")


def _folded(x: Tensor, kind: Kind, is_mapped: bool, count: int) -> Tensor:
    """A tensor with `count` calls one after the other in its batch axis, which it may not have had."""
    x = x if is_mapped else x.expand(count, *x.shape)
    return x.flatten(0, 1) if x.ndim > len(kind.names) else x
