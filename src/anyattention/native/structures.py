"""Records as the kernels' C structures: what each field is in C, checked and filled by name.

A record is a frozen dataclass. A tensor among its fields says what it is: `Annotated[Tensor, Numbers("batch num_queries
heads head_dim")]`. The C structure of a record has, in this order: each axis that is named first here, as int64_t; the
fields, as the kinds below say; `num_threads` and `is_double`, unless a record inside has them. Nothing else lists it.
"""

from __future__ import annotations

import ctypes
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from operator import attrgetter, itemgetter
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from anyattention.native.columns import row_stride

__all__ = [
    "Choice",
    "Field",
    "HeadRows",
    "Indices",
    "Kind",
    "Layout",
    "MatrixRows",
    "Numbers",
    "Order",
    "Pairs",
    "Part",
    "PerEdge",
    "Rows",
    "Seed",
    "layout_of",
    "snake_case",
    "structures",
]

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SCALARS: dict[Any, Any] = {float: ctypes.c_double, bool: ctypes.c_int32, int: _SIZE, str: _SIZE}

# Every structure that a record has become, by its C name.
structures: dict[str, type[ctypes.Structure]] = {}


class EdgeNumbers(ctypes.Structure):
    """`anyattention_edge_numbers`."""

    _fields_ = [("data", _POINTER), *((name, _SIZE) for name in ("batch_stride", "edge_stride", "head_stride"))]


class PairNumbers(ctypes.Structure):
    """`anyattention_pairs`."""

    _fields_ = [("numbers", _POINTER), ("size", _SIZE), ("offset", _SIZE), ("strides", _SIZE * 4)]


class HeadNumbers(ctypes.Structure):
    """`anyattention_head_rows`."""

    _fields_ = [
        ("numbers", _POINTER),
        *((name, _SIZE) for name in ("batch_stride", "row_stride", "head_stride", "type")),
    ]


structures["edge_numbers"] = EdgeNumbers
structures["pairs"] = PairNumbers
structures["head_rows"] = HeadNumbers

# `anyattention_type`.
_TYPES = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}
_HALVES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Kind:
    """What a tensor among a record's fields is.

    Attributes:
        axes: names by a space, such as "batch num_edges heads"; "num_edges+1" is one more. A leading "batch" may be
            absent, from all tensors of a record.
        default: the field that stands in for an absent one.
    """

    axes: str = ""
    default: str | None = None

    dtype: ClassVar[torch.dtype | None] = None
    """None: float32 or float64, one of the two for all."""

    at_rest: ClassVar[frozenset[torch.dtype]] = frozenset()
    """Other dtypes that the kernel reads beside float32."""

    absent: ClassVar[tuple[Any, ...]] = (None,)
    """What C gets where there is no tensor."""

    is_contiguous: ClassVar[bool] = False
    """Whether C gets a pointer to contiguous numbers, and nothing else."""

    is_exact: ClassVar[bool] = True
    """Whether the axes have their sizes: none is 1 or absent in place of it."""

    @cached_property
    def names(self) -> tuple[tuple[str, int], ...]:
        """The axes, each with what is added to its size."""
        return tuple((axis.removesuffix("+1"), int(axis.endswith("+1"))) for axis in self.axes.split())

    def c_fields(self, name: str) -> list[tuple[str, Any]]:
        """The structure's fields."""
        return [(name, _POINTER)]

    def read(self, x: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, tuple[Any, ...]]:
        """The tensor as the kernel reads it, copied where it has to be, and what C gets."""
        x = x.contiguous()
        return x, (x.data_ptr(),)


class Numbers(Kind):
    """Contiguous floating-point numbers."""

    is_contiguous = True


class Indices(Kind):
    """Contiguous int64."""

    dtype = torch.int64
    is_contiguous = True


class Order(Indices):
    """Indices, or none at all where each thing stands at its own place."""

    is_contiguous = False
    is_exact = False


class Rows(Kind):
    """A row of numbers for each node, rows a stride apart: columns of a matrix are read where they lie."""

    absent = (None, 0)

    def c_fields(self, name: str) -> list[tuple[str, Any]]:
        """A pointer, and how many numbers lie from one row to the next."""
        return [(name, _POINTER), (f"{name}_stride", _SIZE)]

    def read(self, x: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, tuple[Any, ...]]:
        """Copied where its rows cannot be read with one stride."""
        if x.is_contiguous():
            return x, (x.data_ptr(), x.shape[-2] * x.shape[-1])
        stride = row_stride(x)
        if stride is None:
            x = x.contiguous()
            stride = row_stride(x)
        return x, (x.data_ptr(), stride)


