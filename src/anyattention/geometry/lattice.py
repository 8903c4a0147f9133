"""The lattice of a periodic cell: its short vectors, points moved into one cell, and copies of points within reach."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention._checks import require_memory
from anyattention.errors import InvalidInputError
from anyattention.geometry.clouds import Clouds

__all__ = ["Copies", "Lattice", "Wrapped", "boxes", "wrapped"]

# A cell whose vectors are together so much longer than its volume asks for is given shorter ones.
_SKEWED = 2.0
_EPSILON = torch.finfo(torch.float64).eps


class Copies(NamedTuple):
    """Copies of points, moved by the lattice's vectors.

    Attributes:
        row: `(copies,)` int64, of which point.
        steps: `(copies, repeats)` int64, by how many of each short vector it was moved.
        places: `(copies, dim)` float64.
        apart: `(copies,)`, how far it is from the point's box.
    """

    row: Tensor
    steps: Tensor
    places: Tensor
    apart: Tensor

    def where(self, keep: Tensor) -> Copies:
        """Those that are kept."""
        return Copies(*(part[keep] for part in self))


class Lattice:
    """Short vectors of the lattices of cells, and the axes along which these are triangular.

    Attributes:
        change: `(cells, repeats, dim)` int64, each short vector in vectors of the cell.
        axes: `(cells, dim, dim)`: points @ axes are coordinates in which the short vector a moves the first a + 1 only.
        vectors: `(cells, repeats, repeats)`, the short vectors in these, lower triangular with a positive diagonal.
    """

    def __init__(self, cell: Tensor, periodic: tuple[bool, ...]) -> None:
        flags = torch.tensor(periodic, dtype=torch.bool, device="cpu")
        self.repeats = sum(periodic)
        change = _short_vectors(cell[:, flags])
        self.change = torch.zeros(len(cell), self.repeats, len(periodic), dtype=torch.int64, device="cpu")
        self.change[:, :, flags] = change
        axes, upper = torch.linalg.qr((change.double() @ cell[:, flags]).mT, mode="complete")
        sign = torch.where(upper.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
        self.vectors = (upper[:, : self.repeats] * sign[:, :, None]).mT.contiguous()
        self.axes = axes.clone()
        self.axes[:, :, : self.repeats] *= sign[:, None]
        self._sizes = change.double().abs() @ cell[:, flags].abs().amax(2, keepdim=True)

    @property
    def lengths(self) -> Tensor:
        """`(cells, repeats)`: how far apart the layers across each vector are, those before it left out."""
        return self.vectors.diagonal(dim1=1, dim2=2)

    def translates(self, r: float) -> Tensor:
        """`(cells,)`: about how many points of the lattice are within r of one."""
        ball = math.pi ** (self.repeats / 2) / math.gamma(self.repeats / 2 + 1)
        return ball * (r / self.lengths).prod(1)

    def reach_of_translates(self, count: int) -> Tensor:
        """`(cells,)`: a distance within which a point has at least so many translates, itself left out."""
        longest = self.vectors.norm(dim=2).sort(1).values.cumsum(1)
        reaches = []
        for vectors in range(1, self.repeats + 1):
            most = math.ceil(((count + 1) ** (1 / vectors) - 1) / 2)
            most += (2 * most + 1) ** vectors <= count
            reaches.append(most * longest[:, vectors - 1])
        return torch.stack(reaches).amin(0)

    def wrapped(self, points: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates inside one cell, a box along the axes, and the steps that lead there."""
        axes = self.axes
        places = points @ axes[0] if len(axes) == 1 else torch.einsum("na,nab->nb", points, axes[cell])
        steps = places.new_zeros(len(points), self.repeats)
        for axis in reversed(range(self.repeats)):
            vector = self.vectors[cell, axis]
            steps[:, axis] = -torch.floor(places[:, axis] / vector[:, axis])
            places[:, : self.repeats] += steps[:, axis, None] * vector
        if not (steps.abs() < 2**53).all():
            raise InvalidInputError(
                argument="positions", expected="points at most 2**53 cells away from the origin", actual="others"
            )
        return places, steps.long()

    def rounding(self, points: Tensor, steps: Tensor, cell: Tensor, reach: float) -> float:
        """More than the distance of copies within reach can be off by, since coordinates were rounded."""
        moved = (steps.abs() + reach / self.lengths[cell] + 2.0) * self._sizes[cell, :, 0]
        size = points.abs().amax(1) + moved.sum(1)
        return 64 * points.shape[1] * _EPSILON * float(size.max())

    def copies(self, points: Tensor, cell: Tensor, low: Tensor, high: Tensor, reach: Tensor) -> Copies:
        """Every copy of each point that is within its reach of its box.

        The longest vector, along the last coordinate, comes first. What the distance along it leaves of the reach
        bounds the steps along the next, so that no more copies are made than may be near.

        Args:
            points: `(points, dim)`, along the axes.
            cell: `(points,)` int64, the cell of each.
            low, high: `(points, dim)`, the corners of its box.
            reach: `(points,)`.
        """
        apart = _outside(points, low, high)[:, self.repeats :].square().sum(1)
        # Of two large squares a small difference is left, with their rounding.
        most = reach.square() * (1 + 1e-12)
        row = (apart <= most).nonzero().flatten()
        apart, most, places = apart[row], most[row], points[row]
        steps = torch.empty(len(row), 0, dtype=torch.int64, device="cpu")
        for axis in reversed(range(self.repeats)):
            vector = self.vectors[cell[row], axis]
            lowest, highest = low[row, axis], high[row, axis]
            width, length = (most - apart).clamp_min(0).sqrt(), vector[:, axis]
            first = torch.ceil((lowest - width - places[:, axis]) / length)
            count = (torch.floor((highest + width - places[:, axis]) / length) - first + 1).clamp_min(0)
            total = float(count.sum())
            size = min(total * 8 * (2 * points.shape[1] + 3 * self.repeats + 4), 2.0**62)
            require_memory(int(size), f"{total:.3g} periodic images", torch.device("cpu"))
            count = count.long()
            again = torch.repeat_interleave(count)
            number = first.long()[again] + torch.arange(len(again), device="cpu") - (count.cumsum(0) - count)[again]
            places = places[again]
            places[:, : self.repeats] += number[:, None] * vector[again]
            apart = apart[again] + _outside(places[:, axis], lowest[again], highest[again]).square()
            row, most, steps = row[again], most[again], torch.cat([number[:, None], steps[again]], dim=1)
        return Copies(row, steps, places, apart.sqrt())


