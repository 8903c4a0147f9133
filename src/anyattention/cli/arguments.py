"""Argument types and options that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyattention.training import NodeData

__all__ = ["add_data", "count", "load_data", "seed", "use_threads"]


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
        "--threads", type=count, metavar="N", help="threads to compute with (default: PyTorch's choice)"
    )


def load_data(name: str, seed: int) -> NodeData:
    """The data that `--data` names.

    Raises:
        InvalidInputError: neither "digits" nor a readable .npz file.
    """
    from anyattention.errors import InvalidInputError
    from anyattention.training import load_digits, load_npz

    if name == "digits":
        return load_digits(seed)
    if not name.endswith(".npz"):
        raise InvalidInputError(argument="--data", expected="digits or a path that ends in .npz", actual=repr(name))
    return load_npz(name)


def use_threads(threads: int | None) -> None:
    """Compute with so many threads; None leaves PyTorch's choice."""
    import torch

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
