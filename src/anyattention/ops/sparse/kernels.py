"""The compiled kernels of attention over runs, called on tensors: plain functions without gradients.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from anyattention import _native
from anyattention.errors import InvalidInputError
from anyattention.ops.graph.kernels import pointer, require_numbers
from anyattention.ops.sparse.runs import RunPart

__all__ = ["Settings", "attention", "attention_backward", "pairs_in_tiles"]

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIZES = ("batch", "heads", "key_heads", "num_queries", "num_keys", "head_dim", "value_dim", "num_threads")
_ARRAYS = ("query_order", "key_order", "run_offsets", "run_begins", "run_ends")


class _Pairs(ctypes.Structure):
    _fields_ = [("numbers", _POINTER), ("size", _SIZE), ("offset", _SIZE), ("strides", _SIZE * 4)]


class _RunAttention(ctypes.Structure):
    _fields_ = [
        *((name, _SIZE) for name in _SIZES),
        ("seed", _SIZE),
        ("is_double", ctypes.c_int32),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "dropout")),
        ("is_dense", ctypes.c_int32),
        *((name, _POINTER) for name in ("query", "key", "value", *_ARRAYS)),
        ("num_runs", _SIZE),
        ("mask", _Pairs),
        ("bias", _Pairs),
    ]


class Settings(NamedTuple):
    """The numbers of a call.

    Args:
        scale: the factor of the dot product.
        softcap: c in c tanh(score / c), 0 for none.
        dropout: probability with which a weight is dropped.
        is_dense: dropout numbers all pairs (batch, head, query, key), else the allowed ones (batch, pair, head).
    """

    scale: float
    softcap: float
    dropout: float
    is_dense: bool = False


@dataclass(frozen=True)
class _Call:
    """A part's structure, and the tensors that its pointers look into."""

    structure: _RunAttention
    kept: tuple[Tensor, ...]


@lru_cache(maxsize=16)
def pairs_in_tiles(part: RunPart, num_keys: int) -> int:
    """How many pairs of a part's tiles the kernels compute, allowed ones and others."""
    counted = ctypes.c_int64()
    sizes = (1, 1, 1, part.offsets.numel() - 1, num_keys, 1, 1, 1)
    call = _structure(sizes, None, False, Settings(1.0, 0.0, 0.0), (None,) * 3, part, (_Pairs(), _Pairs()))
    _native.run("run_attention_tiles", ctypes.byref(call), ctypes.byref(counted))
    return counted.value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    parts: Sequence[Tensor],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Output `(B, L, H, C)` and logsumexp `(B, L, H)`.

    Args:
        query, key, value: `(B, L, H, D)`, `(B, S, G, D)`, `(B, S, G, C)`, float32 or float64 on the CPU.
        mask: boolean, each of the axes `(B, H, L, S)` whole or 1.
        bias: in the query's dtype, its axes as the mask's, or `(H, L + S - 1)`, or with one head, by distance: that of
            query i and key j at i - j + S - 1.
        seed: 0-d int64, with dropout.
        parts: the five arrays of each `RunPart`, one part after the other.
        settings: the numbers.
    """
    output = query.new_empty(*query.shape[:3], value.shape[3])
    logsumexp = query.new_empty(query.shape[:3])
    if not parts:
        return output.zero_(), logsumexp.fill_(-torch.inf)
    for number, call in enumerate(_calls(query, key, value, mask, bias, seed, parts, settings)):
        structure = ctypes.byref(call.structure)
        _native.run("run_attention_forward", structure, number > 0, output.data_ptr(), logsumexp.data_ptr())
    return output, logsumexp


def attention_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    parts: Sequence[Tensor],
    settings: Settings,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and, where `needs_bias`, of a bias by distance, else an empty tensor."""
    gradients = [query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)]
    gradients.append(query.new_zeros(bias.shape if needs_bias and bias is not None else 0))
    if not parts:
        return tuple(gradient.zero_() for gradient in gradients)  # pyright: ignore[reportReturnType]
    whole, by_query = (*query.shape[:3], value.shape[3]), query.shape[:3]
    given = {
        "output": (output, whole),
        "logsumexp": (logsumexp, by_query),
        "grad_output": (grad_output, whole),
        "grad_logsumexp": (grad_logsumexp, by_query),
    }
    for name, (tensor, shape) in given.items():
        if tensor is not None:
            require_numbers(name, tensor, shape, query.dtype)
    kept = [None if tensor is None else tensor.contiguous() for tensor, _ in given.values()]
    pointers = [*map(pointer, kept), *map(pointer, gradients[:3]), pointer(gradients[3] if needs_bias else None)]
    for number, call in enumerate(_calls(query, key, value, mask, bias, seed, parts, settings)):
        _native.run("run_attention_backward", ctypes.byref(call.structure), number > 0, *pointers)
    return tuple(gradients)  # pyright: ignore[reportReturnType]


