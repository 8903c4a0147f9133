"""Attention over several sets of keys, one set after the other, as attention over all of them."""

from collections.abc import Sequence

import torch

from anyattention._checks import Axes, require_device, require_floating, require_same_kind
from anyattention.errors import InvalidInputError
from anyattention.output import AttentionResult

__all__ = ["merge"]


def merge(parts: Sequence[AttentionResult]) -> AttentionResult:
    """The results of the same queries over disjoint sets of keys, joined to that over all keys.

        l = log(sum over parts of exp(l_p)),   output = sum over parts of exp(l_p - l) output_p

    In any order and grouping, and differentiable in outputs and logsumexps: long contexts can be read piece by piece,
    or by several processes.

    Args:
        parts: results with output `(..., queries, heads, value_dim)` and logsumexp `(..., queries, heads)`
            (`return_logsumexp=True`), of one shape and dtype. A part may have no keys at all.

    Returns:
        AttentionResult(output, None, logsumexp). A query that has no keys in any part gets output 0 and logsumexp -inf.

    Raises:
        InvalidInputError: no parts, something else than results, or one without logsumexp.
        DimensionMismatchError: the shapes differ.

    Cost: O(parts x queries x heads x value_dim) time and memory.

    Source: Milakov and Gimelshein, 2018 (online softmax); Dao et al., 2022 (FlashAttention), section 3.1.

    Example:
        >>> from anyattention import attend
        >>> query, key = torch.ones(1, 1, 1, 2), torch.ones(1, 4, 1, 2)
        >>> value = torch.arange(4.0).reshape(1, 4, 1, 1)
        >>> halves = [(key[:, :1], value[:, :1]), (key[:, 1:], value[:, 1:])]
        >>> merge([attend(query, k, v, return_logsumexp=True) for k, v in halves]).output.flatten()
        tensor([1.5000])
    """
    if not isinstance(parts, list | tuple) or not parts:
        raise InvalidInputError(
            argument="parts", expected="a list of AttentionResults, at least one", actual=repr(parts)
        )
    axes = Axes()
    outputs, logsumexps = [], []
    for number, part in enumerate(parts):
        if not isinstance(part, AttentionResult):
            raise InvalidInputError(
                argument=f"parts[{number}]", expected="an AttentionResult", actual=type(part).__name__
            )
        if part.logsumexp is None:
            raise InvalidInputError(
                argument=f"parts[{number}].logsumexp",
                expected="a tensor",
                actual=None,
                hint="call attend with return_logsumexp=True",
            )
        batch = "batch " if parts[0].output.ndim == 4 else ""
        axes.bind(f"parts[{number}].output", part.output, f"{batch}queries heads value_dim")
        axes.bind(f"parts[{number}].logsumexp", part.logsumexp, f"{batch}queries heads")
        require_floating(f"parts[{number}].output", part.output)
        require_floating(f"parts[{number}].logsumexp", part.logsumexp)
        require_device(f"parts[{number}].logsumexp", part.logsumexp, part.output.device, f"parts[{number}].output")
        require_same_kind(f"parts[{number}].output", part.output, "parts[0].output", parts[0].output)
        outputs.append(part.output)
        logsumexps.append(part.logsumexp)
    each = torch.stack(logsumexps)
    top = each.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    shares = torch.exp(each - top)
    total = shares.sum(0)
    is_empty = total == 0
    total = torch.where(is_empty, 1.0, total)
    output = ((shares / total).unsqueeze(-1) * torch.stack(outputs)).sum(0).to(outputs[0].dtype)
    return AttentionResult(output, None, torch.where(is_empty, -torch.inf, total.log() + top))
