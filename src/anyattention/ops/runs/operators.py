"""Attention over runs of keys in tiles: an operator and its gradient.

The gradient is fused too; where it is differentiated again, it is that of the same computation in the primitives of
graphs, over the pairs as edges.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim, E pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any

import torch
from torch import Tensor

from anyattention.ambient import is_differentiated_again, shielded
from anyattention.bias import RelativeBias
from anyattention.native import calls
from anyattention.native.structures import Choice, HeadRows, Numbers, Pairs, Seed
from anyattention.ops.arguments import Arguments, Scaling
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.composed import EdgeAttention
from anyattention.ops.operator import Result, operator
from anyattention.ops.runs.pairs import bias_of_edges, by_distance, masked_bias
from anyattention.ops.runs.parts import RunPart, pairs_of
from anyattention.patterns import Graph
from anyattention.scores import Dot

__all__ = [
    "RunAttention",
    "at_edges",
    "graph_of_parts",
    "of_rows",
    "pairs_in_tiles",
    "run_attention",
    "run_call",
    "with_single_parts",
]


@dataclass(frozen=True, eq=False)
class RunAttention(Scaling):
    """Attention by dot products of each query to the keys of its runs.

    Attributes:
        query, key, value: read where they lie, also in half precision; sums are at least float32.
        mask: boolean, each of the axes `(B, H, L, S)` whole or 1; False hides the pair.
        bias: axes as the mask, added to the score, -inf hides the pair; or by distance, as `Pairs` says.
        seed: with dropout.
        parts: the runs, in parts that share no pair.
        dropout: probability with which a weight is dropped.
        is_dense: dropout numbers all pairs (batch, head, query, key), else the allowed ones (batch, pair, head).
    """

    query: Annotated[Tensor, HeadRows("batch num_queries heads head_dim")]
    key: Annotated[Tensor, HeadRows("batch num_keys key_heads head_dim")]
    value: Annotated[Tensor, HeadRows("batch num_keys key_heads value_dim")]
    mask: Annotated[Tensor | None, Choice("batch heads num_queries num_keys")]
    bias: Annotated[Tensor | None, Pairs("batch heads num_queries num_keys")]
    seed: Annotated[Tensor | None, Seed()]
    parts: tuple[RunPart, ...]
    dropout: float
    is_dense: bool


@dataclass(frozen=True, eq=False)
class RunAttentionBackward:
    """The gradients of query, key, value and bias, where needed, in at least float32."""

    call: RunAttention
    output: Annotated[Tensor, Numbers("batch num_queries heads value_dim")]
    largest: Annotated[Tensor, Numbers("batch num_queries heads")]
    log_sum: Annotated[Tensor, Numbers("batch num_queries heads")]
    grad_output: Annotated[Tensor, HeadRows("batch num_queries heads value_dim")]
    grad_log_sum: Annotated[Tensor | None, Numbers("batch num_queries heads")]
    needed: tuple[bool, ...]


def run_call(call: Arguments, parts: tuple[RunPart, ...], *, is_dense: bool) -> RunAttention:
    """The record of a call over these parts."""
    bias = call.bias
    if isinstance(bias, RelativeBias):
        bias = by_distance(bias, call.query, call.key)
    return RunAttention(
        query=call.query,
        key=call.key,
        value=call.value,
        mask=call.mask,
        bias=None if bias is None else bias.to(call.sums_dtype),
        seed=draw_seed(call.query.device) if call.dropout > 0 else None,
        parts=parts,
        **vars(call.scaling),
        dropout=call.dropout,
        is_dense=is_dense,
    )


def at_edges(call: RunAttention, graph: Graph, kept: Tensor | None) -> EdgeAttention:
    """The same attention in the primitives over the pairs as edges, with the factors of dropout."""
    call = _widened(call)
    return EdgeAttention(
        graph=arrays_of(graph),
        score=Dot,
        query=call.query,
        key=call.key,
        value=call.value,
        vector=None,
        term=None,
        bias=masked_bias(call.mask, call.bias, graph, call.query),
        kept=kept,
        scaling=call,
        negative_slope=0.0,
        normalize=True,
    )


def graph_of_parts(call: RunAttention) -> Graph:
    """The pairs of all parts as edges."""
    queries, keys = pairs_of(call.parts)
    lengths = call.query.shape[1], call.key.shape[1]
    return Graph.from_edge_index(torch.stack([keys, queries]), num_queries=lengths[0], num_keys=lengths[1])


def _widened(call: RunAttention) -> RunAttention:
    """The call with its rows in the dtype of the sums."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    if call.query.dtype is dtype:
        return call
    return replace(call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def _gradient(
    call: RunAttention, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    output, largest, log_sum = results
    grad_output, _, grad_log_sum = by
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if is_differentiated_again():
        found: Mapping[str, Tensor | None] = _composed_gradients(_widened(call), (grad_output, grad_log_sum), needs)
    else:
        needed = (True, True, True, "bias" in needs)
        each = _backward(RunAttentionBackward(call, output, largest, log_sum, grad_output, grad_log_sum, needed))
        found = dict(zip(("query", "key", "value", "bias"), each, strict=True))
    return of_rows(call, found)


def of_rows(call: RunAttention, found: Mapping[str, Tensor | None]) -> Mapping[str, Tensor | None]:
    """Gradients by name, those of rows in their dtype: rows in half precision have them of float32 sums."""
    dtype = call.query.dtype
    if dtype is torch.promote_types(dtype, torch.float32):
        return found
    rows = ("query", "key", "value")
    return {name: x.to(dtype) if x is not None and name in rows else x for name, x in found.items()}


def _composed_gradients(
    call: RunAttention, by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    graph = graph_of_parts(call)
    kept, heads = None, call.query.shape[2]
    if call.seed is not None and call.is_dense:
        every = (call.query.shape[0], heads, graph.num_queries, graph.num_keys)
        kept = keep_factors(every, call.dropout, call.seed, call.query.dtype)
        kept = kept[:, :, graph.query_index, graph.key_index].transpose(1, 2)
    elif call.seed is not None:
        shape = (call.query.shape[0], graph.num_edges, heads)
        kept = keep_factors(shape, call.dropout, call.seed, call.query.dtype)
    found = dict(at_edges(call, graph, kept).gradients(by, needs))
    found["bias"] = bias_of_edges(call.bias, graph, found.get("bias"))
    return found


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
)


@run_attention.kernel("cpu", binds=True)
def _run(call: RunAttention) -> tuple[Tensor | None, ...]:
    if not call.parts:
        call = _widened(call)
        rows = call.query.shape[:3]
        output = call.query.new_zeros(*rows, call.value.shape[3])
        return output, call.query.new_full(rows, -torch.inf), call.query.new_zeros(rows)
    results: list[Tensor | None] = []
    for number, part in enumerate(_single_parts(call)):
        bound = calls.bind(part)
        results = results or run_attention.allocate(call, bound)
        calls.run("run_attention_forward", bound, number > 0, *results)
    return tuple(results)


@_backward.kernel("cpu", binds=True)
def _run_backward(record: RunAttentionBackward) -> tuple[Tensor | None, ...]:
    results: list[Tensor | None] = []
    if not record.call.parts:
        call = _widened(record.call)
        inputs = (call.query, call.key, call.value, call.bias)
        return tuple([None if x is None else torch.zeros_like(x) for x in inputs])
    for number, single in enumerate(with_single_parts(record)):
        bound = calls.bind(single)
        results = results or _backward.allocate(record, bound)
        calls.run("run_attention_backward", bound, number > 0, *results[:3], calls.pairs(results[3], bound))
    return tuple(results)


def with_single_parts(record: Any) -> Iterator[Any]:
    """A record about a call, once for each part of the call."""
    for call in _single_parts(record.call):
        yield record if call is record.call else replace(record, call=call)


def _single_parts(call: RunAttention) -> Iterator[RunAttention]:
    """The call for each of its parts, which a kernel takes one at a time."""
    if len(call.parts) == 1:
        yield call
    else:
        for part in call.parts:
            yield replace(call, parts=(part,))


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
