"""The nearest points of each by the products of every pair, for points of many dimensions; and other measures.

Products are summed in float32 by the kernel that attention chooses keys with. What that leaves open of distances is
decided in float64, or is left to the search by a tree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from anyattention._checks import require_dense
from anyattention.errors import DimensionMismatchError, InvalidInputError
from anyattention.geometry.clouds import Clouds
from anyattention.native.topk import largest_products

__all__ = [
    "Found",
    "Index",
    "Measure",
    "directed",
    "found_by_index",
    "largest_dots",
    "near_by_products",
    "require_measure",
]

Measure = Literal["euclidean", "cosine", "dot"]


class Index(Protocol):
    """What finds the nearest keys of queries: the part of `interfaces.MemoryIndex` that a search needs."""

    def search(self, queries: Tensor, k: int, /) -> tuple[Tensor, Tensor]:
        """Ids and scores, `(n, k)` each, of queries `(n, dim)`, the best first; id -1 is no key."""
        ...


# Candidates beyond those that are wanted: the first that is left out shows how far all others are.
_MORE = 16
# So many coordinates of candidates are gathered at once.
_COORDINATES = 1 << 24
_ROUNDING = 2.0**-23


class Found(NamedTuple):
    """Pairs `(pairs,)` int64 of a query and a key."""

    query: Tensor
    key: Tensor


def require_measure(measure: Measure, clouds: Clouds) -> None:
    """Raise unless it is a measure that these points have."""
    if measure not in ("euclidean", "cosine", "dot"):
        raise InvalidInputError(argument="measure", expected="'euclidean', 'cosine' or 'dot'", actual=repr(measure))
    if clouds.cell is not None and measure != "euclidean":
        raise InvalidInputError(argument="measure", expected="'euclidean' in a cell", actual=repr(measure))


def directed(clouds: Clouds) -> tuple[Clouds, Tensor, Tensor]:
    """The points at length 1, of which the nearest by distance are those by cosine, without those at the origin.

    Returns:
        The clouds, and which of the queries and of the keys they are.
    """
    keys, kept_keys, key_cloud = _directions(clouds.keys, clouds.key_cloud)
    if clouds.is_one_set:
        found = replace(clouds, queries=keys, keys=keys, query_cloud=key_cloud, key_cloud=key_cloud)
        return found, kept_keys, kept_keys
    queries, kept, query_cloud = _directions(clouds.queries, clouds.query_cloud)
    found = replace(clouds, queries=queries, keys=keys, query_cloud=query_cloud, key_cloud=key_cloud)
    return found, kept, kept_keys


def _directions(points: Tensor, cloud: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kept = points.any(1).nonzero().flatten()
    points = points[kept]
    # Divided by the largest first, since squares of small numbers are 0.
    points = points / points.abs().amax(1, keepdim=True)
    return points / points.norm(dim=1, keepdim=True), kept, None if cloud is None else cloud[kept]


def largest_dots(clouds: Clouds, k: int) -> Found:
    """The k largest products of each query, of equal ones the lower key, as float32 sums say."""
    # One factor for a query, and one for all keys of a cloud, change no order: float32 holds what is multiplied.
    queries = _scaled(clouds.queries, clouds.queries.abs().amax(1))
    lengths, cloud = clouds.keys.abs().amax(1), clouds.key_cloud
    if cloud is None:
        lengths = lengths.max()
    else:
        lengths = lengths.new_zeros(int(cloud.max()) + 1).scatter_reduce(0, cloud, lengths, "amax")[cloud]
    count = min(k + int(clouds.is_one_set), len(clouds.keys))
    found = largest_products(queries, _scaled(clouds.keys, lengths), count, *_bounds(clouds, slice(None)))
    return _first_others(clouds, torch.arange(len(queries), device="cpu"), found, k)


def _scaled(points: Tensor, largest: Tensor) -> Tensor:
    """As float32, by powers of two, which round nothing: equal products stay equal."""
    exponent = torch.frexp(largest).exponent.clamp(-1000, 1000)
    return torch.ldexp(points, -exponent.expand(len(points)).unsqueeze(1)).float()


def near_by_products(clouds: Clouds, k: int) -> tuple[Found, Tensor]:
    """The k nearest of each query as far as products decide it, of equal distances the lower key.

        |q - k|^2 = |q|^2 - 2 (q . k - |k|^2 / 2),   with the mean of the keys as the origin

    Returns:
        The pairs, and the queries `(queries,)` that are left open, of which there are no pairs. They have ties that go
        on beyond the candidates, or neighbours nearer to each other than float32 tells apart.

    Cost: O(queries x keys x dim) time, O(keys x dim + queries x k) memory.
    """
    points = _Factors.of(clouds)
    count = k + int(clouds.is_one_set)
    wanted = min(count + _MORE, len(clouds.keys))
    found, undecided = [], []
    for rows in torch.arange(len(clouds.queries), device="cpu").split(max(1, _COORDINATES // (wanted * clouds.dim))):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        begins, ends = _bounds(clouds, some)
        candidate = largest_products(points.queries[some], points.keys, wanted, begins, ends)
        distance = _distances(clouds, rows, candidate)
        sees_all = candidate[:, -1] < 0
        if begins is None or ends is None:
            sees_all |= wanted == len(clouds.keys)
        else:
            sees_all |= ends - begins <= wanted
        # The nearest first, of equal distances the lower key.
        by_key = candidate.argsort(1)
        order = by_key.gather(1, distance.gather(1, by_key).argsort(stable=True, dim=1))[:, :count]
        last = distance.gather(1, order)[:, -1]
        beyond = points.least_beyond(some, distance.amax(1))
        decided = sees_all | (beyond > last)
        undecided.append(rows[~decided])
        found.append(_first_others(clouds, rows[decided], candidate.gather(1, order)[decided], k))
    return Found(*(torch.cat(part) for part in zip(*found, strict=True))), torch.cat(undecided)


class _Factors(NamedTuple):
    """Points as float32, whose product is q . k - |k|^2 / 2, and what is known of their lengths.

    Attributes:
        queries, keys: `(points, dim + 1)` float32, from the mean of the keys, in units of the largest length.
        lengths: `(queries,)` float64, of the queries in that unit; longest: of a key.
        unit: the largest length.
    """

    queries: Tensor
    keys: Tensor
    lengths: Tensor
    longest: float
    unit: float

    @classmethod
    def of(cls, clouds: Clouds) -> _Factors:
        origin = clouds.keys.mean(0)
        keys = clouds.keys - origin
        queries = keys if clouds.is_one_set else clouds.queries - origin
        unit = max(_largest(keys), _largest(queries))
        keys = keys / unit
        queries = keys if clouds.is_one_set else queries / unit
        lengths = queries.norm(dim=1)
        turned = torch.cat([queries.float(), torch.ones(len(queries), 1, dtype=torch.float32, device="cpu")], dim=1)
        rows = keys.float()
        halves = rows.double().square().sum(1, keepdim=True) / -2
        return cls(turned, torch.cat([rows, halves.float()], dim=1), lengths, float(keys.norm(dim=1).max()), unit)

    def least_beyond(self, some: slice, farthest: Tensor) -> Tensor:
        """A distance that no key has less of which is no candidate, but for keys that are longer than the candidates.

        Those are farther than the farthest candidate anyway.

        Args:
            some: which queries.
            farthest: `(queries,)` float64, the largest distance of a candidate.
        """
        lengths, farthest = self.lengths[some], farthest / self.unit
        reach = (lengths + farthest).clamp(max=self.longest) * (1 + 1e-6)
        terms = self.queries.shape[1] + 4
        # Of a sum of products in float32, in any order; and of coordinates that were rounded to float32.
        of_sums = _ROUNDING * terms * (lengths * reach + reach * reach / 2) + 1e-30
        of_points = _ROUNDING * (lengths + reach) + 1e-30
        # A candidate's score is at least the other key's; both are rounded, and a square is twice a score.
        square = (farthest - of_points).clamp(min=0).square() - 4 * of_sums
        return (square.clamp(min=0).sqrt() - of_points) * (1 - 1e-12) * self.unit


def _largest(points: Tensor) -> float:
    """The largest coordinate, by which all are divided so that float32 holds them; 1 where all are 0."""
    return float(points.abs().max()) or 1.0


def _bounds(clouds: Clouds, some: slice) -> tuple[Tensor | None, Tensor | None]:
    """The keys of the same cloud as each of some queries, from a begin up to an end."""
    if clouds.query_cloud is None or clouds.key_cloud is None:
        return None, None
    cloud = clouds.query_cloud[some].contiguous()
    begins = torch.searchsorted(clouds.key_cloud.contiguous(), cloud)
    return begins, torch.searchsorted(clouds.key_cloud.contiguous(), cloud, right=True)


def _distances(clouds: Clouds, rows: Tensor, candidate: Tensor) -> Tensor:
    """Of each query's candidates; infinite where there is none."""
    key = candidate.clamp(min=0)
    apart = clouds.keys[key.flatten()].view(*key.shape, -1).sub_(clouds.queries[rows, None])
    # Coordinate by coordinate, as a tree's candidates are measured.
    parts = apart.flatten(0, 1).T.contiguous().square_()
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total.sqrt_().view(key.shape).masked_fill_(candidate < 0, torch.inf)


