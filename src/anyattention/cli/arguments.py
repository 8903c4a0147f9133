"""Argument types and options that several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyattention.training.data import AnyData
    from anyattention.training.reading import Reading, ReadOptions

__all__ = ["add_data", "count", "fanout", "load_data", "print_notes", "seed", "use_threads"]

# Edges, self-loops included.
_SMALL_GRAPH = 100_000


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def fanout(text: str) -> tuple[int, int]:
    """Two whole numbers with a comma between, each at least 1, or -1."""
    try:
        first, second = [int(part) for part in text.split(",")]
    except ValueError:
        first = second = 0
    # The sampler counts with 64 bits.
    if any(number != -1 and not 1 <= number < 2**63 for number in (first, second)):
        raise argparse.ArgumentTypeError(
            f"expected a number for each of the two layers, at least 1, or -1 for all neighbours, such as 10,10, "
            f"got {text!r}"
        )
    return first, second


def add_data(parser: argparse.ArgumentParser) -> None:
    """`--data` and `--threads`."""
    parser.add_argument(
        "--data",
        default="digits",
        metavar="FOLDER|FILE|digits",
        help="a folder with nodes.csv and edges.csv, a file of the formats of docs/data.md (.graphml, .npz, "
        ".safetensors), or the embedded handwritten digits (default)",
    )
    parser.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="threads to compute with (default: one for a small graph, else PyTorch's choice)",
    )


def load_data(name: str, options: ReadOptions, reading: Reading | None = None, *, to_train: bool = True) -> AnyData:
    """The data that `--data` names.

    Args:
        name: "digits", or the path of a folder or a file.
        options: what the user says of them.
        reading: how the data of the training were read, where that is known.
        to_train: whether labels and splits must be there.

    Raises:
        InvalidInputError: nothing of the kind is there, or it cannot be read.
    """
    from anyattention.training import load_digits
    from anyattention.training.sources import load_source

    if name == "digits":
        return load_digits(options.seed)
    return load_source(name, options, reading, to_train=to_train)


def print_notes(name: str, data: AnyData) -> None:
    """Say on stderr what was done with the file that its author may not expect, a line each."""
    for note in data.notes:
        # Those of a table name it themselves.
        print(note if note.startswith(name) else f"{name}: {note}", file=sys.stderr)


def use_threads(threads: int | None, data: AnyData) -> None:
    """Compute with so many threads; None is one for a small graph, and PyTorch's choice for others."""
    import torch

    # On small graphs threads gain little, and they wait for each other at length when the machine is busy: the
    # digits took 50 times as long then.
    if threads is None and data.num_edges < _SMALL_GRAPH:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def _whole(text: str, at_least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = at_least - 1
    # PyTorch's sizes and seeds are 64-bit numbers.
    if not at_least <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number from {at_least} to 2147483647, got {text!r}")
    return value
