"""Pairs of neighbours in the order of torch-cluster, as two operators, which scripted and compiled code can call."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from anyattention._checks import FLOATING, describe_shape, require_dense, require_device
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError, UnsupportedError
from anyattention.geometry import nearest_neighbours, radius_neighbours
from anyattention.geometry.clouds import LARGEST, read_clouds
from anyattention.geometry.neighbours import sorted_neighbours
from anyattention.native.compressed_rows import sort_rows

__all__ = ["define_search", "nearest_pairs", "radius_pairs"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# float64 holds all integers up to here.
_LARGEST_INTEGER = 2.0**53


class _Points(NamedTuple):
    """Points ready for a search, float64 on the CPU; queries are None where they are the keys themselves.

    `dtype` is the caller's, None for integers.
    """

    keys: Tensor
    queries: Tensor | None
    key_batch: Tensor | None
    query_batch: Tensor | None
    dtype: torch.dtype | None


def radius_pairs(
    x: Tensor,
    y: Tensor | None,
    r: float,
    batch_x: Tensor | None,
    batch_y: Tensor | None,
    max_num_neighbors: int | None,
    batch_size: int | None,
    ignore_same_index: bool,
) -> Tensor:
    """All pairs of a point of y and one of x that are less than r apart, by point of y, then of x.

    Without y the points are those of x.

    Returns:
        `(2, pairs)` int64: points of y in row 0, of x in row 1.
    """
    points = _read_points(x, y, batch_x, batch_y, batch_size)
    if points.dtype is not None:
        r = float(torch.tensor(r, dtype=torch.float64, device="cpu").to(points.dtype))
    if r == 0 or _is_empty(points):
        return _no_pairs(x)
    if r >= LARGEST:
        r = _beyond_all(points)
    # The search includes its bound; the largest number below r leaves out those at r.
    found = radius_neighbours(
        points.keys, math.nextafter(r, 0), points.key_batch, queries=points.queries, query_batch=points.query_batch
    )
    key, query = found.edge_index
    count = len(points.keys)
    if points.queries is None:
        if not ignore_same_index:
            own = torch.arange(count, device="cpu")
            found = sorted_neighbours(torch.cat([query, own]), torch.cat([key, own]), None, count, count)
            key, query = found.edge_index
    elif ignore_same_index:
        is_other = key != query
        key, query = key[is_other], query[is_other]
    if max_num_neighbors is not None:
        is_first = _places(query) < max_num_neighbors
        key, query = key[is_first], query[is_first]
    return torch.stack([query, key]).to(x.device)


def nearest_pairs(
    x: Tensor,
    y: Tensor | None,
    k: int,
    batch_x: Tensor | None,
    batch_y: Tensor | None,
    cosine: bool,
    batch_size: int | None,
    ignore_same_index: bool,
) -> Tensor:
    """Each point of y with the k points of x that are nearest, by point of y, then by distance, then by point of x.

    Without y the points are those of x. `ignore_same_index` is for that case.

    Returns:
        `(2, pairs)` int64: points of y in row 0, of x in row 1.
    """
    points = _read_points(x, y, batch_x, batch_y, batch_size)
    if points.queries is None and not ignore_same_index:
        points = points._replace(queries=points.keys, query_batch=points.key_batch)
    kept_keys = kept_queries = None
    if cosine and not _is_empty(points):
        points, kept_keys, kept_queries = _directions(points)
    if _is_empty(points):
        return _no_pairs(x)
    of_keys, of_queries = (points.keys, points.key_batch), (points.queries, points.query_batch)
    # Nobody has more neighbours than there are keys.
    found = nearest_neighbours(
        points.keys, min(k, len(points.keys)), of_keys[1], queries=of_queries[0], query_batch=of_queries[1]
    )
    key, query = found.edge_index
    distance = read_clouds(*of_keys, None, None, *of_queries).squared_distances(query, key, None).sqrt_()
    order, by_distance = torch.arange(len(key), device="cpu"), torch.empty_like(key)
    sort_rows(found.query_offsets, order, [distance.view(torch.int64), key], [torch.empty_like(key), by_distance])
    if kept_keys is not None and kept_queries is not None:
        by_distance, query = kept_keys[by_distance], kept_queries[query]
    return torch.stack([query, by_distance]).to(x.device)


def _no_pairs(x: Tensor) -> Tensor:
    return torch.empty(2, 0, dtype=torch.int64, device=x.device)


def _is_empty(points: _Points) -> bool:
    return not points.keys.numel() or (points.queries is not None and not points.queries.numel())


def _places(rows: Tensor) -> Tensor:
    """The place of each among those equal to it, of sorted numbers."""
    begins = torch.searchsorted(rows, rows)
    return torch.arange(len(rows), device="cpu") - begins


def _beyond_all(points: _Points) -> float:
    """A radius that no two points are apart."""
    both = points.keys if points.queries is None else torch.cat([points.keys, points.queries])
    return 1.0 + 2.0 * float((both.amax(0) - both.amin(0)).norm())


def _directions(points: _Points) -> tuple[_Points, Tensor, Tensor]:
    """The points at length 1, of which the nearest by distance are those by cosine; without those at the origin.

    Returns:
        The points, and which of the keys and of the queries they are.
    """
    kept_keys = points.keys.any(1).nonzero().flatten()
    keys, key_batch = _unit(points.keys, kept_keys), _at(points.key_batch, kept_keys)
    if points.queries is None:
        return points._replace(keys=keys, key_batch=key_batch), kept_keys, kept_keys
    kept = points.queries.any(1).nonzero().flatten()
    queries, query_batch = _unit(points.queries, kept), _at(points.query_batch, kept)
    return _Points(keys, queries, key_batch, query_batch, points.dtype), kept_keys, kept


def _unit(points: Tensor, kept: Tensor) -> Tensor:
    points = points[kept]
    # Divided by the largest first, since squares of small numbers are 0.
    points = points / points.abs().amax(1, keepdim=True)
    return points / points.norm(dim=1, keepdim=True)


def _at(batch: Tensor | None, kept: Tensor) -> Tensor | None:
    return None if batch is None else batch[kept]


def _read_points(
    x: Tensor, y: Tensor | None, batch_x: Tensor | None, batch_y: Tensor | None, batch_size: int | None
) -> _Points:
    keys = _read_rows("x", x)
    key_batch = _read_batch("batch" if y is None else "batch_x", batch_x, "x", x, batch_size)
    dtype = x.dtype if x.dtype in FLOATING else None
    if y is None:
        return _Points(keys, None, key_batch, None, dtype)
    queries = _read_rows("y", y)
    if y.dtype != x.dtype:
        raise InvalidInputError(argument="y", expected=f"{x.dtype}, as x", actual=y.dtype)
    require_device("y", y, x.device, "x")
    if queries.shape[1] != keys.shape[1]:
        raise DimensionMismatchError(
            argument="y", expected=f"points of {keys.shape[1]} coordinates, as x", actual=describe_shape(y)
        )
    query_batch = _read_batch("batch_y", batch_y, "y", y, batch_size)
    if (key_batch is None) != (query_batch is None):
        key_batch = _single(key_batch, "batch_x", "batch_y")
        query_batch = _single(query_batch, "batch_y", "batch_x")
    return _Points(keys, queries, key_batch, query_batch, dtype)


def _single(batch: Tensor | None, given: str, missing: str) -> None:
    """Raise unless all points are in example 0, as those without a batch are."""
    if batch is not None and batch.numel() and int(batch[-1]) > 0:
        raise InvalidInputError(
            argument=missing, expected=f"the example of each point, as {given} has several", actual=None
        )


def _read_rows(argument: str, points: Tensor) -> Tensor:
    """The points as rows, float64 on the CPU."""
    require_dense(argument, points)
    if points.dtype not in FLOATING + _INTEGERS:
        raise InvalidInputError(
            argument=argument, expected="a floating-point dtype of 16, 32 or 64 bits, or integers", actual=points.dtype
        )
    if points.ndim not in (1, 2):
        raise DimensionMismatchError(
            argument=argument, expected="(points, dim) or (points,)", actual=describe_shape(points)
        )
    wide = points.detach().to("cpu", torch.float64)
    limit = LARGEST if points.dtype in FLOATING else _LARGEST_INTEGER
    # NaN compares as False.
    if wide.numel() and not (inside := wide.abs() < limit).all():
        raise InvalidInputError(
            argument=argument,
            expected=f"finite coordinates, below {limit:g}",
            actual=f"{int((~inside).sum())} others among {wide.numel()}",
        )
    return wide[:, None] if wide.ndim == 1 else wide


def _read_batch(argument: str, batch: Tensor | None, of: str, points: Tensor, batch_size: int | None) -> Tensor | None:
    """The example of each point, int64 on the CPU."""
    if batch is None:
        if batch_size is not None and batch_size > 1:
            raise InvalidInputError(
                argument=argument, expected=f"the example of each of {of}, as batch_size={batch_size}", actual=None
            )
        return None
    require_dense(argument, batch)
    if batch.dtype not in _INTEGERS:
        raise InvalidInputError(argument=argument, expected="integers", actual=batch.dtype)
    require_device(argument, batch, points.device, of)
    if batch.shape != points.shape[:1]:
        raise DimensionMismatchError(
            argument=argument, expected=f"({len(points)},), an example for each of {of}", actual=describe_shape(batch)
        )
    batch = batch.cpu().long()
    if not batch.numel():
        return batch
    if batch[0] < 0 or (batch.diff() < 0).any():
        raise GraphStructureError(
            argument=argument,
            expected="examples from 0 that never fall from one point to the next",
            actual=f"{batch[:8].tolist()}" + (" ..." if len(batch) > 8 else ""),
        )
    if batch_size is not None and batch[-1] >= batch_size:
        raise InvalidInputError(
            argument="batch_size",
            expected=f"at least {int(batch[-1]) + 1}, for the examples of {argument}",
            actual=batch_size,
        )
    return batch


def define_search(library: torch.library.Library, schema: str, search: Any) -> None:
    """Add to a library an operator whose first tensor is x and whose result is pairs, for every device."""
    library.define(schema)
    name = f"{library.ns}::{schema.partition('(')[0]}"
    library.impl(name, search, "CompositeExplicitAutograd")
    torch.library.register_fake(name, _fake_pairs, lib=library)
    torch.library.register_vmap(name, _refuse_vmap, lib=library)


def _fake_pairs(x: Tensor, *others: Any) -> Tensor:
    if any(isinstance(given, Tensor) and given.is_meta and not is_fake(given) for given in (x, *others)):
        raise InvalidInputError(argument="x", expected="points and batches on a device with data", actual="meta")
    return x.new_empty((2, torch.library.get_ctx().new_dynamic_size()), dtype=torch.int64)


def _refuse_vmap(*_given: Any) -> None:
    raise UnsupportedError(
        "neighbours under vmap: each entry has a graph of its own. Join them by a batch, outside", argument="x"
    )


_library = torch.library.Library("anyattention", "FRAGMENT")
define_search(
    _library,
    "radius_pairs(Tensor x, Tensor? y, float r, Tensor? batch_x, Tensor? batch_y, int? max_num_neighbors,"
    " int? batch_size, bool ignore_same_index) -> Tensor",
    radius_pairs,
)
define_search(
    _library,
    "nearest_pairs(Tensor x, Tensor? y, int k, Tensor? batch_x, Tensor? batch_y, bool cosine, int? batch_size,"
    " bool ignore_same_index) -> Tensor",
    nearest_pairs,
)
