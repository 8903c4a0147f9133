"""The memories most like a query, found among all of them: no key is missed.

Axes: n queries, M memories, D key_dim, k memories of a query.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from anyattention._checks import Axes, require_count, require_device, require_floating
from anyattention.ambient import lasting, without_autocast
from anyattention.memory.growing import GrowingRows
from anyattention.memory.ids import read_keys, require_id_tensor, require_ids_of, rows_without
from anyattention.memory.measures import Measure, alike, centre_of, read_measure, rows_of_keys, rows_of_queries
from anyattention.ops.topk import topk_search
from anyattention.output import SearchResult

__all__ = ["ExactIndex", "SearchedKeys", "gathered", "ranked", "read_queries"]

_SCORES_AT_ONCE = 1 << 21


class SearchedKeys:
    """Keys as the kernel compares them: float32, and for "cosine" and "euclidean" a copy.

    Args:
        keys: `(M, D)`; with "dot" and float32 they are read where they lie.
        measure: the measure.
    """

    def __init__(self, keys: Tensor, measure: Measure) -> None:
        self.measure: Measure = measure
        self._prepare(keys)

    def follow(self, keys: Tensor, ids: Tensor) -> None:
        """Take more keys, which begin with those that are here."""
        count = len(self._keys)
        if self._rows is None or len(keys) >= self._prepared_anew_at:
            self._prepare(keys)
            return
        self._keys = keys
        self._rows.append(self._compared(keys[count:]))

    def keep(self, keys: Tensor, ids: Tensor, places: Tensor) -> None:
        """Take fewer keys: those at some places of the ones that are here."""
        if self._rows is None or len(places) == 0:
            self._prepare(keys)
            return
        self._keys = keys
        self._rows.keep(places)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """The rows `(n, k)` of the most alike keys, first ones first among equals; -1 where there are fewer."""
        queries = _at_least_float32(queries.detach())
        rows = self._keys if self._rows is None else self._rows.rows
        if len(rows) == 0:
            return torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
        queries = rows_of_queries(queries, self.measure, self._centre).to(torch.float32)
        with without_autocast(queries.device):
            return topk_search(queries, rows.detach(), k)

    def _prepare(self, keys: Tensor) -> None:
        self._keys = keys
        with lasting(keys), torch.no_grad():
            is_centred = self.measure == "euclidean"
            self._centre = centre_of(_at_least_float32(keys.detach())) if is_centred else None
        # The centre of a few keys may be far from that of many.
        self._prepared_anew_at = 2 * len(keys) if is_centred else 1 if len(keys) == 0 else sys.maxsize
        lies_well = keys.dtype == torch.float32 and keys.is_contiguous()
        self._rows = None if self.measure == "dot" and lies_well else GrowingRows(self._compared(keys))

    def _compared(self, keys: Tensor) -> Tensor:
        with lasting(keys), torch.no_grad():
            keys = _at_least_float32(keys.detach())
            return rows_of_keys(keys, self.measure, self._centre).to(torch.float32).contiguous()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ExactIndex:
    """An index of memories that finds the most alike ones exactly.

    With ids in order of appending and rows in order of ids, a memory's row is found by bisection. Deleted memories
    leave no hole.

    Args:
        key_dim: width of the keys.
        measure: "dot" (q . k), "cosine" (both of length 1) or "euclidean" (-|q - k|^2).
        dtype: of the keys that are kept; they are compared in float32.

    Raises:
        InvalidInputError: an unknown measure, or a width below 1.

    Cost: O(n x M x D) time for a search, memory for the results alone; "cosine" and "euclidean" keep a second copy of
    the keys. `append` takes the time of what it is given, in the long run; `delete` that of all memories.

    Example:
        >>> index = ExactIndex(2, measure="euclidean")
        >>> index.append(torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]]))
        tensor([0, 1, 2])
        >>> ids, scores = index.search(torch.tensor([[0.9, 0.0]]), k=2)
        >>> ids
        tensor([[1, 0]])
        >>> index.delete(torch.tensor([1]))
        >>> index.search(torch.tensor([[0.9, 0.0]]), k=2).ids
        tensor([[0, 2]])
    """

    def __init__(self, key_dim: int, *, measure: Measure = "dot", dtype: torch.dtype = torch.float32) -> None:
        self.key_dim: int = require_count("key_dim", key_dim, 1)
        self.measure: Measure = read_measure(measure)
        self._keys = GrowingRows(torch.zeros(0, self.key_dim, dtype=dtype, device="cpu"))
        self._ids = GrowingRows(torch.zeros(0, dtype=torch.int64, device="cpu"))
        self._searched = SearchedKeys(self._keys.rows, self.measure)
        self._next_id = 0

    def __len__(self) -> int:
        """Number of memories."""
        return len(self._ids.rows)

    @property
    def keys(self) -> Tensor:
        """The keys `(M, key_dim)`, in order of their ids."""
        return self._keys.rows

    @property
    def ids(self) -> Tensor:
        """The ids `(M,)`, ascending."""
        return self._ids.rows

    def append(self, keys: Tensor) -> Tensor:
        """Take more memories.

        Args:
            keys: `(count, key_dim)`, finite.

        Returns:
            Their ids `(count,)`, which no memory had before.

        Raises:
            DimensionMismatchError, InvalidInputError: keys of another width, or with NaN or infinity.
            UnsupportedError: under a compiler, a transform or a mode.
        """
        keys = read_keys("keys", keys, self.key_dim, self.keys.dtype)
        require_device("keys", keys, self.keys.device, "the memory")
        ids = torch.arange(self._next_id, self._next_id + len(keys), device=self.keys.device)
        self._next_id += len(keys)
        self._ids.append(ids)
        self._searched.follow(self._keys.append(keys), self.ids)
        return ids

    def delete(self, ids: Tensor) -> None:
        """Forget memories; their ids are not given again.

        Raises:
            InvalidInputError: an id that is not there, or one twice. Nothing is deleted then.
        """
        kept = rows_without(ids, self.ids)
        self._ids.keep(kept)
        self._searched.keep(self._keys.keep(kept), self.ids, kept)

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """The k most alike memories of each query.

        Args:
            queries: `(n, key_dim)`, of any floating-point dtype.
            k: how many.

        Returns:
            SearchResult(ids `(n, k)` int64, scores `(n, k)`), the best first, of equal keys the one with the lowest
            id; -1 and -inf where there are fewer than k.

        Raises:
            DimensionMismatchError, InvalidInputError: queries of another width, or k below 1.
        """
        queries, k = read_queries(queries, self.key_dim, k)
        require_device("queries", queries, self.keys.device, "the memory")
        return ranked(queries, self.keys, self.ids, self._searched.search(queries, k), self.measure)

    def gather(self, ids: Tensor) -> Tensor:
        """The keys `(..., key_dim)` of ids `(...)`; an id of -1 has zeros.

        Raises:
            InvalidInputError: an id that is not there.
        """
        return gathered(ids, self.keys, self.ids)


def read_queries(queries: Tensor, key_dim: int, k: int) -> tuple[Tensor, int]:
    """A search's arguments, checked; the queries without derivatives."""
    require_floating("queries", queries)
    axes = Axes("the index", key_dim=key_dim)
    axes.bind("queries", queries, "count key_dim")
    return queries.detach(), require_count("k", k, 1)


