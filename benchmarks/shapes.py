"""Twenty shapes that points fill: what a search must not take longer for than for a cube."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RADIUS", "Shape", "shapes"]

# At one point per unit of volume about 20 neighbours are within it.
RADIUS = 1.68


class Shape(NamedTuple):
    """Points, and the cell that repeats them.

    Attributes:
        points: `(points, 3)` float64.
        cell: `(3, 3)`, or None.
        periodic: which of its vectors repeat.
    """

    points: Tensor
    cell: Tensor | None = None
    periodic: tuple[bool, bool, bool] = (False, False, False)


def shapes(count: int) -> dict[str, Shape]:
    """Each shape with about so many points, at about one point per unit of volume where there are points at all."""
    generator = torch.Generator().manual_seed(0)

    def box(*sides: float, points: int = count) -> Tensor:
        return torch.rand(points, 3, generator=generator, dtype=torch.float64) * torch.tensor(
            sides, dtype=torch.float64
        )

    def escaped(points: Tensor, *place: float) -> Tensor:
        points[-1] = torch.tensor(place, dtype=torch.float64)
        return points

    side, wide, long = count ** (1 / 3), (count / 4) ** 0.5, count / 16
    every, cube = (True, True, True), side * torch.eye(3, dtype=torch.float64)
    slab, column, wire = box(wide, wide, 4), box(4, 4, long), box(1, 1, count)
    halves = torch.cat([box(*cube.diag(), points=count // 2), 1e5 + box(*cube.diag(), points=count - count // 2)])
    diagonal = torch.linspace(0, count / 4, count, dtype=torch.float64)[:, None] + box(1, 1, 1)
    sphere = torch.nn.functional.normalize(box(1, 1, 1) - 0.5) * (count / 12.6) ** 0.5
    scales = box(1, 1, 1) * torch.logspace(0, 12, count, dtype=torch.float64)[:, None]
    skewed = cube + torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [-0.4, 0.5, 0]]).double() * side
    far_skewed = cube + torch.tensor([[0.0, 0, 0], [10, 0, 0], [-7, 3, 0]]).double() * side
    return {
        "cube": Shape(box(*cube.diag())),
        "cube, one point at z = 1e6": Shape(escaped(box(*cube.diag()), 0, 0, 1e6)),
        "two cubes 1e5 apart": Shape(halves),
        "line across a cube": Shape(diagonal),
        "sphere, its surface": Shape(sphere),
        "every scale from 1 to 1e12": Shape(scales),
        "coincident points, 20 in each place": Shape(
            box(*cube.diag(), points=-(-count // 20)).repeat_interleave(20, 0)[:count]
        ),
        "cube, periodic": Shape(box(*cube.diag()), cube, every),
        "cube, periodic along x and z": Shape(box(*cube.diag()), cube, (True, False, True)),
        "cube, periodic along x, one point at z = 1e6": Shape(
            escaped(box(*cube.diag()), 0, 0, 1e6), cube, (True, False, False)
        ),
        "slab, periodic along x and y": Shape(slab, _cell(wide, wide, 0), (True, True, False)),
        "slab in a high cell": Shape(slab, _cell(wide, wide, 1e4), every),
        "slab, one point at z = 1e6": Shape(
            escaped(slab.clone(), 0, 0, 1e6), _cell(wide, wide, 0), (True, True, False)
        ),
        "column, periodic along z": Shape(column, _cell(0, 0, long), (False, False, True)),
        "column, periodic along y, which it fills": Shape(column, _cell(0, 4, 0), (False, True, False)),
        "wire in a wide cell": Shape(wire, _cell(1e4, 1e4, count), every),
        "wire, periodic along z, one point at x = 4e4": Shape(
            escaped(wire.clone(), 4e4, 0, 0), _cell(0, 0, count), (False, False, True)
        ),
        "cell 1 wide and long": Shape(wire, _cell(1, 1, count), every),
        "skewed cell": Shape(box(*cube.diag()), skewed, every),
        "far skewed cell": Shape(box(*cube.diag()), far_skewed, every),
    }


def _cell(*lengths: float) -> Tensor:
    return torch.diag(torch.tensor(lengths, dtype=torch.float64))
