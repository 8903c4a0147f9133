"""Keys and values of the tokens so far, for decoding: it grows by doubling, or keeps those of a window alone."""

from __future__ import annotations

import copy
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anyattention._checks import describe_shape, require_count
from anyattention.ambient import is_transformed, lasting
from anyattention.errors import DimensionMismatchError, InvalidInputError

__all__ = ["Grown", "KeyValueCache"]


class Grown(NamedTuple):
    """What a cache becomes: its tensors, from where to where they are in use, and how many tokens are new."""

    rows: list[Tensor]
    first: int
    last: int
    num_new: int


class KeyValueCache:
    """The keys and values of one module for the tokens so far: `attention(x, past=cache)`.

    Each call attends from its tokens to those before and to themselves, and adds them. Where gradients are on, what is
    kept is part of the graph, and each call copies it; else new tokens are written behind the old ones.

    A cache is no part of the graph's inputs: under activation checkpointing, which runs a call again in the backward
    pass, the tokens would be added twice.

    Args:
        window: how many tokens are kept at least, for a module whose pattern looks no further back, such as
            `Window(window, 0)`; memory is then at most that of twice as many. None keeps all.

    Raises:
        InvalidInputError: the window is no int of at least 1.

    Cost: the memory of all tokens, up to twice while it grows. A token costs a copy of its own key and value, and now
    and then one of all that is kept: in all O(tokens).

    Example:
        >>> from anyattention.nn import MultiHeadAttention
        >>> attention, cache = MultiHeadAttention(8, 2, causal=True).eval(), KeyValueCache()
        >>> x = torch.randn(1, 5, 8)
        >>> with torch.no_grad():
        ...     parts = [attention(x[:, :3], past=cache).output, attention(x[:, 3:], past=cache).output]
        >>> torch.allclose(torch.cat(parts, 1), attention(x).output, atol=1e-6), cache.length
        (True, 5)
    """

    def __init__(self, *, window: int | None = None) -> None:
        self.window = None if window is None else require_count("window", window, 1)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, and the module that they came from."""
        self._length = self._first = self._last = 0
        self._rows: list[Tensor] = []
        self._owner: weakref.ref[nn.Module] | None = None

    @property
    def length(self) -> int:
        """How many tokens there have been: the position of the next one."""
        return self._length

    @property
    def num_kept(self) -> int:
        """How many of them are kept."""
        return self._last - self._first

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values take, with the room for more."""
        return sum(x.numel() * x.element_size() for x in self._rows)

    def reorder(self, indices: Tensor) -> None:
        """Take other batch entries in place of these, as a beam search does.

        Args:
            indices: int64 `(batch,)`, an entry for each.

        Raises:
            InvalidInputError: not int64 indices `(batch,)` of entries that there are.
        """
        batch = self._rows[0].shape[0] if self._rows else 0
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
            actual = f"{indices.dtype} {describe_shape(indices)}" if isinstance(indices, Tensor) else type(indices)
            raise InvalidInputError(argument="indices", expected="int64 (batch,)", actual=actual)
        if ((indices < 0) | (indices >= batch)).any():
            raise InvalidInputError(argument="indices", expected=f"numbers from 0 to {batch - 1}", actual=indices)
        kept = [x[:, self._first : self._last].index_select(0, indices.to(x.device)) for x in self._rows]
        self._rows, self._first, self._last = kept, 0, self.num_kept

    def extended(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Grown]:
        """Kept keys and values with new ones behind them, `(batch, kept + length, heads, width)`, for the module alone.

        The cache itself is as it was until it is given the third, so that a call that fails leaves nothing in it.

        Raises:
            InvalidInputError: the cache is another module's, or holds another dtype or device.
            DimensionMismatchError: the cache holds another batch, or heads of other sizes.
        """
        self._require_owner(module)
        new = [key, value]
        for name, old, x in zip(("key", "value"), self._rows, new, strict=False):
            _require_fits(name, old, x)
        count = key.shape[1]
        drops = self.window is not None and count > self.window
        if drops or torch.is_grad_enabled() or is_transformed(*new, *self._rows):
            old = [row[:, self._first : self._last] for row in self._rows] or [x[:, :0] for x in new]
            whole = [torch.cat(parts, 1) for parts in zip(old, new, strict=True)]
            grown = Grown(*self._stored(whole), count)
        else:
            rows = self._rows or [x[:, :0] for x in new]
            first, last = self._first, self._last + count
            if last > rows[0].shape[1] or not _may_be_written(rows):
                rows, first, last = self._with_room(rows, count), 0, self.num_kept + count
            for x, row in zip(new, rows, strict=True):
                row[:, last - count : last] = x
            grown = Grown(rows, first, last, count)
            whole = [row[:, first:last] for row in rows]
        return whole[0], whole[1], grown

    def grow(self, module: nn.Module, grown: Grown) -> None:
        """Keep what `extended` was given."""
        self._rows, self._first, self._last, num_new = grown
        self._length += num_new
        self._owner = weakref.ref(module)
        if self.window is not None:
            self._first = max(self._first, self._last - self.window)

    def _stored(self, whole: list[Tensor]) -> tuple[list[Tensor], int, int]:
        """Tensors of all tokens as what is kept of them, from where to where."""
        length = whole[0].shape[1]
        if self.window is None or length <= self.window:
            return whole, 0, length
        # A copy, so that the rest is freed.
        return [x[:, -self.window :].clone() for x in whole], 0, self.window

    def _with_room(self, rows: list[Tensor], count: int) -> list[Tensor]:
        """What is kept at the front of tensors with room for `count` more, or as much again as there is."""
        kept = self.num_kept
        room = max(2 * kept, kept + count, 16)
        moved = []
        for row in rows:
            # What is kept outlives the call, which may be in inference mode.
            with lasting(row):
                moved.append(row.new_empty(row.shape[0], room, *row.shape[2:]))
            moved[-1][:, :kept] = row[:, self._first : self._last]
        return moved

    def _require_owner(self, module: nn.Module) -> None:
        if self._owner is not None and self._owner() is not module:
            raise InvalidInputError(
                argument="past",
                expected="a cache of this module",
                actual="one that another module has filled",
                hint="each attention module of a model needs a KeyValueCache of its own",
            )

    def __repr__(self) -> str:
        window = "" if self.window is None else f"window={self.window}, "
        return f"KeyValueCache({window}length={self.length}, num_kept={self.num_kept})"

    def __copy__(self) -> KeyValueCache:
        """A copy that another module may go on with; it shares no memory, into which both would write."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyValueCache:
        twin = KeyValueCache(window=self.window)
        # Clones, of tensors of a graph too.
        twin._rows = [row.clone() for row in self._rows]
        twin._length, twin._first, twin._last = self._length, self._first, self._last
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_owner": None}


def _may_be_written(rows: list[Tensor]) -> bool:
    """Whether tokens may be written behind the old ones: in no tensor of a graph, nor one of a past inference mode."""
    is_past = rows[0].is_inference() and not torch.is_inference_mode_enabled()
    return not (is_past or any(row.requires_grad for row in rows))


def _require_fits(name: str, old: Tensor, new: Tensor) -> None:
    """Raise unless new rows stand behind the old ones."""
    if old.dtype != new.dtype or old.device != new.device:
        raise InvalidInputError(
            argument=name, expected=f"{old.dtype} on {old.device}, as the cache", actual=f"{new.dtype} on {new.device}"
        )
    (batch, _, *heads), (new_batch, _, *new_heads) = old.shape, new.shape
    if (batch, heads) != (new_batch, new_heads):
        raise DimensionMismatchError(
            argument="past",
            expected=f"a cache of {new_batch} sequences, of heads {tuple(new_heads)} for the {name}",
            actual=f"one of {batch} sequences and {tuple(heads)}",
        )
