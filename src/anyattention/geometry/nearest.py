"""The nearest points, by scipy's tree; ties are settled by index.

In a periodic cell the points are brought into one cell, and each query looks for its neighbours there. That bounds how
far its neighbours are. Only queries whose bound reaches across a boundary look again, from copies of themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention import native
from anyattention._checks import allocation_failures_named
from anyattention.ambient import lasting
from anyattention.geometry.clouds import Clouds, read_clouds
from anyattention.geometry.lattice import Copies, Wrapped, boxes, wrapped
from anyattention.geometry.neighbours import (
    Neighbours,
    no_neighbours,
    require_count,
    separated,
    sorted_neighbours,
    tree_of,
)
from anyattention.native.compressed_rows import compressed_rows

__all__ = ["nearest_neighbours"]

# So many candidates are looked at together.
_CANDIDATES = 1 << 22
# Copies of a query farther away are looked at when those nearer by have said how near the neighbours are.
_WAVES = (0.5, 1.0)


class _Found(NamedTuple):
    """Pairs `(pairs,)` of a query and a key, their distances, and the steps `(pairs, repeats)` of the key's lattice."""

    query: Tensor
    key: Tensor
    distance: Tensor
    steps: Tensor

    def where(self, keep: Tensor) -> _Found:
        return _Found(*(part[keep] for part in self))

    def joined(self, other: _Found) -> _Found:
        return _joined([self, other])


class _Keys:
    """The keys in a tree; clouds are `step` apart in it."""

    def __init__(self, points: Tensor, cloud: Tensor | None, step: float) -> None:
        self.points, self.cloud, self.step = points, cloud, step
        self.places = separated(points, cloud, step)
        self.kept = torch.arange(len(points), device="cpu")
        self.tree = tree_of(self.places)

    def query(self, places: Tensor, cloud: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """The nearest keys of the same cloud, sorted by index, and how far all others are at least.

        Where there are no more, `len(points)` stands for a key.
        """
        distances, found = self.tree.query(
            separated(places, cloud, self.step).numpy(),
            k=range(1, count + 1),
            distance_upper_bound=self.step / 2 if cloud is not None else np.inf,
            workers=native.num_threads((500 + 4 * count**2) * len(places)),
        )
        key = torch.cat([self.kept, torch.tensor([len(self.points)], dtype=torch.int64, device="cpu")])[
            torch.from_numpy(found).long()
        ]
        farthest = torch.from_numpy(distances)[:, -1]
        return key.sort(1).values, farthest if count < len(self.kept) else torch.full_like(farthest, torch.inf)

    def expect(self, rows: int, wanted: int, k: int) -> None:
        """Before so many rows ask for so many keys: where many coincide, leave out those that are nearest to none.

        They have more than k coincident ones before them in their cloud.
        """
        is_much = wanted > 2 * (k + 2) and rows * wanted > 4 * len(self.points)
        if not is_much or len(self.kept) < len(self.points):
            return
        group = torch.unique(self.places, dim=0, return_inverse=True)[1]
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device="cpu") - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        self.kept = (place <= k).nonzero().flatten()
        self.tree = tree_of(self.places[self.kept])


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
    k = require_count("k", k, 1)
    num_queries, num_keys = len(clouds.queries), len(clouds.keys)
    if num_queries == 0 or num_keys == 0:
        return no_neighbours(clouds)
    with allocation_failures_named():
        moved = wrapped(clouds) if any(clouds.periodic) else None
        found = _at_home(clouds, k, moved)
        if moved is None:
            shifts = clouds.no_shifts(len(found.query))
        else:
            found = _with_copies(clouds, k, moved, found)
            shifts = moved.shifts(found.query, found.key, found.steps)
        return sorted_neighbours(found.query, found.key, shifts, num_queries, num_keys)


