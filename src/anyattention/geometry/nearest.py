"""The nearest points, by scipy's tree: ties are settled by index, and images are taken in until none can be nearer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyattention import native
from anyattention._checks import allocation_failures_named
from anyattention.ambient import lasting
from anyattention.geometry.clouds import Clouds, read_clouds
from anyattention.geometry.images import images_within
from anyattention.geometry.neighbours import (
    Neighbours,
    no_neighbours,
    require_count,
    separated,
    sorted_neighbours,
    tree_of,
)

__all__ = ["nearest_neighbours"]

# So many candidates are looked at together.
_CANDIDATES = 1 << 22


class _Candidates:
    """The points that may be nearest, copies of keys included, ordered by key, then shift."""

    def __init__(self, clouds: Clouds, reach: Tensor | None) -> None:
        self.clouds = clouds
        self.key: Tensor | None = None
        self.shifts: Tensor | None = None
        self.query_shifts: Tensor | None = None
        self.queries, self.points = clouds.queries, clouds.keys
        if reach is not None:
            self.queries, self.points, self.key, self.shifts, self.query_shifts = images_within(clouds, reach)
        self.cloud = clouds.key_cloud
        if self.cloud is not None and self.key is not None:
            self.cloud = self.cloud[self.key]
        both = torch.cat([self.queries, self.points])
        # Farther than any two points of one cloud are apart.
        self.step = 1.0 + 2.0 * float((both.amax(0) - both.amin(0)).norm())

    def pair(self, query: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query, key and shift."""
        if self.key is None or self.shifts is None or self.query_shifts is None:
            return query, candidate, None
        return query, self.key[candidate], self.shifts[candidate] - self.query_shifts[query]

    def first_copies(self, most: int) -> Tensor:
        """Those that have fewer than `most` coincident ones before them in their cloud: no other can be nearest."""
        points = separated(self.points, self.cloud, self.step)
        group = torch.unique(points, dim=0, return_inverse=True)[1]
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device="cpu") - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        return (place < most).nonzero().flatten()


@lasting()
def nearest_neighbours(
    positions: Tensor,
    k: int,
    batch: Tensor | None = None,
    cell: Tensor | None = None,
    periodic: bool | Sequence[bool] | None = None,
    queries: Tensor | None = None,
    query_batch: Tensor | None = None,
) -> Neighbours:
    """The k nearest points of each; `Graph.nearest` describes the arguments.

    Returns:
        Neighbours, on the CPU, sorted by query, key and shift, not by distance.
    """
    clouds = read_clouds(positions, batch, cell, periodic, queries, query_batch)
    require_count("k", k, 1)
    num_queries, num_keys = len(clouds.queries), len(clouds.keys)
    if num_queries == 0 or num_keys == 0:
        return no_neighbours(clouds)
    with allocation_failures_named():
        query, key, shifts = _nearest(clouds, k) if not any(clouds.periodic) else _nearest_image(clouds, k)
        if clouds.cell is not None and shifts is None:
            shifts = torch.zeros(len(key), clouds.dim, dtype=torch.int64, device="cpu")
        return sorted_neighbours(query, key, shifts, num_queries, num_keys)


