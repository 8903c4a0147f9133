"""Keys and values in a safetensors file that may be larger than memory: mapped, never read as a whole.

The file is the header's size (8 bytes), the header (JSON), and the tensors. A mapped file must not be written to; a new
one may take its place, and those that have mapped the old one go on with it.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention._checks import describe_shape, require_dense
from anyattention.errors import DimensionMismatchError, InvalidInputError
from anyattention.files import require_file, to_path, whole_file

__all__ = ["MappedMemory", "write_memory"]

_LARGEST_HEADER = 100_000_000  # safetensors' own
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Room for the header of a file whose number of rows is not known before the last; tensors begin at lines of the cache.
_HEADER = 512
_AT_ONCE = 1 << 24


class MappedMemory:
    """Keys and values of a safetensors file, as tensors that are read from the file where they are used.

    Args:
        path: the file.
        key, value: the names of its tensors; the same name where keys are the values too.

    Attributes:
        keys: `(rows, key_dim)`; values: `(rows, value_dim)`. They must not be written to.

    Raises:
        InvalidInputError: there is no such file, it is cut short or no safetensors file, has no such tensor or no row,
            or one of another dtype than float32, bfloat16 and float16.
        DimensionMismatchError: a tensor is no matrix, or keys and values are not as many.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_memory(f"{folder}/memory.safetensors", [(torch.eye(2), torch.ones(2, 3))])
        ...     MappedMemory(f"{folder}/memory.safetensors").values.shape
        torch.Size([2, 3])
    """

    def __init__(self, path: str | os.PathLike[str], key: str = "keys", value: str = "values") -> None:
        self.path = to_path(path)
        try:
            size = require_file(self.path)
            with open(self.path, "rb") as file:
                places = _read_header(self.path, file, size, (key, value))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as fault:
            raise InvalidInputError(
                argument=str(self.path), expected="a file", actual=fault.strerror or str(fault)
            ) from fault
        self.keys = self._tensor(places[key])
        self.values = self.keys if key == value else self._tensor(places[value])
        if len(self.keys) != len(self.values):
            raise DimensionMismatchError(
                argument=str(self.path),
                expected=f"as many {value} as {key}, {len(self.keys)}",
                actual=f"{len(self.values)}",
            )

    def __len__(self) -> int:
        return len(self.keys)

    def will_read(self, *, in_order: bool) -> None:
        """Tell the system how the file is read next, where it asks."""
        advice = "MADV_SEQUENTIAL" if in_order else "MADV_RANDOM"
        if hasattr(mmap, advice):
            self._map.madvise(getattr(mmap, advice))

    def _tensor(self, place: _Place) -> Tensor:
        bytes_ = np.frombuffer(self._map, dtype=np.uint8, count=place.end - place.begin, offset=place.begin)
        held = torch.from_numpy(np.asarray(_Lent(bytes_)))
        return held.view(place.dtype).view(place.shape)


class _Place(NamedTuple):
    """Where a tensor lies in the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, int]
    begin: int
    end: int


class _Lent:
    """Bytes that may only be read, for tensors, which know no such thing: nobody is given these to write."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers
        told = dict(numbers.__array_interface__)
        self.__array_interface__ = {**told, "data": (told["data"][0], False)}


def _read_header(path: Path, file: BinaryIO, size: int, names: Iterable[str]) -> dict[str, _Place]:
    """Where the named tensors lie, which fits the size of the file."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
        raise _no_memory(path, f"a safetensors file, with its header of {length} bytes", f"{size} bytes")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as fault:
        raise _no_memory(path, "a safetensors file, whose header is JSON", "another header") from fault
    if not isinstance(header, dict):
        raise _no_memory(path, "a safetensors file, whose header names tensors", "another header")
    places = {}
    for name in names:
        if name not in header:
            known = ", ".join(repr(each) for each in header if each != "__metadata__") or "none"
            raise _no_memory(path, f"a tensor {name!r}", f"the tensors {known}")
        places[name] = _read_place(path, name, header[name], 8 + length, size)
    return places


def _read_place(path: Path, name: str, about: Any, first: int, size: int) -> _Place:
    try:
        dtype, shape, (begin, end) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
        is_known = type(dtype) is str and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        is_known, dtype, shape, begin, end = False, "", (), 0, 0
    if not is_known:
        raise _no_memory(path, f"dtype, shape and data_offsets of {name!r}", repr(about))
    if dtype not in _DTYPES:
        raise _no_memory(path, f"{name!r} of dtype F32, BF16 or F16", str(dtype))
    if len(shape) != 2 or shape[1] == 0:
        raise DimensionMismatchError(argument=f"{name!r} of {path}", expected="(rows, width)", actual=shape)
    if shape[0] == 0:
        raise _no_memory(path, "one row or more", "none")
    if end - begin != shape[0] * shape[1] * _DTYPES[dtype].itemsize:
        raise _no_memory(path, f"data_offsets of {name!r} that fit {dtype} {shape}", f"{begin} to {end}")
    if first + end > size:
        raise _no_memory(path, f"{first + end} bytes, as the header says", f"a file that is cut short, {size} bytes")
    return _Place(_DTYPES[dtype], (shape[0], shape[1]), first + begin, first + end)


