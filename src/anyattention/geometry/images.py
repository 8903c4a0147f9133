"""Periodic images of points: each copy that may lie within reach of some query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattention._checks import require_memory
from anyattention.geometry.clouds import Clouds

__all__ = ["Images", "images_within"]


class Images(NamedTuple):
    """Copies of the keys around queries that were brought into the cell.

    Attributes:
        queries: `(queries, dim)`, inside the cell along the vectors that repeat.
        points: `(images, dim)`, ordered by key, then shift.
        key: `(images,)` int64, whose copy it is.
        shifts: `(images, dim)` int64: an image is x_key + shifts @ cell.
        query_shifts: `(queries, dim)` int64: what a query was moved by; the edge's shift is shifts - query_shifts.
    """

    queries: Tensor
    points: Tensor
    key: Tensor
    shifts: Tensor
    query_shifts: Tensor


def images_within(clouds: Clouds, reach: Tensor) -> Images:
    """Every image of a key that is within `reach` `(cells,)` of the cell of its cloud."""
    assert clouds.cell is not None
    inverse = torch.linalg.inv(clouds.cell)
    # The cell's height along a vector is 1 over the length of that column of the inverse.
    widths = reach[:, None] * inverse.norm(dim=1)
    query_cell = clouds.cell_of(clouds.query_cloud, len(clouds.queries))
    key_cell = clouds.cell_of(clouds.key_cloud, len(clouds.keys))
    queries, query_shifts, _ = _wrapped(clouds, clouds.queries, query_cell, inverse)
    points, key_shifts, fractions = _wrapped(clouds, clouds.keys, key_cell, inverse)

    flags = torch.tensor(clouds.periodic, dtype=torch.bool, device="cpu")
    # In cells: no image may be lost because a fraction was rounded.
    slack = 1e-6 + 1e-14 * float(torch.cat([query_shifts, key_shifts]).abs().max())
    width = widths[key_cell] + slack
    first = torch.where(flags, torch.ceil(-width - fractions), 0.0).long()
    last = torch.where(flags, torch.floor(1 + width - fractions), 0.0).long()
    counts = (last - first + 1).clamp_min(0)
    totals = counts.prod(1)
    total = int(totals.double().sum())
    require_memory(total * 8 * (4 * clouds.dim + 4), f"{total} periodic images", torch.device("cpu"))

    key = torch.repeat_interleave(torch.arange(len(points), device="cpu"), totals)
    number = torch.arange(len(key), device="cpu") - (totals.cumsum(0) - totals)[key]
    shifts = torch.empty(len(key), clouds.dim, dtype=torch.int64, device="cpu")
    for axis in reversed(range(clouds.dim)):
        count = counts[:, axis][key]
        shifts[:, axis] = number % count + first[:, axis][key]
        number = number // count
    moved = points[key] + _along(shifts, clouds.cell, key_cell[key])
    return Images(queries, moved, key, shifts + key_shifts[key], query_shifts)


def _wrapped(clouds: Clouds, points: Tensor, cell: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The points inside the cell, the shifts that brought them there, and their fractions along its vectors."""
    assert clouds.cell is not None
    fractions = torch.einsum("na,nab->nb", points, inverse[cell]) if len(inverse) > 1 else points @ inverse[0]
    shifts = torch.where(torch.tensor(clouds.periodic, dtype=torch.bool, device="cpu"), -torch.floor(fractions), 0.0)
    return points + _along(shifts, clouds.cell, cell), shifts.long(), fractions + shifts


def _along(shifts: Tensor, cell: Tensor, number: Tensor) -> Tensor:
    wide = shifts.double()
    return wide @ cell[0] if len(cell) == 1 else torch.einsum("na,nab->nb", wide, cell[number])
