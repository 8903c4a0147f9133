"""What was made of a tensor, until the tensor changes."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import Tensor

from anyattention.ambient import is_compiling, is_plainly_readable

__all__ = ["KeptOf"]

Made = TypeVar("Made")


class KeptOf(Generic[Made]):
    """Keeps one object with the tensor that it was made of.

    A tensor changes by another one in its place, by other memory, or by a write, which its version counts.
    """

    def __init__(self) -> None:
        self._kept: tuple[Made, Tensor, Any] | None = None

    def of(self, x: Tensor) -> Made | None:
        """What was made of a tensor as it is now; None where there is nothing."""
        kept = self._kept
        if kept is None or is_compiling() or not is_plainly_readable(x):
            return None
        made, of, state = kept
        return made if of is x and state is not None and state == _state_of(x) else None

    def keep(self, made: Made, x: Tensor) -> None:
        """Remember what was made of a tensor, unless a compiler or a transform is at work."""
        if not is_compiling() and is_plainly_readable(x):
            self._kept = made, x, _state_of(x)

    def __getstate__(self) -> dict[str, Any]:
        # Copies have other tensors.
        return {"_kept": None}


def _state_of(x: Tensor) -> Any:
    """What a change of a tensor changes; None where writes are not counted."""
    if x.is_inference():
        return None
    return x.data_ptr(), x._version, tuple(x.shape), x.dtype, x.device
