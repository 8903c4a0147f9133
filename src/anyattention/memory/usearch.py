"""Memories in a graph of near ones (HNSW), by the library usearch: the extra `usearch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattention._checks import require_count
from anyattention.errors import InvalidInputError
from anyattention.memory.approximate import ApproximateIndex, as_array, imported
from anyattention.memory.ids import require_id_tensor, require_ids_of, rows_without
from anyattention.memory.measures import Measure, read_measure

__all__ = ["UsearchIndex"]

_METRICS = {"dot": "ip", "cosine": "cos", "euclidean": "l2sq"}
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_APPENDED_ALONE = 1000  # several threads append to a small graph so that some memories miss near ones


class UsearchIndex(ApproximateIndex):
    """An index of memories that finds nearly all of the most alike ones, in a time that hardly grows with their number.

    It walks through a graph of near memories (a hierarchical navigable small world). The first 1,000 memories are
    appended on one thread, the others on all, so that a larger graph is another one each time.

    Args:
        key_dim: width of the keys.
        measure: "dot", "cosine" or "euclidean". "dot" over keys of very different lengths is found less often.
        ef_search: how many candidates a search keeps; more of them find more, in more time.
        ef_construction: the same when a memory is appended.
        connectivity: how many near ones a memory has in the graph.
        dtype: of the keys in the graph. bfloat16 takes half of the memory and less time, and finds a few less: it has
            three digits, so that keys must not lie far from the origin beside their distances.

    Raises:
        InvalidInputError: an unknown measure or dtype, or a number below 1.
        MissingExtraError: usearch is not installed.

    Cost: O(log M) comparisons times ef_search a query, and times ef_construction an appended memory; memory for the
    keys and the graph. usearch loads the library numkong, which brings an OpenMP runtime of its own.

    Source: Malkov and Yashunin, 2018; usearch of Unum.

    Example:
        >>> index = UsearchIndex(2, measure="euclidean")  # doctest: +SKIP
        >>> index.append(torch.eye(2))  # doctest: +SKIP
        tensor([0, 1])
    """

    def __init__(
        self,
        key_dim: int,
        *,
        measure: Measure = "dot",
        ef_search: int = 64,
        ef_construction: int = 128,
        connectivity: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.key_dim: int = require_count("key_dim", key_dim, 1)
        self.measure: Measure = read_measure(measure)
        if dtype not in _DTYPES:
            expected = "torch.float32 or torch.bfloat16"
            raise InvalidInputError(argument="dtype", expected=expected, actual=dtype)
        self._index: Any = imported("usearch.index", "usearch").Index(
            ndim=self.key_dim,
            metric=_METRICS[self.measure],
            dtype=_DTYPES[dtype],
            connectivity=require_count("connectivity", connectivity, 2),
            expansion_add=require_count("ef_construction", ef_construction, 1),
            expansion_search=require_count("ef_search", ef_search, 1),
        )
        self._ids = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._next_id = 0

    def __len__(self) -> int:
        """Number of memories."""
        return len(self._ids)

    @property
    def ef_search(self) -> int:
        """How many candidates a search keeps; it may be set at any time."""
        return self._index.expansion_search

    @ef_search.setter
    def ef_search(self, count: int) -> None:
        self._index.expansion_search = require_count("ef_search", count, 1)

    def take(self, keys: Tensor, ids: Tensor) -> None:
        """`append` of keys and ids that were checked."""
        if len(ids):
            rows, alone = as_array(keys), max(_APPENDED_ALONE - len(self), 0)
            for some, threads in ((slice(alone), 1), (slice(alone, None), torch.get_num_threads())):
                self._index.add(ids[some].numpy(), rows[some], threads=threads)
            self._ids = torch.cat([self._ids, ids])
            self._next_id = int(ids[-1]) + 1

    def delete(self, ids: Tensor) -> None:
        """Forget memories.

        Raises:
            InvalidInputError: an id that is not there, or one twice.
        """
        kept = rows_without(ids, self._ids)
        if len(kept) < len(self._ids):
            gone = torch.ones(len(self._ids), dtype=torch.bool, device="cpu")
            gone[kept] = False
            self._index.remove(self._ids[gone].numpy())
            self._ids = self._ids[kept]

    def find(self, queries: Tensor, k: int) -> Tensor:
        """The ids `(n, k)` of the memories found, the best first; -1 for none."""
        found = torch.full((len(queries), k), -1, dtype=torch.int64, device="cpu")
        if len(self._ids) and len(queries):
            matches = self._index.search(as_array(queries), k, threads=torch.get_num_threads())
            keys = torch.from_numpy(matches.keys.reshape(len(queries), -1).astype("int64"))
            distances = torch.from_numpy(matches.distances.reshape(len(queries), -1).copy())
            counts = torch.as_tensor(getattr(matches, "counts", [keys.shape[1]]), device="cpu")
            is_there = (torch.arange(keys.shape[1], device="cpu") < counts.view(-1, 1)) & ~distances.isnan()
            found[:, : keys.shape[1]] = torch.where(is_there, keys, -1)
        return found.to(queries.device)

    def gather(self, ids: Tensor) -> Tensor:
        """The keys `(..., key_dim)` of ids `(...)`, in float32, rounded to the graph's dtype; an id of -1 has zeros.

        Raises:
            InvalidInputError: an id that is not there.
        """
        require_id_tensor("ids", ids)
        require_ids_of("ids", ids.cpu(), self._ids)
        keys = torch.zeros(*ids.shape, self.key_dim, dtype=torch.float32, device="cpu")
        is_used = (ids >= 0).cpu()
        if is_used.any():
            keys[is_used] = torch.stack([torch.from_numpy(key) for key in self._index.get(ids.cpu()[is_used].numpy())])
        return keys.to(ids.device)

    def known_ids(self) -> Tensor:
        """The ids of all memories, ascending."""
        return self._ids

    def to_bytes(self) -> bytes:
        """The index as usearch writes it."""
        return bytes(self._index.save())

    def restore(self, content: bytes) -> None:
        """Take the memories of an index that usearch wrote; its reader trusts what it reads.

        Raises:
            InvalidInputError: it is none, or of other keys.
        """
        try:
            self._index.load(bytearray(content))
        except (RuntimeError, ValueError) as fault:
            raise InvalidInputError(argument="index", expected="an index of usearch", actual=str(fault)) from fault
        if self._index.ndim != self.key_dim:
            actual = f"{self._index.ndim}"
            raise InvalidInputError(argument="index", expected=f"keys of width {self.key_dim}", actual=actual)
        ids = torch.from_numpy(self._index.keys[:].astype("int64")).sort().values
        self._ids, self._next_id = ids, int(ids[-1]) + 1 if len(ids) else 0
