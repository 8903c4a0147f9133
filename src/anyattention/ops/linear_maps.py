"""Linear maps of many rows: one product for all of them, forward and backward, and large results in large pages.

A fresh tensor of 25 MB costs 6,400 page faults, which take as long as the product that fills it. The products are the
kernels' own where these have the widest vectors, and PyTorch's elsewhere: those of MKL take 2.5 times as long on some
processors that have AVX-512.

Axes: N rows, I in_features, O out_features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import native
from anyattention.ambient import Moment, is_autocast_enabled, moment_of

__all__ = ["add_bias", "linear_maps", "stacked_maps"]

# Below this, faults cost less than the detour.
_SMALLEST = 1 << 22
# Of the kernels' products: narrower matrices would leave most of a vector empty, larger ones do not stay in the caches.
_NARROWEST, _LARGEST = 8, 1 << 18


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


# The functions take plain tensors only: those of torch.func would need a setup_context, which costs as much as a small
# product.
class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.widths = widths
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        if _are_fast(x, weight, bias):
            return tuple(_products([x], weight.T, bias, widths))
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
        if is_plain and _are_fast(x, weight, None) and all(grad is None or grad.is_cpu for grad in gradients):
            grads = _as_rows(gradients, ctx.widths, x)
        else:
            grads = [_joined(gradients, ctx.widths, x, x.shape[0], is_plain)]
        return *_gradients(grads, x, weight, ctx.needs_input_grad[:3], is_plain), None


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
            if _are_fast(x, weight, bias):
                _write_products([x], weight.T, bias, [part])
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
        # No flatten: autograd's vmap has no rule for it.
        grad = _joined(gradients, ctx.widths, inputs[0], rows, is_plain).reshape(-1)
        found: list[Tensor | None] = [None] * 3 * count
        for place, part in enumerate(grad.split(numbers)):
            x, weight = inputs[place], weights[place]
            part = part.view(x.shape[0], weight.shape[0])
            needs = ctx.needs_input_grad[2 + place :: count][:3]
            found[place::count] = _gradients([part], x, weight, needs, is_plain)
        return None, None, *found


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return torch.add(x, bias, out=native.large_empty(x, x.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (grad,) = gradients
        return grad, grad.sum(0) if ctx.needs_input_grad[1] else None


def _gradients(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, needs: Sequence[bool], is_plain: bool
) -> list[Tensor | None]:
    """By x, by the weight and by the bias, those that are needed, of `x weight' + bias`.

    Its gradient `(N, O)` comes in columns side by side; in one piece where the kernels do not multiply.
    """
    needs_x, needs_weight, needs_bias = needs
    by_x = by_weight = by_bias = None
    if is_plain and grads[0].is_cpu and _are_fast(x, weight, None):
        if needs_x:
            (by_x,) = _products(grads, weight, None, [weight.shape[1]])
        if needs_weight or needs_bias:
            by_weight, by_bias = _gradients_by_matrix(grads, x, weight, needs_bias)
        return [by_x, by_weight, by_bias]
    (grad,) = grads
    if needs_x:
        by_x = torch.mm(grad, weight, out=native.large_empty(x, x.shape)) if is_plain else grad @ weight
    if needs_weight:
        by_weight = grad.T @ x
    if needs_bias:
        by_bias = grad.sum(0)
    return [by_x, by_weight, by_bias]


def _are_fast(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels multiply x `(N, I)` with a weight `(O, I)` faster than PyTorch does."""
    for each in (x, weight, bias):
        if each is not None and (each.dtype is not torch.float32 or not each.is_cpu):
            return False
    outputs, inputs = weight.shape
    is_wide = min(outputs, inputs) >= _NARROWEST and outputs * inputs <= _LARGEST
    # What does not fit is PyTorch's to refuse.
    fits = x.shape[1] == inputs and (bias is None or (bias.shape == (outputs,) and bias.is_contiguous()))
    return is_wide and fits and _row_stride(x) > 0 and native.multiplies_fast()


def _row_stride(x: Tensor) -> int:
    """From one row to the next; 0 where a row is in pieces, or rows overlap."""
    rows, width = x.shape
    by_row, by_column = x.stride()
    if by_column != 1 and width > 1:
        return 0
    return width if rows < 2 else by_row if by_row >= width else 0


def _products(rows: Sequence[Tensor], matrix: Tensor, bias: Tensor | None, widths: Sequence[int]) -> list[Tensor]:
    """`rows matrix + bias`, of rows `(N, I)` side by side and `(I, O)`: as tensors of some widths."""
    results = [rows[0].new_empty(rows[0].shape[0], width) for width in widths]
    _write_products(rows, matrix, bias, results)
    return results


def _write_products(rows: Sequence[Tensor], matrix: Tensor, bias: Tensor | None, results: Sequence[Tensor]) -> None:
    """`_products`, into contiguous results."""
    count, widths = len(results), [result.shape[1] for result in results]
    native.run(
        "linear_map",
        *(rows[0].shape[0], *_columns(rows), matrix.data_ptr(), *matrix.stride()),
        *(None if bias is None else bias.data_ptr(), count, _pointers(results), (ctypes.c_int64 * count)(*widths)),
        native.num_threads(),
    )


def _gradients_by_matrix(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """`grads' x` as a tensor like the weight `(O, I)`, and the sum of the rows of grads `(N, O)` side by side."""
    by_weight = x.new_empty(weight.shape)
    by_bias = x.new_empty(weight.shape[0]) if needs_bias else None
    native.run(
        "linear_map_by_matrix",
        *(x.shape[0], *_columns(grads), x.data_ptr(), x.shape[1], _row_stride(x), native.num_threads()),
        *(by_weight.data_ptr(), None if by_bias is None else by_bias.data_ptr()),
    )
    return by_weight, by_bias


def _columns(rows: Sequence[Tensor]) -> tuple[Any, ...]:
    """Matrices side by side, as the kernels take them."""
    numbers = ctypes.c_int64 * len(rows)
    return len(rows), _pointers(rows), numbers(*[x.shape[1] for x in rows]), numbers(*map(_row_stride, rows))


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


def _as_rows(gradients: Sequence[Tensor | None], widths: Sequence[int], like: Tensor) -> list[Tensor]:
    """The gradients as rows that the kernels can read."""
    filled = [
        like.new_zeros(like.shape[0], width) if grad is None else grad
        for grad, width in zip(gradients, widths, strict=True)
    ]
    return [grad if _row_stride(grad) else grad.contiguous() for grad in filled]


def _joined(
    gradients: Sequence[Tensor | None], widths: Sequence[int], like: Tensor, rows: int, is_plain: bool
) -> Tensor:
    """The gradients `(rows, O)` side by side; plain ones without a copy where that is how they lie."""
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
            return first.as_strided((rows, sum(widths)), stride)
    each = zip(gradients, widths, strict=True)
    return torch.cat([like.new_zeros(rows, width) if grad is None else grad for grad, width in each], dim=1)
