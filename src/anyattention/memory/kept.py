"""What was made of a tensor, until the tensor changes."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from anyattention.ambient import is_plain, lasting

__all__ = ["KeptOf"]

Made = TypeVar("Made")

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptOf(Generic[Made]):
    """Keeps one object with the tensor that it was made of.

    A tensor changes by another one in its place, by other memory, or by a write, which its version counts. But not by
    all writes: fused optimizers leave the version as it is, so that what they may write to is read as well.
    """

    def __init__(self) -> None:
        self._kept: tuple[Made, Tensor, Any, Tensor | None, Tensor] | None = None

    def of(self, x: Tensor) -> Made | None:
        """What was made of a tensor as it is now; None where there is nothing."""
        kept = self._kept
        if kept is None or not is_plain(x):
            return None
        made, of, state, bits, _ = kept
        if of is not x or state is None or state != _state_of(x):
            return None
        with lasting():
            found = _bits_of(x)
            is_same = found is None if bits is None else found is not None and torch.equal(found, bits)
        return made if is_same else None

    def keep(self, made: Made, x: Tensor) -> None:
        """Remember what was made of a tensor, unless it is of a compiler, a mode or a transform."""
        if is_plain(x):
            with lasting():  # the alias holds the memory: while it does, no other numbers come to lie at its address
                self._kept = made, x, _state_of(x), _bits_of(x), x.detach()

    def __getstate__(self) -> dict[str, Any]:
        # Copies have other tensors.
        return {"_kept": None}


def _state_of(x: Tensor) -> Any:
    """What a change of a tensor changes; None where writes are not counted."""
    if x.is_inference():
        return None
    return x.data_ptr(), x._version, tuple(x.shape), x.stride(), x.dtype, x.device


def _bits_of(x: Tensor) -> Tensor | None:
    """Of each row of a matrix that is trained the sum of its bits as integers; None of any other."""
    if not x.requires_grad:
        return None
    integer = _INTEGERS[x.element_size()]
    with torch.no_grad():  # another dtype for the sum would make a copy of all
        return x.detach().view(integer).sum(1, dtype=integer)
