"""Clusters of keys by k-means, the cluster of each key, and how many clusters a search has to look into.

Axes: M keys, L clusters, n queries, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyattention.memory.measures import centre_of, rows_of_keys, rows_of_queries
from anyattention.native.clusters import largest_in_clusters
from anyattention.native.topk import largest_products

__all__ = ["centroids_of", "evenly_taken", "nearest_centroids", "probes_for"]

_ONE_CLUSTER = 4096  # so few keys are compared sooner than clusters are told apart
_SAMPLE, _ROUNDS = 64, 6  # keys for a cluster that centroids are learnt from, and how often they move
_QUERIES, _NEAREST = 256, 32  # by which the number of clusters to look into is chosen


def centroids_of(points: Tensor) -> Tensor:
    """`(L, D)`: the means of clusters of points `(M, D)`, sqrt(M) of them, learnt from some of the points.

    The same for the same points; one cluster of up to 4,096.
    """
    count = math.isqrt(len(points)) if len(points) > _ONE_CLUSTER else 1
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(points), generator=generator, device="cpu")
    sample = points[order[: _SAMPLE * count]]
    centroids = sample[:count].clone()
    for _ in range(_ROUNDS if count > 1 else 0):
        nearest = nearest_centroids(sample, centroids)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, nearest, sample)
        means = sums / counts.clamp(min=1)
        centroids = torch.where((counts > 0) & means.isfinite().all(1, keepdim=True), means, centroids)
    return centroids


def nearest_centroids(points: Tensor, centroids: Tensor) -> Tensor:
    """`(M,)`: the centroid `(L, D)` that is nearest to each point `(M, D)`."""
    centre = centre_of(centroids)
    rows = rows_of_queries(points, "euclidean", centre), rows_of_keys(centroids, "euclidean", centre)
    # Products that are no numbers choose none.
    return largest_products(*rows, 1).flatten().clamp(min=0)


def evenly_taken(keys: Tensor) -> Tensor:
    """Some of the keys, by which the number of clusters to look into is chosen: 256 to 511, or all of fewer."""
    return keys[:: max(1, len(keys) // _QUERIES)]


def probes_for(recall: float, queries: Tensor, keys: Tensor, centroids: Tensor, offsets: Tensor) -> int:
    """How many clusters find such a share of the 32 best keys of some queries: the least number, by steps.

    Args:
        recall: the share that is wanted.
        queries: `(n, D)`, rows whose products with the rows of keys and of centroids rank them.
        keys: `(M, D)`, of cluster c the rows offsets[c] up to offsets[c + 1].
        centroids: `(L, D)`.
        offsets: `(L + 1,)`.

    Cost: an exact search, and some in clusters.
    """
    k, count = min(_NEAREST, len(keys)), len(centroids)
    if count == 1:
        return 1
    queries = queries.contiguous()
    best = largest_products(queries, keys, k)
    nearest = largest_products(queries, centroids, count)
    probes = 1
    while probes < count:
        found = largest_in_clusters(queries, keys, offsets, nearest[:, :probes], k)
        if (found[:, :, None] == best[:, None]).any(2).double().mean() >= recall:
            break
        probes = min(count, probes + max(1, probes // 4))
    return probes
