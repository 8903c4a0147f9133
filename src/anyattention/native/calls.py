"""Records as calls of the kernels: checked, bound to C structures, and run.

Sizes, dtypes and devices are checked here once more, so that no call, however it came about, hands out a pointer to less
than a kernel reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.native import load
from anyattention.native.structures import Kind, Layout, Order, Pairs, layout_of

__all__ = ["Bound", "bind", "pointer", "run"]

_NUMBERS = (torch.float32, torch.float64)


@dataclass(eq=False)
class Bound:
    """A record that was checked and is ready for a kernel.

    Attributes:
        sizes: of the axes, by name.
        tensors: as the kernel reads them, by name; the structure's pointers lead into these.
        dtype: of the numbers; None before the first.
        structure: for C.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    structure: Any = None


def run(function: str, bound: Bound, *arguments: Any) -> None:
    """Calls a kernel with a record's structure and further arguments; tensors go as pointers.

    Raises: as `load.run`.
    """
    given = [pointer(x) if x is None or isinstance(x, Tensor) else x for x in arguments]
    load.run(function, ctypes.byref(bound.structure), *given)


def pointer(x: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None without a tensor."""
    return None if x is None else x.data_ptr()


def bind(record: Any) -> Bound:
    """The record as its kernel reads it.

    Raises:
        InvalidInputError: a size, a dtype or a device that does not fit the others.
    """
    bound = Bound()
    bound.structure = _structure(layout_of(type(record)), record, bound, "")
    return bound


def _structure(layout: Layout, record: Any, bound: Bound, place: str) -> Any:
    values: list[Any] = []
    for each in layout.fields:
        value = getattr(record, each.name)
        if each.layout is not None:
            inside = f"{place}{each.name}."
            values.append(_structure(each.layout, value[0] if each.is_many else value, bound, inside))
        elif each.kind is not None:
            if value is None and each.kind.default is not None:
                value = getattr(record, each.kind.default)
            if value is not None:
                value = each.kind.prepare(value)
                _bind_sizes(place, each.name, each.kind, value, bound)
            bound.tensors[place + each.name] = value
            values += each.kind.c_values(value)
        elif each.type is str:
            values.append(load.score_number(value))
        elif not each.is_tuple:
            values.append(value)
    sizes = [bound.sizes.get(axis, 0) for axis in layout.axes]
    if layout.is_call:
        values += (load.num_threads(), bound.dtype == torch.float64)
    return layout.structure(*sizes, *values)


def _bind_sizes(place: str, name: str, kind: Kind, x: Tensor, bound: Bound) -> None:
    """Raise unless a tensor fits the sizes and the dtype that are known; take those that are not."""
    dtype = kind.dtype or bound.dtype
    if dtype is None:
        dtype = bound.dtype = x.dtype if x.dtype in _NUMBERS else torch.float32
    shape, sizes = x.shape, bound.sizes
    fits = x.dtype is dtype and x.is_cpu
    if isinstance(kind, Pairs):
        fits = fits and _fits_pairs(shape, [sizes[axis] for axis, _ in kind.names])
    elif isinstance(kind, Order) and shape == (0,):
        pass
    elif len(shape) != len(kind.names):
        fits = False
    else:
        for size, (axis, more) in zip(shape, kind.names, strict=True):
            if sizes.setdefault(axis, size - more) != size - more:
                fits = False
    if not fits:
        expected = [f"{axis}={sizes.get(axis, '?')}" + (" + 1" if more else "") for axis, more in kind.names]
        raise InvalidInputError(
            argument=place + name,
            expected=f"{dtype} on cpu, ({', '.join(expected)})",
            actual=f"{x.dtype} on {x.device}, {tuple(shape)}",
        )


def _fits_pairs(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    if len(shape) == 2:
        sizes = (sizes[1], max(sizes[2] + sizes[3] - 1, 0))
    return len(shape) == len(sizes) and all(size in (1, whole) for size, whole in zip(shape, sizes, strict=True))
