"""The nearest points, by scipy's tree or, in many dimensions, by products of every pair; ties are settled by index.

In a periodic cell the points are brought into one cell, and each query looks for its neighbours there. That bounds how
far its neighbours are. Only queries whose bound reaches across a boundary look again, from copies of themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention import native
from anyattention._checks import allocation_failures_named, require_count
from anyattention.ambient import lasting, values_of
from anyattention.geometry.clouds import Clouds, read_clouds
from anyattention.geometry.lattice import Copies, Wrapped, boxes, wrapped
from anyattention.geometry.neighbours import (
    Neighbours,
    no_neighbours,
    separated,
    sorted_neighbours,
    tree_of,
)
from anyattention.geometry.products import (
    Found,
    Measure,
    directed,
    found_by_index,
    largest_dots,
    near_by_products,
    require_measure,
)
from anyattention.native.compressed_rows import compressed_rows, sort_rows

__all__ = ["nearest_neighbours"]

# From so many dimensions on a tree looks at most points, whatever they fill, and products are faster.
_MANY_DIMENSIONS = 10
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
        places = keep.nonzero().flatten()
        return self if len(places) == len(keep) else self.at(places)

    def at(self, places: Tensor) -> _Found:
        return _Found(*(part.index_select(0, places) for part in self))

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
        """The nearest keys of the same cloud, and how far all others are at least.

        Where there are no more, `len(points)` stands for a key.
        """
        distances, found = self.tree.query(
            separated(places, cloud, self.step).numpy(),
            k=range(1, count + 1),
            distance_upper_bound=self.step / 2 if cloud is not None else torch.inf,
            workers=native.num_threads((500 + 4 * count**2) * len(places)),
        )
        key = torch.cat([self.kept, torch.tensor([len(self.points)], dtype=torch.int64, device="cpu")])[
            torch.from_numpy(found).long()
        ]
        farthest = torch.from_numpy(distances)[:, -1]
        return key, farthest if count < len(self.kept) else torch.full_like(farthest, torch.inf)

    def expect(self, rows: int, wanted: int, k: int) -> None:
        """Before so many rows ask for so many keys: where many coincide, leave out those that are nearest to none.

        They have more than k coincident ones before them in their cloud.
        """
        is_much = wanted > 2 * (k + 2) and rows * wanted > 4 * len(self.points)
        if not is_much or len(self.kept) < len(self.points):
            return
        group = _places_of(self.places)
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device="cpu") - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        self.kept = (place <= k).nonzero().flatten()
        self.tree = tree_of(self.places[self.kept])


class _Alike(NamedTuple):
    """Points by the place that they are at, where most share theirs with others: what is near to one is near to all.

    Attributes:
        group: `(points,)` int64, a number for each place.
        first: `(places,)` int64, the first point of each.
        offsets: `(places + 1,)` int64, where the points of each begin among `members`.
        members: `(points,)` int64.
    """

    group: Tensor
    first: Tensor
    offsets: Tensor
    members: Tensor

    @classmethod
    def of(cls, points: Tensor, cloud: Tensor | None) -> _Alike | None:
        """None where every second point or more has a place of its own."""
        along = np.sort(points[:, 0].numpy())
        if 2 * np.count_nonzero(along[1:] != along[:-1]) >= len(points):
            return None
        group = _places_of(separated(points, cloud, 1.0))
        count = 1 + int(group.max())
        offsets, _, members = compressed_rows(group, group, count, count)
        return None if 2 * count > len(points) else cls(group, members[offsets[:-1]], offsets, members)

    def as_many(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """All points at the places of some first ones, and for each the number of its first one among these."""
        place = self.group[first]
        sizes = self.offsets.diff()[place]
        again = torch.repeat_interleave(sizes)
        begins = self.offsets[place] - (sizes.cumsum(0) - sizes)
        return self.members[torch.arange(len(again), device="cpu") + begins[again]], again


def _places_of(points: Tensor) -> Tensor:
    """A number for each point, the same for those at the same place."""
    order = torch.from_numpy(np.lexsort(points.T.numpy()))
    in_order = points.index_select(0, order)
    number = torch.zeros_like(order)
    number[1:] = (in_order[1:] != in_order[:-1]).any(1).cumsum(0)
    return torch.empty_like(order).scatter_(0, order, number)


@lasting()
def nearest_neighbours(
    positions: Tensor,
    k: int,
    batch: Tensor | None = None,
    cell: Tensor | None = None,
    periodic: bool | Sequence[bool] | None = None,
    queries: Tensor | None = None,
    query_batch: Tensor | None = None,
    measure: Measure = "euclidean",
    index: Any = None,
) -> Neighbours:
    """The k nearest points of each; `Graph.nearest` describes the arguments.

    Returns:
        Neighbours, on the CPU, sorted by query, key and shift, not by distance.
    """
    clouds = read_clouds(positions, batch, cell, periodic, queries, query_batch)
    k = require_count("k", k, 1)
    require_measure(measure, clouds)
    num_queries, num_keys = len(clouds.queries), len(clouds.keys)
    with allocation_failures_named():
        if index is not None:
            given = values_of(positions if queries is None else queries).detach()
            found, shifts = found_by_index(index, measure, clouds, given, k, batch is not None), None
        elif num_queries == 0 or num_keys == 0:
            return no_neighbours(clouds)
        elif measure == "dot":
            found, shifts = largest_dots(clouds, k), None
        elif measure == "cosine":
            directions, kept_queries, kept_keys = directed(clouds)
            found, shifts = _nearest(directions, k)
            found = Found(kept_queries[found.query], kept_keys[found.key])
        else:
            found, shifts = _nearest(clouds, k)
        return sorted_neighbours(found.query, found.key, shifts, num_queries, num_keys)


def _nearest(clouds: Clouds, k: int) -> tuple[Found, Tensor | None]:
    """The k nearest of each query by distance, and the shifts of the keys."""
    if len(clouds.queries) == 0 or len(clouds.keys) == 0:
        return Found(*torch.empty(2, 0, dtype=torch.int64, device="cpu")), clouds.no_shifts(0)
    if clouds.cell is None and clouds.dim >= _MANY_DIMENSIONS:
        near, left_open = near_by_products(clouds, k)
        if len(left_open) == 0:
            return near, None
        rows = None if len(left_open) == len(clouds.queries) else left_open
        rest = _at_home(clouds, k, None, _keys_at_home(clouds, None), rows)
        return Found(torch.cat([near.query, rest.query]), torch.cat([near.key, rest.key])), None
    moved = wrapped(clouds) if any(clouds.periodic) else None
    keys = _keys_at_home(clouds, moved)
    found = _at_home(clouds, k, moved, keys)
    if moved is None:
        return Found(found.query, found.key), clouds.no_shifts(len(found.query))
    found = _with_copies(clouds, k, moved, keys, found)
    return Found(found.query, found.key), moved.shifts(found.query, found.key, found.steps)


def _keys_at_home(clouds: Clouds, moved: Wrapped | None) -> _Keys:
    """The keys, clouds farther apart than any two points of one."""
    queries, points = (clouds.queries, clouds.keys) if moved is None else (moved.queries, moved.keys)
    both = torch.cat([queries, points])
    return _Keys(points, clouds.key_cloud, 1.0 + 2.0 * float((both.amax(0) - both.amin(0)).norm()))


def _at_home(clouds: Clouds, k: int, moved: Wrapped | None, keys: _Keys, rows: Tensor | None = None) -> _Found:
    """The k nearest keys of each query, or of some rows, of each key the one in the cell."""
    queries = clouds.queries if moved is None else moved.queries
    rounding = 0.0 if moved is None else moved.rounding(clouds, 0.0)
    repeats = 0 if moved is None else moved.lattice.repeats
    found: list[_Found] = []
    alike = _Alike.of(clouds.queries, clouds.query_cloud) if rows is None else None
    # One more for the point itself, and one by whose distance a tie shows.
    count, wanted = k + int(clouds.is_one_set), k + 2
    every = torch.arange(len(queries), device="cpu") if rows is None else rows
    open_rows = every if alike is None else alike.first
    while open_rows.numel():
        wanted = min(wanted, len(keys.kept))
        undecided = []
        for rows in open_rows.split(max(1, _CANDIDATES // wanted)):
            cloud = None if clouds.query_cloud is None else clouds.query_cloud[rows]
            candidate, outside = keys.query(queries[rows], cloud, wanted)
            key, distance = _first(clouds, moved, rows, candidate, count)
            # All are seen, or what was not seen is farther.
            last = distance[:, -1] if distance.shape[1] == count else torch.full_like(outside, torch.inf)
            decided = outside.isinf() | (outside > last * (1 + 1e-12) + rounding)
            undecided.append(rows[~decided])
            query, key, distance = rows[decided], key[decided], distance[decided]
            if alike is not None:
                query, again = alike.as_many(query)
                key, distance = key.index_select(0, again), distance.index_select(0, again)
            if clouds.is_one_set:
                key, distance = _without(query, key, distance)
            query, distance = query[:, None].expand_as(key).flatten(), distance.flatten()
            steps = torch.zeros(len(query), repeats, dtype=torch.int64, device="cpu")
            found.append(_Found(query, key.flatten(), distance, steps).where(distance.isfinite()))
        open_rows = torch.cat(undecided)
        wanted *= 2
        keys.expect(len(open_rows), wanted, k)
    return _joined(found)


def _first(clouds: Clouds, moved: Wrapped | None, rows: Tensor, candidate: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest of each row of candidates, of equal distances the lower; an infinite distance is no key."""
    query = rows[:, None].expand_as(candidate).reshape(-1)
    key = candidate.reshape(-1)
    is_none = key == len(clouds.keys)
    key = key.masked_fill(is_none, 0)
    shifts = None
    if moved is not None and moved.is_moved:
        shifts = moved.shifts(query, key, torch.zeros(len(key), moved.lattice.repeats, dtype=torch.int64, device="cpu"))
    distance = clouds.squared_distances(query, key, shifts).sqrt()
    numbers = [distance.masked_fill_(is_none, torch.inf).view(torch.int64), candidate.reshape(-1)]
    offsets = torch.arange(len(rows) + 1, device="cpu") * candidate.shape[1]
    nearest = [torch.empty_like(key), torch.empty_like(key)]
    sort_rows(offsets, torch.arange(len(key), device="cpu"), numbers, nearest)
    distance, key = (column.view_as(candidate)[:, :count] for column in nearest)
    return key, distance.contiguous().view(torch.float64)


