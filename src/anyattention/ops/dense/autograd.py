"""PyTorch's fused CPU attention as an operator that returns logsumexp and can be differentiated twice.

`anyattention::fused_dense` runs PyTorch's kernel; its backward runs PyTorch's backward kernel and takes the
gradient of logsumexp too; under `create_graph` the backward is written in differentiable operations.

Axes: B batch, L query_length, S key_length, H heads, D head_dim (of value too: the caller pads).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fused_dense"]

_library = torch.library.Library("anyattention", "FRAGMENT")
_library.define(
    "fused_dense(Tensor query, Tensor key, Tensor value, Tensor? bias, bool causal, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "fused_dense_backward(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key,"
    " Tensor value, Tensor? bias, Tensor output, Tensor logsumexp, bool causal, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def fused_dense(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(B, L, H, D)` and logsumexp `(B, L, H)`; no size may be 0.

    Args:
        query, key, value: `(B, L, H, D)`, `(B, S, H, D)`, `(B, S, H, D)`.
        bias: `(B | 1, H | 1, L | 1, S | 1)` of the query's dtype or float32, without gradient, or None.
        causal: query i attends to keys 0 to i.
        scale: the factor of the dot product.
    """
    return torch.ops.anyattention.fused_dense(query, key, value, bias, causal, scale)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, logsumexp = _forward_kernel(*_heads_first(query, key, value), 0.0, causal, attn_mask=bias, scale=scale)
    output, logsumexp = output.transpose(1, 2).contiguous(), logsumexp.transpose(1, 2).contiguous()
    # A row whose scores are all NaN, in one of its blocks of keys, counts as empty in the kernel, which writes 0.
    suspicious = query.sum() + key.sum()
    if bias is not None:
        suspicious = suspicious + bias.amax()
    if not suspicious.isfinite():
        broken = _broken_rows(query, key, bias, causal)
        output.masked_fill_(broken[..., None], torch.nan)
        logsumexp.masked_fill_(broken, torch.nan)
    return output, logsumexp


def _broken_rows(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """Which rows `(B, L, H)` meet a NaN or Inf in the query, in a key or in the bias, where -inf hides a pair."""
    broken_keys = ~key.isfinite().all(-1)
    if causal:
        last_key = torch.arange(query.shape[1]).clamp(max=key.shape[1] - 1)
        broken_keys = (broken_keys.cumsum(1) > 0)[:, last_key]
    else:
        broken_keys = broken_keys.any(1, keepdim=True)
    broken = broken_keys | ~query.isfinite().all(-1)
    if bias is not None:
        broken = broken | (bias.isnan() | (bias == torch.inf)).any(-1).transpose(1, 2)
    return broken


def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    sums = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=sums)


def _backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = query.shape[-1]
    if grad_logsumexp is not None:
        # The kernel subtracts delta = sum(grad_output * output) from the weights' gradient. One more channel, where
        # value is 0, makes that delta - grad_logsumexp, which is the gradient through logsumexp.
        query, key, value = (F.pad(x, (0, 1)) for x in (query, key, value))
        output = torch.cat([output, -grad_logsumexp[..., None].to(output.dtype)], dim=-1)
        grad_output = F.pad(grad_output, (0, 1), value=1.0)
    grads = _backward_kernel(
        *_heads_first(grad_output, query, key, value, output, logsumexp),
        0.0,
        causal,
        attn_mask=bias,
        scale=scale,
    )
    grad_query, grad_key, grad_value = (grad.transpose(1, 2)[..., :head_dim].contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


def _backward_shapes(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))  # pyright: ignore[reportReturnType]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Views `(B, H, L, D)` or `(B, H, L)` whose last axis is dense: the kernel takes that for granted."""
    return [(tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2) for tensor in tensors]


def _differentiable_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients as a function that autograd differentiates again; B x H x L x S numbers in memory.

    P = softmax(scale Q K' + bias), dV = P' dO, dS = P * (dO V' - sum(P * dO V') + d logsumexp),
    dQ = scale dS K, dK = scale dS' Q.
    """
    sums = torch.promote_types(query.dtype, torch.float32)
    grad_output, query, key, value = (x.transpose(1, 2).to(sums) for x in (grad_output, query, key, value))
    scores = scale * (query @ key.mT)
    if bias is not None:
        scores = scores + bias.to(sums)
    if causal:
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
    return tuple(grad.transpose(1, 2) for grad in grads)  # pyright: ignore[reportReturnType]


def _setup_context(ctx, inputs, output) -> None:  # PyTorch's own signature
    query, key, value, bias, ctx.causal, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, bias, *output)


def _gradients(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None):
    query, key, value, bias, output, logsumexp = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    inputs = (query, key, value, bias)
    settings = (ctx.causal, ctx.scale)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _differentiable_backward(grad_output, grad_logsumexp, *inputs, *settings)
        grads = tuple(grad.to(query.dtype) for grad in grads)
    else:
        grads = torch.ops.anyattention.fused_dense_backward(
            grad_output, grad_logsumexp, *inputs, output, logsumexp, *settings
        )
    return *grads, None, None, None


_library.impl("fused_dense", _forward, "CPU")
_library.impl("fused_dense_backward", _backward, "CPU")
torch.library.register_fake("anyattention::fused_dense", _forward_shapes, lib=_library)
torch.library.register_fake("anyattention::fused_dense_backward", _backward_shapes, lib=_library)
torch.library.register_autograd("anyattention::fused_dense", _gradients, setup_context=_setup_context, lib=_library)