class HeadRows(Kind):
    """Rows of contiguous numbers `(batch, positions, heads, width)`, of any strides, and of half precision at rest."""

    at_rest = _HALVES
    absent = (HeadNumbers(),)

    def c_fields(self, name: str) -> list[tuple[str, Any]]:
        """A `HeadNumbers`."""
        return [(name, HeadNumbers)]

    def read(self, x: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, tuple[Any, ...]]:
        """As it lies; copied where a row's numbers lie apart."""
        strides = x.stride()
        if strides[-1] != 1 and x.shape[-1] != 1:
            x = x.contiguous()
            strides = x.stride()
        batch, rows, heads, _ = strides if len(strides) == 4 else (0, *strides)
        return x, (HeadNumbers(x.data_ptr(), batch, rows, heads, _TYPES[x.dtype]),)


class MatrixRows(HeadRows):
    """Rows of contiguous numbers `(positions, width)`, any stride apart, and of half precision at rest."""

    def read(self, x: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, tuple[Any, ...]]:
        """As they lie; copied where a row's numbers lie apart."""
        x, _ = super().read(x.unsqueeze(1), sizes)
        x = x.squeeze(1)
        return x, (HeadNumbers(x.data_ptr(), 0, x.stride(0), 0, _TYPES[x.dtype]),)


class PerEdge(Kind):
    """Numbers `(batch, num_edges, heads)` of any strides, 0 where an axis is broadcast."""

    absent = (EdgeNumbers(),)

    def c_fields(self, name: str) -> list[tuple[str, Any]]:
        """An `EdgeNumbers`."""
        return [(name, EdgeNumbers)]

    def read(self, x: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, tuple[Any, ...]]:
        """As it lies."""
        strides = x.stride()
        return x, (EdgeNumbers(x.data_ptr(), *(strides if len(strides) == 3 else (0, *strides))),)


class Pairs(Kind):
    """Numbers of pairs: each of the axes (batch, heads, num_queries, num_keys) whole or 1; any strides.

    Or by distance, `(heads | 1, num_queries + num_keys - 1)`: that of query i and key j at i - j + num_keys - 1.
    """

    absent = (PairNumbers(),)
    is_exact = False

    def c_fields(self, name: str) -> list[tuple[str, Any]]:
        """A `PairNumbers`."""
        return [(name, PairNumbers)]

    def read(self, x: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, tuple[Any, ...]]:
        """As it lies; contiguous by distance."""
        if x.ndim == 2:
            x = x.contiguous()
            by_head = 0 if x.shape[0] == 1 else x.shape[1]
            strides = (_SIZE * 4)(0, by_head, 1, -1)
            return x, (PairNumbers(x.data_ptr(), x.numel(), max(sizes["num_keys"] - 1, 0), strides),)
        each = [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, each, strict=True)) if x.numel() else 0
        return x, (PairNumbers(x.data_ptr(), size, 0, (_SIZE * 4)(*each)),)


class Choice(Pairs):
    """As `Pairs`, of booleans."""

    dtype = torch.bool


class Seed(Kind):
    """A 0-d int64, of which C gets the number; 0 where there is none."""

    dtype = torch.int64
    absent = (0,)

    def c_fields(self, name: str) -> list[tuple[str, Any]]:
        """A number."""
        return [(name, _SIZE)]

    def read(self, x: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, tuple[Any, ...]]:
        """The number."""
        return x, (int(x),)


class Part:
    """Base of records that stand inside others and are no call of their own; abstract.

    Attributes:
        bound: of a part of indices that was bound before: where its tensors lay, its structure and its axes' sizes.
        number: of a part of indices that compiled programs name; see `ops.handles`.
    """

    bound: tuple[list[int], Any, dict[str, int]] | None = None
    number: int | None = None


@dataclass(frozen=True)
class Field:
    """One field of a record.

    Attributes:
        name: as the record has it.
        type: of a setting, float, bool, int, str or a tuple of bool; Tensor; the type of a record inside.
        optional: whether it may be None.
        kind: what a tensor is; None for all else.
        layout: of a record inside, or of each of a tuple of records.
        is_tuple: a tuple of settings.
        is_told: whether C is told; not of a tuple of settings.
        is_many: a tuple of records.
    """

    name: str
    type: Any
    optional: bool = False
    kind: Kind | None = None
    layout: Layout | None = None
    is_tuple: bool = False
    is_many: bool = False
    is_told: bool = True


