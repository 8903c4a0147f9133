"""What approximate indexes share, and rows of a table that such an index finds.

Axes: n queries, M memories, D key_dim, k memories of a query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from anyattention.ambient import is_compiling, is_readable, shielded, values_of
from anyattention.errors import DimensionMismatchError, InvalidInputError, MissingExtraError, UnsupportedError
from anyattention.memory.exact import read_queries
from anyattention.memory.ids import read_ids, read_keys, require_finite_rows
from anyattention.memory.measures import Measure, alike
from anyattention.output import SearchResult

__all__ = ["ApproximateIndex", "IndexedRows", "as_array", "imported"]


class ApproximateIndex(ABC):
    """An index that misses some memories; a module keeps one beside its keys. Abstract.

    Attributes:
        key_dim: width of the keys.
        measure: how alike a query and a key are.
    """

    key_dim: int
    measure: Measure
    _next_id: int

    def append(self, keys: Tensor, ids: Tensor | None = None) -> Tensor:
        """Take more memories.

        Args:
            keys: `(count, key_dim)`, finite.
            ids: `(count,)`, ascending and above all that were given; None gives the next ones.

        Returns:
            Their ids `(count,)`.

        Raises:
            DimensionMismatchError, InvalidInputError: keys of another width, or with NaN or infinity.
        """
        keys = read_keys("keys", keys, self.key_dim, torch.float32)
        ids = _next_ids(self._next_id, len(keys), ids)
        self.take(keys, ids)
        return ids.to(keys.device)

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """The k most alike memories of each query, as many of them as the index finds.

        Args:
            queries: `(n, key_dim)`.
            k: how many.

        Returns:
            SearchResult(ids `(n, k)`, scores `(n, k)`), the best first; -1 and -inf where there are fewer.

        Raises:
            DimensionMismatchError, InvalidInputError: queries of another width, or k below 1.
            UnsupportedError: under a compiler or vmap.
        """
        queries, k = read_queries(queries, self.key_dim, k)
        _require_readable(queries)
        with shielded():
            ids = self.find(values_of(queries), k)
        scores = alike(queries, self.gather(ids).to(queries), self.measure).masked_fill(ids < 0, -torch.inf)
        # They were found by numbers of other rounding.
        order = scores.sort(dim=1, descending=True, stable=True).indices
        return SearchResult(ids.gather(1, order), scores.gather(1, order))

    @abstractmethod
    def take(self, keys: Tensor, ids: Tensor) -> None:
        """`append` of keys and ids that were checked: ids above all others."""

    @abstractmethod
    def delete(self, ids: Tensor) -> None:
        """Forget memories."""

    @abstractmethod
    def find(self, queries: Tensor, k: int) -> Tensor:
        """The ids `(n, k)` of the memories found, the best first; -1 for none."""

    @abstractmethod
    def gather(self, ids: Tensor) -> Tensor:
        """The keys `(..., key_dim)` of ids `(...)`, in float32; an id of -1 has zeros."""

    @abstractmethod
    def known_ids(self) -> Tensor:
        """The ids of all memories, ascending."""

    def has_keys(self, keys: Tensor, ids: Tensor) -> bool:
        """Whether the memories of some ids may have these keys; other libraries' are taken at their word."""
        return True

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The index as it is kept in a file."""

    @abstractmethod
    def restore(self, content: bytes) -> None:
        """Take the memories of an index that `to_bytes` wrote."""


class IndexedRows:
    """Rows of a table of keys as an approximate index finds them; see `exact.SearchedKeys`.

    Args:
        index: which has the memories already, or none of them.
        keys: `(M, D)`.
        ids: `(M,)`, ascending.

    Raises:
        InvalidInputError: the index has other memories, or a key is no number in float32.
    """

    def __init__(self, index: ApproximateIndex, keys: Tensor, ids: Tensor) -> None:
        self.index = index
        known = index.known_ids()
        if len(known) == 0 and len(ids):
            self._take(keys, ids)
        elif len(known) != len(ids) or not bool((known == ids.cpu()).all()):
            raise InvalidInputError(
                argument="index",
                expected=f"the ids of the {len(ids)} memories",
                actual=f"{len(known)} ids, others among them",
            )
        elif not index.has_keys(keys, known):
            raise InvalidInputError(argument="index", expected="the keys of the memories", actual="others")
        self._ids = ids

    def follow(self, keys: Tensor, ids: Tensor) -> None:
        """Take more keys, which begin with those that are here."""
        count = len(self._ids)
        self._take(keys[count:], ids[count:])
        self._ids = ids

    def keep(self, keys: Tensor, ids: Tensor, places: Tensor) -> None:
        """Take fewer keys: those at some places of the ones that are here."""
        is_gone = torch.ones(len(self._ids), dtype=torch.bool, device=self._ids.device)
        is_gone[places] = False
        self.index.delete(self._ids[is_gone])
        self._ids = ids

    def search(self, queries: Tensor, k: int) -> Tensor:
        """The rows `(n, k)` that the index finds, the best first; -1 where there are fewer."""
        _require_readable(queries)
        with shielded():
            found = self.index.find(values_of(queries), k)
            has_all = len(self._ids) > 0 and int(self._ids[-1] - self._ids[0]) == len(self._ids) - 1
            rows = found - self._ids[0] if has_all else torch.searchsorted(self._ids, found)
            return torch.where(found < 0, -1, rows)

    def _take(self, keys: Tensor, ids: Tensor) -> None:
        keys = keys.detach().to(torch.float32)
        require_finite_rows("keys", keys)
        self.index.take(keys, ids.cpu())


def _require_readable(queries: Tensor) -> None:
    if is_compiling() or not is_readable(queries):
        raise UnsupportedError(
            "an approximate index is searched where the queries can be read: neither compiled nor under vmap; "
            "index='exact' has no such bound",
            argument="index",
        )


def imported(module: str, extra: str) -> Any:
    """An optional module.

    Raises:
        MissingExtraError: it is not installed, or cannot be loaded.
    """
    try:
        return import_module(module)
    except ImportError as missing:
        raise MissingExtraError(
            f"index={extra!r} needs {module} ({missing}): pip install 'anyattention[{extra}]'", argument="index"
        ) from missing


def as_array(x: Tensor) -> Any:
    """Keys or queries as float32 in numpy."""
    return x.detach().to("cpu", torch.float32).contiguous().numpy()


def _next_ids(first: int, count: int, ids: Tensor | None) -> Tensor:
    """The ids of memories to append: those of the caller, ascending and not below the first, or the next ones."""
    if ids is None:
        return torch.arange(first, first + count, device="cpu")
    ids = read_ids("ids", ids)
    if len(ids) != count:
        raise DimensionMismatchError(argument="ids", expected=f"({count},), one for each key", actual=tuple(ids.shape))
    if len(ids) and (ids[0] < first or bool((ids.diff() <= 0).any())):
        raise InvalidInputError(argument="ids", expected=f"ascending ids from {first} on", actual=int(ids[0]))
    return ids.cpu()
