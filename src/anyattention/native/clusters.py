"""The search among clusters of keys: the record that the kernel reads, and the kernel called.

Axes: n queries, D dim, M keys, L clusters, p probes of a query, k keys of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from anyattention.native import calls, load
from anyattention.native.structures import Indices, Numbers, layout_of
from anyattention.native.topk import products_of, turned

__all__ = ["ClusterSearch", "largest_in_clusters"]

_CANDIDATES_AT_ONCE, _SCORES_AT_ONCE = 1 << 20, 1 << 23
_LEAST_CANDIDATES = 32  # that a thread of the kernel has room for, for each query


@dataclass(frozen=True, eq=False)
class ClusterSearch:
    """The keys of the largest products of each query `(n, k)`, among those of the clusters that it looks into.

    Attributes:
        query, key: float32.
        cluster_offsets: cluster c has the keys cluster_offsets[c] up to cluster_offsets[c + 1].
        probe_offsets, probing: the queries that look into cluster c, from probe_offsets[c] up to probe_offsets[c + 1].
        k: how many, at least 1.
    """

    query: Annotated[Tensor, Numbers("num_queries dim")]
    key: Annotated[Tensor, Numbers("num_keys dim")]
    cluster_offsets: Annotated[Tensor, Indices("num_clusters+1")]
    probe_offsets: Annotated[Tensor, Indices("num_clusters+1")]
    probing: Annotated[Tensor, Indices("num_probes")]
    k: int


# Entered among the structures whose sizes are compared when the library is loaded.
_STRUCTURE = layout_of(ClusterSearch).structure


def largest_in_clusters(query: Tensor, key: Tensor, offsets: Tensor, probes: Tensor, k: int) -> Tensor:
    """The keys `(n, k)` of the largest products of each query, the largest first; -1 where there are fewer.

    Of equal products the first key is taken. NaN and infinity are larger than any number.

    Args:
        query, key: `(n, D)` and `(M, D)`, float32 on the CPU.
        offsets: `(L + 1,)` int64; cluster c has the keys offsets[c] up to offsets[c + 1].
        probes: `(n, p)` int64, the clusters that a query looks into, all different; -1 for none.
        k: how many, at least 1.

    Cost: the products of each query with the keys of its clusters, where each key is read once for all queries of its
    cluster.
    """
    if not load.available():
        return _by_sorting(query, key, offsets, probes, k)
    found = torch.empty(len(query), k, dtype=torch.int64, device="cpu")
    size = max(64, _CANDIDATES_AT_ONCE // max(k, _LEAST_CANDIDATES))
    for first in range(0, len(query), size):
        some, own = query[first : first + size], probes[first : first + size]
        clusters, order = own.flatten().sort(stable=True)
        bounds = torch.searchsorted(clusters, torch.arange(len(offsets), device="cpu"))
        order = order[int(bounds[0]) :]
        record = ClusterSearch(some, key, offsets, bounds - bounds[0], order // own.shape[1], k)
        calls.run("cluster_search", calls.bind(record), found[first : first + size])
    return found


def _by_sorting(query: Tensor, key: Tensor, offsets: Tensor, probes: Tensor, k: int) -> Tensor:
    """The same in PyTorch."""
    found = torch.full((len(query), k), -1, dtype=torch.int64, device="cpu")
    size, keys = max(1, _SCORES_AT_ONCE // max(len(key), 1)), turned(key)
    for first in range(0, len(query), size):
        some = slice(first, first + size)
        own = probes[some]
        # One more, for -1.
        is_probed = torch.zeros(len(own), len(offsets), dtype=torch.bool, device="cpu").scatter_(1, own + 1, True)
        is_seen = is_probed[:, 1:].repeat_interleave(offsets.diff(), dim=1)
        products = products_of(query[some], keys)[:, : len(key)].masked_fill(~is_seen, -torch.inf)
        order = products.sort(dim=1, descending=True, stable=True)
        best = order.indices[:, :k].masked_fill(order.values[:, :k] == -torch.inf, -1)
        found[some, : best.shape[1]] = best
    return found
