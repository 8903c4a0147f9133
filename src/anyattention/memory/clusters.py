"""Memories in clusters, of which a search looks into the most promising ones (an inverted file)."""

from __future__ import annotations

from typing import get_args

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as written_tensors
from torch import Tensor

from anyattention._checks import require_count
from anyattention.ambient import lasting
from anyattention.errors import InvalidInputError
from anyattention.memory.approximate import ApproximateIndex
from anyattention.memory.clustering import centroids_of, evenly_taken, nearest_centroids, probes_for
from anyattention.memory.growing import GrowingRows
from anyattention.memory.ids import require_id_tensor, require_ids_of, rows_without
from anyattention.memory.measures import Measure, centre_of, read_measure, rows_of_keys, rows_of_queries
from anyattention.native.clusters import largest_in_clusters
from anyattention.native.topk import largest_products

__all__ = ["ClusterIndex"]

_RECALL = 0.95
_PROBES_AT_ONCE = 1 << 22
_FEW_NEW, _PART_NEW = 1024, 16  # memories that may wait for their clusters: so many, or a part of all


class ClusterIndex(ApproximateIndex):
    """An index of memories that finds nearly all of the most alike ones, among those of some clusters of memories.

    M memories are in sqrt(M) clusters when these are learnt, up to 4,096 of them in one. A search looks into the
    clusters whose centroids are most like a query, and compares all of their memories; queries that come together read
    each memory once. A query that finds fewer than k looks into more clusters, until there are k. New memories wait in
    a cluster that every query looks into, until they are a sixteenth of all; clusters are learnt anew at twice as many
    memories, or half. The same calls give the same index.

    Args:
        key_dim: width of the keys.
        measure: "dot", "cosine" or "euclidean".
        num_probes: how many clusters a search looks into; more of them find more, in more time. None chooses it
            whenever the clusters are learnt anew: as many as find 95 % of the 32 nearest of some of its own keys.

    Attributes:
        num_clusters: how many clusters there are.
        num_probes: how many of them a search looks into; it may be set at any time.

    Raises:
        InvalidInputError: an unknown measure, or a number below 1.

    Cost: O(D (sqrt(M) num_probes + memories that wait)) time for a query; to build it O(D M sqrt(M)), a second or two
    for a million keys of width 64 on two cores. Memory for the keys in float32, for "cosine" and "euclidean" twice.

    Source: Sivic and Zisserman, 2003 (inverted files of vectors); Jegou et al., 2011.

    Example:
        >>> index = ClusterIndex(2, measure="euclidean")
        >>> index.append(torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]]))
        tensor([0, 1, 2])
        >>> index.search(torch.tensor([[0.9, 0.0]]), k=2).ids
        tensor([[1, 0]])
    """

    def __init__(self, key_dim: int, *, measure: Measure = "dot", num_probes: int | None = None) -> None:
        self.key_dim: int = require_count("key_dim", key_dim, 1)
        self.measure: Measure = read_measure(measure)
        self._is_chosen = num_probes is None
        self._num_probes = 1 if num_probes is None else require_count("num_probes", num_probes, 1)
        # In order of their clusters, then those that wait.
        self._keys = GrowingRows(torch.zeros(0, self.key_dim, dtype=torch.float32, device="cpu"))
        self._ids = GrowingRows(torch.zeros(0, dtype=torch.int64, device="cpu"))
        self._next_id = 0
        self._order: tuple[Tensor, Tensor] | None = None
        self._forget_clusters()

    def __len__(self) -> int:
        """Number of memories."""
        return len(self._ids.rows)

    @property
    def num_clusters(self) -> int:
        """How many clusters there are."""
        return len(self._centroids)

    @property
    def num_probes(self) -> int:
        """How many clusters a search looks into."""
        return self._num_probes

    @num_probes.setter
    def num_probes(self, count: int) -> None:
        self._num_probes, self._is_chosen = require_count("num_probes", count, 1), False

    def take(self, keys: Tensor, ids: Tensor) -> None:
        """`append` of keys and ids that were checked."""
        if len(ids) == 0:
            return
        keys = keys.detach().to("cpu", torch.float32)
        if self._order is not None:  # these ids are above all others
            known, order = self._order
            places = torch.arange(len(self), len(self) + len(ids), device="cpu")
            self._order = torch.cat([known, ids]), torch.cat([order, places])
        self._keys.append(keys)
        if self._rows is not self._keys:
            self._rows.append(self._compared(keys))
        self._ids.append(ids)
        self._next_id = int(ids[-1]) + 1
        waiting = len(self) - int(self._offsets[-1])
        if len(self) >= 2 * self._learnt_from:
            self._learn()
        elif waiting > max(_FEW_NEW, len(self) // _PART_NEW):
            self._arrange()

    def delete(self, ids: Tensor) -> None:
        """Forget memories.

        Raises:
            InvalidInputError: an id that is not there, or one twice.
        """
        with lasting():
            known, order = self._ordered()
            kept = rows_without(ids, known)
            if len(kept) == len(self):
                return
            is_kept = torch.zeros(len(self), dtype=torch.bool, device="cpu")
            is_kept[order[kept]] = True
            counts = torch.nn.functional.pad(is_kept.cumsum(0), (1, 0))
            self._offsets = counts[self._offsets]
            self._keep(is_kept.nonzero().flatten())
            if 2 * len(self) <= self._learnt_from:  # few memories of many clusters
                self._learn()

    def find(self, queries: Tensor, k: int) -> Tensor:
        """The ids `(n, k)` of the memories found, the best first; -1 for none."""
        if len(self) == 0 or len(queries) == 0:
            return torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
        given = queries.detach().to("cpu", torch.float32).resolve_neg()
        rows = rows_of_queries(given, self.measure, self._centre).contiguous()
        num_probes, last = self._num_probes, min(k, len(self)) - 1
        places = self._best_places(rows, num_probes, k)
        # The clusters may have fewer than k.
        while num_probes < len(self._centroids) and len(few := (places[:, last] < 0).nonzero().flatten()):
            num_probes *= 2
            places[few] = self._best_places(rows[few], num_probes, k)
        return torch.where(places < 0, -1, self._ids.rows[places.clamp(min=0)]).to(queries.device)

    def gather(self, ids: Tensor) -> Tensor:
        """The keys `(..., key_dim)` of ids `(...)`, in float32; an id of -1 has zeros.

        Raises:
            InvalidInputError: an id that is not there.
        """
        require_id_tensor("ids", ids)
        known, order = self._ordered()
        rows = require_ids_of("ids", ids.cpu(), known)
        if len(known) == 0:
            return torch.zeros(*ids.shape, self.key_dim, dtype=torch.float32, device=ids.device)
        keys = self._keys.rows[order[rows.clamp(min=0)]].masked_fill((rows < 0).unsqueeze(-1), 0.0)
        return keys.to(ids.device)

    def known_ids(self) -> Tensor:
        """The ids of all memories, ascending."""
        return self._ordered()[0]

    def has_keys(self, keys: Tensor, ids: Tensor) -> bool:
        """Whether the memories of some ids have these keys, in float32."""
        return torch.equal(self.gather(ids), keys.to("cpu", torch.float32))

    def to_bytes(self) -> bytes:
        """The keys, their ids and their clusters, as safetensors."""
        measure = get_args(Measure).index(self.measure)
        numbers = [measure, self._num_probes, self._is_chosen, self._learnt_from, self._next_id]
        tensors = {
            "keys": self._keys.rows.contiguous(),
            "ids": self._ids.rows.contiguous(),
            "offsets": self._offsets,
            "centroids": self._centroids,
            "numbers": torch.tensor(numbers, dtype=torch.int64, device="cpu"),
        }
        if self._centre is not None:
            tensors["centre"] = self._centre
        return written_tensors(tensors)

    def restore(self, content: bytes) -> None:
        """Take the memories of an index that `to_bytes` wrote.

        Raises:
            InvalidInputError: it is none, or of other keys.
        """
        try:
            found = read_tensors(content)
            keys, ids, offsets = (found[name] for name in ("keys", "ids", "offsets"))
            centroids, centre = found["centroids"], found.get("centre")
            measure, num_probes, is_chosen, learnt_from, next_id = map(int, found["numbers"].tolist())
        except Exception as fault:  # safetensors has errors of its own
            raise InvalidInputError(argument="index", expected="an index of clusters", actual=str(fault)) from fault
        if keys.shape[1:] != (self.key_dim,) or get_args(Measure)[measure : measure + 1] != (self.measure,):
            expected = f"an index of clusters, keys of width {self.key_dim} for {self.measure!r}"
            actual = f"keys {tuple(keys.shape)} for measure {measure} of {get_args(Measure)}"
            raise InvalidInputError(argument="index", expected=expected, actual=actual)
        is_whole = (
            _are_clusters(keys, ids, offsets, centroids, centre)
            and (centre is not None) == (self.measure == "euclidean" and len(keys) > 0)
            and num_probes >= 1
            and (learnt_from > 0) == (len(keys) > 0)
            and next_id > (int(ids.max()) if len(ids) else -1)
        )
        if not is_whole:
            raise InvalidInputError(argument="index", expected="an index of clusters", actual="other tensors")
        self._keys, self._ids, self._offsets, self._centroids = GrowingRows(keys), GrowingRows(ids), offsets, centroids
        self._centre, self._order = centre, None
        self._rows = self._keys if self.measure == "dot" or len(keys) == 0 else GrowingRows(self._compared(keys))
        self._num_probes, self._is_chosen = num_probes, bool(is_chosen)
        self._learnt_from, self._next_id = learnt_from, next_id

    def _forget_clusters(self) -> None:
        """As without memories: one cluster."""
        self._rows = self._keys
        self._offsets = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._centroids = torch.zeros(1, self.key_dim, dtype=torch.float32, device="cpu")
        self._centre: Tensor | None = None
        self._learnt_from = 0

    def _learn(self) -> None:
        """Learn the clusters anew."""
        if len(self) == 0:
            self._forget_clusters()
            return
        keys = self._keys.rows
        self._centre = centre_of(keys) if self.measure == "euclidean" else None
        if self.measure != "dot":
            self._rows = GrowingRows(self._compared(keys))
        self._centroids = centroids_of(self._points())
        self._learnt_from = len(self)
        self._offsets = torch.zeros(len(self._centroids) + 1, dtype=torch.int64, device="cpu")
        self._arrange()
        if self._is_chosen:
            some = rows_of_queries(evenly_taken(self._keys.rows), self.measure, self._centre)
            self._num_probes = probes_for(_RECALL, some, self._rows.rows, self._centroid_rows(), self._offsets)

    def _arrange(self) -> None:
        """Bring the memories that wait to their clusters."""
        old = torch.arange(len(self._centroids), device="cpu").repeat_interleave(self._offsets.diff())
        new = nearest_centroids(self._points(len(old)), self._centroids)
        cluster = torch.cat([old, new])
        counts = torch.bincount(cluster, minlength=len(self._centroids))
        self._offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self._keep(cluster.argsort(stable=True))

    def _ordered(self) -> tuple[Tensor, Tensor]:
        """The ids, ascending, and where each of their memories lies."""
        if self._order is None:
            with lasting():
                ids, order = self._ids.rows.sort()
            self._order = ids, order
        return self._order

    def _keep(self, places: Tensor) -> None:
        self._order = None
        for rows in {id(each): each for each in (self._keys, self._rows, self._ids)}.values():
            rows.keep(places)

    def _best_places(self, rows: Tensor, num_probes: int, k: int) -> Tensor:
        """Where the best memories `(n, k)` of some queries lie among those of so many clusters and those that wait."""
        offsets, size = self._offsets, max(64, _PROBES_AT_ONCE // num_probes)
        if offsets[-1] < len(self):
            offsets = torch.cat([offsets, offsets.new_tensor([len(self)])])
        found = [
            largest_in_clusters(some, self._rows.rows, offsets, self._probes_of(some, num_probes), k)
            for some in rows.split(size)
        ]
        return torch.cat(found)

    def _probes_of(self, rows: Tensor, num_probes: int) -> Tensor:
        """The clusters `(n, probes)` that some queries look into, with that of the memories that wait."""
        count = len(self._centroids)
        if num_probes < count:
            probes = largest_products(rows, self._centroid_rows(), num_probes)
        else:
            probes = torch.arange(count, device="cpu").expand(len(rows), -1)
        if self._offsets[-1] < len(self):
            probes = torch.cat([probes, probes.new_full((len(probes), 1), count)], dim=1)
        return probes

    def _points(self, first: int = 0) -> Tensor:
        """The keys from a place on whose distances make the clusters: of length 1 for "cosine", about the centre."""
        return self._rows.rows[first:, : self.key_dim].contiguous()

    def _compared(self, keys: Tensor) -> Tensor:
        return rows_of_keys(keys, self.measure, self._centre)

    def _centroid_rows(self) -> Tensor:
        """The centroids as rows whose products with those of queries rank them."""
        if self.measure != "euclidean":
            return self._centroids
        return rows_of_keys(self._centroids, "euclidean", torch.zeros_like(self._centroids[0]))


def _are_clusters(keys: Tensor, ids: Tensor, offsets: Tensor, centroids: Tensor, centre: Tensor | None) -> bool:
    """Whether tensors of a file fit together: keys `(M, D)`, of any M and D."""
    if keys.ndim != 2 or ids.ndim != 1 or offsets.ndim != 1 or len(offsets) < 2:
        return False
    if ids.dtype != torch.int64 or offsets.dtype != torch.int64:
        return False
    if any(x.dtype != torch.float32 or not x.isfinite().all() for x in (keys, centroids, centre) if x is not None):
        return False
    return bool(
        len(ids) == len(keys)
        and ids.unique().numel() == len(ids)
        and (ids >= 0).all()
        and centroids.shape == (len(offsets) - 1, keys.shape[1])
        and (centre is None or centre.shape == keys.shape[1:])
        and (offsets.diff() >= 0).all()
        and offsets[0] == 0
        and offsets[-1] <= len(keys)
    )
