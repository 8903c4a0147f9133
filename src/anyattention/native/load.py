"""Finds, loads and types the compiled kernels.

The libraries have a plain C interface (csrc/anyattention.h) and are opened with ctypes. They call
OpenMP without being linked to it: torch's own runtime is made visible to them first, so that the
process never holds a second one. Nothing is loaded before the first question is asked.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anyattention
from anyattention.ambient import constant_when_compiled
from anyattention.errors import (
    IndexRangeError,
    InvalidConfigError,
    InvalidInputError,
    OutOfMemoryError,
    UnsupportedError,
)
from anyattention.native.structures import structures

__all__ = [
    "MissingKernelsWarning",
    "NativeInfo",
    "available",
    "check_status",
    "info",
    "kernel",
    "large_empty",
    "library",
    "multiplies_fast",
    "num_threads",
    "run",
    "score_number",
]

_FLAGS_V3 = frozenset(
    {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
    | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
)
_FLAGS_V4 = _FLAGS_V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_FLAGS_V4_BF16 = _FLAGS_V4 | {"avx512_bf16"}

# What the CPU must offer for each level, the fastest level first.
_LEVELS: dict[str, frozenset[str]] = {
    "v4-bf16": _FLAGS_V4_BF16,
    "v4": _FLAGS_V4,
    "v3": _FLAGS_V3,
    "baseline": frozenset(),
}

# As in csrc/pages.h: what is smaller stays in small pages.
_LARGE = 4 << 20

_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_int64

# Functions that take no record, or return no status: result and arguments.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "anyattention_version": (ctypes.c_char_p, []),
    "anyattention_level": (ctypes.c_char_p, []),
    "anyattention_threaded": (ctypes.c_int32, []),
    "anyattention_team_size": (ctypes.c_int32, [_SIZE, _SIZE, ctypes.c_double]),
    "anyattention_size_of": (_SIZE, [ctypes.c_char_p]),
    "anyattention_score": (ctypes.c_int32, [ctypes.c_char_p]),
    "anyattention_prefer_large_pages": (ctypes.c_int32, [_POINTER, _SIZE]),
    "anyattention_multiplies_fast": (ctypes.c_int32, []),
    "anyattention_linear_map": (
        ctypes.c_int32,
        [*[_SIZE] * 2, *[_POINTER] * 4, *[_SIZE] * 2, _POINTER, _SIZE, *[_POINTER] * 2, _SIZE],
    ),
    "anyattention_linear_map_by_matrix": (
        ctypes.c_int32,
        [*[_SIZE] * 2, *[_POINTER] * 4, *[_SIZE] * 3, *[_POINTER] * 2],
    ),
    "anyattention_keep_factors": (ctypes.c_int32, [_SIZE, _SIZE, ctypes.c_double, _SIZE, ctypes.c_int32, _POINTER]),
    "anyattention_compressed_rows": (ctypes.c_int32, [_POINTER, _POINTER, *[_SIZE] * 4, *[_POINTER] * 4]),
    "anyattention_sorted_rows": (
        ctypes.c_int32,
        [_POINTER, *[_SIZE] * 2, *[_POINTER] * 2, *[_SIZE] * 2, *[_POINTER] * 3],
    ),
    "anyattention_symmetric_rows": (ctypes.c_int32, [_POINTER, *[_SIZE] * 3, *[_POINTER] * 4]),
    "anyattention_sampled_offsets": (
        ctypes.c_int32,
        [_POINTER, *[_SIZE] * 2, *[_POINTER] * 2, ctypes.c_int32, _POINTER, *[_SIZE] * 3, _POINTER],
    ),
    "anyattention_sampled_rows": (
        ctypes.c_int32,
        [
            *[_POINTER] * 3,
            *[_SIZE] * 3,
            *[_POINTER] * 2,
            ctypes.c_int32,
            _POINTER,
            _SIZE,
            _POINTER,
            *[_SIZE] * 5,
            *[_POINTER] * 3,
        ],
    ),
    "anyattention_numbered_nodes": (
        ctypes.c_int32,
        [_POINTER, *[_SIZE] * 2, _POINTER, ctypes.c_int32, _POINTER, _SIZE, _POINTER],
    ),
    "anyattention_sorted_slots": (ctypes.c_int32, [_POINTER, *[_SIZE] * 2, *[_POINTER] * 4]),
    "anyattention_slot_attention_backward": (ctypes.c_int32, [*[_POINTER] * 2, ctypes.c_int32, *[_POINTER] * 3]),
    "anyattention_slot_rows": (
        ctypes.c_int32,
        [*[_POINTER] * 2, *[_SIZE] * 3, _POINTER, _SIZE, ctypes.c_int32, _POINTER],
    ),
    "anyattention_run_attention_forward": (ctypes.c_int32, [_POINTER, ctypes.c_int32, *[_POINTER] * 3]),
    "anyattention_run_attention_backward": (ctypes.c_int32, [_POINTER, ctypes.c_int32, *[_POINTER] * 4]),
    "anyattention_run_attention_weights": (ctypes.c_int32, [_POINTER, ctypes.c_int32, _POINTER]),
    "anyattention_run_attention_weights_backward": (ctypes.c_int32, [_POINTER, ctypes.c_int32, *[_POINTER] * 4]),
    "anyattention_run_attention_double_backward_sums": (ctypes.c_int32, [_POINTER, ctypes.c_int32, _POINTER]),
    "anyattention_run_attention_double_backward": (ctypes.c_int32, [_POINTER, *[ctypes.c_int32] * 2, *[_POINTER] * 6]),
}

# The codes of csrc/anyattention.h.
_OK, _INVALID_ARGUMENT, _OUT_OF_RANGE, _OUT_OF_MEMORY = range(4)


class MissingKernelsWarning(RuntimeWarning):
    """The compiled kernels for this CPU are missing, and slower ones or the reference implementation run."""


@dataclass(frozen=True)
class NativeInfo:
    """Which kernels were found, and which of them run.

    Args:
        built: levels that are installed, the fastest first.
        supported: levels that this CPU can run, the fastest first.
        level: the level in use; None where no kernel runs.
        path: the library in use.
        version: the version it was compiled for.
        openmp: the OpenMP runtime it shares with torch; None where it runs on one thread.
        reason: why no kernel runs; None where they do.
        refused: faster levels that cannot be used, and why.
    """

    built: tuple[str, ...]
    supported: tuple[str, ...]
    level: str | None = None
    path: str | None = None
    version: str | None = None
    openmp: str | None = None
    reason: str | None = None
    refused: tuple[tuple[str, str], ...] = ()


class _State:
    """What was found, once and for all; a class so that a fork and a test can start afresh."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: tuple[ctypes.CDLL | None, NativeInfo] | None = None
        self.functions: dict[str, Any] = {}
        self.scores: dict[str, int] = {}
        self.multiplies_fast: bool | None = None
        self.warned = False


