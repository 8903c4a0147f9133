"""Ids of memories: int64, ascending, each given once; a memory's row is its id's place among them."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import Axes, require_dense, require_floating
from anyattention.ambient import is_compiling, is_plainly_readable
from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError

__all__ = [
    "read_ids",
    "read_keys",
    "require_finite_rows",
    "require_id_tensor",
    "require_ids_of",
    "require_memories",
    "rows_without",
]


def read_keys(argument: str, keys: Tensor, width: int, dtype: torch.dtype, axis: str = "key_dim") -> Tensor:
    """Keys or values that a caller appends, `(count, width)`, in the dtype that they are kept in.

    They are checked, numbers all of them in that dtype, without derivatives.
    """
    require_floating(argument, keys)
    require_dense(argument, keys)
    if is_compiling() or not is_plainly_readable(keys):
        raise UnsupportedError(
            f"{argument}: memories are appended in plain calls, neither compiled nor under a transform or mode",
            argument=argument,
        )
    axes = Axes("the memory", **{axis: width})
    axes.bind(argument, keys, f"count {axis}")
    keys = keys.detach().to(dtype)
    require_finite_rows(argument, keys)
    return keys


def require_finite_rows(argument: str, rows: Tensor) -> None:
    """Raise where a row holds what is no number."""
    broken = (~rows.isfinite().all(1)).nonzero()
    if len(broken):
        raise InvalidInputError(
            argument=argument,
            expected=f"finite numbers in {rows.dtype}",
            actual=f"NaN or infinity in {len(broken)} of {len(rows)} rows, first in row {int(broken[0])}",
        )


def read_ids(argument: str, ids: Tensor) -> Tensor:
    """Ids that a caller names, `(count,)` int64; a list of ints too."""
    if not isinstance(ids, Tensor):
        try:
            ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as fault:
            expected = "int64 ids"
            raise InvalidInputError(argument=argument, expected=expected, actual=type(ids).__name__) from fault
    require_dense(argument, ids)
    if ids.dtype != torch.int64:
        raise InvalidInputError(argument=argument, expected="torch.int64", actual=ids.dtype)
    if ids.ndim != 1:
        raise DimensionMismatchError(argument=argument, expected="(count,)", actual=tuple(ids.shape))
    return ids


def require_id_tensor(argument: str, ids: object) -> None:
    """Raise unless ids are a tensor of int64, of any shape."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        actual = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidInputError(argument=argument, expected="a tensor of torch.int64", actual=actual)


def require_ids_of(argument: str, ids: Tensor, known: Tensor) -> Tensor:
    """The rows of ids `(...)`, all of which are known; -1 has row -1."""
    rows = torch.searchsorted(known, ids.contiguous())
    is_used = ids != -1
    found = rows < len(known)
    if len(known):
        found &= known[rows.clamp(max=len(known) - 1)] == ids
    missing = is_used & ~found
    if missing.any():
        raise InvalidInputError(
            argument=argument,
            expected=f"ids of the {len(known)} memories",
            actual=f"{int(missing.sum())} that are not there, such as {int(ids[missing][0])}",
        )
    return torch.where(is_used, rows, -1)


def rows_without(ids: Tensor, known: Tensor) -> Tensor:
    """The rows that stay when memories are deleted.

    Raises:
        InvalidInputError: an id that is not there, or one twice.
    """
    ids = read_ids("ids", ids).to(known.device)
    if (ids < 0).any():
        raise InvalidInputError(argument="ids", expected="ids of memories", actual=int(ids.min()))
    rows = require_ids_of("ids", ids, known)
    kept = torch.ones(len(known), dtype=torch.bool, device=known.device)
    kept[rows] = False
    if len(known) - int(kept.sum()) != len(ids):
        raise InvalidInputError(argument="ids", expected="each id once", actual="one of them twice")
    return kept.nonzero().flatten()


def require_memories(count: int, k: int) -> None:
    """Raise where a query cannot have k memories."""
    if count == 0:
        raise InvalidInputError(argument="memory", expected="memories to attend to", actual="none: append some first")
    if k > count:
        raise InvalidInputError(
            argument="k",
            expected=f"at most {count}, the number of memories",
            actual=k,
        )
