"""Neighbours of points within a radius, by vesin's cell list or scipy's tree.

The libraries find candidates; which of them are neighbours is decided here, in float64, by one formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention._checks import allocation_failures_named, require_count, require_memory, require_number
from anyattention.ambient import lasting
from anyattention.errors import GraphStructureError, InvalidInputError
from anyattention.geometry.cell_list import cell_list_pairs, numbered_box
from anyattention.geometry.clouds import LARGEST, Clouds, Pairs, read_clouds, require_library
from anyattention.geometry.lattice import Wrapped, boxes, wrapped
from anyattention.native.compressed_rows import compressed_rows, sort_rows, symmetric_rows

__all__ = ["Neighbours", "radius_neighbours", "sorted_neighbours"]


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
        max_neighbours = require_count("max_neighbours", max_neighbours, 0)
    num_queries, num_keys = len(clouds.queries), len(clouds.keys)
    if num_queries == 0 or num_keys == 0:
        found = no_neighbours(clouds)
    else:
        with allocation_failures_named():
            found = _within(clouds, r)
    if max_neighbours is not None:
        _require_few(found.query_offsets, max_neighbours)
    return found


def _within(clouds: Clouds, r: float) -> Neighbours:
    """By vesin where the points fill their box, which its time grows with; else by the tree, linear on any shape."""
    moved = wrapped(clouds) if any(clouds.periodic) else None
    if moved is not None:
        _require_memory_for_pairs(clouds, r, moved)
    box = numbered_box(clouds, r, moved)
    num_queries, num_keys = len(clouds.queries), len(clouds.keys)
    if box is not None:
        pairs, _memory = cell_list_pairs(clouds, r, box, moved)
        return _both_ways(pairs, num_keys)
    if clouds.is_one_set and moved is None:
        return _both_ways(_half_by_tree(clouds, r), num_keys)
    pairs = _pairs_by_tree(clouds, r, moved)
    return sorted_neighbours(pairs.points[:, 0], pairs.points[:, 1], pairs.shifts, num_queries, num_keys)


def _require_memory_for_pairs(clouds: Clouds, r: float, moved: Wrapped) -> None:
    """Raise where the pairs of one set take more than is free: those of points with their own images, or with all."""
    if clouds.is_one_set:
        pairs = moved.lattice.translates(r)[moved.key_cell].sum() / 2
        if all(clouds.periodic) and clouds.key_cloud is None:
            # At the mean density; a list of this length is all that a radius of many cells leads to.
            pairs = pairs * len(clouds.keys)
        size = min(float(pairs) * 40, 2.0**62)
        require_memory(int(size), f"{float(pairs):.3g} pairs of neighbours", torch.device("cpu"))


def no_neighbours(clouds: Clouds) -> Neighbours:
    """The result without a pair."""
    none = torch.empty(2, 0, dtype=torch.int64, device="cpu")
    return Neighbours(none, torch.zeros(len(clouds.queries) + 1, dtype=torch.int64, device="cpu"), clouds.no_shifts(0))


def sorted_neighbours(query: Tensor, key: Tensor, shifts: Tensor | None, num_queries: int, num_keys: int) -> Neighbours:
    """Pairs sorted by query, key and shift."""
    offsets, _, order = compressed_rows(query, key, num_queries, num_keys)
    edge_index = key.new_empty(2, len(key))
    sorted_shifts = None if shifts is None else torch.empty_like(shifts, memory_format=torch.contiguous_format)
    numbers, into = [key, *_columns(shifts)], [edge_index[0], *_columns(sorted_shifts)]
    sort_rows(offsets, order, numbers, into)
    edge_index[1] = torch.repeat_interleave(offsets.diff())
    return Neighbours(edge_index, offsets, sorted_shifts)


def _columns(shifts: Tensor | None) -> Sequence[Tensor]:
    return () if shifts is None else shifts.unbind(1)


def _read_radius(r: float, dtype: torch.dtype) -> float:
    r = require_number("r", r, above=0, below=LARGEST)
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


def _pairs_by_tree(clouds: Clouds, r: float, moved: Wrapped | None) -> Pairs:
    """Each pair of a query and a key, images of keys included; no point with itself in one set."""
    if moved is None:
        reach, points, centres, key, steps = r * (1 + 1e-12), clouds.keys, clouds.queries, None, None
    else:
        reach = r * (1 + 1e-12) + moved.rounding(clouds, r)
        low, high = boxes(moved.queries, clouds.query_cloud, clouds.key_cloud, len(moved.keys))
        every = torch.full((len(moved.keys),), reach, dtype=torch.float64, device="cpu")
        key, steps, points, _ = moved.lattice.copies(moved.keys, moved.key_cell, low, high, every)
        centres = moved.queries
    cloud = clouds.key_cloud if clouds.key_cloud is None or key is None else clouds.key_cloud[key]
    around = tree_of(separated(centres, clouds.query_cloud, 2 * reach))
    inside = tree_of(separated(points, cloud, 2 * reach))
    found = around.sparse_distance_matrix(inside, reach, output_type="ndarray")
    query, place = torch.from_numpy(found["i"].copy()).long(), torch.from_numpy(found["j"].copy()).long()
    if moved is None or key is None or steps is None:
        pairs = Pairs(torch.stack([query, place], dim=1), clouds.no_shifts(len(query)))
    else:
        shifts = moved.shifts(query, key[place], steps[place])
        pairs = Pairs(torch.stack([query, key[place]], dim=1), shifts)
    keep = clouds.are_within(r, *pairs)
    if clouds.is_one_set:
        keep &= (pairs.points[:, 0] != pairs.points[:, 1]) | (False if pairs.shifts is None else pairs.shifts.any(1))
    return pairs.where(keep)


def _half_by_tree(clouds: Clouds, r: float) -> Pairs:
    """Each pair of one set once, without images."""
    reach = r * (1 + 1e-12)
    tree = tree_of(separated(clouds.keys, clouds.key_cloud, 2 * reach))
    points = torch.from_numpy(tree.query_pairs(reach, output_type="ndarray")).long()
    pairs = Pairs(points, clouds.no_shifts(len(points)))
    keep = clouds.are_within(r, *pairs)
    return pairs if keep.all() else pairs.where(keep)


def separated(points: Tensor, cloud: Tensor | None, step: float) -> Tensor:
    """The points with a last coordinate that puts clouds `step` apart and changes no distance inside one."""
    return points if cloud is None else torch.cat([points, step * cloud[:, None].double()], dim=1)


def tree_of(points: Tensor) -> Any:
    """scipy's tree. Coincident points make a balanced one slow."""
    return require_library("scipy.spatial").cKDTree(points.numpy(), balanced_tree=False)


def _both_ways(half: Pairs, count: int) -> Neighbours:
    """The pairs of one set and the way back of each, sorted."""
    if half.shifts is None:
        offsets, edge_index, reverse = symmetric_rows(half.points, count)
        return Neighbours(edge_index, offsets, None, reverse)
    left, right = half.points[:, 0], half.points[:, 1]
    query, key = torch.cat([left, right]), torch.cat([right, left])
    return sorted_neighbours(query, key, torch.cat([half.shifts, -half.shifts]), count, count)
