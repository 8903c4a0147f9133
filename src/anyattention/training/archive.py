"""Reads arrays of .npz files of unknown origin: nothing is unpickled, and sizes are checked before memory is taken."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from anyattention.errors import InvalidInputError
from anyattention.files import most_memory, require_file

__all__ = ["read_arrays"]

_EXPECTED = "a readable .npz file"


def read_arrays(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The wanted arrays of a file, those that it has, and the names of what it has besides, which is not read.

    Raises:
        InvalidInputError: no such file, not an .npz file, or an array that is broken, encrypted, of objects, or of
            another size than its header declares.

    Cost: memory for the arrays; at most 64 MiB and 100 times the file.
    """
    try:
        size = require_file(path)
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual="a single array (.npy)")
            with zipfile.ZipFile(file) as archive:
                # Compressed arrays may be larger than the file, masks above all.
                return _read(path, archive, wanted, most_memory(size))
    except InvalidInputError:
        raise
    except OSError as fault:
        raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=fault.strerror or str(fault)) from fault
    # A broken archive fails in the archive, in its compression or in an array's header, each in ways of its own.
    except Exception as fault:
        actual = str(fault) or type(fault).__name__
        raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=actual) from fault


def _read(
    path: Path, archive: zipfile.ZipFile, wanted: Collection[str], limit: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    chosen: dict[str, zipfile.ZipInfo] = {}
    others: list[str] = []
    for member in archive.infolist():
        key = member.filename.removesuffix(".npy")
        if key not in wanted or key == member.filename:
            others.append(key)
        elif key in chosen:
            raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=f"two arrays {key}")
        else:
            chosen[key] = member
    declared = sum(member.file_size for member in chosen.values())
    if declared > limit:
        raise InvalidInputError(
            argument=str(path),
            expected=f"arrays of at most {limit:,} bytes for its size",
            actual=f"{declared:,} bytes",
        )
    return {key: _read_array(path, archive, key, member) for key, member in chosen.items()}, others


def _read_array(path: Path, archive: zipfile.ZipFile, key: str, member: zipfile.ZipInfo) -> np.ndarray:
    if member.flag_bits & 1:
        raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=f"{key} is encrypted")
    with archive.open(member) as content:
        version = np.lib.format.read_magic(content)
        if version == (1, 0):
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(content)
        else:
            shape, by_columns, dtype = np.lib.format.read_array_header_2_0(content)
        if dtype.hasobject:
            actual = f"{key} holds pickled objects, which are never loaded"
            raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=actual)
        if dtype.kind not in "biuf" or any(type(each) is not int or each < 0 for each in shape):
            actual = f"{dtype} of shape {shape}"
            raise InvalidInputError(argument=str(path), expected=f"{key}: numbers", actual=actual)
        size, left = math.prod(shape) * dtype.itemsize, member.file_size - content.tell()
        if size != left:
            actual = f"{left:,} bytes for the {size:,} of {dtype} {shape}"
            raise InvalidInputError(argument=str(path), expected=f"{key} of the size that it declares", actual=actual)
        # Over the end, where the archive's checksum is compared.
        held = content.read(size + 1)
    if len(held) != size:
        raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=f"{key} ends early")
    return np.frombuffer(held, dtype).reshape(shape, order="F" if by_columns else "C")
