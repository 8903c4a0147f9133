"""The compiled kernels of attention over runs, called on tensors: plain functions without gradients.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from anyattention import _native
from anyattention.errors import InvalidInputError
from anyattention.ops.graph.kernels import pointer, require_numbers
from anyattention.ops.sparse.runs import RunPart

__all__ = ["attention", "attention_backward", "pairs_in_tiles"]

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIZES = ("batch", "heads", "key_heads", "num_queries", "num_keys", "head_dim", "value_dim", "num_threads")
_ARRAYS = ("query_order", "key_order", "run_offsets", "run_begins", "run_ends")


class _RunAttention(ctypes.Structure):
    _fields_ = [
        *((name, _SIZE) for name in _SIZES),
        ("scale", ctypes.c_double),
        *((name, _POINTER) for name in ("query", "key", "value", *_ARRAYS)),
        ("num_runs", _SIZE),
    ]


@dataclass(frozen=True)
class _Call:
    """A part's structure, and the tensors that its pointers look into."""

    structure: _RunAttention
    kept: tuple[Tensor, ...]


@lru_cache(maxsize=16)
def pairs_in_tiles(part: RunPart, num_keys: int) -> int:
    """How many pairs the tiles of a part hold that the kernels compute, allowed ones and others."""
    counted = ctypes.c_int64()
    num_queries = part.offsets.numel() - 1
    call = _structure((1, 1, 1, num_queries, num_keys, 1, 1, 1), 1.0, (None,) * 3, part)
    _native.run("run_attention_tiles", ctypes.byref(call), ctypes.byref(counted))
    return counted.value


def attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(B, L, H, C)` and logsumexp `(B, L, H)`.

    Args:
        query, key, value: `(B, L, H, D)`, `(B, S, G, D)`, `(B, S, G, C)`, float32 on the CPU.
        parts: the five arrays of each `RunPart`, one part after the other.
        scale: the factor of the dot product.
    """
    output = query.new_empty(*query.shape[:3], value.shape[3])
    logsumexp = query.new_empty(query.shape[:3])
    if not parts:
        return output.zero_(), logsumexp.fill_(-torch.inf)
    for number, call in enumerate(_calls(query, key, value, parts, scale)):
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
    parts: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    gradients = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
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
            require_numbers(name, tensor, shape, torch.float32)
    kept = [None if tensor is None else tensor.contiguous() for tensor, _ in given.values()]
    for number, call in enumerate(_calls(query, key, value, parts, scale)):
        structure = ctypes.byref(call.structure)
        _native.run("run_attention_backward", structure, number > 0, *map(pointer, kept), *map(pointer, gradients))
    return gradients


def _calls(query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Tensor], scale: float) -> list[_Call]:
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, num_queries, heads, head_dim = query.shape
    num_keys, key_heads, value_dim = value.shape[1:]
    require_numbers("query", query, query.shape, torch.float32)
    require_numbers("key", key, (batch, num_keys, key_heads, head_dim), torch.float32)
    require_numbers("value", value, (batch, num_keys, key_heads, value_dim), torch.float32)
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
        calls.append(_Call(_structure(counts, scale, rows, arrays), (query, key, value, *arrays)))
    return calls


def _structure(
    sizes: Sequence[int], scale: float, rows: Sequence[int | None], arrays: Sequence[Tensor]
) -> _RunAttention:
    """A part's structure; `sizes` in the order of its fields."""
    pointers = (array.data_ptr() if array.numel() else None for array in arrays)
    return _RunAttention(*sizes, scale, *rows, *pointers, arrays[3].numel())