def _no_memory(path: Path, expected: str, actual: str) -> InvalidInputError:
    return InvalidInputError(argument=str(path), expected=expected, actual=actual)


def write_memory(
    path: str | os.PathLike[str],
    parts: Iterable[tuple[Tensor, Tensor] | Tensor],
    *,
    key: str = "keys",
    value: str = "values",
) -> None:
    """Write keys and values to a safetensors file, part by part: no more than a part is in memory.

    The file has a temporary name, in the same folder, until it is whole: Ctrl-C, an error among the parts or a crash
    leaves the old file as it was.

    Args:
        path: of the file, in a folder that exists.
        parts: pairs of keys `(rows, key_dim)` and values `(rows, value_dim)`, in order; or keys alone, which are the
            values too where `attend_file` is given value="keys". All of one dtype, float32, bfloat16 or float16, and of
            the same widths. A part may have no rows.
        key, value: the names of the tensors.

    Raises:
        InvalidInputError: no rows in all, another dtype, equal names, or a file that cannot be written.
        DimensionMismatchError: no matrix, another width than that of the first part, or keys and values that are not as
            many.

    Cost: the size of the file, the values a second time: they wait in a file of their own until the last key is there.

    Example:
        >>> import tempfile
        >>> from anyattention.memory import attend_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/memory.safetensors"
        ...     write_memory(path, ((torch.randn(100, 4), torch.randn(100, 2)) for _ in range(10)))
        ...     attend_file(torch.randn(3, 4), path).output.shape
        torch.Size([3, 2])
    """
    target = to_path(path)
    if key == value or "__metadata__" in (key, value):
        raise InvalidInputError(argument="value", expected="another name than that of the keys", actual=repr(value))
    # The system takes the values' file away with the process.
    with whole_file(target) as file, tempfile.TemporaryFile(dir=target.parent) as waiting:
        file.write(bytes(_HEADER))
        first: _Part | None = None
        rows = 0
        for number, part in enumerate(parts):
            found = _Part.of(number, part, first)
            first = found if first is None else first
            rows += len(found.keys)
            for x, to in ((found.keys, file), (found.values, waiting)):
                if x is not None and x.numel():
                    to.write(x.view(torch.uint8).numpy().data)
        if first is None or rows == 0:
            raise InvalidInputError(argument="parts", expected="one row or more", actual="none")
        waiting.seek(0)
        while copied := waiting.read(_AT_ONCE):
            file.write(copied)
        file.seek(0)
        file.write(_header(first, rows, key, value))


class _Part(NamedTuple):
    """Keys and values of a part, contiguous on the CPU."""

    keys: Tensor
    values: Tensor | None

    @classmethod
    def of(cls, number: int, part: Any, first: _Part | None) -> _Part:
        given = part if isinstance(part, tuple | list) else (part,)
        if len(given) not in (1, 2):
            raise InvalidInputError(
                argument=f"parts[{number}]", expected="keys, or keys and values", actual=f"{len(given)} things"
            )
        rows = []
        for place, x in enumerate(given):
            name = f"parts[{number}][{place}]"
            require_dense(name, x)
            like = x if first is None else first.keys
            if x.dtype not in _NAMES or x.dtype != (given[0] if first is None else like).dtype:
                expected = "float32, bfloat16 or float16, as all parts"
                raise InvalidInputError(argument=name, expected=expected, actual=x.dtype)
            if x.ndim != 2 or x.shape[1] == 0 or len(x) != len(given[0]):
                raise DimensionMismatchError(
                    argument=name, expected="(rows, width), as many values as keys", actual=describe_shape(x)
                )
            rows.append(x.detach().cpu().contiguous())
        found = cls(rows[0], rows[1] if len(rows) == 2 else None)
        if first is not None and found.widths != first.widths:
            raise DimensionMismatchError(
                argument=f"parts[{number}]",
                expected=f"the widths of the first part, {first.widths}",
                actual=found.widths,
            )
        return found

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self if x is not None)


def _header(first: _Part, rows: int, key: str, value: str) -> bytes:
    """The first bytes of the file."""
    told, begin = {}, 0
    for name, x in zip((key, value), first, strict=True):
        if x is not None:
            end = begin + rows * x.shape[1] * x.itemsize
            told[name] = {"dtype": _NAMES[x.dtype], "shape": [rows, x.shape[1]], "data_offsets": [begin, end]}
            begin = end
    text = json.dumps(told).encode()
    if len(text) > _HEADER - 8:
        raise InvalidInputError(argument="key", expected="shorter names of tensors", actual=f"{len(key) + len(value)}")
    return (_HEADER - 8).to_bytes(8, "little") + text.ljust(_HEADER - 8)
