"""Modules to and from folders: weights as safetensors, settings as JSON. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from anyattention._checks import FLOATING
from anyattention.errors import InvalidConfigError, InvalidInputError, UnsupportedError
from anyattention.files import make_folder, most_memory, reading, require_file, to_path, write_together
from anyattention.patterns.stored import pattern_from_dict, pattern_to_dict

__all__ = ["load", "model_files", "read_metadata", "save"]

_SETTINGS = "anyattention"  # their name among a file's metadata
_INDEX = "anyattention index"  # the name of a memory's index file, and what it holds
_INDEX_KINDS = ("clusters", "faiss", "usearch")
_INDEX_NAMES = tuple(f"index-{'[0-9a-f]' * 32}.{kind}" for kind in _INDEX_KINDS)
_LARGEST_CONFIG = 1 << 20

# The closed set of modules that a folder may name: where each lives, and its config.
_MODULES = {
    "ScaledDotProductAttention": ("anyattention.nn", "anyattention.config", "AttentionConfig"),
    "MultiHeadAttention": ("anyattention.nn", "anyattention.config", "AttentionConfig"),
    "GraphAttention": ("anyattention.nn", "anyattention.config", "GraphAttentionConfig"),
    "GraphTransformerLayer": ("anyattention.nn", "anyattention.config", "GraphTransformerConfig"),
    "HeterogeneousGraphAttention": (
        "anyattention.nn",
        "anyattention.config",
        "HeterogeneousGraphAttentionConfig",
    ),
    "MemoryAttention": ("anyattention.nn", "anyattention.config", "MemoryAttentionConfig"),
    "SparseAttention": ("anyattention.nn", "anyattention.config", "SparseAttentionConfig"),
    "DistanceAttention": ("anyattention.nn", "anyattention.config", "GeometricAttentionConfig"),
    "EquivariantAttention": ("anyattention.nn", "anyattention.config", "GeometricAttentionConfig"),
    "NodeClassifier": (
        "anyattention.training",
        "anyattention.training",
        "NodeClassifierConfig",
    ),
    "HeterogeneousNodeClassifier": (
        "anyattention.training",
        "anyattention.training",
        "HeterogeneousNodeClassifierConfig",
    ),
}
_WITH_PATTERN = ("ScaledDotProductAttention", "MultiHeadAttention")


def save(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a module's weights and settings: `model.safetensors`, and `config.json` to read.

    A memory with an approximate index has a third file, the index, if it was built.

    `model.safetensors` holds the settings too, in its metadata, so that one renaming decides which model a folder has:
    whatever ends the process, the folder has the old model or the new one. Two processes may save at once.

    Args:
        module: any module of this package that has a `config`.
        folder: made where it is missing.

    Raises:
        InvalidInputError: another module, or a folder that cannot be written.
        UnsupportedError: a module whose pattern holds tensors, as a Graph does, or settings of over a mebibyte.

    Example:
        >>> import tempfile
        >>> from anyattention.nn import MultiHeadAttention
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(MultiHeadAttention(8, 2), folder)
        ...     load(folder).config.num_heads
        2
    """
    index = _index_of(module)
    metadata = {_INDEX: json.dumps({name: _digest(content) for name, content in index.items()})} if index else None
    files = model_files(module, metadata)
    write_together(make_folder(folder), files, before=index, outdated=_INDEX_NAMES)


