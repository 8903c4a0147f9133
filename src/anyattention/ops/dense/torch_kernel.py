"""PyTorch's fused CPU attention as an operator that returns logsumexp and can be differentiated twice.

Its gradient is PyTorch's backward kernel, which is given the gradient of logsumexp too; where it is differentiated
again, it is written in differentiable operations.

Axes: B batch, L query_length, S key_length, H heads, D head_dim (of value too: the caller pads).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ambient import is_differentiated_again
from anyattention.native.structures import Numbers, Pairs
from anyattention.ops.operator import Result, operator

__all__ = ["FusedDense", "fused_dense"]

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, eq=False)
class FusedDense:
    """Dense attention by dot products; no size may be 0.

    Attributes:
        query, key, value: `(B, L, H, D)`, `(B, S, H, D)`, `(B, S, H, D)`.
        bias: `(B | 1, H | 1, L | 1, S | 1)` of the query's dtype or float32, without gradient, or None.
        causal: query i attends to keys 0 to i.
        scale: the factor of the dot product.
    """

    query: Annotated[Tensor, Numbers("batch num_queries heads head_dim")]
    key: Annotated[Tensor, Numbers("batch num_keys heads head_dim")]
    value: Annotated[Tensor, Numbers("batch num_keys heads head_dim")]
    bias: Annotated[Tensor | None, Pairs("batch heads num_queries num_keys")]
    causal: bool
    scale: float


@dataclass(frozen=True, eq=False)
class FusedDenseBackward:
    """The gradients of query, key and value."""

    call: FusedDense
    output: Annotated[Tensor, Numbers("batch num_queries heads head_dim")]
    logsumexp: Annotated[Tensor, Numbers("batch num_queries heads")]
    grad_output: Annotated[Tensor, Numbers("batch num_queries heads head_dim")]
    grad_logsumexp: Annotated[Tensor | None, Numbers("batch num_queries heads")]


def _forward(call: FusedDense) -> tuple[Tensor, Tensor]:
    query, key, bias = call.query, call.key, call.bias
    rows = _heads_first(query, key, call.value)
    output, logsumexp = _forward_kernel(*rows, 0.0, call.causal, attn_mask=bias, scale=call.scale)
    output, logsumexp = output.transpose(1, 2).contiguous(), logsumexp.transpose(1, 2).contiguous()
    # A row whose scores are all NaN, in one of its blocks of keys, counts as empty in the kernel, which writes 0.
    suspicious = query.sum() + key.sum()
    if bias is not None:
        suspicious = suspicious + bias.amax()
    if not suspicious.isfinite():
        broken = _broken_rows(query, key, bias, call.causal)
        output.masked_fill_(broken[..., None], torch.nan)
        logsumexp.masked_fill_(broken, torch.nan)
    return output, logsumexp


def _broken_rows(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """Which rows `(B, L, H)` meet a NaN or Inf in the query, in a key or in the bias, where -inf hides a pair."""
    broken_keys = ~key.isfinite().all(-1)
    if causal:
        last_key = torch.arange(query.shape[1], device=query.device).clamp(max=key.shape[1] - 1)
        broken_keys = (broken_keys.cumsum(1) > 0)[:, last_key]
    else:
        broken_keys = broken_keys.any(1, keepdim=True)
    broken = broken_keys | ~query.isfinite().all(-1)
    if bias is not None:
        broken = broken | (bias.isnan() | (bias == torch.inf)).any(-1).transpose(1, 2)
    return broken


def _backward(record: FusedDenseBackward) -> tuple[Tensor, Tensor, Tensor]:
    call, output, grad_output = record.call, record.output, record.grad_output
    query, key, value = call.query, call.key, call.value
    head_dim = query.shape[-1]
    if record.grad_logsumexp is not None:
        # The kernel subtracts delta = sum(grad_output * output) from the weights' gradient. One more channel, where
        # value is 0, makes that delta - grad_logsumexp, which is the gradient through logsumexp.
        query, key, value = (F.pad(x, (0, 1)) for x in (query, key, value))
        output = torch.cat([output, -record.grad_logsumexp[..., None].to(output.dtype)], dim=-1)
        grad_output = F.pad(grad_output, (0, 1), value=1.0)
    rows = _heads_first(grad_output, query, key, value, output, record.logsumexp)
    grads = _backward_kernel(*rows, 0.0, call.causal, attn_mask=call.bias, scale=call.scale)
    grad_query, grad_key, grad_value = (grad.transpose(1, 2)[..., :head_dim].contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Views `(B, H, L, D)` or `(B, H, L)` whose last axis is dense: the kernel takes that for granted.

    And of its output, to which it gives the order of the query's strides: beside another stride of 1, in numbers that
    share memory, the last axis may come before the end, and what it then writes is anything.
    """
    return [(x if _is_dense_at_the_end(x) else x.contiguous()).transpose(1, 2) for x in tensors]


def _is_dense_at_the_end(x: Tensor) -> bool:
    *others, last = zip(x.shape, x.stride(), strict=True)
    return last[1] == 1 and all(size == 1 or stride != 1 for size, stride in others)


def _differentiable_backward(call: FusedDense, by: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients as a function that autograd differentiates again; B x H x L x S numbers in memory.

    P = softmax(scale Q K' + bias), dV = P' dO, dS = P * (dO V' - sum(P * dO V') + d logsumexp),
    dQ = scale dS K, dK = scale dS' Q.
    """
    sums, scale = torch.promote_types(call.query.dtype, torch.float32), call.scale
    grad_output, grad_logsumexp = by
    assert grad_output is not None
    rows = (grad_output, call.query, call.key, call.value)
    grad_output, query, key, value = (x.transpose(1, 2).to(sums) for x in rows)
    scores = scale * (query @ key.mT)
    if call.bias is not None:
        scores = scores + call.bias.to(sums)
    if call.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1)
    grad_weights = grad_output @ value.mT
    centre = (weights * grad_weights).sum(-1, keepdim=True)
    if grad_logsumexp is not None:
        centre = centre - grad_logsumexp.transpose(1, 2)[..., None].to(sums)
    grad_scores = weights * (grad_weights - centre)
    grads = (
        scale * (grad_scores @ key),
        scale * (grad_scores.mT @ query),
        weights.mT @ grad_output,
    )
    return tuple([grad.transpose(1, 2).to(call.query.dtype) for grad in grads])


def _gradient(
    call: FusedDense, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    output, logsumexp = results
    grad_output = torch.zeros_like(output) if by[0] is None else by[0]
    if is_differentiated_again():
        grads = _differentiable_backward(call, (grad_output, by[1]))
    else:
        grads = _fused_dense_backward(FusedDenseBackward(call, output, logsumexp, grad_output, by[1]))
    return dict(zip(("query", "key", "value"), grads, strict=True))


fused_dense = operator(
    FusedDense,
    [Result("output", like="query"), Result("logsumexp", "batch num_queries heads", is_sum=True)],
    gradient=_gradient,
    keeps_results=True,
)
fused_dense.kernel("cpu")(_forward)
_fused_dense_backward = operator(
    FusedDenseBackward, [Result(f"grad_{name}", like=f"call.{name}") for name in ("query", "key", "value")]
)
_fused_dense_backward.kernel("cpu")(_backward)
