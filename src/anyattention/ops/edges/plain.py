"""Sums and softmaxes over the edges of each query in plain PyTorch, which references are written in.

Axes: ... batch or nothing, N queries, M keys, E edges, H heads, G key heads, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest_by_query", "softmax_by_query", "sum_by_query", "to_heads"]


def to_heads(rows: Tensor, heads: int) -> Tensor:
    """Rows `(..., G, D)` for each of the heads that share them, `(..., H, D)`."""
    key_heads = rows.shape[-2]
    return rows if key_heads == heads else rows.repeat_interleave(heads // key_heads, dim=-2)


def sum_by_query(rows: Tensor, axis: int, target: Tensor, num_queries: int) -> Tensor:
    """Sums of edge rows by query; `axis` is the axis of edges, counted from the end."""
    shape = list(rows.shape)
    shape[axis] = num_queries
    return rows.new_zeros(shape).index_add(axis, target, rows)


def largest_by_query(scores: Tensor, target: Tensor, num_queries: int) -> Tensor:
    """The largest of the edge scores `(..., E, H)` by query, `(..., N, H)`, a constant; -inf for empty queries."""
    largest = scores.new_full((*scores.shape[:-2], num_queries, scores.shape[-1]), -torch.inf)
    return largest.scatter_reduce(-2, target[:, None].expand(scores.shape), scores.detach(), "amax")


def softmax_by_query(scores: Tensor, target: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of edge scores `(..., E, H)` by query; the largest score and the log of the sum `(..., N, H)`.

    The sum is relative to the largest score; empty queries have -inf and 0.
    """
    largest = largest_by_query(scores, target, num_queries)
    shift = torch.where(largest.isfinite(), largest, 0.0)
    terms = (scores - shift.index_select(-2, target)).exp()
    sums = sum_by_query(terms, -2, target, num_queries)
    # 0 / 0 is NaN, log(0) = -inf has gradient inf, and inf x 0 is NaN: empty queries take another branch.
    is_empty = sums == 0
    sums = torch.where(is_empty, 1.0, sums)
    # Not exp(scores - logsumexp): beside large scores the logarithm of the sum has no digits left.
    weights = terms / sums.index_select(-2, target)
    return weights, largest, sums.log()
