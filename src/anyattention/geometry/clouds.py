"""Points, checked and in float64: the keys, the queries, the cloud of each, and the cell that repeats them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention._checks import (
    Axes,
    describe_shape,
    plain,
    require_dense,
    require_device,
    require_floating,
    require_same_kind,
)
from anyattention.ambient import is_mapped, values_of
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidInputError,
    MatrixOperationError,
    MissingExtraError,
    UnsupportedError,
)

__all__ = ["LARGEST", "Clouds", "Pairs", "read_clouds", "require_library"]

# Squares of larger coordinates are not sure to be float64.
LARGEST = 1e150


class Pairs(NamedTuple):
    """`(pairs, 2)` int64, a query and a key each; and shifts `(pairs, dim)`, None without a cell."""

    points: Tensor
    shifts: Tensor | None = None

    def where(self, keep: Tensor) -> Pairs:
        """Those that are kept."""
        return Pairs(self.points[keep], None if self.shifts is None else self.shifts[keep])


@dataclass(frozen=True)
class Clouds:
    """Points ready for a search, on the CPU.

    Attributes:
        queries, keys: `(points, dim)` float64, equal to the caller's; the same tensor where the caller gave one set.
        query_cloud, key_cloud: `(points,)` int64, the cloud of each point, numbered without gaps; None for one cloud.
        cell: `(cells, dim, dim)` float64, one per cloud or one for all; rows are the cell's vectors. One along which
            nothing repeats may be anything. None without.
        periodic: whether the points repeat along each vector of the cell.
        dtype: the caller's.
    """

    queries: Tensor
    keys: Tensor
    query_cloud: Tensor | None
    key_cloud: Tensor | None
    cell: Tensor | None
    periodic: tuple[bool, ...]
    dtype: torch.dtype

    @property
    def is_one_set(self) -> bool:
        """Whether queries and keys are the same points, and no point is its own neighbour."""
        return self.queries is self.keys

    @property
    def dim(self) -> int:
        """Coordinates of a point."""
        return self.keys.shape[1]

    def cell_of(self, cloud: Tensor | None, count: int) -> Tensor:
        """The row of `cell` of each of `count` points."""
        assert self.cell is not None
        if cloud is None or len(self.cell) == 1:
            return torch.zeros(count, dtype=torch.int64, device="cpu")
        return cloud

    def no_shifts(self, count: int) -> Tensor | None:
        """The shifts of so many pairs of points as they are; None without a cell."""
        return None if self.cell is None else torch.zeros(count, self.dim, dtype=torch.int64, device="cpu")

    def displacements(self, query: Tensor, key: Tensor, shifts: Tensor | None) -> list[Tensor]:
        """Coordinate by coordinate, (x_key - x_query) + shift @ cell.

        In this order, and one product at a time, the way back has exactly the opposite sign.
        """
        # Whole points are gathered: the coordinates of one lie together.
        apart = self.keys.index_select(0, key).sub_(self.queries.index_select(0, query))
        parts = list(apart.unbind(1))
        if shifts is None or self.cell is None:
            return parts
        cell, wide = self.cell[0], shifts.double()
        if len(self.cell) > 1:
            cell = self.cell[self.cell_of(self.query_cloud, len(self.queries))[query]].movedim(0, 2)
        for axis in range(self.dim):
            along = torch.zeros_like(parts[axis])
            for vector in range(self.dim):
                if self.periodic[vector]:
                    along = along + wide[:, vector] * cell[vector, axis]
            parts[axis] = parts[axis] + along
        return parts

    def squared_distances(self, query: Tensor, key: Tensor, shifts: Tensor | None) -> Tensor:
        """`(pairs,)` float64."""
        parts = self.displacements(query, key, shifts)
        total = parts[0] * parts[0]
        for part in parts[1:]:
            total = total + part * part
        return total

    def are_within(self, r: float, pairs: Tensor, shifts: Tensor | None) -> Tensor:
        """Which pairs `(pairs, 2)` of a query and a key are at a distance of at most r."""
        return self.squared_distances(pairs[:, 0], pairs[:, 1], shifts).sqrt() <= r


def require_library(module: str) -> Any:
    """A library of the extra "geometry", or the error that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise MissingExtraError(
            "neighbours of points need vesin and scipy: pip install 'anyattention[geometry]'", argument="positions"
        ) from missing


