"""Argument types and options that several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyattention.training import NodeData

__all__ = ["add_data", "count", "load_data", "print_notes", "seed", "use_threads"]

# Edges, self-loops included.
_SMALL_GRAPH = 100_000


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def add_data(parser: argparse.ArgumentParser) -> None:
    """`--data` and `--threads`."""
    parser.add_argument(
        "--data",
        default="digits",
        metavar="digits|FILE.npz",
        help="the embedded handwritten digits (default), or a file in one of the formats of docs/data.md",
    )
    parser.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="threads to compute with (default: one for a small graph, else PyTorch's choice)",
    )


def load_data(name: str, seed: int, *, to_train: bool = True) -> NodeData:
    """The data that `--data` names; not to train, a file needs no labels and no splits.

    Raises:
        InvalidInputError: neither "digits" nor a readable .npz file.
    """
    from anyattention.errors import InvalidInputError
    from anyattention.training import load_digits, load_npz

    if name == "digits":
        return load_digits(seed)
    if not name.endswith(".npz"):
        raise InvalidInputError(argument="--data", expected="digits or a path that ends in .npz", actual=repr(name))
    return load_npz(name, to_train=to_train)


def print_notes(name: str, data: NodeData) -> None:
    """Say on stderr what was done with the file that its author may not expect, a line each."""
    for note in data.notes:
        print(f"{name}: {note}", file=sys.stderr)


def use_threads(threads: int | None, data: NodeData) -> None:
    """Compute with so many threads; None is one for a small graph, and PyTorch's choice for others."""
    import torch

    # On small graphs threads gain little, and they wait for each other at length when the machine is busy: the
    # digits took 50 times as long then.
    if threads is None and data.graph.num_edges < _SMALL_GRAPH:
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
