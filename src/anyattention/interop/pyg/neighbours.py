"""Neighbours of points with the signatures and the order of torch-cluster, by this package's exact searches.

torch.jit.script takes these functions, so a check stands where scripts do not look.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_scripting  # pyright: ignore[reportPrivateImportUsage]  # documented

# The functions call the operators that are made there.
import anyattention.interop.pyg.neighbour_pairs  # noqa: F401
from anyattention._checks import plain, require_count, require_tensor
from anyattention.errors import InvalidInputError

__all__ = ["knn", "knn_graph", "radius", "radius_graph"]


def radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    max_num_neighbors: int | None = None,
    num_workers: int = 1,
    batch_size: int | None = None,
    ignore_same_index: bool = False,
) -> Tensor:
    """For each point of y, all points of x that are less than r away.

        |x_j - y_i| < r,   in float64, r rounded to the points' dtype first

    Args:
        x: `(points, dim)` or `(points,)`, floating or integer, finite.
        y: `(queries, dim)` or `(queries,)`, in the dtype of x.
        r: the radius, at least 0; infinite for all pairs.
        batch_x: `(points,)` integers, the example of each point, from 0 and never falling. Examples do not see each
            other.
        batch_y: `(queries,)`, the same for y.
        max_num_neighbors: keep so many points for each of y, those of the lowest index. None keeps all;
            torch_cluster's default is 32.
        num_workers: ignored, as torch_cluster does; `torch.set_num_threads` counts.
        batch_size: how many examples there are. It is only compared with the batches.
        ignore_same_index: leave out the point of x that has the index of the point of y.

    Returns:
        `(2, pairs)` int64 on the device of x: the index in y in row 0, the index in x in row 1; in order of the first,
        then of the second.

    Raises:
        InvalidInputError, DimensionMismatchError: what does not fit, and coordinates that are infinite or NaN.
        GraphStructureError: a batch that falls.
        MissingExtraError: vesin or scipy is not installed (the extra "geometry").

    Cost: that of `Graph.radius` for all pairs within r, which are found before any is cut off. On the CPU, whatever
    the device.

    Source: torch_cluster 1.6. Its order on a GPU, and the pairs that its cut keeps there; on a CPU its order, and
    with it the cut, is that of its tree. It compares squares, rounded to the points' dtype.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> radius(x, y, 5.0)
        tensor([[0, 0],
                [0, 1]])
    """
    others: Tensor | None = y
    if not is_scripting():
        _require_tensors(x=x, y=y, batch_x=batch_x, batch_y=batch_y)
        r = _radius(r)
        max_num_neighbors, batch_size = _limits(max_num_neighbors, batch_size)
        if y is x and batch_y is batch_x:
            # One set of points is searched faster.
            others = None
    return torch.ops.anyattention.radius_pairs(
        x, others, r, batch_x, batch_y, max_num_neighbors, batch_size, ignore_same_index
    )


def radius_graph(
    x: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int | None = None,
    flow: str = "source_to_target",
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """The edges between all points that are less than r apart.

        |x_j - x_i| < r,   in float64, r rounded to the points' dtype first

    Args:
        x: `(points, dim)` or `(points,)`, floating or integer, finite.
        r: the radius, at least 0; infinite for all pairs.
        batch: `(points,)` integers, the example of each point, from 0 and never falling.
        loop: whether each point has an edge to itself.
        max_num_neighbors: keep so many neighbours of each point, those of the lowest index, itself among them with
            `loop`. The graph is then not symmetric. None keeps all; torch_cluster's default is 32.
        flow: "source_to_target": neighbours in row 0, points in row 1. "target_to_source": the other way round.
        num_workers, batch_size: as in `radius`.

    Returns:
        `(2, edges)` int64 on the device of x, in order of the point, then of its neighbour.

    Raises:
        The errors of `radius`.

    Cost: that of `Graph.radius`: linear in points and edges, but for the logarithm of a tree with a batch.

    Source: torch_cluster 1.6, as `radius`.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 0.0]])
        >>> radius_graph(x, 7.5)
        tensor([[1, 0, 2, 1],
                [0, 1, 1, 2]])
    """
    if not is_scripting():
        _require_tensors(x=x, batch=batch)
        r = _radius(r)
        max_num_neighbors, batch_size = _limits(max_num_neighbors, batch_size)
        _require_flow(flow)
    pairs = torch.ops.anyattention.radius_pairs(x, None, r, batch, None, max_num_neighbors, batch_size, not loop)
    return pairs.flip([0]) if flow == "source_to_target" else pairs


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """For each point of y, the k points of x that are nearest; all of its example where there are fewer.

        |x_j - y_i|,   or   1 - x_j . y_i / (|x_j| |y_i|)   with `cosine`,   in float64

    Args:
        x: `(points, dim)` or `(points,)`, floating or integer, finite.
        y: `(queries, dim)` or `(queries,)`, in the dtype of x.
        k: how many, at least 1.
        batch_x: `(points,)` integers, the example of each point, from 0 and never falling. Examples do not see each
            other.
        batch_y: `(queries,)`, the same for y.
        cosine: compare directions. A point at the origin has none: it finds nothing, and nothing finds it.
        num_workers, batch_size: as in `radius`.

    Returns:
        `(2, pairs)` int64 on the device of x: the index in y in row 0, the index in x in row 1; in order of the first,
        then of the distance; between equal distances the lower index is the nearer. With `cosine` distances are equal
        only up to rounding.

    Raises:
        The errors of `radius`.

    Cost: scipy's k-d tree, O(points log points + pairs) in few dimensions. In many, a tree looks at most of the points
    for each: from 50 or so on, `torch.cdist` and `topk` are faster, if the distances of all pairs fit in memory.

    Source: torch_cluster 1.6, which has `cosine` on a GPU only, and there at most 100 neighbours.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 0.0]]), torch.tensor([[4.0, 3.0]])
        >>> knn(x, y, 2)
        tensor([[0, 0],
                [1, 0]])
    """
    if not is_scripting():
        _require_tensors(x=x, y=y, batch_x=batch_x, batch_y=batch_y)
        k = require_count("k", k, 1)
        _, batch_size = _limits(None, batch_size)
    return torch.ops.anyattention.nearest_pairs(x, y, k, batch_x, batch_y, cosine, batch_size, False)


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """The edges from each point's k nearest points to it.

        |x_j - x_i|,   or   1 - x_j . x_i / (|x_j| |x_i|)   with `cosine`,   in float64

    Args:
        x: `(points, dim)` or `(points,)`, floating or integer, finite.
        k: how many, at least 1.
        batch: `(points,)` integers, the example of each point, from 0 and never falling.
        loop: whether a point is one of its own nearest. Where points coincide, those of lower index come before it.
        flow: "source_to_target": neighbours in row 0, points in row 1. "target_to_source": the other way round.
        cosine, num_workers, batch_size: as in `knn`.

    Returns:
        `(2, edges)` int64 on the device of x, in order of the point, then of the distance, then of the neighbour.

    Raises:
        The errors of `radius`.

    Cost: that of `knn`.

    Source: torch_cluster 1.6. It looks for k + 1 points and leaves out the point itself, and so gives k + 1 neighbours
    to one that more than k others coincide with; here it is always k.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 0.0]])
        >>> knn_graph(x, 1)
        tensor([[1, 0, 1],
                [0, 1, 2]])
    """
    if not is_scripting():
        _require_tensors(x=x, batch=batch)
        k = require_count("k", k, 1)
        _, batch_size = _limits(None, batch_size)
        _require_flow(flow)
    pairs = torch.ops.anyattention.nearest_pairs(x, None, k, batch, None, cosine, batch_size, not loop)
    return pairs.flip([0]) if flow == "source_to_target" else pairs


def _require_tensors(**given: Any) -> None:
    """Raise what the operators' own check of types does not say kindly."""
    for name, value in given.items():
        if value is not None or name in ("x", "y"):
            require_tensor(name, value)


def _radius(r: Any) -> Any:
    """The radius as a plain number; raise unless it is one of at least 0."""
    r = plain(r)
    is_number = isinstance(r, int | float | torch.SymInt | torch.SymFloat) and not isinstance(r, bool)
    # NaN compares as False.
    if not is_number or not 0 <= r <= math.inf:
        raise InvalidInputError(argument="r", expected="a number of at least 0", actual=repr(r))
    return r


def _limits(max_num_neighbors: Any, batch_size: Any) -> tuple[int | None, int | None]:
    if max_num_neighbors is not None:
        max_num_neighbors = require_count("max_num_neighbors", max_num_neighbors, 0)
    return max_num_neighbors, None if batch_size is None else require_count("batch_size", batch_size, 1)


def _require_flow(flow: str) -> None:
    if flow not in ("source_to_target", "target_to_source"):
        raise InvalidInputError(argument="flow", expected="'source_to_target' or 'target_to_source'", actual=repr(flow))