class Wrapped(NamedTuple):
    """The points of clouds inside one cell of their lattice, along its axes.

    Attributes:
        lattice: of their cells.
        queries, keys: `(points, dim)`.
        query_steps, key_steps: `(points, repeats)` int64, what each was moved by.
        query_cell, key_cell: `(points,)` int64.
    """

    lattice: Lattice
    queries: Tensor
    keys: Tensor
    query_steps: Tensor
    key_steps: Tensor
    query_cell: Tensor
    key_cell: Tensor

    @property
    def is_moved(self) -> bool:
        """Whether any point was outside of the cell."""
        return bool(self.key_steps.any() or self.query_steps.any())

    def shifts(self, query: Tensor, key: Tensor, steps: Tensor) -> Tensor:
        """The shifts `(pairs, dim)` of pairs whose wrapped key is moved by so many steps more."""
        if self.is_moved:
            steps = steps + self.key_steps[key] - self.query_steps[query]
        change = self.lattice.change
        if len(change) > 1:
            return (steps[:, :, None] * change[self.query_cell[query]]).sum(1)
        if torch.equal(change[0], torch.eye(change.shape[1], dtype=torch.int64, device="cpu")):
            return steps
        return steps @ change[0]

    def rounding(self, clouds: Clouds, reach: float) -> float:
        """More than a distance up to `reach` between wrapped points can be off by."""
        keys = self.lattice.rounding(clouds.keys, self.key_steps, self.key_cell, reach)
        return max(keys, self.lattice.rounding(clouds.queries, self.query_steps, self.query_cell, reach))


def wrapped(clouds: Clouds) -> Wrapped:
    """The points of periodic clouds in one cell."""
    assert clouds.cell is not None
    lattice = Lattice(clouds.cell, clouds.periodic)
    key_cell = clouds.cell_of(clouds.key_cloud, len(clouds.keys))
    keys, key_steps = lattice.wrapped(clouds.keys, key_cell)
    if clouds.is_one_set:
        return Wrapped(lattice, keys, keys, key_steps, key_steps, key_cell, key_cell)
    query_cell = clouds.cell_of(clouds.query_cloud, len(clouds.queries))
    queries, query_steps = lattice.wrapped(clouds.queries, query_cell)
    return Wrapped(lattice, queries, keys, query_steps, key_steps, query_cell, key_cell)


def boxes(points: Tensor, cloud: Tensor | None, of: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The corners of the box around the points of its cloud, for each of `count` others, which are of clouds `of`."""
    if cloud is None or of is None:
        return points.amin(0).expand(count, -1), points.amax(0).expand(count, -1)
    size = 1 + int(torch.maximum(cloud[-1], of[-1]))
    place = cloud[:, None].expand_as(points)
    none = points.new_full((size, points.shape[1]), torch.inf)
    return none.scatter_reduce(0, place, points, "amin")[of], (-none).scatter_reduce(0, place, points, "amax")[of]


def _outside(points: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far coordinates are outside of an interval."""
    return torch.maximum(low - points, points - high).clamp_min(0)


def _short_vectors(vectors: Tensor) -> Tensor:
    """Short vectors of each lattice `(cells, repeats, dim)`, in those given, the longest last; int64."""
    lengths = vectors.norm(dim=2)
    volume = torch.linalg.qr(vectors.mT, mode="r").R.diagonal(dim1=1, dim2=2).abs()
    change = torch.nn.functional.one_hot(torch.argsort(lengths, dim=1, stable=True), vectors.shape[1])
    for cell in ((lengths / volume).prod(1) > _SKEWED).nonzero().flatten().tolist():
        change[cell] = torch.from_numpy(_reduced(vectors[cell].numpy()))
    return change


def _reduced(vectors: np.ndarray) -> np.ndarray:
    """A reduced basis of a lattice.

    Source: Lenstra, Lenstra, Lovasz, 1982, Factoring polynomials with rational coefficients, figure 1.
    """
    count = len(vectors)
    change = np.eye(count, dtype=np.int64)
    at = 1
    # Rounding could go on for ever where a cell is all but singular.
    for _ in range(200 * count):
        if at == count:
            break
        lower = np.linalg.qr((change @ vectors).T).R.T
        for before in reversed(range(at)):
            times = int(np.rint(lower[at, before] / lower[before, before]))
            change[at] -= times * change[before]
            lower[at] -= times * lower[before]
        if np.hypot(lower[at, at], lower[at, at - 1]) ** 2 >= 0.75 * lower[at - 1, at - 1] ** 2:
            at += 1
        else:
            change[[at - 1, at]] = change[[at, at - 1]]
            at = max(at - 1, 1)
    return change