def _calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    parts: Sequence[Tensor],
    settings: Settings,
) -> list[_Call]:
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, num_queries, heads, head_dim = query.shape
    num_keys, key_heads, value_dim = value.shape[1:]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    require_numbers("query", query, query.shape, dtype)
    require_numbers("key", key, (batch, num_keys, key_heads, head_dim), dtype)
    require_numbers("value", value, (batch, num_keys, key_heads, value_dim), dtype)
    axes = (batch, heads, num_queries, num_keys)
    mask, bias = (None if x is None else x.contiguous() for x in (mask, bias))
    pairs = (_pairs("mask", mask, torch.bool, axes), _pairs("bias", bias, dtype, axes))
    calls = []
    for first in range(0, len(parts), len(_ARRAYS)):
        arrays = [array.contiguous() for array in parts[first : first + len(_ARRAYS)]]
        num_runs = arrays[3].numel()
        sizes = ((0, num_queries), (0, num_keys), (num_queries + 1,), (num_runs,), (num_runs,))
        for name, array, allowed in zip(_ARRAYS, arrays, sizes, strict=True):
            if array.dtype != torch.int64 or not array.is_cpu or array.ndim != 1 or array.numel() not in allowed:
                raise InvalidInputError(
                    argument="pattern",
                    expected=f"{name} of int64 on the CPU, {allowed[-1]} of them",
                    actual=f"{array.dtype} on {array.device}, {tuple(array.shape)}",
                )
        counts = (batch, heads, key_heads, num_queries, num_keys, head_dim, value_dim, _native.num_threads())
        rows = (query.data_ptr(), key.data_ptr(), value.data_ptr())
        structure = _structure(counts, seed, dtype == torch.float64, settings, rows, arrays, pairs)
        given = [x for x in (query, key, value, mask, bias, *arrays) if x is not None]
        calls.append(_Call(structure, tuple(given)))
    return calls


def _pairs(name: str, pairs: Tensor | None, dtype: torch.dtype, axes: Sequence[int]) -> _Pairs:
    """Where the kernels find the numbers of pairs of the axes `(B, H, L, S)`; contiguous."""
    if pairs is None or 0 in axes:
        return _Pairs()
    heads, num_queries, num_keys = axes[1:]
    by_distance = pairs.ndim == 2
    whole = (heads, num_queries + num_keys - 1) if by_distance else tuple(axes)
    fits = len(pairs.shape) == len(whole) and all(a in (1, b) for a, b in zip(pairs.shape, whole, strict=True))
    if not fits or pairs.dtype != dtype or not pairs.is_cpu:
        raise InvalidInputError(
            argument=name,
            expected=f"{dtype} on cpu, {whole}, each axis whole or 1",
            actual=f"{pairs.dtype} on {pairs.device}, {tuple(pairs.shape)}",
        )
    strides = [0 if size == 1 else stride for size, stride in zip(pairs.shape, pairs.stride(), strict=True)]
    if by_distance:
        return _Pairs(pairs.data_ptr(), pairs.numel(), num_keys - 1, (_SIZE * 4)(0, strides[0], 1, -1))
    return _Pairs(pairs.data_ptr(), pairs.numel(), 0, (_SIZE * 4)(*strides))


def _structure(
    sizes: Sequence[int],
    seed: Tensor | None,
    is_double: bool,
    settings: Settings,
    rows: Sequence[int | None],
    arrays: Sequence[Tensor],
    pairs: Sequence[_Pairs],
) -> _RunAttention:
    """A part's structure; `sizes` in the order of its fields."""
    pointers = (array.data_ptr() if array.numel() else None for array in arrays)
    drawn = 0 if seed is None else int(seed)
    return _RunAttention(*sizes, drawn, is_double, *settings, *rows, *pointers, arrays[3].numel(), *pairs)