def read_clouds(
    positions: Tensor,
    batch: Tensor | None,
    cell: Tensor | None,
    periodic: bool | Sequence[bool] | None,
    queries: Tensor | None,
    query_batch: Tensor | None,
) -> Clouds:
    """Check the points and bring them to float64 on the CPU."""
    positions, batch, cell = _held(positions, "positions"), _held(batch, "batch"), _held(cell, "cell")
    queries, query_batch = _held(queries, "queries"), _held(query_batch, "query_batch")
    axes = Axes()
    _require_points(axes, "positions", positions, "points dim")
    if positions.shape[1] == 0:
        raise DimensionMismatchError(
            argument="positions", expected="(points, dim) with dim >= 1", actual=describe_shape(positions)
        )
    if queries is not None:
        require_same_kind("queries", queries, "positions", positions)
        _require_points(axes, "queries", queries, "queries dim")
    key_cloud = _read_batch("batch", batch, "positions", positions)
    if queries is None and query_batch is not None:
        raise InvalidInputError(argument="query_batch", expected="None without queries", actual="a tensor")
    if queries is not None and (batch is None) != (query_batch is None):
        raise InvalidInputError(
            argument="query_batch",
            expected="None" if batch is None else "the cloud of each query, as batch is given",
            actual="None" if query_batch is None else "a tensor, and batch is None",
        )
    query_cloud = key_cloud if queries is None else _read_batch("query_batch", query_batch, "queries", queries)
    given = [cloud for cloud in (key_cloud, query_cloud) if cloud is not None and cloud.numel()]
    clouds = 1 + max((int(cloud[-1]) for cloud in given), default=0)
    wide_cell, repeats = _read_cell(cell, periodic, positions, None if key_cloud is None else clouds)
    if given:
        used = torch.unique(torch.cat(given))
        key_cloud, query_cloud = _renumbered(key_cloud, used), _renumbered(query_cloud, used)
        wide_cell = wide_cell[used] if wide_cell is not None and len(wide_cell) > 1 else wide_cell
    keys = _wide(positions)
    return Clouds(
        keys if queries is None else _wide(queries), keys, query_cloud, key_cloud, wide_cell, repeats, positions.dtype
    )


def _held(x: Any, argument: str) -> Any:
    """What a tensor holds, whatever derivatives are taken of it: who is near to whom has none."""
    if not isinstance(x, Tensor):
        return x
    if is_mapped(x):
        raise UnsupportedError(
            "neighbours under vmap: each entry has a graph of its own. Join them by batch= or Graph.batch, outside",
            argument=argument,
        )
    return values_of(x)


def _renumbered(cloud: Tensor | None, used: Tensor) -> Tensor | None:
    """The clouds numbered without gaps, so that nothing is as large as a number; None where there is one."""
    return None if cloud is None or len(used) == 1 else torch.searchsorted(used, cloud)


def _wide(points: Tensor) -> Tensor:
    return points.detach().to("cpu", torch.float64).contiguous()


def _require_points(axes: Axes, argument: str, points: Tensor, names: str) -> None:
    require_dense(argument, points)
    require_floating(argument, points)
    if points.device.type == "meta":
        raise InvalidInputError(argument=argument, expected="a device with data", actual=points.device)
    axes.bind(argument, points, names)
    # NaN compares as False.
    if points.numel() and not (inside := points.detach().abs() < LARGEST).all():
        raise InvalidInputError(
            argument=argument,
            expected=f"finite coordinates, below {LARGEST:g}",
            actual=f"{int((~inside).sum())} others among {points.numel()}",
        )