class Untold:
    """Marks a setting that C is not told: `Annotated[str, Untold]`."""


class Layout:
    """A record's fields, and the axes that are named first here or in a record inside.

    Attributes:
        record: the type.
        fields: in order.
        axes: those that are this record's own in C.
        sure_axes: those that tensors give which are always there.
        names: of the fields.
        plan: for each field that C gets, the name, the kind of a tensor, the layout of a record inside, whether it is a
            tuple of records, whether it is a name, and what looks up a tensor's shape, without batch and with, among
            the sizes that fields before it have given.
        is_call: not a `Part`: C is told the number of threads and whether numbers are double.
        tensors_of: the tensors of a record that has nothing else, in order.
        is_of_tensors: whether it has nothing else.
        is_of_indices: nothing but int64 tensors, all there, which have no gradient.
    """

    def __init__(self, record: type) -> None:
        hints = typing.get_type_hints(record, include_extras=True)
        self.record = record
        self.fields = [_field(item.name, hints[item.name]) for item in fields(record)]
        self.is_call = not issubclass(record, Part)
        self.names = tuple([each.name for each in self.fields])
        self.sure_axes: set[str] = set()
        self.plan = [
            (each.name, each.kind, each.layout, each.is_many, each.type is str, self._shapes_of(each))
            for each in self.fields
            if each.is_told
        ]
        self.is_of_tensors = all(each.kind is not None for each in self.fields)
        self.is_of_indices = all(isinstance(each.kind, Indices) and not each.optional for each in self.fields)
        self.tensors_of = attrgetter(*self.names)
        self.axes: list[str] = []
        named: set[str] = set()
        for each in self.fields:
            if each.layout is not None:
                named |= each.layout.all_axes
            for axis, _ in each.kind.names if each.kind is not None else ():
                if axis not in named:
                    named.add(axis)
                    self.axes.append(axis)
        self.all_axes = named

    def _shapes_of(self, field: Field) -> tuple[itemgetter[Any], itemgetter[Any]] | None:
        """What looks up the shape, where fields before this one give all of its sizes; notes the sizes it gives."""
        if field.layout is not None:
            self.sure_axes |= field.layout.sure_axes
        if field.kind is None or not field.kind.is_exact:
            return None
        axes = [axis for axis, _ in field.kind.names]
        own = axes[axes[:1] == ["batch"] :]
        is_given = self.sure_axes.issuperset(axes) and not any(more for _, more in field.kind.names)
        if not field.optional or field.kind.default is not None:
            self.sure_axes.update(axes)
        # Of one name it would not give a tuple.
        return (itemgetter(*own), itemgetter(*axes)) if is_given and len(own) > 1 else None

    @cached_property
    def structure(self) -> type[ctypes.Structure]:
        """The C structure, entered under its name."""
        c_fields: list[tuple[str, Any]] = [(axis, _SIZE) for axis in self.axes]
        for each in self.fields:
            if each.layout is not None:
                c_fields.append((each.name, each.layout.structure))
            elif each.kind is not None:
                c_fields += each.kind.c_fields(each.name)
            elif each.is_told:
                c_fields.append((each.name, _SCALARS[each.type]))
        if self.is_call:
            c_fields += [("num_threads", _SIZE), ("is_double", ctypes.c_int32)]
        made = type(self.record.__name__, (ctypes.Structure,), {"_fields_": c_fields})
        structures[snake_case(self.record.__name__)] = made
        return made


@cache
def layout_of(record: type) -> Layout:
    """The layout of a record, made once."""
    return Layout(record)


def snake_case(name: str) -> str:
    """`GraphAttention` as `graph_attention`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _field(name: str, hint: Any) -> Field:
    kind = None
    if typing.get_origin(hint) is Annotated:
        hint, kind = typing.get_args(hint)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = types.NoneType in parts
    (kept,) = (part for part in parts if part is not types.NoneType)
    if typing.get_origin(kept) is Literal:
        kept = str
    if typing.get_origin(kept) is tuple:
        item = typing.get_args(kept)[0]
        layout = layout_of(item) if is_dataclass(item) else None
        is_many = layout is not None
        return Field(name, item, optional, None, layout, not is_many, is_many, is_told=is_many)
    layout = layout_of(kept) if is_dataclass(kept) else None
    if kind is Untold:
        return Field(name, kept, optional, is_told=False)
    return Field(name, kept, optional, kind, layout)
