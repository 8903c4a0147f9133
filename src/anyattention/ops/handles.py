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


def names_of(part: Part) -> Tensor:
    """A number for each array of a part of indices, the last field's first; the part lives as long as the numbers."""
    number = part.number
    if number is None:
        number = next(_numbers)
        object.__setattr__(part, "number", number)
    _named[number] = part
    count = len(fields(part))  # pyright: ignore[reportArgumentType]  # every part is a dataclass
    first = _FIRST + number * count
    # The memory of the numbers belongs to an object that holds the part.
    owner: Any = _owner_of(count)(*reversed(range(first, first + count)))
    owner.part = part
    return torch.frombuffer(owner, dtype=torch.int64)


def resolved(part: Any) -> Any:
    """A part of indices with the arrays that its tensors name, where they name some.

    Raises:
        GraphStructureError: nobody holds the arrays any more.
    """
    tensors = {each.name: getattr(part, each.name) for each in fields(part)}
    found, places = {}, []
    for name, x in tensors.items():
        first = _first_of(x)
        if _FIRST <= first < _LAST:
            number, place = divmod(first - _FIRST, len(tensors))
            kept = _named.get(number)
            if kept is None:
                raise GraphStructureError(
                    argument="graph", expected="a graph that the compiled program holds", actual="one that is gone"
                )
            found[name] = getattr(kept, fields(kept)[place].name)  # pyright: ignore[reportArgumentType]  # as above
            places.append((number, place))
    if not found:
        return part
    if places == [(places[0][0], place) for place in range(len(tensors))]:
        # As it was named; what was bound for the kernels before is kept with it.
        return _named[places[0][0]]
    return type(part)(**{**tensors, **found})


def _first_of(x: Tensor) -> int:
    return ctypes.c_int64.from_address(x.data_ptr()).value if x.numel() else 0


@functools.cache
def _owner_of(count: int) -> type:
    """Memory of so many numbers, which holds a part."""
    return type("Names", (ctypes.c_int64 * count,), {"part": None})