_state = _State()
_forked = os.getpid() != anyattention._IMPORTED_BY


def _after_fork_in_child() -> None:
    # OpenMP's worker threads did not survive the fork, and waiting for them would never end.
    # Another thread may have held the lock, and it did not survive either.
    global _forked
    _forked = True
    _state.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def num_threads(nanoseconds: float | None = None) -> int:
    """Threads for one kernel: as many as torch uses, and one in a forked child.

    Args:
        nanoseconds: what the work takes one thread, about, where other than our kernels is asked to do it: these know
            by themselves what is too small for several.
    """
    threads = 1 if _forked else torch.get_num_threads()
    found = None if nanoseconds is None or threads == 1 else _load()[0]
    return threads if found is None else found.anyattention_team_size(threads, threads, nanoseconds)


# A traced call takes the answer as a constant: torch.compile does not trace the lock of loading.
@constant_when_compiled
def available() -> bool:
    """Whether kernels can run; where they cannot, warns the first time it is asked.

    Raises:
        InvalidConfigError: ANYATTENTION_LEVEL names a level that cannot run here.
    """
    loaded = _state.loaded
    return (loaded is not None and loaded[0] is not None) or library() is not None


def info() -> NativeInfo:
    """What was found and what runs; never warns.

    Raises:
        InvalidConfigError: ANYATTENTION_LEVEL names a level that cannot run here.
    """
    return _load()[1]