def _at_home(clouds: Clouds, k: int, moved: Wrapped | None) -> _Found:
    """The k nearest keys of each query, of each key the one in the cell."""
    queries, points = (clouds.queries, clouds.keys) if moved is None else (moved.queries, moved.keys)
    both = torch.cat([queries, points])
    # Farther than any two points of one cloud are apart.
    keys = _Keys(points, clouds.key_cloud, 1.0 + 2.0 * float((both.amax(0) - both.amin(0)).norm()))
    rounding = 0.0 if moved is None else moved.rounding(clouds, 0.0)
    found: list[_Found] = []
    # One more for the point itself, and one by whose distance a tie shows.
    open_rows, wanted = torch.arange(len(queries), device="cpu"), k + 2
    while open_rows.numel():
        wanted = min(wanted, len(keys.kept))
        undecided = []
        for rows in open_rows.split(max(1, _CANDIDATES // wanted)):
            cloud = None if clouds.query_cloud is None else clouds.query_cloud[rows]
            candidate, outside = keys.query(queries[rows], cloud, wanted)
            key, distance = _first(clouds, moved, rows, candidate, k)
            # All are seen, or what was not seen is farther.
            last = distance[:, -1] if distance.shape[1] == k else torch.full_like(outside, torch.inf)
            decided = outside.isinf() | (outside > last * (1 + 1e-12) + rounding)
            undecided.append(rows[~decided])
            used = decided[:, None] & distance.isfinite()
            query = rows[:, None].expand_as(key)[used]
            steps = torch.zeros(
                len(query), 0 if moved is None else moved.lattice.repeats, dtype=torch.int64, device="cpu"
            )
            found.append(_Found(query, key[used], distance[used], steps))
        open_rows = torch.cat(undecided)
        wanted *= 2
        keys.expect(len(open_rows), wanted, k)
    return _joined(found)


def _first(clouds: Clouds, moved: Wrapped | None, rows: Tensor, candidate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each row of candidates, which are in order of index; an infinite distance is no neighbour."""
    query = rows[:, None].expand_as(candidate).reshape(-1)
    key = candidate.reshape(-1)
    is_none = key == len(clouds.keys)
    key = key.masked_fill(is_none, 0)
    shifts = None
    if moved is not None and moved.is_moved:
        shifts = moved.shifts(query, key, torch.zeros(len(key), moved.lattice.repeats, dtype=torch.int64, device="cpu"))
    distance = clouds.squared_distances(query, key, shifts).sqrt()
    if clouds.is_one_set:
        is_none |= query == key
    distance = distance.masked_fill(is_none, torch.inf).view_as(candidate)
    distance, order = distance.sort(dim=1, stable=True)
    return candidate.gather(1, order[:, :k]), distance[:, :k]


def _with_copies(clouds: Clouds, k: int, moved: Wrapped, home: _Found) -> _Found:
    """The k nearest of each query, of all images, from the nearest in the cell."""
    bound = _bounds(clouds, k, moved, home)
    low, high = boxes(moved.keys, clouds.key_cloud, clouds.query_cloud, len(moved.queries))
    some = (bound.isfinite() & low[:, 0].isfinite()).nonzero().flatten()
    copies = moved.lattice.copies(moved.queries[some], moved.query_cell[some], low[some], high[some], bound[some])
    copies = copies._replace(row=some[copies.row])
    copies = copies.where(copies.steps.any(1))
    again = torch.zeros(len(moved.queries), dtype=torch.bool, device="cpu")
    again[copies.row] = True
    again = again[home.query]
    found = home.where(again)
    if len(copies.row):
        found = _from_copies(clouds, k, moved, copies, bound, found)
    return home.where(~again).joined(found)


def _bounds(clouds: Clouds, k: int, moved: Wrapped, home: _Found) -> Tensor:
    """A distance for each query within which its k nearest images are; infinite where its cloud has no keys."""
    count = len(moved.queries)
    own = moved.lattice.reach_of_translates(k)
    bound = torch.full((count,), torch.inf, dtype=torch.float64, device="cpu")
    if clouds.is_one_set:
        bound = own[moved.query_cell]
    # The translates of a key that was found: along the lattice they are as far again as they are from it, at most.
    apart = moved.keys[home.key] - moved.queries[home.query]
    repeats = moved.lattice.repeats
    along = apart[:, :repeats].norm(dim=1) + own[moved.query_cell[home.query]]
    bound = bound.scatter_reduce(0, home.query, torch.hypot(along, apart[:, repeats:].norm(dim=1)), "amin")
    farthest = torch.zeros(count, dtype=torch.float64, device="cpu").scatter_reduce(
        0, home.query, home.distance, "amax"
    )
    is_full = torch.bincount(home.query, minlength=count) == k
    bound = torch.where(is_full, torch.minimum(bound, farthest), bound)
    largest = float(bound[bound.isfinite()].max()) if bound.isfinite().any() else 0.0
    return bound * (1 + 1e-12) + moved.rounding(clouds, largest)


def _from_copies(clouds: Clouds, k: int, moved: Wrapped, copies: Copies, bound: Tensor, found: _Found) -> _Found:
    """The k nearest of the queries that have copies, from what they found at home and what the copies find."""
    farthest = float(bound[copies.row].max())
    keys = _Keys(moved.keys, clouds.key_cloud, 1.0 + 4.0 * farthest)
    rounding = moved.rounding(clouds, farthest)
    share, looked_to = copies.apart / bound[copies.row], -1.0
    for wave in _WAVES:
        is_next = (share > looked_to) & (share <= wave) & (copies.apart <= bound[copies.row])
        open_rows, looked_to = is_next.nonzero().flatten(), wave
        # About what falls to each of a query's copies, itself included.
        wanted = 2 + k * len(bound) // (len(bound) + len(copies.row))
        while open_rows.numel():
            keys.expect(len(open_rows), wanted, k)
            wanted = min(wanted, len(keys.kept))
            new, copy, outside = _seen_from(clouds, moved, copies, open_rows, keys, bound, wanted)
            query = copies.row[open_rows]
            is_open = torch.zeros(len(copies.row), dtype=torch.bool, device="cpu")
            is_open[open_rows] = outside <= bound[query]
            if wave < 1 or is_open.any():
                is_seen = torch.zeros(len(bound), dtype=torch.bool, device="cpu")
                is_seen[query] = True
                kth = _kth_distance(found.where(is_seen[found.query]).joined(new), k, len(bound))
                bound = torch.minimum(bound, kth * (1 + 1e-12) + rounding)
                is_open[open_rows] = outside <= bound[query]
            # What an open copy found it finds again.
            found = found.joined(new.where(~is_open[copy]))
            open_rows, wanted = is_open.nonzero().flatten(), 4 * wanted
    return _first_of_each(found.where(found.distance <= bound[found.query]), moved, k, len(bound))


def _seen_from(
    clouds: Clouds, moved: Wrapped, copies: Copies, open_rows: Tensor, keys: _Keys, bound: Tensor, wanted: int
) -> tuple[_Found, Tensor, Tensor]:
    """What copies see within their queries' bounds, by which copy, and how far all else is from each at least.

    A key that a copy sees is seen by its query moved by the opposite of the copy's steps.
    """
    parts, seen_by, outside = [], [], []
    for rows in open_rows.split(max(1, _CANDIDATES // wanted)):
        of = copies.row[rows]
        cloud = None if clouds.query_cloud is None else clouds.query_cloud[of]
        candidate, beyond = keys.query(copies.places[rows], cloud, wanted)
        copy, place = (candidate < len(keys.points)).nonzero().T
        query, key, steps = of[copy], candidate[copy, place], -copies.steps[rows[copy]]
        distance = clouds.squared_distances(query, key, moved.shifts(query, key, steps)).sqrt()
        near = distance <= bound[query]
        parts.append(_Found(query, key, distance, steps).where(near))
        seen_by.append(rows[copy[near]])
        outside.append(beyond)
    return _joined(parts), torch.cat(seen_by), torch.cat(outside)


def _kth_distance(found: _Found, k: int, count: int) -> Tensor:
    """The distance of the k-th of each query; infinite for those with fewer."""
    order, place = _by_distance(found, count)
    at = order[place == k - 1]
    kth = torch.full((count,), torch.inf, dtype=torch.float64, device="cpu")
    kth[found.query[at]] = found.distance[at]
    return kth


def _first_of_each(found: _Found, moved: Wrapped, k: int, count: int) -> _Found:
    """The k nearest of each query; of equal distances the lower key comes first, then the lower shift."""
    order, place = _by_distance(found, count)
    last, next_one = (torch.full((count,), end, dtype=torch.float64, device="cpu") for end in (-1.0, -2.0))
    for at, distance in ((k - 1, last), (k, next_one)):
        chosen = order[place == at]
        distance[found.query[chosen]] = found.distance[chosen]
    is_tied = (last == next_one)[found.query]
    nearest = found.where(order[(place < k) & ~is_tied[order]])
    if not is_tied.any():
        return nearest
    tied = found.where(is_tied)
    shifts = moved.shifts(tied.query, tied.key, tied.steps)
    keys = [*shifts.T.flip(0), tied.key, tied.distance, tied.query]
    order = torch.from_numpy(np.lexsort([key.numpy() for key in keys]))
    return nearest.joined(tied.where(order[_places(tied.query[order], count) < k]))


def _by_distance(found: _Found, count: int) -> tuple[Tensor, Tensor]:
    """The order by query, then distance, and the place of each of these among its query's."""
    by_distance = torch.from_numpy(np.argsort(found.distance.numpy()))
    query = found.query[by_distance]
    order = compressed_rows(query, query, count, count).edges
    return by_distance[order], _places(query[order], count)


def _places(query: Tensor, count: int) -> Tensor:
    """Of sorted numbers, the place of each among those like it."""
    sizes = torch.bincount(query, minlength=count)
    return torch.arange(len(query), device="cpu") - (sizes.cumsum(0) - sizes)[query]


def _joined(parts: Sequence[_Found]) -> _Found:
    return _Found(*(torch.cat(part) for part in zip(*parts, strict=True)))
