"""Linear maps of many rows: one product for all of them, forward and backward, and large results in large pages.

A fresh tensor of 25 MB costs 6,400 page faults, which take as long as the product that fills it.

Axes: N rows, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import native
from anyattention.ambient import Moment, is_autocast_enabled, moment_of

__all__ = ["add_bias", "linear_maps"]

# Below this, faults cost less than the detour.
_SMALLEST = 1 << 22


def linear_maps(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (None,), widths: Sequence[int] | None = None
) -> list[Tensor]:
    """`x weight' + bias` for each weight: `(..., N, O)` from `(..., N, I)` and `(O, I)`; differentiable to any order.

    One product in place of several, each with a cost of its own: the results are columns of one matrix, cut by
    `widths`, where these are given. There are biases for all weights or for none; x may be a sparse CSR matrix.
    """
    widths = [weight.shape[0] for weight in weights] if widths is None else list(widths)
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    bias = torch.cat([each for each in biases if each is not None]) if biases[0] is not None else None
    if x.layout == torch.strided:
        if x.ndim == 2 and _is_plain(x, weight, bias):
            return list(_LinearMap.apply(x, weight, bias, widths))
        return list(F.linear(x, weight, bias).split(widths, dim=-1))
    product = torch.sparse.mm(x, weight.T)
    return list((product if bias is None else product + bias).split(widths, dim=-1))


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """`x + bias`, `(N, O)` and `(O,)`; differentiable to any order."""
    if x.ndim == 2 and x.numel() * x.element_size() >= _SMALLEST and _is_plain(x, bias):
        return _AddBias.apply(x, bias)
    return x + bias


def _is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing but plain tensors on the CPU is at hand."""
    if not x.is_cpu or moment_of((x, *others)) is not Moment.PLAIN:
        return False
    return not is_autocast_enabled(x.device) and native.available()


# Both functions take plain tensors only: those of torch.func would need a setup_context, which costs as much as a small
# product.
class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.widths = widths
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        result = native.large_empty(x, (x.shape[0], weight.shape[0]))
        if bias is None:
            torch.mm(x, weight.T, out=result)
        else:
            torch.addmm(bias, x, weight.T, out=result)
        return result.split(widths, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        is_plain = not torch.is_grad_enabled() and moment_of(gradients) is Moment.PLAIN
        grad = _joined(gradients, ctx.widths, x, is_plain)
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = torch.mm(grad, weight, out=native.large_empty(x, x.shape)) if is_plain else grad @ weight
        if ctx.needs_input_grad[1]:
            by_weight = grad.T @ x
        if ctx.needs_input_grad[2]:
            by_bias = grad.sum(0)
        return by_x, by_weight, by_bias, None


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return torch.add(x, bias, out=native.large_empty(x, x.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (grad,) = gradients
        return grad, grad.sum(0) if ctx.needs_input_grad[1] else None


def _joined(gradients: Sequence[Tensor | None], widths: Sequence[int], like: Tensor, is_plain: bool) -> Tensor:
    """The gradients `(N, O)` side by side; plain ones without a copy where that is how they lie."""
    first = gradients[0]
    if first is not None and is_plain:
        offset, stride = first.storage_offset(), (sum(widths), 1)
        for grad, width in zip(gradients, widths, strict=True):
            if grad is None or grad.stride() != stride or grad.storage_offset() != offset:
                break
            if grad.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                break
            offset += width
        else:
            return first.as_strided((like.shape[0], sum(widths)), stride)
    each = zip(gradients, widths, strict=True)
    return torch.cat([like.new_zeros(like.shape[0], width) if grad is None else grad for grad, width in each], dim=1)
