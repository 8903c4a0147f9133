"""Calls of dense attention whose checks and C structures are kept: of a small call they are two thirds of the time.

What a call is refused for, and what C is told of it, depends on its settings and on the shapes, strides and dtypes of
its rows: its key. Calls with the same key differ in pointers, and in the number of threads. Those of one query that
sees all keys, as when a token is decoded over a cache that grows, differ in how many keys there are and how they lie,
and in a mask that they may have.
"""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from anyattention.ambient import Moment, is_differentiated_again, moment_of
from anyattention.native import calls, load
from anyattention.native.structures import Choice, HeadNumbers, HeadRows
from anyattention.ops.arguments import Arguments
from anyattention.ops.runs import RunAttention, RunAttentionBackward, run_attention
from anyattention.output import AttentionResult
from anyattention.patterns import Causal, Full
from anyattention.scores import Dot

__all__ = ["KeptCall", "decoding_key", "key_of"]

_PATTERNS = frozenset({Full, Causal})
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_IN_KEY = frozenset({"query", "key", "value", "pattern", "scale", "softcap", "mask"})
# A call that has another of these settings than the default is not kept.
_others = [each for each in fields(Arguments) if each.name not in _IN_KEY]
_others_of = attrgetter(*[each.name for each in _others])
_defaults = tuple([each.default for each in _others])
_head_rows, _choice = HeadRows(), Choice()


def key_of(call: Arguments) -> tuple[Any, ...] | None:
    """What a call depends on beside the numbers in its rows; None where there is more. First, whether it decodes."""
    query, key, value = call.query, call.key, call.value
    dtype, pattern = query.dtype, call.pattern
    if type(pattern) not in _PATTERNS or type(call.score) is not Dot or _others_of(call) != _defaults:
        return None
    if key is None or value is None or moment_of((query, key, value, call.mask)) is not Moment.PLAIN:
        return None
    if type(pattern) is Full:
        found = decoding_key(query, key, value, call.mask, call.scale, call.softcap)
        if found is not None:
            return found
    if call.mask is not None:
        return None
    if dtype not in _DTYPES or not query.is_cpu or not key.is_cpu or not value.is_cpu:
        return None
    strides = query.stride(), key.stride(), value.stride()
    if any(each[-1:] != (1,) for each in strides):
        return None  # copied for the kernel
    rows = query.shape, key.shape, value.shape, *strides
    return False, dtype, key.dtype, value.dtype, *rows, pattern, call.scale, call.softcap


def decoding_key(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    *,
    place: int = 1,
) -> tuple[Any, ...] | None:
    """The key of one query over all keys, however many and wherever, without a gradient; None for any other call.

    Args:
        query, key, value, mask: plain tensors, or no mask.
        place: the axis of positions, 1 or 2; the other one is that of heads.
    """
    shape, keys, values = query.shape, key.shape, value.shape
    if not len(shape) == len(keys) == len(values) == 4 or shape[place] != 1 or not 0 != keys[place] == values[place]:
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if query.dtype not in _DTYPES or not query.is_cpu or not key.is_cpu or not value.is_cpu:
        return None
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        return None
    by = None
    if mask is not None:
        by = mask.shape
        if mask.dtype is not torch.bool or not mask.is_cpu or by[2:] != (1, keys[place]):
            return None
        by = by[:2]
    heads = 3 - place
    sizes = shape[0], shape[heads], shape[3], keys[0], keys[heads], keys[3], values[0], values[heads], values[3], by
    return True, query.dtype, key.dtype, value.dtype, *sizes, scale, softcap


