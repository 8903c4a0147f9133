"""Text that every machine with Python has: the source of its standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError

__all__ = ["Text", "load_source", "pair_entropy", "split_text", "unigram_entropy"]


class Text(NamedTuple):
    """Bytes as int64 numbers from 0 to 255, the last part held out of the training."""

    train: Tensor
    held_out: Tensor


def load_source(limit: int = 2_000_000, folder: Path | None = None) -> Text:
    """The standard library's own modules, one after the other by name, the last tenth held out.

    Args:
        limit: bytes at most.
        folder: of `.py` files; None is the standard library's.

    Raises:
        InvalidInputError: the folder holds too little to train on.
    """
    home = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    content = bytearray()
    for path in sorted(home.glob("*.py")):
        content += path.read_bytes()
        if len(content) >= limit:
            break
    if len(content) < 100:
        raise InvalidInputError(argument=str(home), expected="Python files to read", actual=f"{len(content)} bytes")
    return split_text(bytes(content[:limit]))


def split_text(content: bytes) -> Text:
    """The first nine tenths to train on, and the last."""
    tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    cut = len(tokens) * 9 // 10
    return Text(tokens[:cut], tokens[cut:])


def unigram_entropy(tokens: Tensor) -> float:
    """Bits per byte of a code that knows how often each byte occurs in this very text, and nothing else."""
    shares = tokens.bincount(minlength=256).double() / len(tokens)
    return float(torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))


def pair_entropy(train: Tensor, held_out: Tensor) -> float:
    """Bits per byte of guessing each byte by the one before it, by the counts of the training text plus 0.1."""
    counts = (train[:-1] * 256 + train[1:]).bincount(minlength=65_536).double().view(256, 256) + 0.1
    logarithms = (counts / counts.sum(1, keepdim=True)).log2()
    return float(-logarithms[held_out[:-1], held_out[1:]].mean())