def model_files(module: nn.Module, metadata: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """The files that `save` writes, for `write_together`; raises as `save`.

    Args:
        module: as of `save`.
        metadata: what `model.safetensors` keeps besides, which `read_metadata` gives back.
    """
    name = type(module).__name__
    if name not in _MODULES or not hasattr(module, "from_config"):
        raise InvalidInputError(argument="module", expected="one of " + ", ".join(_MODULES), actual=name)
    config: Any = module.config
    weights = {key: value.contiguous() for key, value in module.state_dict().items()}
    told = {"module": name, "config": config.to_dict()}
    # SparseAttention's pattern is a property, made of its config.
    pattern: Any = vars(module).get("pattern")
    if pattern is not None:
        told["pattern"] = pattern_to_dict(pattern)
    settings = json.dumps(told, indent=2) + "\n"
    if len(settings) > _LARGEST_CONFIG:
        raise UnsupportedError(f"settings of over {_LARGEST_CONFIG:,} bytes are not kept in a file", argument="module")
    return {
        "model.safetensors": safetensors.torch.save(weights, {**(metadata or {}), _SETTINGS: settings}),
        "config.json": settings.encode(),
    }


def load(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Any:
    """The module of a folder that `save` wrote, with its dtype, in evaluation mode.

    Args:
        folder: with `model.safetensors`, whose metadata has the settings. `config.json` says the same, and a warning
            comes where it does not; folders saved before 29 November 2026 have the settings in `config.json` alone.
        device: where the weights go.

    Returns:
        A module of the class that the folder names.

    Example:
        >>> import tempfile
        >>> from anyattention.nn import GraphAttention
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(GraphAttention(8, 2, in_features=3), folder)
        ...     load(folder)(torch.ones(2, 3), torch.tensor([[0], [1]])).output.shape
        torch.Size([2, 8])

    Raises:
        InvalidInputError: a file is missing or broken, the weights do not fit the settings, are not of one floating
            dtype, or have a NaN; or a memory's index is not the one that was saved with it.
        MissingExtraError: it is of a library that is not installed.
        InvalidConfigError: the settings name an unknown module or field, are out of range, or ask for tables that are
            far larger than the weights.
    """
    path = to_path(folder)
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as fault:
        raise InvalidInputError(argument="device", expected="the name of a device", actual=repr(device)) from fault
    weights_path, config_path = path / "model.safetensors", path / "config.json"
    with reading(path):
        told = _read_settings(config_path) if config_path.exists() else None
        kept, weights = _read_weights(weights_path, place)
        index = _read_index(path)
    if kept is None:
        kind, config, more = told or _read_settings(config_path)
    else:
        kind, config, more = _parsed(kept, weights_path)
        if told is not None and told != (kind, config, more):
            warnings.warn(
                f"{config_path} is not what {weights_path} was saved with: the settings in the latter are taken. To "
                "change settings, build the module and load the weights into it",
                stacklevel=2,
            )
    _require_one_dtype(weights, kind, weights_path)
    try:
        # First without memory: settings that do not fit the weights may ask for any amount of it.
        with torch.device("meta"):
            hollow = kind.from_config(config, **more)
            _require_small_tables(hollow, weights, path)
            begins_with = _size_of(hollow.parameters())
            hollow.load_state_dict(weights, assign=True)
            # A memory takes weights of any number of memories.
            _require_small(begins_with, weights, path, "a smaller num_memories")
        module: nn.Module = kind.from_config(config, **more)
        # assign=True: the weights keep the dtype they were saved in.
        module.load_state_dict(weights, assign=True)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as fault:
        raise InvalidInputError(
            f"{weights_path}: the weights do not fit config.json: {fault}", argument="folder"
        ) from fault
    module = module.to(place).eval()
    if index is not None:
        restore: Any = getattr(module, "restore_index", None)
        if restore is None:
            raise InvalidInputError(
                argument=str(weights_path), expected=f"no index beside a {kind.__name__}", actual="one"
            )
        restore(index)
    return module


def read_metadata(folder: str | os.PathLike[str], name: str) -> str | None:
    """What `model_files` kept in a folder's `model.safetensors` under a name; None where there is none.

    Raises:
        InvalidInputError: the file is missing or broken.
    """
    path = to_path(folder) / "model.safetensors"
    with reading(path.parent):
        return _metadata_of(path, name)


def _metadata_of(path: Path, name: str) -> str | None:
    with _opened(path, "cpu") as file:
        return (file.metadata() or {}).get(name)


def _index_of(module: nn.Module) -> dict[str, bytes]:
    """The file of a memory's index, under a name that its content has alone; none where there is no index."""
    content_of: Any = getattr(module, "index_content", None)
    content: bytes | None = None if content_of is None else content_of()
    if content is None:
        return {}
    config: Any = module.config
    return {f"index-{_digest(content)[:32]}.{config.index}": content}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_index(folder: Path) -> bytes | None:
    """The index that a folder's `model.safetensors` names; None where it names none.

    Raises:
        InvalidInputError: it is not there, or another one.
    """
    text = _metadata_of(folder / "model.safetensors", _INDEX)
    if text is None:
        return None
    try:
        ((name, digest),) = json.loads(text).items()
    except (AttributeError, TypeError, ValueError, RecursionError) as fault:
        raise InvalidInputError(
            argument=str(folder / "model.safetensors"), expected="the name of an index file", actual=repr(text[:99])
        ) from fault
    if not re.fullmatch(rf"index-[0-9a-f]{{32}}\.({'|'.join(_INDEX_KINDS)})", name):
        raise InvalidInputError(
            argument=str(folder / "model.safetensors"), expected="the name of an index file", actual=repr(name[:99])
        )
    path = folder / name
    try:
        require_file(path)
        content = path.read_bytes()
    except OSError as fault:
        raise InvalidInputError(
            argument=str(path), expected="the memory's index", actual=fault.strerror or str(fault)
        ) from fault
    if _digest(content) != digest:
        raise InvalidInputError(
            argument=str(path), expected="the index that model.safetensors was saved with", actual="other bytes"
        )
    return content


@contextmanager
def _opened(path: Path, device: str) -> Iterator[Any]:
    try:
        require_file(path)
        with safetensors.safe_open(path, "pt", device) as file:
            yield file
    except (OSError, SafetensorError, ValueError) as fault:
        raise InvalidInputError(
            argument=str(path),
            expected="a readable safetensors file",
            actual=getattr(fault, "strerror", None) or str(fault),
        ) from fault


def _read_weights(path: Path, device: torch.device) -> tuple[str | None, dict[str, Tensor]]:
    """The settings among a file's metadata, None where it has none, and the weights, without NaN."""
    with _opened(path, str(device)) as file:
        settings = (file.metadata() or {}).get(_SETTINGS)
        # Clones lie where torch allocates; what lies as the file has it may be multiplied with other rounding.
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name, x in weights.items():
        if x.isnan().any():
            raise InvalidInputError(argument=str(path), expected="weights that are numbers", actual=f"NaN in {name}")
    return settings, weights


def _require_one_dtype(weights: Mapping[str, Tensor], kind: type, path: Path) -> None:
    """Raise unless the weights, but for those that the class says are whole numbers, have one floating dtype."""
    whole = getattr(kind, "whole_numbers", ())
    dtypes = {x.dtype for name, x in weights.items() if not (name in whole and x.dtype == torch.int64)}
    if len(dtypes) > 1 or not dtypes <= set(FLOATING):
        raise InvalidInputError(
            argument=str(path),
            expected="weights of one floating-point dtype of 16, 32 or 64 bits",
            actual=", ".join(sorted(map(str, dtypes))) or "none",
        )


def _require_small_tables(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise where tables that are computed, of positions say, would take far more memory than the weights."""
    tables = _size_of(x for name, x in module.named_buffers() if name not in weights)
    _require_small(tables, weights, path, "a smaller max_seq_len")


def _require_small(size: int, weights: Mapping[str, Tensor], path: Path, remedy: str) -> None:
    most = most_memory(_size_of(weights.values()))
    if size > most:
        raise InvalidConfigError(
            argument=str(path),
            expected=f"settings that ask for at most {most:,} bytes beside such weights",
            actual=f"{size:,} bytes: {remedy}",
        )


def _size_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _read_settings(path: Path) -> tuple[type, Any, dict[str, Any]]:
    try:
        if require_file(path) > _LARGEST_CONFIG:
            raise InvalidConfigError(argument=str(path), expected="settings", actual=f"over {_LARGEST_CONFIG:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault)
        raise InvalidInputError(argument=str(path), expected="a readable JSON file", actual=reason) from fault
    return _parsed(text, path)


def _parsed(text: str, path: Path) -> tuple[type, Any, dict[str, Any]]:
    """The class and the config that settings name, and what else it is made of: a pattern, where it has one."""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise InvalidInputError(argument=str(path), expected="a readable JSON file", actual=str(fault)) from fault
    if not isinstance(settings, dict) or set(settings) - {"pattern"} != {"module", "config"}:
        raise InvalidConfigError(argument=str(path), expected="the keys module, config", actual=_keys(settings))
    if settings["module"] not in tuple(_MODULES):
        raise InvalidConfigError(
            argument="module",
            expected="one of " + ", ".join(_MODULES),
            actual=repr(settings["module"]),
        )
    home, config_home, config_name = _MODULES[settings["module"]]
    config = getattr(import_module(config_home), config_name).from_dict(settings["config"])
    more = {}
    if "pattern" in settings:
        if settings["module"] not in _WITH_PATTERN:
            raise InvalidConfigError(
                argument="pattern", expected=f"none in {settings['module']}", actual=repr(settings["pattern"])
            )
        more["pattern"] = pattern_from_dict(settings["pattern"])
    return getattr(import_module(home), settings["module"]), config, more


def _keys(settings: object) -> str:
    return ", ".join(settings) if isinstance(settings, dict) else type(settings).__name__
