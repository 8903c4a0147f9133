"""The choice of slots by product keys, and attention to the chosen ones, as operators.

The gradient is fused too; where it is differentiated again, it is that of the same computation in the primitives of
edges.

Axes: T tokens, H heads, D half_dim, n half keys of a half, S = n x n slots, C value_dim, k slots chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from anyattention.ambient import Moment, is_differentiated_again, is_transformed, moment_of
from anyattention.errors import UnsupportedError
from anyattention.native import calls
from anyattention.native.structures import Indices, MatrixRows, Numbers, Untold
from anyattention.ops.operator import Result, operator
from anyattention.ops.product_keys.composed import gradients_again
from anyattention.ops.product_keys.used_slots import UsedSlots, used_slots

__all__ = [
    "ProductKeyIndices",
    "SlotAttention",
    "SlotAttentionBackward",
    "product_key_indices",
    "slot_attention",
    "slot_attention_backward",
]


@dataclass(frozen=True, eq=False)
class ProductKeyIndices:
    """The slots of each query's largest scores, `(T, H, k)`, the largest first, and these scores.

    The score of slot i n + j is the sum of the products with half key i of the first half and j of the second. NaN is
    larger than any number, and of equal numbers the lowest slot is taken first.

    Attributes:
        query: `(T, H, 2, D)`.
        half_keys: `(2, H, n, D)`.
        k: how many, from 1 up to n x n.
    """

    query: Annotated[Tensor, Numbers("tokens heads halves half_dim")]
    half_keys: Annotated[Tensor, Numbers("halves heads num_half_keys half_dim")]
    k: int


@dataclass(frozen=True, eq=False)
class SlotAttention:
    """Attention of each token to the slots that were chosen for it, summed over heads.

    Attributes:
        query, half_keys: as above.
        values: `(S, C)`, of half precision too where the query is float32.
        indices, scores: `(T, H, k)`, slots, and what query and half keys give for them: a gradient comes to those.
        keep: `(T, H, k)`, the factors of dropout, a constant; None for none.
        sparse_grad: whether the gradient of the values is a sparse tensor.
        hands_on: whether it is an empty one, since the caller has its factors.
    """

    query: Annotated[Tensor, Numbers("tokens heads halves half_dim")]
    half_keys: Annotated[Tensor, Numbers("halves heads num_half_keys half_dim")]
    values: Annotated[Tensor, MatrixRows("num_slots value_dim")]
    indices: Annotated[Tensor, Indices("tokens heads k")]
    scores: Annotated[Tensor, Numbers("tokens heads k")]
    keep: Annotated[Tensor | None, Numbers("tokens heads k")]
    sparse_grad: Annotated[bool, Untold]
    hands_on: Annotated[bool, Untold]


@dataclass(frozen=True, eq=False)
class SlotAttentionBackward:
    """The gradients of query, half keys and values, where needed, by the weights and the gradients of both results."""

    call: SlotAttention
    weights: Annotated[Tensor, Numbers("tokens heads k")]
    grad_output: Annotated[Tensor | None, Numbers("tokens value_dim")]
    grad_weights: Annotated[Tensor | None, Numbers("tokens heads k")]
    needed: tuple[bool, ...]


_INPUTS = ("query", "half_keys", "values")


def _gradient(
    call: SlotAttention, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    grad_output, grad_weights = by
    is_sparse = call.sparse_grad and "values" in needs
    if is_differentiated_again():
        if is_sparse:
            argument = "slot_gradient" if call.hands_on else "sparse_grad"
            raise UnsupportedError(f"{argument}: such a gradient of the values has no derivative", argument=argument)
        return gradients_again(call, by, needs)
    needed = tuple([name in needs and not (name == "values" and call.hands_on) for name in _INPUTS])
    record = SlotAttentionBackward(call, results[1], grad_output, grad_weights, needed)
    if not is_sparse:
        return dict(zip(_INPUTS, slot_attention_backward(record), strict=True))
    given = (call.query, call.values, grad_output, grad_weights)
    if moment_of(given) is not Moment.PLAIN or is_transformed(*given):
        raise UnsupportedError(
            "sparse_grad=True: how many rows a sparse gradient has, only a plain backward knows", argument="sparse_grad"
        )
    used = used_slots(call.indices, len(call.values))
    grad_query, grad_half_keys, rows = _run(record, used)
    if rows is None:
        if grad_output is None:
            return {"query": grad_query, "half_keys": grad_half_keys, "values": None}
        nothing = call.indices.new_zeros(1, 0), call.values.new_zeros(0, call.values.shape[1])
        empty = torch.sparse_coo_tensor(
            *nothing, tuple(call.values.shape), device=call.values.device, check_invariants=False
        )
        return {"query": grad_query, "half_keys": grad_half_keys, "values": empty}
    return {"query": grad_query, "half_keys": grad_half_keys, "values": used.as_sparse(rows, len(call.values))}


product_key_indices = operator(
    ProductKeyIndices, [Result("indices", "tokens heads k", dtype=torch.int64), Result("scores", "tokens heads k")]
)
product_key_indices.c_kernel()
slot_attention = operator(
    SlotAttention,
    [Result("output", "tokens value_dim"), Result("weights", "tokens heads k")],
    gradient=_gradient,
    keeps_results=True,
)
slot_attention.c_kernel()
slot_attention_backward = operator(
    SlotAttentionBackward, [Result(f"grad_{name}", like=f"call.{name}") for name in _INPUTS]
)


@slot_attention_backward.kernel("cpu", binds=True)
def _run_backward(record: SlotAttentionBackward) -> tuple[Tensor | None, ...]:
    return _run(record, None)


def _run(record: SlotAttentionBackward, used: UsedSlots | None) -> tuple[Tensor | None, ...]:
    """The three gradients; that of the values whole where `used` is None, else the rows of these slots, in order."""
    call, (needs_query, needs_half_keys, needs_values) = record.call, record.needed
    # It refuses indices of another dtype, which the sort of slots would read as what they are not.
    bound = calls.bind(record)
    is_dense = used is None
    used = used_slots(call.indices, len(call.values)) if used is None else used
    query = torch.empty_like(call.query, memory_format=torch.contiguous_format) if needs_query else None
    half_keys = torch.empty_like(call.half_keys, memory_format=torch.contiguous_format) if needs_half_keys else None
    values, rows, at_slots = call.values, None, False
    if needs_values:
        # The kernel writes the rows of float32 and float64 at their places; others it cannot round.
        at_slots = is_dense and values.dtype is call.query.dtype
        has_rows = record.grad_output is not None
        if at_slots or not has_rows:
            shape: Any = values.shape if is_dense else (len(used.slots), values.shape[1])
            rows = call.query.new_zeros(shape)
        else:
            rows = used.empty_rows(call.query, values.shape[1])
    calls.run("slot_attention_backward", bound, used.reference, int(at_slots), query, half_keys, rows)
    if rows is None:
        return query, half_keys, None
    rows = rows.to(values.dtype)
    if is_dense and len(rows) != len(values):
        rows = values.new_zeros(values.shape).index_copy_(0, used.slots, rows)
    return query, half_keys, rows