def _without(query: Tensor, key: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """One key of each row less: the query's own, and where more keys are at its place than there are, the last."""
    is_own = key == query[:, None]
    if is_own[:, 0].all():
        return key[:, 1:], distance[:, 1:]
    is_own[:, -1] |= ~is_own.any(1)
    places = (~is_own).flatten().nonzero().flatten()
    shape = len(query), key.shape[1] - 1
    return key.flatten()[places].view(shape), distance.flatten()[places].view(shape)


def _with_copies(clouds: Clouds, k: int, moved: Wrapped, keys: _Keys, home: _Found) -> _Found:
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
        if clouds.key_cloud is not None:
            # Copies lie outside of the cell, where another cloud might be.
            keys = _Keys(moved.keys, clouds.key_cloud, 1.0 + 4.0 * float(bound[copies.row].max()))
        found = _from_copies(clouds, k, moved, keys, copies, bound, found)
    return home.where(~again).joined(found)


def _bounds(clouds: Clouds, k: int, moved: Wrapped, home: _Found) -> Tensor:
    """A distance for each query within which its k nearest images are; infinite where its cloud has no keys."""
    count = len(moved.queries)
    own = moved.lattice.reach_of_translates(k)
    if clouds.is_one_set:
        bound = own[moved.query_cell]
    else:
        # The translates of a key that was found: along the lattice they are as far again as they are from it, at most.
        apart = moved.keys[home.key] - moved.queries[home.query]
        repeats = moved.lattice.repeats
        along = apart[:, :repeats].norm(dim=1) + own[moved.query_cell[home.query]]
        reach = torch.hypot(along, apart[:, repeats:].norm(dim=1))
        bound = torch.full((count,), torch.inf, dtype=torch.float64, device="cpu")
        bound = bound.scatter_reduce(0, home.query, reach, "amin")
    farthest = torch.zeros(count, dtype=torch.float64, device="cpu").scatter_reduce(
        0, home.query, home.distance, "amax"
    )
    is_full = torch.bincount(home.query, minlength=count) == k
    bound = torch.where(is_full, torch.minimum(bound, farthest), bound)
    largest = float(bound[bound.isfinite()].max()) if bound.isfinite().any() else 0.0
    return bound * (1 + 1e-12) + moved.rounding(clouds, largest)


def _from_copies(
    clouds: Clouds, k: int, moved: Wrapped, keys: _Keys, copies: Copies, bound: Tensor, found: _Found
) -> _Found:
    """The k nearest of the queries that have copies, from what they found at home and what the copies find."""
    rounding = moved.rounding(clouds, float(bound[copies.row].max()))
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
    shifts = moved.shifts(found.query, found.key, found.steps)
    order, place = _by_distance(found, count, found.key, *shifts.unbind(1))
    return found.at(order[place < k])


def _by_distance(found: _Found, count: int, *then: Tensor) -> tuple[Tensor, Tensor]:
    """The order by query, then distance, then other numbers, and the place of each of these among its query's."""
    offsets, _, order = compressed_rows(found.query, found.query, count, count)
    sort_rows(offsets, order, [found.distance.view(torch.int64), *then])
    begins = torch.repeat_interleave(offsets[:-1], offsets.diff())
    return order, torch.arange(len(order), device="cpu").sub_(begins)


def _joined(parts: Sequence[_Found]) -> _Found:
    return _Found(*(torch.cat(part) for part in zip(*parts, strict=True)))
