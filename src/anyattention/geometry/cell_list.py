"""Pairs of one set of points by vesin's cell list, where the points fill the box that its cells number."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anyattention import native
from anyattention.geometry.clouds import Clouds, Pairs, require_library
from anyattention.geometry.lattice import Wrapped

__all__ = ["Box", "cell_list_pairs", "numbered_box"]

# vesin numbers the cells of a box as wide as the radius, and goes over all of them.
_CELLS_PER_POINT = 16
# Beyond so many it makes them wider, by a formula that gives thin boxes no cell at all; so wide, the formula is safe.
_MOST_CELLS, _FEWEST_ALONG = 1e5, 2.0
# Up to so many times as many, wider cells hold few more points.
_WIDER = 4
# Cells or images along an axis that vesin's 32 bits surely hold.
_WIDEST = 2.0**24
# Nanoseconds that a point takes one thread, about.
_PER_POINT = 1000


class Box(NamedTuple):
    """What is handed to vesin. Lengths are in a unit near the radius: some of vesin's bounds are absolute.

    Attributes:
        points: `(points, 3)`, inside the box along the axes that repeat.
        vectors: `(3, 3)`.
        repeats: for each vector.
        cutoff: the radius, with what rounding asks for.
        unit: a power of two, so that nothing is rounded.
    """

    points: Tensor
    vectors: Tensor
    repeats: list[bool]
    cutoff: float
    unit: float


def numbered_box(clouds: Clouds, r: float, moved: Wrapped | None) -> Box | None:
    """The box of one set of points; None where a search of its cells would not be linear in the points, or not be safe.

    An axis along which nothing repeats, but the points are farther apart than two cells, becomes one that repeats, with
    room between the images: with some axes of either kind, vesin searches all layers along the others.
    """
    if clouds.dim > 3 or clouds.key_cloud is not None or not clouds.is_one_set:
        return None
    points = clouds.keys if moved is None else moved.keys
    rounding = 64 * clouds.dim * torch.finfo(torch.float64).eps * float(points.abs().max())
    rounding = rounding if moved is None else moved.rounding(clouds, r)
    if rounding > 1e-3 * r:
        return None
    cutoff = r * (1 + 1e-12) + rounding
    unit = 2.0 ** (math.frexp(cutoff)[1] - 1)
    low, high = points.aminmax(dim=0)
    extents = torch.nn.functional.pad((high - low) / unit, (0, 3 - clouds.dim))
    cutoff = cutoff / unit
    count = 0 if moved is None else moved.lattice.repeats
    vectors = torch.diag(extents + 1.5 * cutoff)
    repeats = [axis < count or (count > 0 and bool(extents[axis] > 2 * cutoff)) for axis in range(3)]
    # As vesin has it: a box is a little wider than the points, and not narrower than 1.
    widths = torch.where(
        torch.tensor(repeats, dtype=torch.bool, device="cpu"), vectors.diagonal(), (1.01 * extents).clamp_min(1.0)
    )
    if moved is not None:
        vectors[:count, :count] = moved.lattice.vectors[0] / unit
        widths[:count] = 1 / torch.linalg.inv(vectors[:count, :count]).norm(dim=0)
    if not _can_be_numbered(widths / cutoff, len(points)):
        return None
    points = torch.nn.functional.pad(points / unit, (0, 3 - clouds.dim))
    return Box(points, vectors, repeats, cutoff, unit)


def _can_be_numbered(widths: Tensor, points: int) -> bool:
    """Whether cells of width 1 in a box of these widths are few beside the points, and as many as vesin can number."""
    if not bool(((widths > 1 / _WIDEST) & (widths < _WIDEST)).all()):
        return False
    cells = widths.floor().clamp_min(1)
    total = float(cells.prod())
    if total > min(_CELLS_PER_POINT * points, _WIDER * _MOST_CELLS):
        return False
    return total < 0.99 * _MOST_CELLS or float(cells.min()) * (_MOST_CELLS / total) ** (1 / 3) > _FEWEST_ALONG


def cell_list_pairs(clouds: Clouds, r: float, box: Box, moved: Wrapped | None) -> tuple[Pairs, object]:
    """Each pair of one set once, by vesin, and by the formula near the boundary; and what must outlive these pairs."""
    search = require_library("vesin").NeighborList(
        cutoff=box.cutoff, full_list=False, sorted=False, n_threads=native.num_threads(_PER_POINT * len(box.points))
    )
    # Without copies these are views of the search's memory.
    pairs, distances, *more = search.compute(
        box.points.numpy(), box.vectors.numpy(), box.repeats, "Pd" if moved is None else "PdS", copy=False
    )
    pairs, distances = torch.from_numpy(pairs.view("int64")), torch.from_numpy(distances)
    if moved is None:
        found = Pairs(pairs, clouds.no_shifts(len(pairs)))
    else:
        steps = torch.from_numpy(more[0])[:, : moved.lattice.repeats].long()
        found = Pairs(pairs, moved.shifts(pairs[:, 0], pairs[:, 1], steps))
    # vesin's distances are right but for rounding, so that only those next to r are in question.
    near = (distances >= (2 * r / box.unit - box.cutoff)).nonzero().flatten()
    if near.numel():
        inside = torch.ones(len(pairs), dtype=torch.bool, device="cpu")
        inside[near] = clouds.are_within(r, *found.where(near))
        found = found.where(inside)
    return found, search
