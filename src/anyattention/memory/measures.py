"""How alike a query and a key are: three measures, each a dot product of rows made of the two.

    dot         q . k
    cosine      (q / |q|) . (k / |k|); a vector of zeros has cosine 0 to all
    euclidean   -|q - k|^2, which is (2 q, -1) . (k, |k|^2) but for -|q|^2, the same for all keys of a query

Axes: ... any, k keys, D key_dim.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError

__all__ = ["Measure", "alike", "centre_of", "read_measure", "rows_of_keys", "rows_of_queries", "sampled_centre"]

Measure = Literal["dot", "cosine", "euclidean"]

_CENTRE_OF = 64


def read_measure(measure: object) -> Measure:
    """The measure; raises InvalidInputError unless it is one."""
    if measure not in get_args(Measure):
        expected = "one of " + ", ".join(map(repr, get_args(Measure)))
        raise InvalidInputError(argument="measure", expected=expected, actual=repr(measure))
    return measure  # pyright: ignore[reportReturnType]  # it was compared


def rows_of_keys(keys: Tensor, measure: Measure, centre: Tensor | None = None) -> Tensor:
    """The keys `(..., D)` as rows whose dot products with `rows_of_queries` rank them; "euclidean" has D + 1 columns.

    Args:
        keys: the keys.
        measure: the measure.
        centre: `(D,)`, for "euclidean" what is taken from queries and keys first: far from the origin the squares have
            no digits left for the distances.
    """
    if measure == "dot":
        return keys
    if measure == "cosine":
        return _normalized(keys)
    assert centre is not None
    keys = keys - centre
    return torch.cat([keys, keys.square().sum(-1, keepdim=True)], dim=-1)


def rows_of_queries(queries: Tensor, measure: Measure, centre: Tensor | None = None) -> Tensor:
    """The queries `(..., D)` as rows for `rows_of_keys`."""
    if measure == "dot":
        return queries
    if measure == "cosine":
        return _normalized(queries)
    assert centre is not None
    queries = queries - centre
    return torch.cat([2 * queries, -torch.ones_like(queries[..., :1])], dim=-1)


def centre_of(keys: Tensor) -> Tensor:
    """`(D,)`: the mean of keys `(k, D)`, which "euclidean" takes from both sides; a number, whatever they hold."""
    if len(keys) == 0:
        return keys.new_zeros(keys.shape[1])
    return keys.detach().nan_to_num(0.0, 0.0, 0.0).mean(0).nan_to_num(0.0, 0.0, 0.0)


def sampled_centre(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """A centre `(D,)` for "euclidean" that lies among most of the keys `(N, D)`, whatever a few of them are.

    It is the median of 64 to 127 rows that lie evenly among the keys, or of all where these are fewer.
    """
    some = keys[:: max(1, len(keys) // _CENTRE_OF)]
    return some.detach().to(dtype).nan_to_num(0.0, 0.0, 0.0).median(dim=0).values


def alike(queries: Tensor, keys: Tensor, measure: Measure) -> Tensor:
    """The measure `(..., k)` of queries `(..., D)` and some keys of each `(..., k, D)`."""
    queries = queries.unsqueeze(-2)
    if measure == "euclidean":
        return -(queries - keys).square().sum(-1)
    if measure == "cosine":
        queries, keys = _normalized(queries), _normalized(keys)
    return (queries * keys).sum(-1)


def _normalized(x: Tensor) -> Tensor:
    """x / |x|; 0, with gradient 0, where that is 0."""
    # Squares of what is far from 1 overflow, or vanish. The factor cancels, and so has no gradient.
    largest = x.detach().abs().amax(-1, keepdim=True)
    is_zero = largest == 0
    x = torch.where(is_zero, 0.0, x) / torch.where(is_zero, 1.0, largest)
    return x * torch.where(is_zero, 1.0, x.square().sum(-1, keepdim=True)).rsqrt()
