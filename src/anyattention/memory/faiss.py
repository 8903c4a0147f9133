"""Memories in an index of the library faiss: the extra `faiss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattention._checks import require_count
from anyattention.errors import InvalidInputError
from anyattention.memory.approximate import ApproximateIndex, as_array, imported
from anyattention.memory.growing import GrowingRows
from anyattention.memory.ids import require_id_tensor, require_ids_of, rows_without
from anyattention.memory.measures import Measure, read_measure, rows_of_keys

__all__ = ["FaissIndex"]


class FaissIndex(ApproximateIndex):
    """An index of memories by faiss, which has many kinds of them.

    Deleted memories are hidden from searches, and when more than half are deleted the index is built anew: many kinds
    of faiss's cannot forget.

    Args:
        key_dim: width of the keys.
        measure: "dot", "cosine" or "euclidean".
        factory: faiss's name of the kind: "Flat" is exact, "HNSW32" walks through a graph of near memories,
            "IVF1024,Flat" compares those of near clusters and is trained by the first keys that are appended. It keeps
            whole keys, so that they can be read again.
        ef_search: of "HNSW", how many candidates a search keeps.

    Raises:
        InvalidInputError: an unknown measure or kind.
        MissingExtraError: faiss is not installed.

    Cost: that of the kind. faiss brings an OpenMP runtime and a library for matrices of its own.

    Source: Douze et al., 2024 (the faiss library).

    Example:
        >>> index = FaissIndex(2, measure="euclidean", factory="Flat")  # doctest: +SKIP
        >>> index.append(torch.eye(2))  # doctest: +SKIP
        tensor([0, 1])
    """

    def __init__(self, key_dim: int, *, measure: Measure = "dot", factory: str = "HNSW32", ef_search: int = 64) -> None:
        self.key_dim: int = require_count("key_dim", key_dim, 1)
        self.measure: Measure = read_measure(measure)
        self._faiss: Any = imported("faiss", "faiss")
        self._factory, self._ef_search = factory, require_count("ef_search", ef_search, 1)
        self._index: Any = self._made()
        # Of each place in faiss's index the id, and whether the memory is still there.
        self._ids = GrowingRows(torch.zeros(0, dtype=torch.int64, device="cpu"))
        self._is_there = GrowingRows(torch.zeros(0, dtype=torch.bool, device="cpu"))
        self._next_id = 0

    def __len__(self) -> int:
        """Number of memories."""
        return int(self._is_there.rows.sum())

    def take(self, keys: Tensor, ids: Tensor) -> None:
        """`append` of keys and ids that were checked."""
        if len(ids):
            self._add(as_array(rows_of_keys(keys, self._added_by)))
            self._ids.append(ids)
            self._is_there.append(torch.ones(len(ids), dtype=torch.bool, device="cpu"))
            self._next_id = int(ids[-1]) + 1

    def delete(self, ids: Tensor) -> None:
        """Forget memories.

        Raises:
            InvalidInputError: an id that is not there, or one twice.
        """
        known = self.known_ids()
        kept = rows_without(ids, known)
        self._is_there.rows.copy_(torch.isin(self._ids.rows, known[kept], assume_unique=True))
        if 2 * len(kept) < len(self._ids.rows):
            places = self._is_there.rows.nonzero().flatten()
            rows = self._rows_at(places)
            self._index = self._made()
            self._ids.keep(places)
            self._is_there.keep(places)
            if len(places):
                self._add(rows)

    def find(self, queries: Tensor, k: int) -> Tensor:
        """The ids `(n, k)` of the memories found, the best first; -1 for none."""
        found = torch.full((len(queries), k), -1, dtype=torch.int64, device="cpu")
        if len(self) and len(queries):
            self._faiss.omp_set_num_threads(torch.get_num_threads())
            rows = as_array(rows_of_keys(queries, self._added_by))
            _, places = self._index.search(rows, k, params=self._parameters(k))
            places = torch.from_numpy(places)
            found = torch.where(places < 0, -1, self._ids.rows[places.clamp(min=0)])
        return found.to(queries.device)

    def gather(self, ids: Tensor) -> Tensor:
        """The keys `(..., key_dim)` of ids `(...)`, in float32, of length 1 with "cosine"; an id of -1 has zeros.

        Raises:
            InvalidInputError: an id that is not there.
        """
        require_id_tensor("ids", ids)
        require_ids_of("ids", ids.cpu(), self.known_ids())
        keys = torch.zeros(*ids.shape, self.key_dim, dtype=torch.float32, device="cpu")
        is_used = (ids >= 0).cpu()
        if is_used.any():
            places = torch.searchsorted(self._ids.rows, ids.cpu()[is_used])
            keys[is_used] = torch.from_numpy(self._rows_at(places))
        return keys.to(ids.device)

    def known_ids(self) -> Tensor:
        """The ids of all memories, ascending."""
        return self._ids.rows[self._is_there.rows]

    def to_bytes(self) -> bytes:
        """The ids, whether each memory is there, and the index as faiss writes it."""
        ids = self._ids.rows.numpy().astype("<i8").tobytes()
        whole = self._faiss.serialize_index(self._index).tobytes()
        return len(self._ids.rows).to_bytes(8, "little") + ids + self._is_there.rows.numpy().tobytes() + whole

    def restore(self, content: bytes) -> None:
        """Take the memories of an index that `to_bytes` wrote; faiss's reader trusts what it reads.

        Raises:
            InvalidInputError: it is none, or of other keys.
        """
        import numpy as np

        count = int.from_bytes(content[:8], "little")
        begin = 8 + 9 * count
        if len(content) < begin:
            raise InvalidInputError(argument="index", expected="an index of faiss", actual=f"{len(content)} bytes")
        try:
            index = self._faiss.deserialize_index(np.frombuffer(content[begin:], dtype=np.uint8))
        except RuntimeError as fault:
            raise InvalidInputError(argument="index", expected="an index of faiss", actual=str(fault)) from fault
        if index.d != self.key_dim or index.ntotal != count:
            raise InvalidInputError(
                argument="index",
                expected=f"{count} keys of width {self.key_dim}",
                actual=f"{index.ntotal} of width {index.d}",
            )
        self._index = index
        ids = np.frombuffer(content[8 : 8 + 8 * count], dtype="<i8").astype("int64")
        is_there = np.frombuffer(content[8 + 8 * count : begin], dtype=np.bool_).copy()
        self._ids, self._is_there = GrowingRows(torch.from_numpy(ids)), GrowingRows(torch.from_numpy(is_there))
        self._next_id = int(ids[-1]) + 1 if count else 0

    @property
    def _added_by(self) -> Measure:
        """How keys are changed before faiss gets them: they have length 1 where their cosine counts."""
        return "cosine" if self.measure == "cosine" else "dot"

    def _made(self) -> Any:
        metric = self._faiss.METRIC_L2 if self.measure == "euclidean" else self._faiss.METRIC_INNER_PRODUCT
        try:
            return self._faiss.index_factory(self.key_dim, self._factory, metric)
        except (RuntimeError, TypeError) as fault:
            raise InvalidInputError(
                argument="factory", expected="a kind that faiss knows", actual=repr(self._factory)
            ) from fault

    def _add(self, rows: Any) -> None:
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        if not self._index.is_trained:
            self._index.train(rows)
        self._index.add(rows)

    def _rows_at(self, places: Tensor) -> Any:
        """What faiss has at some places."""
        if hasattr(self._index, "make_direct_map"):
            self._index.make_direct_map()
        return self._index.reconstruct_batch(places.numpy())

    def _parameters(self, k: int) -> Any:
        """Of a search: the places that are hidden, and the candidates."""
        faiss, given = self._faiss, {}
        if not bool(self._is_there.rows.all()):
            import numpy as np

            bits = np.packbits(self._is_there.rows.numpy(), bitorder="little")
            given["sel"] = faiss.IDSelectorBitmap(bits)
        index = faiss.downcast_index(self._index)
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=max(self._ef_search, k), **given)
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=index.nprobe, **given) if given else None
        return faiss.SearchParameters(**given) if given else None
