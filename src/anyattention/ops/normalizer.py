"""The softmax's denominator of a row as two numbers: its largest score, and the logarithm of the sum relative to that.

Their sum is logsumexp, which beside a large score has no digits left for the logarithm: a weight taken from it, as
exp(score - logsumexp), would be too large by the number of keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyattention.output import AttentionResult

__all__ = ["joined", "normalizer_of", "with_normalizer"]


def normalizer_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the scores in the last axis, a constant, and the logarithm of the sum of exp(score - largest).

    A score of -inf hides its key; of no keys these are -inf and 0.
    """
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf), scores.sum(-1)
    largest = scores.detach().amax(-1)
    is_empty = largest == -torch.inf
    relative = torch.where(is_empty.unsqueeze(-1), 0.0, scores - largest.unsqueeze(-1))
    return largest, torch.where(is_empty, 0.0, relative.logsumexp(-1))


def joined(normalizers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The normalizer of several sets of keys together, and the share of each set in the sum.

    Args:
        normalizers: the largest score and log_sum of each set, tensors of one shape.

    Returns:
        Largest score, log_sum, and the shares `(sets, ...)`; where no set has a key, -inf, 0 and 0.
    """
    each = torch.stack([largest for largest, _ in normalizers]).detach()
    largest = each.amax(0)
    relative = each - torch.where(largest == -torch.inf, 0.0, largest)
    terms = torch.exp(relative + torch.stack([log_sum for _, log_sum in normalizers]))
    total = terms.sum(0)
    total = torch.where(total == 0, 1.0, total)
    return largest, total.log(), terms / total


def with_normalizer(result: AttentionResult, largest: Tensor, log_sum: Tensor) -> AttentionResult:
    """The result with its normalizer, and with logsumexp; `log_sum` has the gradient of both."""
    largest = largest.detach()
    return result._replace(logsumexp=largest + log_sum, normalizer=(largest, log_sum))
