"""Records as calls of the kernels: checked, bound to C structures, and run.

Sizes, dtypes and devices are checked here once more, so that no call, however it came about, hands out a pointer to
less than a kernel reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NoReturn

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.native import load
from anyattention.native.structures import Kind, Layout, Order, Pairs, layout_of

__all__ = ["Bound", "bind", "pairs", "run"]

_NUMBERS = (torch.float32, torch.float64)


class Bound:
    """A record that was checked and is ready for a kernel.

    Attributes:
        sizes: of the axes, by name.
        copies: tensors that the kernel reads in place of the record's own, which do not lie as it needs them.
        first: the first tensor of numbers.
        dtype: of the sums, and of all numbers but those in half precision at rest; None before the first.
        has_batch: whether numbers have the axis "batch"; else it is 1.
        structure: for C.
    """

    __slots__ = ("copies", "dtype", "first", "has_batch", "sizes", "structure")

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.copies: list[Tensor] = []
        self.first: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.has_batch = True
        self.structure: Any = None


def run(function: str, bound: Bound, *arguments: Any) -> None:
    """Calls a kernel with a record's structure and further arguments; tensors go as pointers.

    Raises: as `load.run`, and InvalidInputError for a tensor that is not on the CPU.
    """
    given = [x if not isinstance(x, Tensor) else x.data_ptr() if x.is_cpu else _refuse(x) for x in arguments]
    load.run(function, ctypes.byref(bound.structure), *given)


def pairs(x: Tensor | None, bound: Bound) -> Any:
    """A result of a bound record's kernel that is numbers of pairs, as an argument of `run`; None for none."""
    return None if x is None or x.numel() == 0 else ctypes.byref(Pairs().read(x, bound.sizes)[1][0])


def bind(record: Any) -> Bound:
    """The record as its kernel reads it.

    Raises:
        InvalidInputError: a size, a dtype or a device that does not fit the others.
    """
    bound = Bound()
    bound.structure = _structure(layout_of(type(record)), record, bound, "")
    return bound


def _structure(layout: Layout, record: Any, bound: Bound, place: str) -> Any:
    # One loop, and no calls for what most fields are: this stands before every kernel.
    values: list[Any] = []
    given, sizes, numbers = record.__dict__, bound.sizes, bound.dtype
    for name, kind, inside, is_many, is_name, shapes_of in layout.plan:
        value = given[name]
        if kind is not None:
            if value is None and kind.default is not None:
                value = given[kind.default]
            if value is None:
                values += kind.absent
                continue
            dtype = kind.dtype or numbers
            if dtype is None:
                dtype = numbers = bound.dtype = value.dtype if value.dtype in _NUMBERS else torch.float32
                bound.first = value
            shape = value.shape
            fits = shapes_of is not None and shapes_of[bound.has_batch](sizes) == shape
            has_dtype = value.dtype is dtype or (dtype is torch.float32 and value.dtype in kind.at_rest)
            if not has_dtype or not value.is_cpu or not (fits or _fits(kind, shape, bound)):
                raise _misfit(place + name, kind, value, bound)
            if not kind.is_contiguous:
                lying, found = kind.read(value, sizes)
                values += found
                if lying is not value:
                    bound.copies.append(lying)
            elif value.is_contiguous():
                values.append(value.data_ptr())
            else:
                bound.copies.append(value.contiguous())
                values.append(bound.copies[-1].data_ptr())
        elif inside is not None:
            part = value[0] if is_many else value
            read = _part if inside.is_of_indices else _structure
            values.append(read(inside, part, bound, f"{place}{name}."))
            numbers = bound.dtype
        else:
            values.append(load.score_number(value) if is_name else value)
    found = map(sizes.get, layout.axes, repeat(0))
    if layout.is_call:
        return layout.structure(*found, *values, load.num_threads(), bound.dtype is torch.float64)
    return layout.structure(*found, *values)


def _part(layout: Layout, part: Any, bound: Bound, place: str) -> Any:
    """`_structure` of a part of indices, such as a graph's arrays; kept with it, for where its tensors still are."""
    kept = part.bound
    places = list(map(Tensor.data_ptr, layout.tensors_of(part)))
    if kept is not None and kept[0] == places:
        _, structure, own = kept
        for axis, size in own.items():
            if bound.sizes.setdefault(axis, size) != size:
                break
        else:
            return structure
    num_copies = len(bound.copies)
    structure = _structure(layout, part, bound, place)
    if len(bound.copies) == num_copies:
        own = {axis: bound.sizes.get(axis, 0) for axis in layout.axes}
        object.__setattr__(part, "bound", (places, structure, own))
    return structure


def _refuse(x: Tensor) -> NoReturn:
    raise InvalidInputError(argument="a kernel's tensor", expected="the cpu", actual=x.device)


def _misfit(argument: str, kind: Kind, x: Tensor, bound: Bound) -> InvalidInputError:
    expected = [f"{axis}={bound.sizes.get(axis, '?')}" + (" + 1" if more else "") for axis, more in kind.names]
    return InvalidInputError(
        argument=argument,
        expected=f"{kind.dtype or bound.dtype} on cpu, ({', '.join(expected)})",
        actual=f"{x.dtype} on {x.device}, {tuple(x.shape)}",
    )


def _fits(kind: Kind, shape: Sequence[int], bound: Bound) -> bool:
    """Whether a shape fits the sizes that are known; those that are not, it gives."""
    names, sizes = kind.names, bound.sizes
    if not kind.is_exact:
        return _fits_loosely(kind, shape, [sizes[axis] for axis, _ in names])
    if len(shape) != len(names):
        if len(shape) != len(names) - 1 or names[0][0] != "batch":
            return False
        bound.has_batch = False
        shape = (1, *shape)
    for size, (axis, more) in zip(shape, names, strict=True):
        if sizes.setdefault(axis, size - more) != size - more:
            return False
    return True


def _fits_loosely(kind: Kind, shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether an order has its length or none, and numbers of pairs have axes that are whole or 1."""
    if isinstance(kind, Order):
        return len(shape) == 1 and shape[0] in (0, *sizes)
    if len(shape) == 2:
        sizes = (sizes[1], max(sizes[2] + sizes[3] - 1, 0))
    return len(shape) == len(sizes) and all(size in (1, whole) for size, whole in zip(shape, sizes, strict=True))
