"""Arrays that a compiled program names, and does not hold: a graph's, found again at each run.

A compiler takes the memory of an operator's results for its own, and writes into it once they are read. So an operator
must not return arrays that are kept: it returns numbers that name them. An operator that gets such a number in place of
an array takes the array itself. Where a compiler copies the numbers, each copy is a name too.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from dataclasses import fields
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from anyattention.errors import GraphStructureError
from anyattention.native.structures import Part

__all__ = ["names_of", "resolved"]

# No index and no offset is as low.
_FIRST, _LAST = -(2**62), -(2**61)
_numbers = itertools.count()
_named: WeakValueDictionary[int, Part] = WeakValueDictionary()
_read = ctypes.c_int64.from_address


def names_of(part: Part) -> Tensor:
    """A number for each array of a part of indices, in the order of its fields; the part lives as long as they do."""
    number = part.number
    if number is None:
        number = next(_numbers)
        object.__setattr__(part, "number", number)
    _named[number] = part
    count = len(fields(part))  # pyright: ignore[reportArgumentType]  # every part is a dataclass
    first = _FIRST + number * count
    owner: Any = _owner_of(count)(*range(first, first + count))
    owner.part = part
    return torch.frombuffer(owner, dtype=torch.int64)


def resolved(part: Any) -> Any:
    """A part of indices with the arrays that its tensors name, where they name some.

    Raises:
        GraphStructureError: nobody holds the arrays any more.
    """
    tensors = {each.name: getattr(part, each.name) for each in fields(part)}
    numbers = {name: _read(x.data_ptr()).value for name, x in tensors.items() if x.numel()}
    named = [(name, divmod(first - _FIRST, len(tensors))) for name, first in numbers.items() if _FIRST <= first < _LAST]
    if not named:
        return part
    parts = {number: _named.get(number) for _, (number, _) in named}
    if None in parts.values():
        raise GraphStructureError(
            argument="graph", expected="a graph that the compiled program still holds", actual="one that is gone"
        )
    names = list(tensors)
    if len(parts) == 1 and [place for _, (_, place) in named] == list(range(len(tensors))):
        # What was bound for the kernels before is kept with it.
        return next(iter(parts.values()))
    found = {name: getattr(parts[number], names[place]) for name, (number, place) in named}
    return type(part)(**{**tensors, **found})


@functools.cache
def _owner_of(count: int) -> type:
    """Memory of so many numbers, which holds a part."""
    return type("Names", (ctypes.c_int64 * count,), {"part": None})