def _first_others(clouds: Clouds, rows: Tensor, keys: Tensor, k: int) -> Found:
    """The first k keys `(queries, count)` of each row that are used, and not the query itself."""
    is_other = keys >= 0
    if clouds.is_one_set:
        is_other &= keys != rows[:, None]
    is_other &= is_other.cumsum(1) <= k
    place, slot = is_other.nonzero().T
    return Found(rows[place], keys[place, slot])


def found_by_index(index: Any, measure: Measure, clouds: Clouds, queries: Tensor, k: int, has_batch: bool) -> Found:
    """What an index finds: `search(queries (n, dim), k)` gives ids `(n, k)`, the best first, and -1 for no key."""
    if not callable(getattr(index, "search", None)):
        raise InvalidInputError(
            argument="index", expected="an object with search(queries, k)", actual=type(index).__name__
        )
    if clouds.cell is not None:
        raise InvalidInputError(argument="index", expected="None in a cell", actual=type(index).__name__)
    if has_batch:
        raise InvalidInputError(argument="batch", expected="None with an index, which has one cloud", actual="a tensor")
    if getattr(index, "measure", measure) != measure:
        raise InvalidInputError(
            argument="measure", expected=f"{index.measure!r}, that of the index", actual=repr(measure)
        )
    if getattr(index, "key_dim", clouds.dim) != clouds.dim:
        raise DimensionMismatchError(
            argument="index", expected=f"keys of {clouds.dim} dimensions, as positions", actual=index.key_dim
        )
    count = min(k + int(clouds.is_one_set), len(clouds.keys))
    if count == 0 or len(queries) == 0:
        return Found(*torch.empty(2, 0, dtype=torch.int64, device="cpu"))
    ids = index.search(queries, count)[0]
    require_dense("ids of index.search", ids)
    if ids.dtype != torch.int64 or ids.shape != (len(queries), count):
        raise InvalidInputError(
            argument="ids of index.search",
            expected=f"int64, ({len(queries)}, {count})",
            actual=f"{ids.dtype}, {tuple(ids.shape)}",
        )
    ids = ids.cpu()
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < len(clouds.keys):
        raise InvalidInputError(
            argument="ids of index.search",
            expected=f"-1, or rows of positions, which has {len(clouds.keys)}",
            actual=f"from {int(ids.min())} to {int(ids.max())}",
        )
    in_order = ids.sort(1).values
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
        raise InvalidInputError(
            argument="ids of index.search", expected="each key once for a query", actual="one that is repeated"
        )
    return _first_others(clouds, torch.arange(len(queries), device="cpu"), ids, k)
