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
from anyattention.ambient import (
    Moment,
    is_autocast_enabled,
    is_compiling,
    is_exported_to_onnx,
    is_transformed,
    moment_of,
)
from anyattention.ops.linear_map_operators import LinearMap, linear_map
from anyattention.ops.linear_products import (
    are_fast,
    joined_columns,
    map_gradients,
    map_rows,
    multiplied_gradients,
    suit_kernels,
    write_products,
)

__all__ = [
    "add_bias",
    "folded",
    "folded_gradients",
    "joined",
    "linear_maps",
    "rows_and_terms",
    "stacked_maps",
]

# Of a compiled program's products: from here on reading x once more costs less than copying columns.
_WIDE = 32
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
    weight, bias = joined(weights, biases)
    if x.layout == torch.strided:
        if x.ndim == 2 and _is_plain(x, weight, bias):
            return list(_LinearMap.apply(x, weight, bias, widths))
        if x.ndim == 2 and is_compiling() and _compiles_to_kernels(x, weight, bias):
            return _compiled_maps(x, weight, bias, widths)
        return list(F.linear(x, weight, bias).split(widths, dim=-1))
    product = torch.sparse.mm(x, weight.T)
    return list((product if bias is None else product + bias).split(widths, dim=-1))


def joined(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of all maps at once."""
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    return weight, torch.cat([each for each in biases if each is not None]) if biases[0] is not None else None


def folded(weight: Tensor, *vectors: Tensor) -> Tensor:
    """What a weight `(H x C, I)` and T vectors `(H, C)` make of a row, for each vector and head: `(T x H, I)`.

    Folding spares a temporary as large as the rows: the products of these with each vector.
    """
    by_head = weight.unflatten(0, vectors[0].shape)
    by_vector = vectors[0] if len(vectors) == 1 else torch.stack(vectors)
    return (by_vector.unsqueeze(-1) * by_head).sum(-2).flatten(0, -2)


def folded_gradients(by_folded: Tensor, weight: Tensor, *vectors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """By the weight `(H x C, I)` and by the vectors, from the gradient `(T x H, I)` by what `folded` gives."""
    by_head = by_folded.reshape(len(vectors), vectors[0].shape[0], -1).transpose(0, 1)
    by_weight = torch.bmm(torch.stack(vectors, 2), by_head)
    by_vectors = torch.bmm(by_head, weight.reshape(*vectors[0].shape, -1).transpose(1, 2))
    return by_weight.reshape(weight.shape), by_vectors.unbind(1)


def rows_and_terms(x: Tensor, weight: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
    """`x weight'` with heads, `(..., N, H, C)`, and its heads' products with each vector, `(..., N, H, 1)`.

    One product, differentiable to any order. x may be a sparse CSR matrix.
    """
    heads, channels = vectors[0].shape
    widths = [heads * channels, *[heads] * len(vectors)]
    rows, *terms = linear_maps(x, [weight, folded(weight, *vectors)], widths=widths)
    return [rows.unflatten(-1, (heads, channels)), *[term.unsqueeze(-1) for term in terms]]


def stacked_maps(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], widths: Sequence[int]
) -> list[Tensor]:
    """Products of several inputs as the rows of one matrix; differentiable to any order.

    Each input `(N, I)` has a weight `(R x O, I)`, whose product is read as R rows of O numbers for each row of the
    input. The rows of all inputs, one after the other, are one matrix, cut by `widths` into columns, which sum up to O:
    one tensor for each, `(sum of N x R, width)`. An input may be a sparse CSR matrix.

    Cost: a product for each input, forward and for each gradient; nothing is copied.
    """
    total = sum(widths)
    tensors = [*inputs, *weights, *biases]
    if all(x.layout == torch.strided for x in inputs) and inputs and _is_plain(*inputs, *weights, *biases):
        return list(_StackedMaps.apply(list(widths), len(inputs), *tensors))
    products = [
        linear_maps(x, [weight], [bias])[0].unflatten(-1, (-1, total)).flatten(-3, -2)
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
        if weight.shape[0]
    ]
    return list(torch.cat(products, dim=-2).split(list(widths), dim=-1))


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


def _compiles_to_kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a compiled program has the kernels' products of these.

    Not where nothing needs a gradient: a program whose operators autograd does not see drops forward derivatives that
    are taken around it, in silence.
    """
    tensors = [each for each in (x, weight, bias) if each is not None]
    if is_autocast_enabled(x.device) or is_exported_to_onnx() or is_transformed(*tensors) or not native.available():
        return False
    needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    return needs_gradient and suit_kernels(x, weight, bias)


def _compiled_maps(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> list[Tensor]:
    """The maps as operators: wide results apart, since a compiler joins the gradients of columns by a copy."""
    found: list[Tensor] = []
    first = 0
    while len(found) < len(widths):
        own = [widths[len(found)]]
        while own[-1] < _WIDE and len(found) + len(own) < len(widths) and widths[len(found) + len(own)] < _WIDE:
            own.append(widths[len(found) + len(own)])
        last = first + sum(own)
        product = linear_map(LinearMap(x, weight[first:last], None if bias is None else bias[first:last]))
        found += product.split(own, dim=-1)
        first = last
    return found


# The functions take plain tensors only: those of torch.func would need a setup_context, which costs as much as a small
# product.
class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.widths = widths
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return tuple(map_rows(x, weight, bias, widths))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        is_plain = not torch.is_grad_enabled() and moment_of(gradients) is Moment.PLAIN
        return *map_gradients(gradients, ctx.widths, x, weight, ctx.needs_input_grad[:3], is_plain), None


class _StackedMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, widths: list[int], count: int, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.widths, ctx.count = widths, count
        ctx.save_for_backward(*tensors[: 2 * count])
        ctx.set_materialize_grads(False)
        inputs, weights, biases = (tensors[first : first + count] for first in (0, count, 2 * count))
        numbers = [x.shape[0] * weight.shape[0] for x, weight in zip(inputs, weights, strict=True)]
        result = native.large_empty(inputs[0], (sum(numbers) // sum(widths), sum(widths)))
        for x, weight, bias, part in zip(inputs, weights, biases, result.flatten().split(numbers), strict=True):
            part = part.view(x.shape[0], weight.shape[0])
            if are_fast(x, weight, bias):
                write_products([x], weight.T, bias, [part])
            elif bias is None:
                torch.mm(x, weight.T, out=part)
            else:
                torch.addmm(bias, x, weight.T, out=part)
        return result.split(widths, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        count = ctx.count
        tensors = ctx.saved_tensors
        is_plain = not torch.is_grad_enabled() and moment_of(gradients) is Moment.PLAIN
        inputs, weights = tensors[:count], tensors[count:]
        numbers = [x.shape[0] * weight.shape[0] for x, weight in zip(inputs, weights, strict=True)]
        rows = sum(numbers) // sum(ctx.widths)
        grad = joined_columns(gradients, ctx.widths, inputs[0], rows, is_plain).reshape(-1)
        found: list[Tensor | None] = [None] * 3 * count
        for place, part in enumerate(grad.split(numbers)):
            x, weight = inputs[place], weights[place]
            part = part.view(x.shape[0], weight.shape[0])
            needs = ctx.needs_input_grad[2 + place :: count][:3]
            found[place::count] = multiplied_gradients([part], x, weight, needs, is_plain)
        return None, None, *found


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return torch.add(x, bias, out=native.large_empty(x, x.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (grad,) = gradients
        return grad, grad.sum(0) if ctx.needs_input_grad[1] else None