def library() -> ctypes.CDLL | None:
    """The library in use, its functions typed; None where there is none. Warns once where it is not the best one."""
    found, about = _load()
    if found is None or about.refused:
        with _state.lock:
            first, _state.warned = not _state.warned, True
        if first:
            warnings.warn(_warning(about), MissingKernelsWarning, stacklevel=2)
    return found


def _warning(about: NativeInfo) -> str:
    if about.level is None:
        return f"anyattention runs its reference implementation in PyTorch, which is correct but slower: {about.reason}"
    reasons = "; ".join(reason for _, reason in about.refused)
    return f"anyattention runs its kernels for {about.level}, which are slower: {reasons}. Reinstall anyattention"


@constant_when_compiled
def multiplies_fast() -> bool:
    """Whether the kernels' products of float32 matrices are faster than PyTorch's; there are kernels."""
    fast = _state.multiplies_fast
    if fast is None:
        fast = _state.multiplies_fast = bool(kernel("multiplies_fast", 0)())
    return fast


def large_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor of another's dtype on the CPU, in large pages where the system gives them."""
    tensor = like.new_empty(shape)
    if tensor.nbytes >= _LARGE:
        run("prefer_large_pages", tensor.data_ptr(), tensor.nbytes)
    return tensor


def run(function: str, *arguments: Any) -> None:
    """Calls a kernel by its name, without the prefix; the caller has checked what the pointers lead to.

    Raises:
        IndexRangeError: a row, column or edge outside its bounds, or twice.
        InvalidInputError: the kernel refused its arguments.
        OutOfMemoryError: there is no memory for the workspace.
        RuntimeError: no kernels are available; ask `available()` first.
    """
    status = kernel(function, len(arguments))(*arguments)
    if status:
        check_status(status, function)


def kernel(function: str, num_arguments: int) -> Any:
    """The C function of a name, without the prefix; it answers with a status for `check_status`.

    Raises:
        RuntimeError: no kernels are available; ask `available()` first.
    """
    found = _state.functions.get(function)
    if found is None:
        loaded, about = _load()
        if loaded is None:
            raise RuntimeError(f"the compiled kernels are not available: {about.reason}")
        found = getattr(loaded, f"anyattention_{function}")
        if found.argtypes is None:
            # A record, and tensors.
            found.restype, found.argtypes = ctypes.c_int32, [_POINTER] * num_arguments
        _state.functions[function] = found
    return found


def score_number(name: str) -> int:
    """The number of a score by the name of its policy in csrc/scores.h.

    Raises:
        UnsupportedError: the kernels have no such score.
    """
    number = _state.scores.get(name)
    if number is None:
        number = _state.scores[name] = kernel("score", 1)(name.encode())
    if number < 0:
        raise UnsupportedError(f"the kernels have no score {name!r}", argument="score", actual=name)
    return number


def check_status(status: int, function: str) -> None:
    """Raise where a kernel found a place that is not there, refused its arguments or found no memory."""
    if status == _OUT_OF_RANGE:
        raise IndexRangeError(
            f"{function}: the arrays of a graph or pattern name a place that does not exist, or one twice",
            hint="Index arrays must not be written to once a graph or pattern is built",
        )
    if status == _OUT_OF_MEMORY:
        raise OutOfMemoryError(f"{function}: no memory for the workspace")
    if status != _OK:
        raise InvalidInputError(f"{function}: invalid argument (status {status})")