def _nearest(clouds: Clouds, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    candidates = _Candidates(clouds, None)
    query, candidate, _, _ = _search(candidates, k)
    return candidates.pair(query, candidate)


def _nearest_image(clouds: Clouds, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """With all images in reach of a radius: once k are found in it for every query of a cloud, none is missed."""
    assert clouds.cell is not None
    count = len(clouds.cell)
    query_cell = clouds.cell_of(clouds.query_cloud, len(clouds.queries))
    key_count = torch.bincount(clouds.cell_of(clouds.key_cloud, len(clouds.keys)), minlength=count)
    has_keys = torch.ones(len(clouds.queries), dtype=torch.bool, device="cpu")
    if clouds.key_cloud is not None and clouds.query_cloud is not None:
        size = 1 + int(torch.maximum(clouds.key_cloud[-1], clouds.query_cloud[-1]))
        has_keys = torch.bincount(clouds.key_cloud, minlength=size)[clouds.query_cloud] > 0
    # A cube for k + 1 points at the mean density.
    volume = torch.linalg.det(clouds.cell).abs()
    reach = (volume * (k + 1) / key_count.clamp_min(1)) ** (1 / clouds.dim)
    while True:
        candidates = _Candidates(clouds, reach)
        query, candidate, distance, full = _search(candidates, k)
        short = ~full & has_keys
        farthest = torch.zeros(count, dtype=torch.float64, device="cpu")
        farthest.scatter_reduce_(0, query_cell[query], distance, "amax")
        farthest = farthest * (1 + 1e-12) + clouds.rounding()
        is_short = torch.zeros(count, dtype=torch.bool, device="cpu")
        is_short[query_cell[short]] = True
        if not (is_short | (farthest > reach)).any():
            return candidates.pair(query, candidate)
        reach = torch.where(is_short, 2 * reach, torch.maximum(reach, farthest))


def _search(candidates: _Candidates, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, candidate and distance of each pair found, and which queries have all k."""
    clouds = candidates.clouds
    queries = separated(candidates.queries, clouds.query_cloud, candidates.step)
    points = separated(candidates.points, candidates.cloud, candidates.step)
    kept = torch.arange(len(points), device="cpu")
    tree = tree_of(points)
    full = torch.zeros(len(queries), dtype=torch.bool, device="cpu")
    rounding = clouds.reach(0.0)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    # One more for the point itself, and one by whose distance a tie shows.
    open_rows, wanted = torch.arange(len(queries), device="cpu"), k + 2
    while open_rows.numel():
        wanted = min(wanted, len(kept))
        undecided = []
        for rows in open_rows.split(max(1, _CANDIDATES // wanted)):
            distances, places = tree.query(
                queries[rows].numpy(), k=range(1, wanted + 1), workers=max(1, native.num_threads())
            )
            outer = torch.from_numpy(distances)[:, -1]
            candidate = kept[torch.from_numpy(places).long().clamp(max=len(kept) - 1)].sort(1).values
            near, distance, is_full = _first(candidates, rows, candidate, k)
            last = distance.masked_fill(distance.isinf(), -1).amax(1)
            enough = last * (1 + 1e-12) + rounding
            # All are seen, or what was not seen is farther, or of another cloud.
            decided = (is_full & (outer > enough)) | (outer > candidates.step / 2)
            decided |= torch.tensor(wanted == len(kept), dtype=torch.bool, device="cpu")
            undecided.append(rows[~decided])
            rows, near, distance = rows[decided], near[decided], distance[decided]
            full[rows] = is_full[decided]
            used = distance.isfinite()
            found.append((rows[:, None].expand_as(near)[used], near[used], distance[used]))
        open_rows = torch.cat(undecided)
        if open_rows.numel() and len(kept) == len(points) and len(points) > k + 1:
            kept = candidates.first_copies(k + 1)
            tree = tree_of(points[kept])
        wanted *= 2
    query, candidate, distance = (torch.cat(parts) for parts in zip(*found, strict=True))
    return query, candidate, distance, full


def _first(candidates: _Candidates, rows: Tensor, candidate: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest of each row of candidates, which are in order of index; an infinite distance is no neighbour."""
    clouds = candidates.clouds
    query = rows[:, None].expand_as(candidate).reshape(-1)
    pair = candidates.pair(query, candidate.reshape(-1))
    distance = clouds.squared_distances(*pair).sqrt()
    excluded = torch.zeros(len(query), dtype=torch.bool, device="cpu")
    if clouds.is_one_set:
        excluded = (pair[0] == pair[1]) & (True if pair[2] is None else (pair[2] == 0).all(1))
    if clouds.query_cloud is not None and clouds.key_cloud is not None:
        excluded |= clouds.query_cloud[pair[0]] != clouds.key_cloud[pair[1]]
    distance = distance.masked_fill(excluded, torch.inf).view_as(candidate)
    order = torch.argsort(distance, dim=1, stable=True)[:, :k]
    distance = distance.gather(1, order)
    is_full = (
        (distance.isfinite().sum(1) == k)
        if distance.shape[1] == k
        else torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    )
    return candidate.gather(1, order), distance, is_full
