"""Attention over several sets of keys, one set after the other, as attention over all of them."""

from collections.abc import Sequence

import torch

from anyattention._checks import Axes, require_device, require_floating, require_same_kind
from anyattention.errors import InvalidInputError
from anyattention.ops.normalizer import joined, with_normalizer
from anyattention.output import AttentionResult

__all__ = ["merge"]

_WITH_SINKS = (
    "the part was attended to with sinks, which each part would count once more: leave them out of the parts, and add "
    "a part of output 0 and normalizer (sinks, 0)"
)


def merge(parts: Sequence[AttentionResult]) -> AttentionResult:
    """The results of the same queries over disjoint sets of keys, joined to that over all keys.

        m = largest m_p,   l = log(sum over parts of exp(m_p - m + l_p))
        output = sum over parts of exp(m_p - m + l_p - l) output_p

    where (m_p, l_p) is the normalizer of a part, and (m, l) that of all keys. In any order and grouping, and
    differentiable to any order: long contexts can be read piece by piece, or by several processes.

    Args:
        parts: results with output `(..., queries, heads, value_dim)` and normalizer, two tensors
            `(..., queries, heads)` (`return_logsumexp=True`), of one shape and dtype. A part may have no keys at all.

    Returns:
        AttentionResult with output, logsumexp and normalizer. A query that has no keys in any part gets output 0 and
        logsumexp -inf.

    Raises:
        InvalidInputError: no parts, something else than results, or one without normalizer.
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
    outputs, normalizers = [], []
    for number, part in enumerate(parts):
        if not isinstance(part, AttentionResult):
            raise InvalidInputError(
                argument=f"parts[{number}]", expected="an AttentionResult", actual=type(part).__name__
            )
        normalizer = part.normalizer
        if not isinstance(normalizer, tuple | list) or len(normalizer) != 2:
            raise InvalidInputError(
                argument=f"parts[{number}].normalizer",
                expected="a pair of tensors",
                actual=None if normalizer is None else type(normalizer).__name__,
                hint="call attend with return_logsumexp=True" if part.logsumexp is None else _WITH_SINKS,
            )
        batch = "batch " if parts[0].output.ndim == 4 else ""
        axes.bind(f"parts[{number}].output", part.output, f"{batch}queries heads value_dim")
        require_floating(f"parts[{number}].output", part.output)
        require_same_kind(f"parts[{number}].output", part.output, "parts[0].output", parts[0].output)
        for place, x in enumerate(normalizer):
            name = f"parts[{number}].normalizer[{place}]"
            axes.bind(name, x, f"{batch}queries heads")
            require_floating(name, x)
            require_device(name, x, part.output.device, f"parts[{number}].output")
        outputs.append(part.output)
        normalizers.append((normalizer[0], normalizer[1]))
    largest, log_sum, shares = joined(normalizers)
    output = (shares.unsqueeze(-1) * torch.stack(outputs)).sum(0).to(outputs[0].dtype)
    return with_normalizer(AttentionResult(output), largest, log_sum)
