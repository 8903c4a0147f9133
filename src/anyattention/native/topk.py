"""The choice of keys by their scores: the record that the kernel reads, and the kernel called for plain rows.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, k keys chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import ambient
from anyattention.errors import InvalidInputError
from anyattention.native import calls, load
from anyattention.native.structures import Choice, Indices, Numbers, Pairs, layout_of

__all__ = ["TopkIndices", "largest_products", "products_of", "turned"]

_SCORES_AT_ONCE = 1 << 23
_TILE = 16


@dataclass(frozen=True, eq=False)
class TopkIndices:
    """The keys of each query's largest scores, `(B, L, H, k)`, the largest first, -1 in slots that are not used.

    NaN is larger than any number, and of equal scores the first key is taken. A softcap alone changes no order.

    Attributes:
        query, key: float32.
        key_begins, key_ends: query i sees the keys key_begins[i] up to key_ends[i]; None lets each see all.
        mask: boolean, axes (B, H, L, S) whole or 1; False hides.
        bias: axes as the mask, added to the scores; -inf hides.
        scale: the factor of the dot product.
        k: how many, at least 1.
    """

    query: Annotated[Tensor, Numbers("batch num_queries heads head_dim")]
    key: Annotated[Tensor, Numbers("batch num_keys key_heads head_dim")]
    key_begins: Annotated[Tensor | None, Indices("num_queries")]
    key_ends: Annotated[Tensor | None, Indices("num_queries")]
    mask: Annotated[Tensor | None, Choice("batch heads num_queries num_keys")]
    bias: Annotated[Tensor | None, Pairs("batch heads num_queries num_keys")]
    scale: float
    k: int

    def __post_init__(self) -> None:
        if self.query.dtype != torch.float32:
            raise InvalidInputError(argument="query", expected="torch.float32", actual=str(self.query.dtype))


# Entered among the structures whose sizes are compared when the library is loaded.
_STRUCTURE = layout_of(TopkIndices).structure


def largest_products(
    query: Tensor, key: Tensor, k: int, begins: Tensor | None = None, ends: Tensor | None = None
) -> Tensor:
    """The keys of the largest products `query . key` of each query, the largest first, of equal ones the first.

    Args:
        query, key: `(queries, dim)` and `(keys, dim)`, finite float32 on the CPU.
        k: how many, at least 1.
        begins, ends: `(queries,)` int64; query i sees the keys begins[i] up to ends[i], all without.

    Returns:
        `(queries, k)` int64, -1 where there are fewer.

    Cost: O(queries x keys x dim) time; memory O(queries x k), and some 32 MB without kernels.
    """
    if not (ambient.moment_of((query, key)) is ambient.Moment.PLAIN and load.available()):
        return _by_sorting(query, key, k, begins, ends)
    chosen = torch.empty(len(query), k, dtype=torch.int64, device="cpu")
    record = TopkIndices(query[None, :, None], key[None, :, None], begins, ends, None, None, 1.0, k)
    calls.run("topk_indices", calls.bind(record), chosen)
    return chosen


def turned(key: Tensor) -> Tensor:
    """Keys `(M, D)` as the columns that `products_of` takes, and columns of zeros up to whole tiles.

    Whole tiles have the same bits for equal keys; the last columns may be summed in another order.
    """
    return F.pad(key, (0, 0, 0, -len(key) % _TILE)).T


def products_of(query: Tensor, keys: Tensor) -> Tensor:
    """The products `(n, M)` of queries `(n, D)` and turned keys; infinity becomes NaN, as in the kernels."""
    with ambient.without_autocast(query.device):
        products = query @ keys
    return products.add_(products * 0)


def _by_sorting(query: Tensor, key: Tensor, k: int, begins: Tensor | None, ends: Tensor | None) -> Tensor:
    """The same in PyTorch."""
    keys = turned(key)
    places = torch.arange(len(key), device="cpu")
    chosen = torch.full((len(query), k), -1, dtype=torch.int64, device="cpu")
    rows = max(1, _SCORES_AT_ONCE // max(len(key), 1))
    for first in range(0, len(query), rows):
        some = slice(first, first + rows)
        scores = products_of(query[some], keys)[:, : len(key)]
        if begins is not None and ends is not None:
            scores.masked_fill_((places < begins[some, None]) | (places >= ends[some, None]), -torch.inf)
        order = scores.sort(dim=1, descending=True, stable=True)
        found = order.indices[:, :k].masked_fill(order.values[:, :k] == -torch.inf, -1)
        chosen[some, : found.shape[1]] = found
    return chosen
