"""Product-key memory: checks the arguments and chooses the implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import (
    Axes,
    allocation_failures_named,
    describe_shape,
    require_count,
    require_floating,
    require_number,
    require_same_kind,
)
from anyattention.ambient import (
    Moment,
    is_autocast_enabled,
    is_compiling,
    is_transformed,
    moment_of,
    untraced,
    without_autocast,
)
from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.ops import dispatch
from anyattention.ops.dispatch import Explanation, Implementation
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.product_keys import cpu, reference
from anyattention.ops.product_keys.call import Call
from anyattention.ops.product_keys.slot_gradient import Handover, SlotGradient
from anyattention.output import AttentionResult

__all__ = ["explain_product_keys", "product_key_attention", "product_key_search"]

_TABLE = (
    Implementation("cpu", cpu.run, cpu.refusal),
    Implementation("reference", reference.run, reference.refusal),
)
_CHOICE = (
    Implementation("cpu", cpu.choose, cpu.refusal),
    Implementation("reference", reference.choose, reference.refusal),
)


def product_key_attention(
    query: Tensor,
    half_keys: Tensor,
    values: Tensor,
    *,
    k: int = 32,
    scale: float = 1.0,
    dropout: float = 0.0,
    sparse_grad: bool = False,
    slot_gradient: Callable[[SlotGradient], None] | None = None,
    implementation: str | None = None,
) -> AttentionResult:
    """Attention to the k best of n x n memory slots, whose keys are pairs of n half keys each.

        score(slot) = scale (q_1 . first[i] + q_2 . second[j]),  slot = i n + j,  q = (q_1, q_2)
        output = sum over heads and the k slots of the largest scores of p value,  p = dropout(softmax(scores))

    The scores are sums of halves, so that the k best slots are found among the k x k pairs of the best half keys: this
    is exact. Of equal scores the lowest slot is taken first; sums of float32 are compared in float64.

    Args:
        query: `(tokens, heads, key_dim)`; its first and its second half meet the first and the second half keys.
        half_keys: `(2, heads, n, key_dim / 2)`.
        values: `(n * n, value_dim)`, which all heads share. All three have one dtype; under autocast it is the values'.
        k: how many slots each token and head attends to.
        scale: the factor of the scores.
        dropout: the probability that a weight is 0.
        sparse_grad: the gradient of the values is a coalesced COO tensor with a row for each used slot, as
            `torch.optim.SparseAdam` and `SGD` take it, in place of a dense one. (A leaf's `.grad` has each row once
            too, but PyTorch does not mark it so.)
        slot_gradient: instead, a function that the backward calls with the gradient of values that require one, as a
            `SlotGradient`; the values themselves get none. No row of the gradient is in memory before it is asked for,
            and the function may change the values in place: nothing else reads them any more.
        implementation: force "cpu" or "reference"; None takes the first that can run the call.

    Returns:
        output `(tokens, value_dim)`, weights `(tokens, heads, k)` before dropout, and indices `(tokens, heads, k)`
        int64, the best slot first. NaN or infinity in a query or a half key is larger than any score, and makes the
        weights of its tokens and heads NaN; which of several such slots are taken is left open. Output and weights are
        differentiable to any order, but not where the gradient of the values is sparse or handed on.

    Raises:
        DimensionMismatchError, InvalidInputError: an argument does not fit the others, key_dim is odd, or k is more
            than n * n.
        UnsupportedError: the forced implementation cannot run the call, or the gradient of the values is to be sparse
            or handed on where the call is traced or transformed; `torch.compile` leaves such a call to eager mode.
        OutOfMemoryError: memory ran out.

    Cost: O(tokens x heads x (n x key_dim + k x (key_dim + value_dim))) time; memory O(tokens x heads x k) above the
    results, backward too, and there the gradient of the values: n * n rows dense, one for each used slot sparse.

    Source: Lample et al., 2019, "Large Memory Layers with Product Keys", equations 1 to 5; here without query
    normalisation, which is the layer's. Berges et al., 2024, "Memory Layers at Scale", share the values among layers.

    Example:
        >>> import torch
        >>> half_keys = torch.tensor([[[[0.0], [1.0]]], [[[0.0], [2.0]]]])  # the scores of 4 slots are 0, 2, 1, 3
        >>> values = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
        >>> result = product_key_attention(torch.ones(1, 1, 2), half_keys, values, k=2)
        >>> result.indices.flatten(), result.output
        (tensor([3, 1]), tensor([[34.6212]]))
    """
    if is_compiling() and (sparse_grad or slot_gradient is not None):
        # How many rows there are, no trace can know.
        return untraced(product_key_attention)(
            query,
            half_keys,
            values,
            k=k,
            scale=scale,
            dropout=dropout,
            sparse_grad=sparse_grad,
            slot_gradient=slot_gradient,
            implementation=implementation,
        )
    dropout = require_number("dropout", dropout, at_least=0.0, below=1.0)
    require_number("scale", scale)
    if is_autocast_enabled(query.device) if isinstance(query, Tensor) else False:
        query, half_keys = (_of_dtype(x, values) for x in (query, half_keys))
    call = _checked(query, half_keys, values, k, scale, sparse_grad)
    if sparse_grad or slot_gradient is not None:
        _refuse_traces(call, "sparse_grad" if sparse_grad else "slot_gradient")
    handover = None
    if slot_gradient is not None:
        if sparse_grad:
            raise InvalidInputError(argument="sparse_grad", expected="False with slot_gradient", actual=True)
        handover = Handover(slot_gradient)
    keep = None
    if dropout > 0:
        shape = (len(query), query.shape[1], call.k)
        keep = keep_factors(shape, dropout, draw_seed(query.device), call.sums_dtype)
    rows = values if handover is None else handover.values(values)
    is_sparse, hands_on = sparse_grad or handover is not None, handover is not None
    call = Call(call.query, call.half_keys, rows, call.k, keep, is_sparse, hands_on)
    output, weights, indices = _run(_TABLE, call, implementation)
    if handover is not None:
        output = handover.output(output, weights if keep is None else weights * keep, indices)
    return AttentionResult(output.to(values.dtype), weights.to(values.dtype), indices=indices)


def product_key_search(
    query: Tensor, half_keys: Tensor, *, k: int = 32, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k best slots of `product_key_attention` and their scores, without values and without gradients.

    Args:
        query: `(tokens, heads, key_dim)`.
        half_keys: `(2, heads, n, key_dim / 2)`.
        k: how many slots.
        implementation: force "cpu" or "reference"; None takes the first that can run the call.

    Returns:
        indices `(tokens, heads, k)` int64, the best first, and their scores, at least float32.

    Raises:
        DimensionMismatchError, InvalidInputError, UnsupportedError: as `product_key_attention`.

    Cost: O(tokens x heads x n x key_dim) time; memory O(tokens x heads x k) above the half keys once more.

    Example:
        >>> import torch
        >>> half_keys = torch.tensor([[[[0.0], [1.0]]], [[[0.0], [2.0]]]])
        >>> product_key_search(torch.ones(1, 1, 2), half_keys, k=3)
        (tensor([[[3, 1, 2]]]), tensor([[[3., 2., 1.]]]))
    """
    return _run(_CHOICE, _checked(query, half_keys, None, k, 1.0, False), implementation)