class KeptCall:
    """What a call that was checked came to, in the kernels."""

    def __init__(self, record: RunAttention, *, is_decoding: bool) -> None:
        self._is_decoding = is_decoding
        bound = calls.bind(record)
        # Its rows would hold their memory, and of them nothing but dtypes is asked.
        nothing = record.query.new_empty(0)
        # A mask that is a pattern's stays; that of the caller belongs to one call.
        mask = None if is_decoding else record.mask
        self._record = replace(record, query=nothing, key=nothing, value=nothing, mask=mask)
        self._sizes = (*record.query.shape[:3], record.value.shape[3])
        self._types = bound.structure.query.type, bound.structure.key.type, bound.structure.value.type
        self._normalizer = ctypes.c_double * (2 * record.query.shape[:3].numel()) if is_decoding else None
        self._structure, self._dtype = bound.structure, bound.dtype
        self._backward_structure: Any = None

    def run(self, call: Arguments) -> AttentionResult:
        """The result of a call with the same key."""
        rows = query, key, value = call.query, call.key, call.value
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            output: Any = _Attention.apply(self, *rows)
        else:
            output = self.decode(*rows, call.mask) if self._is_decoding else self.forward(*rows)[0]
        return AttentionResult(output if output.dtype is query.dtype else output.to(query.dtype))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output `(B, L, H, E)`, and each row's largest score and log_sum `(2, B, L, H)`."""
        # A copy: another thread may be in here, too.
        structure: Any = type(self._structure).from_buffer_copy(self._structure)
        _point(structure, query, key, value)
        structure.num_threads = load.num_threads()
        output = query.new_empty(self._sizes, dtype=self._dtype)
        normalizer = output.new_empty((2, *self._sizes[:3]))
        largest = normalizer.data_ptr()
        log_sum = largest + normalizer.nbytes // 2
        load.run("run_attention_forward", ctypes.byref(structure), 0, output.data_ptr(), largest, log_sum)
        return output, normalizer

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, place: int = 1) -> Tensor:
        """Output `(B, 1, H, E)` of one query, in the dtype of the sums; `place` is the axis of positions."""
        structure: Any = type(self._structure).from_buffer_copy(self._structure)
        (batch, *by, _), of_query = query.stride(), self._types[0]
        structure.query = HeadNumbers(query.data_ptr(), batch, by[place - 1], by[2 - place], of_query)
        (batch, *by, _), of_key = key.stride(), self._types[1]
        structure.key = HeadNumbers(key.data_ptr(), batch, by[place - 1], by[2 - place], of_key)
        (batch, *by, _), of_value = value.stride(), self._types[2]
        structure.value = HeadNumbers(value.data_ptr(), batch, by[place - 1], by[2 - place], of_value)
        if mask is not None:
            _, (structure.mask,) = _choice.read(mask, {})
        num_keys = key.shape[place]
        structure.num_keys = structure.parts.num_keys = num_keys
        end = ctypes.c_int64(num_keys)
        structure.parts.ends = ctypes.addressof(end)
        structure.num_threads = load.num_threads()
        output = query.new_empty(self._sizes, dtype=self._dtype)
        assert self._normalizer is not None
        normalizer = self._normalizer()
        largest = ctypes.addressof(normalizer)
        log_sum = largest + ctypes.sizeof(normalizer) // 2
        load.run("run_attention_forward", ctypes.byref(structure), 0, output.data_ptr(), largest, log_sum)
        return output

    def backward(
        self, rows: tuple[Tensor, Tensor, Tensor], output: Tensor, normalizer: Tensor, grad_output: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of query, key and value."""
        if self._backward_structure is None:
            record = RunAttentionBackward(
                self.record_of(*rows),
                output,
                normalizer[0],
                normalizer[1],
                grad_output,
                None,
                (True, True, True, False),
            )
            self._backward_structure = calls.bind(record).structure
        structure: Any = type(self._backward_structure).from_buffer_copy(self._backward_structure)
        _point(structure.call, *rows)
        structure.call.num_threads = load.num_threads()
        grad_output, (structure.grad_output,) = _head_rows.read(grad_output, {})
        structure.output = output.data_ptr()
        structure.largest = normalizer.data_ptr()
        structure.log_sum = normalizer.data_ptr() + normalizer.nbytes // 2
        found = [torch.empty_like(x, dtype=self._dtype, memory_format=torch.contiguous_format) for x in rows]
        pointers = [x.data_ptr() for x in found]
        load.run("run_attention_backward", ctypes.byref(structure), 0, *pointers, None)
        return tuple([x if x.dtype is query.dtype else x.to(query.dtype) for x, query in zip(found, rows, strict=True)])

    def record_of(self, query: Tensor, key: Tensor, value: Tensor) -> RunAttention:
        """The record of a call of these rows."""
        return replace(self._record, query=query, key=key, value=value)


def _point(structure: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
    structure.query.numbers = query.data_ptr()
    structure.key.numbers = key.data_ptr()
    structure.value.numbers = value.data_ptr()


class _Attention(torch.autograd.Function):
    """Output of a kept call; any other derivative than the gradient of plain tensors is `run_attention`'s."""

    @staticmethod
    def forward(ctx: Any, kept: KeptCall, *rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        output, normalizer = kept.forward(*rows)
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows, output, normalizer)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad_output is None:
            return None, None, None, None
        kept: KeptCall = ctx.kept
        *rows, output, normalizer = ctx.saved_tensors
        is_plain = moment_of((grad_output, *rows)) is Moment.PLAIN and not is_differentiated_again()
        # A hook may have put anything in its place.
        fits = grad_output.shape == output.shape and grad_output.dtype is output.dtype and grad_output.is_cpu
        if is_plain and fits:
            return None, *kept.backward(tuple(rows), output, normalizer, grad_output)
        names = [name for name, n in zip(("query", "key", "value"), ctx.needs_input_grad[1:], strict=True) if n]
        record = kept.record_of(*rows)
        found = run_attention.gradients(record, (output, *normalizer), (grad_output, None, None), names)
        return None, *[found.get(name) for name in ("query", "key", "value")]
