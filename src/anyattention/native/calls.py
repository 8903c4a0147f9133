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
    # One loop and no calls for what most fields are: this stands before every kernel.
    values: list[Any] = []
    sizes, tensors, given = bound.sizes, bound.tensors, record.__dict__
    for each in layout.fields:
        value, kind = given[each.name], each.kind
        if kind is not None:
            if value is None and kind.default is not None:
                value = given[kind.default]
            if value is None:
                values += kind.absent
                tensors[place + each.name] = None
                continue
            dtype = kind.dtype or bound.dtype
            if dtype is None:
                dtype = bound.dtype = value.dtype if value.dtype in _NUMBERS else torch.float32
            shape, names = value.shape, kind.names
            fits = value.dtype is dtype and value.is_cpu and (len(shape) == len(names) or isinstance(kind, Pairs))
            if fits and not isinstance(kind, Pairs | Order):
                for size, (axis, more) in zip(shape, names, strict=True):
                    if sizes.setdefault(axis, size - more) != size - more:
                        fits = False
            elif fits:
                fits = _fits(kind, shape, sizes)
            if not fits:
                raise _misfit(place + each.name, kind, value, bound)
            if kind.is_contiguous:
                if not value.is_contiguous():
                    value = value.contiguous()
                values.append(value.data_ptr())
            else:
                value, read = kind.read(value, sizes)
                values += read
            tensors[place + each.name] = value
        elif each.layout is not None:
            inside = value[0] if each.is_many else value
            values.append(_structure(each.layout, inside, bound, f"{place}{each.name}."))
        elif each.type is str:
            values.append(load.score_number(value))
        elif not each.is_tuple:
            values.append(value)
    found = [sizes.get(axis, 0) for axis in layout.axes]
    if layout.is_call:
        return layout.structure(*found, *values, load.num_threads(), bound.dtype is torch.float64)
    return layout.structure(*found, *values)


def _misfit(argument: str, kind: Kind, x: Tensor, bound: Bound) -> InvalidInputError:
    expected = [f"{axis}={bound.sizes.get(axis, '?')}" + (" + 1" if more else "") for axis, more in kind.names]
    return InvalidInputError(
        argument=argument,
        expected=f"{kind.dtype or bound.dtype} on cpu, ({', '.join(expected)})",
        actual=f"{x.dtype} on {x.device}, {tuple(x.shape)}",
    )


def _fits(kind: Kind, shape: Sequence[int], known: dict[str, int]) -> bool:
    """Whether numbers of pairs have axes that are whole or 1, and an order its length or none."""
    sizes = [known[axis] for axis, _ in kind.names]
    if isinstance(kind, Order):
        return shape[0] in (0, *sizes)
    if len(shape) == 2:
        sizes = [sizes[1], max(sizes[2] + sizes[3] - 1, 0)]
    return len(shape) == len(sizes) and all(size in (1, whole) for size, whole in zip(shape, sizes, strict=True))
