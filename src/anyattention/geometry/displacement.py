"""Displacements along the edges of a graph of points, differentiable in positions and cell."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import (
    Axes,
    describe_shape,
    require_dense,
    require_device,
    require_floating,
    require_same_kind,
)
from anyattention.ambient import is_readable
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError

__all__ = ["edge_displacements", "image_offsets"]


def edge_displacements(
    edge_index: Tensor,
    num_queries: int,
    num_keys: int,
    positions: Tensor,
    shifts: Tensor | None = None,
    cell: Tensor | None = None,
    queries: Tensor | None = None,
    batch: Tensor | None = None,
) -> Tensor:
    """(x_key - x_query) + shift @ cell for each edge; `Graph.displacements` describes the arguments.

    Returns:
        `(edges, dim)` in the positions' dtype.
    """
    key_index, query_index = edge_index
    axes = Axes()
    axes.set("keys", num_keys, "the graph")
    axes.set("queries", num_queries, "the graph")
    require_dense("positions", positions)
    require_floating("positions", positions)
    axes.bind("positions", positions, "keys dim")
    if queries is None:
        if num_queries != num_keys:
            raise GraphStructureError(
                argument="queries",
                expected=f"the positions of the graph's {num_queries} queries, which are not its {num_keys} keys",
                actual=None,
            )
        queries = positions
    else:
        require_same_kind("queries", queries, "positions", positions)
        axes.bind("queries", queries, "queries dim")
    require_device("positions", positions, key_index.device, "the graph")
    found = positions.index_select(0, key_index) - queries.index_select(0, query_index)
    offsets = image_offsets(positions, shifts, cell, key_index, batch)
    return found if offsets is None else found + offsets


def image_offsets(
    positions: Tensor, shifts: Tensor | None, cell: Tensor | None, key_index: Tensor, batch: Tensor | None
) -> Tensor | None:
    """shift @ cell, by which the image of each edge's key is moved, `(edges, dim)`; None where there are no shifts.

    `positions` `(..., keys, dim)` say what the rest must fit.
    """
    if (cell is None) != (shifts is None):
        raise InvalidInputError(
            argument="cell",
            expected="the cell that the graph's shifts count" if cell is None else "None, as the graph has no shifts",
            actual=None if cell is None else "a tensor",
        )
    if cell is None or shifts is None:
        return None
    require_same_kind("cell", cell, "positions", positions)
    points, dim = positions.shape[-2:]
    if shifts.shape[1] != dim:
        raise DimensionMismatchError(
            argument="positions",
            expected=f"(points, dim={shifts.shape[1]}), as the graph's shifts",
            actual=describe_shape(positions),
        )
    wide = shifts.to(positions.dtype)
    if cell.shape[-2:] != (dim, dim) or cell.ndim not in (2, 3):
        raise DimensionMismatchError(
            argument="cell", expected=f"({dim}, {dim}) or (clouds, {dim}, {dim})", actual=describe_shape(cell)
        )
    if cell.ndim == 2:
        return wide @ cell
    if len(cell) == 1:
        return wide @ cell[0]
    if batch is None:
        raise InvalidInputError(
            argument="batch", expected="the cloud of each of positions, as there is a cell for each", actual=None
        )
    require_dense("batch", batch)
    require_device("batch", batch, positions.device, "positions")
    if batch.dtype != torch.int64:
        raise InvalidInputError(argument="batch", expected="torch.int64", actual=batch.dtype)
    if batch.shape != (points,):
        raise DimensionMismatchError(
            argument="batch",
            expected=f"({points},), a cloud for each of positions",
            actual=describe_shape(batch),
        )
    # Where it cannot be read, a cloud that is not there shows in index_select.
    if is_readable(batch) and batch.numel() and (batch.min() < 0 or batch.max() >= len(cell)):
        raise GraphStructureError(
            argument="batch",
            expected=f"clouds from 0 to {len(cell) - 1}, as cell has",
            actual=f"clouds from {int(batch.min())} to {int(batch.max())}",
        )
    cloud = batch.index_select(0, key_index)
    return torch.einsum("ea,eab->eb", wide, cell.index_select(0, cloud))