def _read_batch(argument: str, batch: Tensor | None, points_name: str, points: Tensor) -> Tensor | None:
    if batch is None:
        return None
    require_dense(argument, batch)
    require_device(argument, batch, points.device, points_name)
    if batch.dtype != torch.int64:
        raise InvalidInputError(argument=argument, expected="torch.int64", actual=batch.dtype)
    if batch.shape != points.shape[:1]:
        raise DimensionMismatchError(
            argument=argument,
            expected=f"({len(points)},), a cloud for each of {points_name}",
            actual=describe_shape(batch),
        )
    batch = batch.cpu()
    if batch.numel() and (batch[0] < 0 or (batch.diff() < 0).any()):
        raise GraphStructureError(
            argument=argument,
            expected="cloud numbers from 0 that never fall from one point to the next",
            actual=f"{batch[:8].tolist()}" + (" ..." if len(batch) > 8 else ""),
        )
    return batch


def _read_cell(
    cell: Tensor | None, periodic: bool | Sequence[bool] | None, positions: Tensor, clouds: int | None
) -> tuple[Tensor | None, tuple[bool, ...]]:
    dim = positions.shape[1]
    if cell is None:
        repeats = _read_periodic(periodic, dim, default=False)
        if any(repeats):
            raise InvalidInputError(argument="cell", expected="a cell, as periodic is given", actual=None)
        return None, repeats
    repeats = _read_periodic(periodic, dim, default=True)
    require_same_kind("cell", cell, "positions", positions)
    expected = f"({dim}, {dim}), one vector in each row"
    if clouds is not None:
        expected += f", or ({clouds}, {dim}, {dim}), one cell per cloud"
    fits = cell.shape[-2:] == (dim, dim) and (
        cell.ndim == 2 or (cell.ndim == 3 and (len(cell) == 1 if clouds is None else len(cell) >= clouds))
    )
    if not fits:
        raise DimensionMismatchError(
            argument="cell",
            expected=expected,
            actual=describe_shape(cell),
            hint="torch.diag(lengths) makes the cell of a box" if cell.ndim == 1 else None,
        )
    if not (cell.detach().abs() < LARGEST).all():
        raise InvalidInputError(argument="cell", expected="finite numbers", actual="NaN, Inf or larger ones")
    wide = _wide(cell).reshape(-1, dim, dim)
    _require_independent(wide, repeats, torch.finfo(cell.dtype).eps)
    return wide, repeats


def _read_periodic(periodic: bool | Sequence[bool] | None, dim: int, *, default: bool) -> tuple[bool, ...]:
    if periodic is None:
        return (default,) * dim
    periodic = plain(periodic)
    if isinstance(periodic, bool):
        return (periodic,) * dim
    flags = periodic.tolist() if isinstance(periodic, Tensor) else periodic
    if not isinstance(flags, list | tuple) or not all(isinstance(flag, bool) for flag in flags) or len(flags) != dim:
        raise InvalidInputError(
            argument="periodic", expected=f"a bool, or {dim} of them, one per vector of the cell", actual=repr(flags)
        )
    return tuple(flags)


def _require_independent(cell: Tensor, periodic: tuple[bool, ...], eps: float) -> None:
    """Raise unless the vectors that repeat point in independent directions."""
    some = cell[:, torch.tensor(periodic, dtype=torch.bool, device="cpu")]
    if not some.numel():
        return
    sizes = torch.linalg.svdvals(some)
    # A row of tiny length beside long ones is as good a cell as any; only directions may not coincide.
    unit = some / some.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    spread = torch.linalg.svdvals(unit)[:, -1]
    is_singular = ~((spread > 4 * cell.shape[-1] * eps) & (sizes[:, -1] > sizes[:, 0] * 1e-12))
    if is_singular.any():
        first = int(is_singular.nonzero()[0])
        raise MatrixOperationError(
            argument="cell" if len(cell) == 1 else f"cell[{first}]",
            expected="vectors that repeat to point in independent directions",
            actual=f"a singular cell, {cell[first].tolist()}",
        )