def ranked(queries: Tensor, keys: Tensor, ids: Tensor, rows: Tensor, measure: Measure) -> SearchResult:
    """Ids and scores of the chosen rows `(n, k)`, -1 for none, by their scores in the queries' dtype."""
    is_used = rows >= 0
    places = rows.clamp(min=0)
    if len(ids) == 0:
        scores = torch.full(rows.shape, -torch.inf, dtype=queries.dtype, device=queries.device)
        return SearchResult(torch.full_like(rows, -1), scores)
    size = max(_SCORES_AT_ONCE // max(rows.shape[1] * keys.shape[1], 1), 1)
    parts = zip(queries.split(size), places.split(size), strict=True)
    scores = torch.cat([alike(some, keys.detach()[chosen].to(some), measure) for some, chosen in parts])
    scores = scores.masked_fill(~is_used, -torch.inf)
    # They were chosen by products of other rounding.
    order = scores.sort(dim=1, descending=True, stable=True).indices
    chosen_ids = torch.where(is_used, ids[places], -1)
    return SearchResult(chosen_ids.gather(1, order), scores.gather(1, order))


def gathered(ids: Tensor, keys: Tensor, known: Tensor) -> Tensor:
    """The keys of ids `(...)`, zeros for -1."""
    require_id_tensor("ids", ids)
    rows = require_ids_of("ids", ids.to(known.device), known)
    if len(known) == 0:
        return keys.new_zeros(*ids.shape, keys.shape[1])
    return keys[rows.clamp(min=0)].masked_fill((rows < 0).unsqueeze(-1), 0.0)
