"""Neighbours of points within a radius, by vesin's cell list or scipy's tree.

The libraries find candidates; which of them are neighbours is decided here, in float64, by one formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention import native
from anyattention._checks import allocation_failures_named, require_memory, require_number
from anyattention.ambient import lasting
from anyattention.errors import GraphStructureError, InvalidInputError
from anyattention.geometry.clouds import LARGEST, Clouds, read_clouds, require_library
from anyattention.geometry.images import images_within
from anyattention.native.compressed_rows import compressed_rows, symmetric_rows

__all__ = ["Neighbours", "radius_neighbours", "sorted_neighbours"]

# Beyond so many cells along one axis vesin's numbers of cells are not to be trusted.
_WIDEST = 2.0**20


class Neighbours(NamedTuple):
    """Pairs of points, sorted by query, then key, then shift.

    Attributes:
        edge_index: `(2, edges)` int64, on the CPU; row 0 = key, row 1 = query.
        query_offsets: `(queries + 1,)` int64: the edges of each query.
        shifts: `(edges, dim)` int64, how many cells to move the key by along each vector; None without a cell.
        reverse: `(edges,)` int64, the edge from key to query of each edge from query to key, where queries and keys
            are the same points and there is no cell; else None.
    """

    edge_index: Tensor
    query_offsets: Tensor
    shifts: Tensor | None = None
    reverse: Tensor | None = None


class _Pairs(NamedTuple):
    """`(pairs, 2)` int64, a query and a key, or of one set each pair once; and shifts."""

    points: Tensor
    shifts: Tensor | None = None

    def where(self, keep: Tensor) -> _Pairs:
        return _Pairs(self.points[keep], None if self.shifts is None else self.shifts[keep])


@lasting()
def radius_neighbours(
    positions: Tensor,
    r: float,
    batch: Tensor | None = None,
    cell: Tensor | None = None,
    periodic: bool | Sequence[bool] | None = None,
    queries: Tensor | None = None,
    query_batch: Tensor | None = None,
    max_neighbours: int | None = None,
) -> Neighbours:
    """All pairs of points at a distance of at most r; `Graph.radius` describes the arguments.

        |(x_key - x_query) + shift @ cell| <= r,   in float64, r rounded to the positions' dtype first

    Returns:
        Neighbours, on the CPU.
    """
    clouds = read_clouds(positions, batch, cell, periodic, queries, query_batch)
    r = _read_radius(r, clouds.dtype)
    if max_neighbours is not None:
        require_count("max_neighbours", max_neighbours, 0)
    num_queries, num_keys = len(clouds.queries), len(clouds.keys)
    if num_queries == 0 or num_keys == 0:
        found = no_neighbours(clouds)
    else:
        with allocation_failures_named():
            if clouds.is_one_set:
                suits = _suits_vesin(clouds, r)
                found = _by_vesin(clouds, r) if suits else _both_ways(_half_by_tree(clouds, r), num_keys)
            else:
                pairs, shifts = _pairs_by_tree(clouds, r)
                found = sorted_neighbours(pairs[:, 0], pairs[:, 1], shifts, num_queries, num_keys)
    if max_neighbours is not None:
        _require_few(found.query_offsets, max_neighbours)
    return found


def require_count(argument: str, count: object, at_least: int) -> None:
    """Raise unless the count is an int of at least so many."""
    if isinstance(count, bool) or not isinstance(count, int) or count < at_least:
        raise InvalidInputError(argument=argument, expected=f"an int of at least {at_least}", actual=repr(count))


def no_neighbours(clouds: Clouds) -> Neighbours:
    """The result without a pair."""
    none = torch.empty(2, 0, dtype=torch.int64, device="cpu")
    shifts = None if clouds.cell is None else torch.empty(0, clouds.dim, dtype=torch.int64, device="cpu")
    return Neighbours(none, torch.zeros(len(clouds.queries) + 1, dtype=torch.int64, device="cpu"), shifts)


def sorted_neighbours(query: Tensor, key: Tensor, shifts: Tensor | None, num_queries: int, num_keys: int) -> Neighbours:
    """Pairs sorted by query, key and shift. O(edges + points), but for pairs that are there through several images."""
    offsets, queries, by_key = compressed_rows(key, query, num_keys, num_queries)
    keys = torch.repeat_interleave(offsets.diff())
    offsets, keys, order = compressed_rows(queries, keys, num_queries, num_keys)
    edge_index = torch.stack([keys, torch.repeat_interleave(offsets.diff())])
    if shifts is None:
        return Neighbours(edge_index, offsets)
    shifts = shifts.index_select(0, by_key.index_select(0, order))
    is_again = (edge_index[0, 1:] == edge_index[0, :-1]) & (edge_index[1, 1:] == edge_index[1, :-1])
    if is_again.any():
        _sort_shifts(shifts, is_again)
    return Neighbours(edge_index, offsets, shifts)


def _sort_shifts(shifts: Tensor, is_again: Tensor) -> None:
    """Sort, in place, the shifts of edges that are equal to the one before."""
    none = is_again.new_zeros(1)
    run = (~torch.cat([none, is_again])).cumsum(0)
    places = (torch.cat([none, is_again]) | torch.cat([is_again, none])).nonzero().flatten()
    order = places
    for vector in reversed(range(shifts.shape[1])):
        order = order[torch.argsort(shifts[order, vector], stable=True)]
    order = order[torch.argsort(run[order], stable=True)]
    shifts[places] = shifts[order]


def _read_radius(r: float, dtype: torch.dtype) -> float:
    require_number("r", r, above=0, below=LARGEST)
    rounded = float(torch.tensor(r, dtype=torch.float64, device="cpu").to(dtype))
    if not 1 / LARGEST < rounded < LARGEST:
        raise InvalidInputError(argument="r", expected=f"a number above 0 in {dtype}", actual=r)
    return rounded


def _require_few(offsets: Tensor, most: int) -> None:
    counts = offsets.diff()
    if counts.numel() and int(counts.max()) > most:
        query = int(counts.argmax())
        raise GraphStructureError(
            argument="max_neighbours",
            expected=f"at most {most} neighbours for each query",
            actual=f"{int(counts[query])} for query {query}, and too many for {int((counts > most).sum())} in all",
            hint="nothing is cut off silently: raise max_neighbours, or take a smaller r, or Graph.nearest",
        )


def _suits_vesin(clouds: Clouds, r: float) -> bool:
    """One cloud in up to three dimensions, not so sparse that cells of size r could not be numbered."""
    if clouds.dim > 3 or clouds.key_cloud is not None:
        return False
    low, high = clouds.keys.aminmax()
    return float(high - low) < _WIDEST * r


def _by_vesin(clouds: Clouds, r: float) -> Neighbours:
    """The neighbours of one set, by vesin's cell list."""
    vesin = require_library("vesin")
    dim, missing = clouds.dim, 3 - clouds.dim
    points = torch.nn.functional.pad(clouds.keys, (0, missing)).numpy()
    box = torch.eye(3, dtype=torch.float64, device="cpu")
    if clouds.cell is not None:
        box[:dim, :dim] = clouds.cell[0]
    if clouds.periodic == (True,) * 3:
        # At the mean density; a list of this length is all that a radius of many cells leads to.
        pairs = len(points) ** 2 * (2 / 3 * math.pi * r**3) / float(torch.linalg.det(box).abs())
        require_memory(int(pairs) * 40, f"{pairs:.3g} pairs of neighbours", torch.device("cpu"))
    is_periodic = any(clouds.periodic)
    tolerance = clouds.rounding() + 1e-12 * r
    search = vesin.NeighborList(
        cutoff=r + tolerance, full_list=False, sorted=False, n_threads=max(1, native.num_threads())
    )
    wanted = "PdS" if is_periodic else "Pd"
    # Without copies these are views of the search's memory: they end with this function.
    pairs, distances, *more = search.compute(
        points, box.numpy(), [*clouds.periodic, *[False] * missing], wanted, copy=False
    )
    pairs, distances = torch.from_numpy(pairs.view("int64")), torch.from_numpy(distances)
    found = _Pairs(pairs)
    if clouds.cell is not None:
        shifts = torch.zeros(len(pairs), dim, dtype=torch.int64, device="cpu")
        found = _Pairs(pairs, shifts.copy_(torch.from_numpy(more[0])[:, :dim]) if more else shifts)
    # vesin's distances are right but for rounding, so that only those next to r are in question.
    near = (distances >= r - tolerance).nonzero().flatten()
    if near.numel():
        inside = torch.ones(len(pairs), dtype=torch.bool, device="cpu")
        inside[near] = clouds.are_within(r, *found.where(near))
        found = found.where(inside)
    return _both_ways(found, len(clouds.keys))


