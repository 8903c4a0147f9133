"""Linear maps of many rows whose results are large: written into large pages, and gradients summed in one buffer.

A fresh tensor of 25 MB costs 6,400 page faults, which take as long as the product that fills it.

Axes: N rows, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import _native
from anyattention._checks import is_autocast_enabled
from anyattention.ops.eager import are_plain

__all__ = ["add_bias", "linear_maps"]

# Below this, faults cost less than the detour.
_SMALLEST = 1 << 22


def linear_maps(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`x weight' + bias` for each weight: `(..., N, O)` from `(..., N, I)` and `(O, I)`; differentiable to any order.

    There are biases for all weights or for none; x may be a sparse CSR matrix.
    """
    widths = [weight.shape[0] for weight in weights]
    is_sparse = x.layout != torch.strided
    if not is_sparse and _takes_large_pages(x.shape[0] * max(widths), x, *weights, *biases):
        return list(_LinearMaps.apply(x, len(weights), *weights, *biases))
    # One product in place of several, each with a cost of its own.
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    bias = torch.cat([each for each in biases if each is not None]) if biases[0] is not None else None
    if not is_sparse:
        return list(F.linear(x, weight, bias).split(widths, dim=-1))
    product = torch.sparse.mm(x, weight.T)
    return list((product if bias is None else product + bias).split(widths, dim=-1))


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """`x + bias`, `(N, O)` and `(O,)`; differentiable to any order."""
    return _AddBias.apply(x, bias) if _takes_large_pages(x.numel(), x, bias) else x + bias


def _takes_large_pages(size: int, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a result of `size` numbers is large enough, and nothing but plain tensors on the CPU is at hand."""
    if size * x.element_size() < _SMALLEST or x.ndim != 2 or not are_plain((x, *others)):
        return False
    return not is_autocast_enabled(x.device) and _native.available()


class _LinearMaps(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, count: int, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        results = []
        for weight, bias in zip(parameters[:count], parameters[count:], strict=True):
            assert weight is not None
            result = _native.large_empty(x, (x.shape[0], weight.shape[0]))
            if bias is None:
                torch.mm(x, weight.T, out=result)
            else:
                torch.addmm(bias, x, weight.T, out=result)
            results.append(result)
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.count, *parameters = inputs
        ctx.save_for_backward(x, *parameters[: ctx.count])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        given = [(grad, weight) for grad, weight in zip(gradients, weights, strict=True) if grad is not None]
        by_x = _sum_of_products(given, x) if ctx.needs_input_grad[0] and given else None
        needed = ctx.needs_input_grad[2:]
        by_weights = [
            grad.T @ x if is_needed and grad is not None else None
            for grad, is_needed in zip(gradients, needed[: ctx.count], strict=True)
        ]
        by_biases = [
            grad.sum(0) if is_needed and grad is not None else None
            for grad, is_needed in zip(gradients, needed[ctx.count :], strict=True)
        ]
        return by_x, None, *by_weights, *by_biases


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor) -> Tensor:
        return torch.add(x, bias, out=_native.large_empty(x, x.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (grad,) = gradients
        return grad, grad.sum(0) if ctx.needs_input_grad[1] else None


def _sum_of_products(pairs: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The sum of `grad weight` over the pairs, `(N, I)`."""
    if torch.is_grad_enabled():
        return torch.stack([grad @ weight for grad, weight in pairs]).sum(0)
    result = _native.large_empty(x, x.shape)
    for number, (grad, weight) in enumerate(pairs):
        if number == 0:
            torch.mm(grad, weight, out=result)
        else:
            result.addmm_(grad, weight)
    return result
