"""Product-key memory in plain PyTorch, on any device: every half key's score is in memory, and each entry's value.

Axes: T tokens, H heads, D half_dim, n half keys of a half, S = n x n slots, C value_dim, k slots chosen, m = min(k, n).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ops.product_keys.call import Call

__all__ = ["choose", "refusal", "run"]

_TILE = 16


def refusal(call: Call) -> str | None:
    """None: the reference computes every call."""
    return None


def choose(call: Call) -> tuple[Tensor, Tensor]:
    """The slots and their scores `(T, H, k)`, the best first, without gradients."""
    with torch.no_grad():
        scores = _half_scores(call)
        indices = _chosen(call, scores)
        return indices, _scores_of(scores, indices)


def run(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(T, C)`, weights and slots `(T, H, k)`, the first two in the dtype of the sums.

    Cost: O(T x H x (n x (D + log n) + k^2 log k + k x C)) time; memory O(T x H x (n + k^2 + k x C)).
    """
    assert call.values is not None
    scores = _half_scores(call)
    with torch.no_grad():
        indices = _chosen(call, scores)
    chosen = _scores_of(scores, indices)
    # Infinity is NaN, as where slots are chosen.
    weights = (chosen + chosen * 0).softmax(-1)
    kept = weights if call.keep is None else weights * call.keep
    if call.sparse_grad:
        rows = F.embedding(indices, _Coalesced.apply(call.values), sparse=True)
    else:
        rows = call.values[indices]
    output = (kept.unsqueeze(-1) * rows.to(kept.dtype)).sum((1, 2))
    return output, weights, indices


def _half_scores(call: Call) -> tuple[Tensor, Tensor]:
    """The scores `(T, H, n)` of the half keys of each half, with the same bits for equal half keys.

    Libraries do not promise this of a matrix product's last columns, which fill no tile; float64 has tiles of its own.
    """
    query, n = call.query, call.num_half_keys
    if call.sums_dtype == torch.float64:
        first, second = ((query[:, :, half, None] * call.half_keys[half]).sum(-1) for half in range(2))
    else:
        padded = F.pad(call.half_keys, (0, 0, 0, -n % _TILE))
        first, second = ((query[:, :, half].transpose(0, 1) @ padded[half].mT).transpose(0, 1) for half in range(2))
    return first[..., :n], second[..., :n]


def _scores_of(scores: tuple[Tensor, Tensor], indices: Tensor) -> Tensor:
    n = scores[0].shape[-1]
    return scores[0].gather(-1, indices // n) + scores[1].gather(-1, indices % n)


def _chosen(call: Call, scores: tuple[Tensor, Tensor]) -> Tensor:
    """The k best of all pairs, which are among the pairs of the m best half keys of each half."""
    n = call.num_half_keys
    m = min(call.k, n)
    # Ascending, so that pairs stand in the order of their slots: a stable sort keeps the lowest of equal ones first.
    first, second = (_largest_first(x + x * 0)[..., :m].sort(-1).values for x in scores)
    # The sum of two floats is exact in float64.
    sums = scores[0].double().gather(-1, first).unsqueeze(-1) + scores[1].double().gather(-1, second).unsqueeze(-2)
    slots = first.unsqueeze(-1) * n + second.unsqueeze(-2)
    best = _largest_first((sums + sums * 0).flatten(-2))[..., : call.k]
    return slots.flatten(-2).gather(-1, best)


def _largest_first(numbers: Tensor) -> Tensor:
    """Where the numbers lie, from the largest down; NaN is the largest, and equal ones keep their order."""
    return torch.sort(numbers, dim=-1, descending=True, stable=True).indices


class _Coalesced(torch.autograd.Function):
    """The values themselves, whose sparse gradient has each slot once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *by: Tensor) -> Tensor:
        return by[0].coalesce()