def _half_by_tree(clouds: Clouds, r: float) -> _Pairs:
    """Each pair of one set once, by scipy's tree."""
    if clouds.cell is not None and any(clouds.periodic):
        pairs, shifts = _pairs_by_tree(clouds, r)
        assert shifts is not None
        # Of the two ways of a pair, keep the one whose key, or else shift, comes later.
        later = torch.zeros(len(pairs), dtype=torch.int64, device="cpu")
        for vector in reversed(range(clouds.dim)):
            sign = shifts[:, vector].sign()
            later = torch.where(sign != 0, sign, later)
        query, key = pairs.T
        return _Pairs(pairs, shifts).where((key > query) | ((key == query) & (later > 0)))
    reach = clouds.reach(r)
    tree = tree_of(separated(clouds.keys, clouds.key_cloud, 2 * reach))
    pairs = torch.from_numpy(tree.query_pairs(reach, output_type="ndarray")).long()
    shifts = None if clouds.cell is None else torch.zeros(len(pairs), clouds.dim, dtype=torch.int64, device="cpu")
    return _Pairs(pairs, shifts).where(clouds.are_within(r, pairs, shifts))


def _pairs_by_tree(clouds: Clouds, r: float) -> _Pairs:
    """Each (query, key) pair, images of keys included; no point with itself in one set."""
    reach = clouds.reach(r)
    images, points, centres, key_cloud = None, clouds.keys, clouds.queries, clouds.key_cloud
    if clouds.cell is not None and any(clouds.periodic):
        images = images_within(clouds, torch.full((len(clouds.cell),), reach, dtype=torch.float64, device="cpu"))
        points, centres = images.points, images.queries
        key_cloud = None if key_cloud is None else key_cloud[images.key]
    around = tree_of(separated(centres, clouds.query_cloud, 2 * reach))
    inside = tree_of(separated(points, key_cloud, 2 * reach))
    found = around.sparse_distance_matrix(inside, reach, output_type="ndarray")
    query, key = torch.from_numpy(found["i"].copy()).long(), torch.from_numpy(found["j"].copy()).long()
    shifts = None if clouds.cell is None else torch.zeros(len(query), clouds.dim, dtype=torch.int64, device="cpu")
    if images is not None:
        shifts = images.shifts[key] - images.query_shifts[query]
        key = images.key[key]
    pairs = torch.stack([query, key], dim=1)
    keep = clouds.are_within(r, pairs, shifts)
    if clouds.is_one_set:
        keep &= (query != key) | (False if shifts is None else (shifts != 0).any(1))
    return _Pairs(pairs, shifts).where(keep)


def separated(points: Tensor, cloud: Tensor | None, step: float) -> Tensor:
    """The points with a last coordinate that puts clouds `step` apart and changes no distance inside one."""
    return points if cloud is None else torch.cat([points, step * cloud[:, None].double()], dim=1)


def tree_of(points: Tensor) -> Any:
    """scipy's tree. Coincident points make a balanced one slow."""
    return require_library("scipy.spatial").cKDTree(points.numpy(), balanced_tree=False)


def _both_ways(half: _Pairs, count: int) -> Neighbours:
    """The pairs of one set and the way back of each, sorted."""
    if half.shifts is None:
        offsets, edge_index, reverse = symmetric_rows(half.points, count)
        return Neighbours(edge_index, offsets, None, reverse)
    left, right = half.points[:, 0], half.points[:, 1]
    query, key = torch.cat([left, right]), torch.cat([right, left])
    return sorted_neighbours(query, key, torch.cat([half.shifts, -half.shifts]), count, count)
