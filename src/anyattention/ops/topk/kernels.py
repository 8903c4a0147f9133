"""The compiled kernel that chooses keys, called on tensors: a plain function without gradients.

Axes: B batch, H heads, G key heads, L query_length, S key_length, D head_dim, k keys chosen.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from anyattention import _native
from anyattention.errors import InvalidInputError
from anyattention.ops.graph.kernels import pointer, require_numbers

__all__ = ["chosen_keys"]

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIZES = ("batch", "heads", "key_heads", "num_queries", "num_keys", "head_dim", "k", "num_threads")


class _TopK(ctypes.Structure):
    _fields_ = [
        *((name, _SIZE) for name in _SIZES),
        ("scale", ctypes.c_double),
        *((name, _POINTER) for name in ("query", "key", "key_begins", "key_ends", "mask")),
        ("mask_strides", _SIZE * 4),
        ("bias", _POINTER),
        ("bias_strides", _SIZE * 4),
    ]


def chosen_keys(
    query: Tensor,
    key: Tensor,
    begins: Tensor | None,
    ends: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    k: int,
) -> Tensor:
    """Int64 `(B, L, H, k)`: the keys of each query's largest scores, the largest first, -1 in slots that are not used.

    NaN is larger than any number, and of equal scores the first key is taken.

    Args:
        query, key: `(B, L, H, D)`, `(B, S, G, D)`, float32 on the CPU.
        begins, ends: `(L,)` int64, query i sees the keys begins[i] up to ends[i]; None lets each see all.
        mask: boolean, axes (B, H, L, S) whole or 1; False hides.
        bias: float32, axes as the mask, added to the scores; -inf hides.
        scale: the factor of the dot product.
        k: how many, at least 1.
    """
    query, key = query.contiguous(), key.contiguous()
    batch, num_queries, heads, head_dim = query.shape
    num_keys, key_heads = key.shape[1:3]
    require_numbers("query", query, query.shape, torch.float32)
    require_numbers("key", key, (batch, num_keys, key_heads, head_dim), torch.float32)
    for name, array in (("begins", begins), ("ends", ends)):
        fits = array is None or (array.dtype == torch.int64 and array.is_contiguous())
        if array is not None and not (fits and array.is_cpu and array.shape == (num_queries,)):
            raise InvalidInputError(
                argument="pattern",
                expected=f"{name} of contiguous int64 on the CPU, ({num_queries},)",
                actual=f"{array.dtype} on {array.device}, {tuple(array.shape)}",
            )
    pairs = []
    for name, tensor, dtype in (("mask", mask, torch.bool), ("bias", bias, torch.float32)):
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_cpu):
            raise InvalidInputError(
                argument=name, expected=f"{dtype} on cpu", actual=f"{tensor.dtype} on {tensor.device}"
            )
        whole = None if tensor is None else tensor.expand(batch, heads, num_queries, num_keys)
        pairs += [pointer(whole), (_SIZE * 4)(*(() if whole is None else whole.stride()))]
    indices = query.new_empty(batch, num_queries, heads, k, dtype=torch.int64)
    call = _TopK(
        batch,
        heads,
        key_heads,
        num_queries,
        num_keys,
        head_dim,
        k,
        _native.num_threads(),
        scale,
        *map(pointer, (query, key, begins, ends)),
        *pairs,
    )
    _native.run("topk_indices", ctypes.byref(call), indices.data_ptr())
    return indices
