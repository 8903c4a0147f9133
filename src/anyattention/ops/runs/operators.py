"""Attention over runs of keys in tiles: an operator and its gradient, which is an operator with one too.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from anyattention.ambient import is_differentiated_again, is_transformed, shielded
from anyattention.native import calls
from anyattention.ops.operator import Result, operator
from anyattention.ops.runs.call import (
    RunAttention,
    RunAttentionBackward,
    in_parts,
    of_rows,
    single_parts,
    widened,
    with_parts,
    with_single_parts,
)
from anyattention.ops.runs.composed import composed_gradients
from anyattention.ops.runs.parts import RunPart
from anyattention.ops.runs.second import second_gradient

__all__ = ["pairs_in_tiles", "run_attention"]


def _gradient(
    call: RunAttention, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    output, largest, log_sum = results
    grad_output, _, grad_log_sum = by
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    is_recorded = is_differentiated_again()
    if is_recorded and is_transformed(call.query, call.key, call.value, call.bias, grad_output, grad_log_sum):
        found: Mapping[str, Tensor | None] = composed_gradients(call, (grad_output, grad_log_sum), needs)
    else:
        if is_recorded:
            # To derivatives, what follows from the results follows from the call.
            output, largest, log_sum = (x.detach() for x in results)
        needed = (True, True, True, "bias" in needs)
        each = _backward(RunAttentionBackward(call, output, largest, log_sum, grad_output, grad_log_sum, needed))
        found = dict(zip(("query", "key", "value", "bias"), each, strict=True))
    return of_rows(call, found)


run_attention = operator(
    RunAttention,
    [
        Result("output", "batch num_queries heads value_dim", is_sum=True),
        Result("largest", "batch num_queries heads", is_sum=True),
        Result("log_sum", "batch num_queries heads", is_sum=True),
    ],
    gradient=_gradient,
    keeps_results=True,
)
_backward = operator(
    RunAttentionBackward,
    [Result(f"grad_{name}", like=f"call.{name}", is_sum=True) for name in ("query", "key", "value", "bias")],
    gradient=second_gradient,
)


@run_attention.kernel("cpu", binds=True)
def _run(call: RunAttention) -> tuple[Tensor | None, ...]:
    call = in_parts(call)
    if not call.parts:
        call = widened(call)
        rows = call.query.shape[:3]
        output = call.query.new_zeros(*rows, call.value.shape[3])
        return output, call.query.new_full(rows, -torch.inf), call.query.new_zeros(rows)
    results: list[Tensor | None] = []
    for number, part in enumerate(single_parts(call)):
        bound = calls.bind(part)
        results = results or run_attention.allocate(call, bound)
        calls.run("run_attention_forward", bound, number > 0, *results)
    return tuple(results)


@_backward.kernel("cpu", binds=True)
def _run_backward(record: RunAttentionBackward) -> tuple[Tensor | None, ...]:
    record = with_parts(record)
    results: list[Tensor | None] = []
    if not record.call.parts:
        call = widened(record.call)
        inputs = (call.query, call.key, call.value, call.bias)
        return tuple([None if x is None else torch.zeros_like(x) for x in inputs])
    for number, single in enumerate(with_single_parts(record)):
        bound = calls.bind(single)
        results = results or _backward.allocate(record, bound)
        calls.run("run_attention_backward", bound, number > 0, *results[:3], calls.pairs(results[3], bound))
    return tuple(results)


@lru_cache(maxsize=16)
def pairs_in_tiles(part: RunPart, num_keys: int) -> int:
    """How many pairs of a part's tiles the kernels compute, allowed ones and others."""
    with shielded():
        number = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device="cpu")
        query, key = (number.expand(1, length, 1, 1) for length in (part.offsets.numel() - 1, num_keys))
        counted = torch.zeros(1, dtype=torch.int64, device="cpu")
    bound = calls.bind(RunAttention(query, key, key, None, None, None, (part,), 0.0, False, scale=1.0, softcap=0.0))
    calls.run("run_attention_tiles", bound, counted)
    return int(counted)
