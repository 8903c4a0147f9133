"""Records and their parts as flat lists and back: what an operator hands to PyTorch.

Tensors come in the order of the fields. A tuple of records inside is one list of tensors for the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from anyattention.native.structures import Field, Kind, Layout

__all__ = [
    "flattened",
    "kept_flags",
    "kinds_of",
    "late_names",
    "num_tensors",
    "numbers_of",
    "places_of",
    "record_of",
    "schema_of",
    "take_sizes",
    "tensors_of",
    "versions_of",
    "with_tensors",
]

_SCHEMA = {float: "float", bool: "bool", int: "SymInt", str: "str"}


def schema_of(layout: Layout, prefix: str) -> list[str]:
    """The arguments of the schema."""
    found: list[str] = []
    for each in layout.fields:
        name = prefix + each.name
        if each.is_many:
            found.append(f"Tensor[] {name}")
        elif each.layout is not None:
            found += schema_of(each.layout, f"{name}_")
        elif each.kind is not None:
            found.append(f"Tensor{'?' if each.optional else ''} {name}")
        else:
            found.append(f"bool[] {name}" if each.is_tuple else f"{_SCHEMA[each.type]} {name}")
    return found


def places_of(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Where each field of numbers stands among the tensors of a record, and among the schema's arguments.

    Of a tuple of records one is counted: `late_names` come so many tensors later as the others have.
    """
    places: dict[str, int] = {}
    arguments: dict[str, int] = {}
    tensors = given = 0
    for each in layout.fields:
        if each.is_many:
            assert each.layout is not None
            tensors += num_tensors(each.layout)
            given += 1
        elif each.layout is not None:
            for own, found, first in zip((places, arguments), places_of(each.layout), (tensors, given), strict=True):
                own.update({f"{each.name}.{name}": first + place for name, place in found.items()})
            tensors += num_tensors(each.layout)
            given += len(schema_of(each.layout, ""))
        else:
            if each.kind is not None and each.kind.dtype is None:
                places[each.name], arguments[each.name] = tensors, given
            tensors += each.kind is not None
            given += 1
    return places, arguments


def late_names(layout: Layout) -> frozenset[str]:
    """The fields of numbers that come after a tuple of records."""
    late: set[str] = set()
    is_late = False
    for each in layout.fields:
        if each.layout is not None and not each.is_many:
            names = places_of(each.layout)[0] if is_late else late_names(each.layout)
            late |= {f"{each.name}.{name}" for name in names}
        elif is_late and each.kind is not None and each.kind.dtype is None:
            late.add(each.name)
        is_late |= has_tuple(each)
    return frozenset(late)


def has_tuple(field: Field) -> bool:
    """Whether a field is a tuple of records, or has one inside."""
    return field.is_many or (field.layout is not None and any(map(has_tuple, field.layout.fields)))


def num_tensors(layout: Layout) -> int:
    """How many tensors a record has, with one record in each tuple."""
    return sum(1 if each.kind is not None else num_tensors(each.layout) if each.layout else 0 for each in layout.fields)


def tensors_of(layout: Layout, record: Any, with_indices: bool = True) -> list[Tensor | None]:
    """The tensors of a record, in order, absent ones too; on demand without those of parts of indices."""
    found: list[Tensor | None] = []
    given = record.__dict__
    for name, kind, inside, is_many, _, _ in layout.plan:
        if kind is not None:
            found.append(given[name])
        elif inside is not None and (with_indices or not inside.is_of_indices):
            for part in given[name] if is_many else (given[name],):
                found += inside.tensors_of(part) if inside.is_of_tensors else tensors_of(inside, part, with_indices)
    return found


def versions_of(layout: Layout, record: Any) -> list[int]:
    """How often each tensor of a record's parts of indices was changed in place."""
    found: list[int] = []
    for name, _, inside, is_many, _, _ in layout.plan:
        if inside is not None:
            for part in record.__dict__[name] if is_many else (record.__dict__[name],):
                if inside.is_of_indices:
                    tensors = inside.tensors_of(part)
                    try:
                        found += [x._version for x in tensors]
                    except RuntimeError:  # inference tensors keep none
                        found += [0 if x.is_inference() else x._version for x in tensors]
                else:
                    found += versions_of(inside, part)
    return found


