"""Modules to and from folders: weights as safetensors, settings as JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from anyattention.errors import InvalidConfigError, InvalidInputError, UnsupportedError

__all__ = ["load", "make_folder", "save", "write_atomically"]

# The closed set of modules that a folder may name: where each lives, and its config.
_MODULES = {
    "ScaledDotProductAttention": ("anyattention.nn", "anyattention.config", "AttentionConfig"),
    "MultiHeadAttention": ("anyattention.nn", "anyattention.config", "AttentionConfig"),
    "GraphAttention": ("anyattention.nn", "anyattention.config", "GraphAttentionConfig"),
    "SparseAttention": ("anyattention.nn", "anyattention.config", "SparseAttentionConfig"),
    "DistanceAttention": ("anyattention.nn", "anyattention.config", "GeometricAttentionConfig"),
    "EquivariantAttention": ("anyattention.nn", "anyattention.config", "GeometricAttentionConfig"),
    "NodeClassifier": (
        "anyattention.training",
        "anyattention.training",
        "NodeClassifierConfig",
    ),
}


def save(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a module's weights and settings: `model.safetensors` and `config.json`.

    Each file is written under a temporary name and then renamed, so a crash leaves the old one or the new one.

    Args:
        module: any module of this package that has a `config`.
        folder: made where it is missing.

    Raises:
        InvalidInputError: another module, or a folder that cannot be written.
        UnsupportedError: a module that was given a pattern, which is no setting of its config.

    Example:
        >>> import tempfile
        >>> from anyattention.nn import MultiHeadAttention
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(MultiHeadAttention(8, 2), folder)
        ...     load(folder).config.num_heads
        2
    """
    name = type(module).__name__
    if name not in _MODULES or not hasattr(module, "from_config"):
        raise InvalidInputError(argument="module", expected="one of " + ", ".join(_MODULES), actual=name)
    # SparseAttention's pattern is a property, made of its config.
    if vars(module).get("pattern") is not None:
        raise UnsupportedError(
            argument="module",
            expected="settings that are all in its config",
            actual=f"{name}(pattern={module.pattern})",
            hint="save a module without pattern that has the same weights, or use SparseAttention",
        )
    config: Any = module.config
    path = make_folder(folder)
    weights = {key: value.contiguous() for key, value in module.state_dict().items()}
    settings = {"module": name, "config": config.to_dict()}
    write_atomically(path / "model.safetensors", safetensors.torch.save(weights))
    write_atomically(path / "config.json", (json.dumps(settings, indent=2) + "\n").encode())


def load(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Any:
    """The module of a folder that `save` wrote, with its dtype, in evaluation mode.

    Args:
        folder: with `model.safetensors` and `config.json`.
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
        InvalidInputError: a file is missing or broken, or the weights do not fit the settings.
        InvalidConfigError: the settings name an unknown module or field, or are out of range.
    """
    path = _to_path(folder)
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as fault:
        raise InvalidInputError(argument="device", expected="the name of a device", actual=repr(device)) from fault
    settings = _read_settings(path / "config.json")
    name = settings["module"]
    home, config_home, config_name = _MODULES[name]
    config = getattr(import_module(config_home), config_name).from_dict(settings["config"])
    kind = getattr(import_module(home), name)
    weights_path = path / "model.safetensors"
    try:
        # Clones lie where torch allocates; what lies as the file has it may be multiplied with other rounding.
        weights = {name: x.clone() for name, x in safetensors.torch.load_file(weights_path, device=str(place)).items()}
    except (OSError, SafetensorError) as fault:
        raise InvalidInputError(
            argument=str(weights_path), expected="a readable safetensors file", actual=str(fault)
        ) from fault
    try:
        # First without memory: settings that do not fit the weights may ask for any amount of it.
        with torch.device("meta"):
            kind.from_config(config).load_state_dict(weights, assign=True)
        module: nn.Module = kind.from_config(config)
        # assign=True: the weights keep the dtype they were saved in.
        module.load_state_dict(weights, assign=True)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as fault:
        raise InvalidInputError(
            f"{weights_path}: the weights do not fit config.json: {fault}", argument="folder"
        ) from fault
    return module.to(place).eval()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it.

    Raises:
        InvalidInputError: the folder cannot be written; no half-written file stays.
    """
    # Not tempfile's, which are private: the result gets the permissions of any new file.
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as fault:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(fault, OSError):
            raise InvalidInputError(argument=str(path), expected="a writable file", actual=fault.strerror) from fault
        raise


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, made where it is missing.

    Raises:
        InvalidInputError: it cannot be made, or is not writable.
    """
    path = _to_path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InvalidInputError(argument=str(path), expected="a folder", actual=fault.strerror) from fault
    if not os.access(path, os.W_OK):
        raise InvalidInputError(argument=str(path), expected="a writable folder", actual="read-only")
    return path


def _to_path(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, str | os.PathLike) or "\0" in str(folder):
        raise InvalidInputError(argument="folder", expected="a path", actual=repr(folder))
    return Path(folder)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault)
        raise InvalidInputError(argument=str(path), expected="a readable JSON file", actual=reason) from fault
    if not isinstance(settings, dict) or set(settings) != {"module", "config"}:
        raise InvalidConfigError(argument=str(path), expected="the keys module, config", actual=_keys(settings))
    if settings["module"] not in tuple(_MODULES):
        raise InvalidConfigError(
            argument="module",
            expected="one of " + ", ".join(_MODULES),
            actual=repr(settings["module"]),
        )
    return settings


def _keys(settings: object) -> str:
    return ", ".join(settings) if isinstance(settings, dict) else type(settings).__name__
