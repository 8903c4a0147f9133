"""The gradient of the gradient of attention over runs, in tiles.

Where that is differentiated again, it is that of the same computation in the primitives of graphs, over the pairs as
edges.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from anyattention.ambient import is_differentiated_again
from anyattention.native import calls
from anyattention.native.structures import HeadRows, Pairs
from anyattention.ops.operator import Result, operator
from anyattention.ops.runs.call import RunAttentionBackward, with_parts, with_single_parts
from anyattention.ops.runs.composed import composed_second_gradients

__all__ = ["RunAttentionDoubleBackward", "double_backward", "second_gradient"]


@dataclass(frozen=True, eq=False)
class RunAttentionDoubleBackward:
    """The gradients of a backward by query, key, value, bias, grad_output and grad_log_sum, in at least float32.

    Attributes:
        backward: whose gradients they are, as a function of those. What it has of the forward's results is no input of
            its own.
        grad_grad_query, grad_grad_key, grad_grad_value, grad_grad_bias: the gradients by its results.
        needed: which are wanted.
    """

    backward: RunAttentionBackward
    grad_grad_query: Annotated[Tensor | None, HeadRows("batch num_queries heads head_dim")]
    grad_grad_key: Annotated[Tensor | None, HeadRows("batch num_keys key_heads head_dim")]
    grad_grad_value: Annotated[Tensor | None, HeadRows("batch num_keys key_heads value_dim")]
    grad_grad_bias: Annotated[Tensor | None, Pairs("batch heads num_queries num_keys")]
    needed: tuple[bool, ...]


_FIELDS = ("call.query", "call.key", "call.value", "grad_output", "call.bias", "grad_log_sum")


def second_gradient(
    record: RunAttentionBackward, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    """The rule of the gradient of a backward."""
    by_query, by_key, by_value, by_bias = by
    if record.call.bias is None or not record.needed[3]:
        by_bias = None  # an empty result of PyTorch's dispatcher
    if is_differentiated_again():
        return composed_second_gradients(record, (by_query, by_key, by_value, by_bias), needs)
    needed = tuple([name in needs for name in _FIELDS])
    each = double_backward(RunAttentionDoubleBackward(record, by_query, by_key, by_value, by_bias, needed))
    dtypes = [record.call.query.dtype] * 3 + [record.grad_output.dtype]
    cast = [x if x is None or x.dtype is dtype else x.to(dtype) for x, dtype in zip(each, dtypes, strict=False)]
    return dict(zip(_FIELDS, (*cast, *each[4:]), strict=True))


double_backward = operator(
    RunAttentionDoubleBackward,
    [
        *[Result(f"grad_{name}", like=f"backward.call.{name}", is_sum=True) for name in ("query", "key", "value")],
        Result("grad_grad_output", like="backward.grad_output", is_sum=True),
        Result("grad_bias", like="backward.call.bias", is_sum=True),
        Result("grad_grad_log_sum", like="backward.grad_log_sum"),
    ],
)


@double_backward.kernel("cpu", binds=True)
def _run(record: RunAttentionDoubleBackward) -> tuple[Tensor | None, ...]:
    backward = with_parts(record.backward)
    call = backward.call
    if not call.parts:
        inputs = (call.query, call.key, call.value, backward.grad_output, call.bias, backward.grad_log_sum)
        wanted = [x if is_needed else None for x, is_needed in zip(inputs, record.needed, strict=True)]
        return tuple([None if x is None else x.new_zeros(x.shape, dtype=backward.log_sum.dtype) for x in wanted])
    bounds = [calls.bind(replace(record, backward=single)) for single in with_single_parts(backward)]
    results = double_backward.allocate(record, bounds[0])
    # The sums of a row go over all parts, before anything else.
    sums, has_sums = backward.log_sum.new_empty(2, *backward.log_sum.shape), len(bounds) > 1
    for number, bound in enumerate(bounds if has_sums else ()):
        calls.run("run_attention_double_backward_sums", bound, number > 0, sums)
    for number, bound in enumerate(bounds):
        calls.run(
            "run_attention_double_backward",
            bound,
            number > 0,
            has_sums,
            sums,
            *results[:4],
            calls.pairs(results[4], bound),
        )
    return (*results[:5], None if results[5] is None else sums[0])