def _load() -> tuple[ctypes.CDLL | None, NativeInfo]:
    loaded = _state.loaded
    if loaded is None:
        with _state.lock:
            if _state.loaded is None:
                _state.loaded = _open(os.environ.get("ANYATTENTION_LEVEL"))
            loaded = _state.loaded
    return loaded


def _open(forced: str | None) -> tuple[ctypes.CDLL | None, NativeInfo]:
    built = _built()
    supported = _supported()
    usable = [level for level in supported if level in built]
    if forced:
        if forced not in usable:
            raise InvalidConfigError(
                argument="ANYATTENTION_LEVEL",
                expected=f"one of {usable} (built: {list(built)}, this CPU runs: {supported})",
                actual=repr(forced),
            )
        usable = [forced]
    about = NativeInfo(built=tuple(built), supported=tuple(supported))
    if not usable:
        reason = (
            "this installation has no compiled kernels. Install a C++17 compiler (g++) and then reinstall anyattention"
        )
        return None, replace(about, reason=reason)

    refused: list[tuple[str, str]] = []
    for level in usable:
        try:
            found, openmp = _open_library(built[level])
        except (OSError, AttributeError, ValueError) as fault:
            refused.append((level, f"{built[level]} cannot be used ({fault})"))
            continue
        version = found.anyattention_version().decode()
        return found, replace(
            about, level=level, path=str(built[level]), version=version, openmp=openmp, refused=tuple(refused)
        )
    reasons = "; ".join(reason for _, reason in refused)
    return None, replace(about, refused=tuple(refused), reason=f"{reasons}. Reinstall anyattention")


def _open_library(path: Path) -> tuple[ctypes.CDLL, str | None]:
    """A library, its functions typed, and the OpenMP runtime that it shares with torch.

    Raises:
        OSError, AttributeError, ValueError: it is broken, or of another version.
    """
    digest = path.with_name(f"{path.name}.sha256")
    # Opening a library that is cut off ends the process.
    if digest.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != digest.read_text().strip():
        raise OSError("it is not the file that was built")
    runtime = _torch_openmp()
    if runtime is not None:
        ctypes.CDLL(runtime, mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)
    found = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    for name, structure in structures.items():
        if found.anyattention_size_of(name.encode()) != ctypes.sizeof(structure):
            raise OSError(f"it was compiled from other sources: its {name} has another size")
    return found, runtime if found.anyattention_threaded() else None


def _built() -> dict[str, Path]:
    """The installed libraries by level. An editable package has a second folder for them."""
    found: dict[str, Path] = {}
    for level in _LEVELS:
        for folder in anyattention.__path__:
            for path in sorted(Path(folder).glob(f"libanyattention_{level}.*")):
                if path.suffix != ".sha256":
                    found.setdefault(level, path)
    return found


def _supported() -> list[str]:
    flags = _cpu_flags() if platform.machine().lower() in ("x86_64", "amd64") else frozenset()
    return [level for level, needed in _LEVELS.items() if needed <= flags]


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "flags":
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def _torch_openmp() -> str | None:
    """Path of the OpenMP runtime that torch's operators call.

    Other packages may have loaded runtimes of their own, so torch's library is asked for the
    address of a function, and the process's maps say which file that address belongs to.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    files: list[tuple[int, int, str]] = []
    for line in maps.splitlines():
        span, *_, path = line.split(maxsplit=5)
        if path.startswith("/"):
            begin, end = (int(part, 16) for part in span.split("-"))
            files.append((begin, end, path))
    operators = next((path for *_, path in files if "libtorch_cpu." in Path(path).name), None)
    if operators is None:
        return None
    try:
        function = ctypes.CDLL(operators, mode=os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return None
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    return next((path for begin, end, path in files if begin <= address < end), None)