def kept_flags(layout: Layout, keeps: Sequence[str], with_indices: bool) -> list[bool]:
    """Which of a record's tensors are kept; a record without tuples of records."""
    flags: list[bool] = []
    for each in layout.fields:
        if each.kind is not None:
            flags.append(each.name in keeps)
        elif each.layout is not None and (with_indices or not each.layout.is_of_indices):
            flags += [each.name in keeps] * num_tensors(each.layout)
    return flags


def flattened(layout: Layout, record: Any) -> list[Any]:
    """The schema's arguments."""
    found: list[Any] = []
    for each in layout.fields:
        value = getattr(record, each.name)
        if each.is_many:
            assert each.layout is not None
            found.append([x for part in value for x in tensors_of(each.layout, part)])
        elif each.layout is not None:
            found += flattened(each.layout, value)
        else:
            found.append(list(value) if each.is_tuple else value)
    return found


def record_of(layout: Layout, arguments: Iterator[Any], resolve: Callable[[Any], Any] | None = None) -> Any:
    """The record of the schema's arguments, its parts of indices resolved on demand."""
    values = {}
    for each in layout.fields:
        if each.is_many:
            assert each.layout is not None
            tensors, size = next(arguments), len(each.layout.fields)
            parts = [tensors[first : first + size] for first in range(0, len(tensors), size)]
            values[each.name] = tuple([each.layout.record(*part) for part in parts])
        elif each.layout is not None:
            values[each.name] = record_of(each.layout, arguments, resolve)
        else:
            value = next(arguments)
            values[each.name] = tuple(value) if each.is_tuple else value
    record = layout.record(**values)
    return record if resolve is None or not layout.is_of_indices else resolve(record)


def with_tensors(layout: Layout, template: Any, tensors: Iterator[Tensor | None], keeps_indices: bool = False) -> Any:
    """A record with the template's settings, and tensors in order; `keeps_indices` keeps the template's own parts."""
    if keeps_indices and layout.is_of_indices:
        return template
    made = object.__new__(layout.record)
    values = made.__dict__
    if layout.is_of_tensors:
        values.update(zip(layout.names, tensors, strict=False))
        return made
    given = template.__dict__
    for each in layout.fields:
        if each.kind is not None:
            values[each.name] = next(tensors)
        elif each.layout is None:
            values[each.name] = given[each.name]
        elif each.is_many:
            values[each.name] = tuple(
                [with_tensors(each.layout, part, tensors, keeps_indices) for part in given[each.name]]
            )
        else:
            values[each.name] = with_tensors(each.layout, given[each.name], tensors, keeps_indices)
    return made


def kinds_of(layout: Layout, record: Any) -> list[Kind]:
    """What each of a record's tensors is."""
    found: list[Kind] = []
    for each in layout.fields:
        if each.kind is not None:
            found.append(each.kind)
        elif each.layout is not None:
            value = getattr(record, each.name)
            for part in value if each.is_many else (value,):
                found += kinds_of(each.layout, part)
    return found


def numbers_of(layout: Layout, record: Any) -> Tensor:
    """The first tensor of numbers."""
    kinds = kinds_of(layout, record)
    tensors = zip(kinds, tensors_of(layout, record), strict=True)
    return next(x for kind, x in tensors if x is not None and kind.dtype is None)


def take_sizes(layout: Layout, record: Any, sizes: dict[str, Any]) -> bool:
    """The sizes of a record's axes, from its tensors; whether it has a batch axis."""
    has_batch = True
    for each in layout.fields:
        value = getattr(record, each.name)
        if each.layout is not None:
            for part in value if each.is_many else (value,):
                has_batch &= take_sizes(each.layout, part, sizes)
        elif each.kind is not None and each.kind.is_exact:
            value = getattr(record, each.kind.default) if value is None and each.kind.default else value
            if value is not None:
                names = each.kind.names
                if value.ndim == len(names) - 1:
                    names, has_batch = names[1:], False
                for size, (axis, more) in zip(value.shape, names, strict=True):
                    sizes.setdefault(axis, size - more if more else size)
    return has_batch
