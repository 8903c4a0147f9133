"""What a path has for a training: a folder of tables, or a file of one of the formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from anyattention.errors import InvalidInputError
from anyattention.training.data import AnyData
from anyattention.training.graphml import load_graphml
from anyattention.training.heterogeneous_tables import are_heterogeneous_tables, load_heterogeneous_tables
from anyattention.training.npz import load_npz
from anyattention.training.reading import Reading, ReadOptions
from anyattention.training.saved_sources import load_saved
from anyattention.training.tables import load_tables

__all__ = ["load_source"]


def load_source(name: str, options: ReadOptions, reading: Reading | None = None, *, to_train: bool = True) -> AnyData:
    """The data of a folder or a file, by its suffix.

    Args:
        name: the path.
        options: what the user says of them.
        reading: how the data of the training were read; None where that is not known, and to train.
        to_train: whether labels and splits must be there.

    Raises:
        InvalidInputError: nothing of the kind is there, or it cannot be read.
    """
    path = Path(name)
    if path.suffix == ".npz":
        _refuse(options, path)
        return load_npz(path, to_train=to_train, reading=reading)
    if path.suffix == ".safetensors":
        _refuse(replace(options, directed=False, target=None), path)
        return load_saved(path, options, reading, to_train=to_train)
    if path.suffix == ".graphml":
        return load_graphml(path, options, _required(reading, to_train))
    if path.is_dir():
        reading = _required(reading, to_train)
        if are_heterogeneous_tables(path):
            return load_heterogeneous_tables(path, options, reading)
        return load_tables(path, options, reading)
    raise InvalidInputError(
        argument="--data",
        expected="digits, a folder with tables, or a file that ends in .graphml, .npz or .safetensors",
        actual=repr(name),
        hint=f"give the folder that has {path.name}" if path.suffix in (".csv", ".tsv", ".txt") else None,
    )


def _required(reading: Reading | None, to_train: bool) -> Reading | None:
    """The reading, without which tables cannot be read but to train."""
    if not to_train and reading is None:
        raise InvalidInputError(
            argument="--model", expected="a folder that was trained on tables", actual="one that keeps no columns"
        )
    return reading


def _refuse(options: ReadOptions, path: Path) -> None:
    """Raise InvalidInputError where an option is given that says nothing of a file with arrays."""
    for option, value in (
        ("--directed", options.directed),
        ("--category", options.categories),
        ("--ignore", options.ignored),
        ("--target", options.target),
    ):
        if value:
            raise InvalidInputError(argument=option, expected="tables or GraphML", actual=str(path))