def explain_product_keys(
    query: Tensor, half_keys: Tensor, values: Tensor, *, k: int = 32, implementation: str | None = None
) -> Explanation:
    """Which implementation runs a call of `product_key_attention`, and why each faster one does not."""
    return dispatch.explain(_TABLE, _checked(query, half_keys, values, k, 1.0, False), implementation)


def _run(table: tuple[Implementation, ...], call: Call, implementation: str | None) -> Any:
    run = dispatch.choose(table, call, implementation).run
    with without_autocast(call.query.device):
        if is_compiling():
            return run(call)
        with allocation_failures_named():
            return run(call)


def _of_dtype(x: Tensor, other: Tensor) -> Tensor:
    """What autocast left in another dtype, in that of the values."""
    both = isinstance(x, Tensor) and isinstance(other, Tensor) and x.is_floating_point() and other.is_floating_point()
    return x.to(other.dtype) if both else x


def _checked(query: Tensor, half_keys: Tensor, values: Tensor | None, k: int, scale: float, sparse_grad: bool) -> Call:
    require_floating("query", query)
    axes = Axes()
    axes.bind("query", query, "tokens heads key_dim")
    key_dim = query.shape[2]
    if key_dim < 2 or key_dim % 2:
        raise DimensionMismatchError(
            argument="query",
            expected="(tokens, heads, key_dim) with an even key_dim, for two halves",
            actual=describe_shape(query),
        )
    axes.set("halves", 2, "product keys")
    axes.set("half_dim", key_dim // 2, "half of the query's key_dim")
    axes.bind("half_keys", half_keys, "halves heads half_keys half_dim")
    require_same_kind("query", query, "query", query)
    require_same_kind("half_keys", half_keys, "query", query)
    n = half_keys.shape[2]
    if values is not None:
        axes.set("slots", n * n, "the square of the number of half keys")
        axes.bind("values", values, "slots value_dim")
        require_same_kind("values", values, "query", query)
    k = require_count("k", k, at_least=1)
    if k > n * n:
        raise InvalidInputError(argument="k", expected=f"at most the {n} x {n} = {n * n} slots", actual=k)
    sums = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(sums) if scale == 1.0 else query.to(sums) * scale
    return Call(scaled.unflatten(-1, (2, key_dim // 2)), half_keys.to(sums), values, k, None, sparse_grad)


def _refuse_traces(call: Call, argument: str) -> None:
    """Raise where the rows of the values' gradient could not be counted, or no backward of this call would come."""
    tensors = (call.query, call.half_keys, call.values)
    if moment_of(tensors) is not Moment.PLAIN or is_transformed(*tensors):
        raise UnsupportedError(
            f"{argument}: calls that are traced or transformed have a dense gradient of the values only",
            argument=argument,
        )
