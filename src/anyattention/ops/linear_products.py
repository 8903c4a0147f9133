"""Products of a long matrix with a small one, of plain tensors: the rows of linear maps and their gradients.

They are the kernels' own where these have the widest vectors, and PyTorch's elsewhere: those of MKL take 2.5 times as
long on some processors that have AVX-512.

Axes: N rows, I in_features, O out_features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention import native

__all__ = [
    "are_fast",
    "joined_columns",
    "map_gradients",
    "map_rows",
    "multiplied_gradients",
    "suit_kernels",
    "write_products",
]

# Of the kernels' products: narrower matrices would leave most of a vector empty, larger ones do not stay in the caches.
_NARROWEST, _LARGEST = 8, 1 << 18


def map_rows(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> Sequence[Tensor]:
    """`linear_maps` of plain tensors `(N, I)` and `(O, I)`, and nothing of autograd."""
    if sum(widths) == weight.shape[0] and are_fast(x, weight, bias):
        return _products([x], weight.T, bias, widths)
    result = native.large_empty(x, (x.shape[0], weight.shape[0]))
    if bias is None:
        torch.mm(x, weight.T, out=result)
    else:
        torch.addmm(bias, x, weight.T, out=result)
    return result.split(list(widths), dim=-1)


def map_gradients(
    gradients: Sequence[Tensor | None],
    widths: Sequence[int],
    x: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    is_plain: bool,
) -> list[Tensor | None]:
    """By x, by the weight and by the bias, those that are needed, from the gradients by `map_rows`'s results.

    Args:
        is_plain: whether nothing but plain tensors is at hand, and no derivative is taken of the gradients.
    """
    if is_plain and are_fast(x, weight, None) and all(grad is None or grad.is_cpu for grad in gradients):
        grads = _as_rows(gradients, widths, x)
    else:
        grads = [joined_columns(gradients, widths, x, x.shape[0], is_plain)]
    return multiplied_gradients(grads, x, weight, needs, is_plain)


def multiplied_gradients(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, needs: Sequence[bool], is_plain: bool
) -> list[Tensor | None]:
    """By x, by the weight and by the bias, those that are needed, of `x weight' + bias`.

    Its gradient `(N, O)` comes in columns side by side; in one piece where the kernels do not multiply.
    """
    needs_x, needs_weight, needs_bias = needs
    by_x = by_weight = by_bias = None
    if is_plain and grads[0].is_cpu and are_fast(x, weight, None):
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


def are_fast(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels multiply x `(N, I)` with a weight `(O, I)` faster than PyTorch does."""
    return suit_kernels(x, weight, bias) and _row_stride(x) > 0


def suit_kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """`are_fast` by all but the number and the places of x's rows, which a compiler may not know."""
    for each in (x, weight, bias):
        if each is not None and (each.dtype is not torch.float32 or not each.is_cpu):
            return False
    outputs, inputs = weight.shape
    is_wide = min(outputs, inputs) >= _NARROWEST and outputs * inputs <= _LARGEST
    # What does not fit is PyTorch's to refuse.
    fits = x.shape[1] == inputs and (bias is None or (bias.shape == (outputs,) and bias.is_contiguous()))
    return is_wide and fits and native.multiplies_fast()


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
    write_products(rows, matrix, bias, results)
    return results


def write_products(rows: Sequence[Tensor], matrix: Tensor, bias: Tensor | None, results: Sequence[Tensor]) -> None:
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


def joined_columns(
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
