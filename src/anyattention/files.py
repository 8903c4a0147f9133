"""Files that are whole or not there, and files that belong together."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from anyattention.errors import GraphStructureError, InvalidInputError, SparseMatrixError
from anyattention.signals import uninterrupted

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

__all__ = [
    "faults_of_file",
    "make_folder",
    "most_memory",
    "reading",
    "require_file",
    "to_path",
    "whole_file",
    "write_atomically",
    "write_together",
]

_TEMPORARY = ".anyattention-"


def write_together(
    folder: Path,
    files: Mapping[str, bytes],
    *,
    without: Sequence[str] = (),
    before: Mapping[str, bytes] | None = None,
    outdated: Sequence[str] = (),
) -> None:
    """Write files that belong together, in order, each under a temporary name and then renamed.

    Whatever ends the process leaves each file old or new, and no half-written one. The first one decides what the
    folder holds: files that would belong to the old one are taken away before it is replaced. Ctrl-C and SIGTERM wait
    until all is written, and other processes of this package until this one is done. What a killed one left is taken
    away.

    Args:
        folder: one that exists.
        files: by name.
        without: names of files to take away first.
        before: files that the first one names, each under a name that its content has alone: they are written before
            it, beside those that the old one names.
        outdated: patterns of such names; what has one and is not among `before` is taken away in the end.

    Raises:
        InvalidInputError: the folder cannot be written.
        KeyboardInterrupt: after it was written, with a message that says so.
    """
    with uninterrupted(f"{', '.join(files)} in {folder} are whole"), _locked(folder, to_write=True) as is_locked:
        try:
            for left in folder.glob(f"{_TEMPORARY}*") if is_locked else ():
                left.unlink()
            for name in without:
                (folder / name).unlink(missing_ok=True)
        except OSError as fault:
            raise InvalidInputError(
                argument=str(folder), expected="a writable folder", actual=fault.strerror
            ) from fault
        for name, content in {**(before or {}), **files}.items():
            _write(folder / name, content)
        for path in [path for pattern in outdated for path in folder.glob(pattern)]:
            if path.name not in (before or {}):
                with suppress(OSError):
                    path.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """`write_together` of one file."""
    write_together(path.parent, {path.name: content})


def reading(folder: Path) -> AbstractContextManager[object]:
    """While nobody writes files together into a folder."""
    return _locked(folder, to_write=False)


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, made where it is missing.

    Raises:
        InvalidInputError: it cannot be made, or is not writable.
    """
    path = to_path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InvalidInputError(argument=str(path), expected="a folder", actual=fault.strerror) from fault
    if not os.access(path, os.W_OK):
        raise InvalidInputError(argument=str(path), expected="a writable folder", actual="read-only")
    return path


def to_path(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder; raises InvalidInputError for what is none."""
    if not isinstance(folder, str | os.PathLike) or "\0" in str(folder):
        raise InvalidInputError(argument="folder", expected="a path", actual=repr(folder))
    return Path(folder)


def require_file(path: Path) -> int:
    """How many bytes a regular file has. A device or a pipe might never end.

    Raises:
        OSError: it is another thing, or not there.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(None, "not a file")
    return about.st_size


@contextmanager
def faults_of_file(path: Path) -> Iterator[None]:
    """While a file is read: what is wrong in it, such as an array, is told with the file before it.

    An option of a command, such as --target, is not of the file.
    """
    try:
        yield
    except (InvalidInputError, GraphStructureError, SparseMatrixError) as fault:
        if str(fault).startswith((str(path), "--")):
            raise
        named = type(fault)(
            f"{path}: {fault}",
            argument=f"{path}, {fault.argument}",
            expected=fault.expected,
            actual=fault.actual,
        )
        named.hint = fault.hint
        raise named from fault


def most_memory(size: int) -> int:
    """How many bytes a file of unknown origin may ask for beside its own."""
    return (1 << 26) + 100 * size


def _write(path: Path, content: bytes) -> None:
    with whole_file(path, path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A new file to write, which takes the path's place at the end; where that is not reached nothing has changed.

    Args:
        path: of the file.
        temporary: where it is until then, in the same folder; a name of its own where none is given.

    Raises:
        InvalidInputError: it cannot be written.
    """
    # Not tempfile's, which are private: the result gets the permissions of any new file.
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}") if temporary is None else temporary
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as fault:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(fault, OSError):
            raise InvalidInputError(argument=str(path), expected="a writable file", actual=fault.strerror) from fault
        raise


@contextmanager
def _locked(folder: Path, *, to_write: bool) -> Iterator[bool]:
    """While a lock of the folder is held; whether there is one, which not every system and file system has.

    The system takes it off with the process: no folder stays locked.
    """
    number = None
    try:
        if fcntl is not None:
            with suppress(OSError):
                number = os.open(folder, os.O_RDONLY)
                fcntl.flock(number, fcntl.LOCK_EX if to_write else fcntl.LOCK_SH)
        yield number is not None
    finally:
        if number is not None:
            os.close(number)
