"""Attention over runs as an operator that autograd, opcheck and torch.compile know.

`anyattention::run_attention` is fused, forward and backward; under `create_graph` its backward is that of the same
computation in the primitives of graphs, over the pairs as edges.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim, E pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention.ops.graph.composed import composed_gradients
from anyattention.ops.graph.edge_operators import arrays_of, define
from anyattention.ops.graph.kernels import Settings as GraphSettings
from anyattention.ops.random import keep_factors
from anyattention.ops.sparse import kernels
from anyattention.ops.sparse.call import masked_bias, place_by_distance
from anyattention.ops.sparse.kernels import Settings
from anyattention.ops.sparse.runs import RunPart, pairs_of
from anyattention.patterns import Graph

__all__ = ["attention"]

_ATTENTION = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? seed, Tensor[] parts, "
    "float scale, float softcap, float dropout, bool is_dense"
)


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
    """Output `(B, L, H, C)` and logsumexp `(B, L, H)`; see `kernels.attention`.

    A bias has gradients where it is one by distance.
    """
    return _attend(query, key, value, mask, bias, seed, list(parts), *settings)


def _shapes(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3])


def _keep(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output, *inputs[6])
    ctx.numbers = inputs[7:]


def _gradients(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    query, key, value, mask, bias, seed, output, logsumexp, *parts = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    none = (None,) * (2 + len(ctx.numbers))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        needed = [ctx.needs_input_grad[n] for n in (0, 1, 2, 4)]
        given = (query, key, value, mask, bias, seed, parts, Settings(*ctx.numbers))
        found = _composed(needed, *given, grad_output, grad_logsumexp, logsumexp)
        return (*found[:3], None, found[3], *none)
    needs_bias = ctx.needs_input_grad[4]
    given = (grad_output, grad_logsumexp, output, logsumexp, query, key, value, mask, bias, seed, parts)
    *gradients, by_bias = _attend_backward(*given, *ctx.numbers, needs_bias)
    return (*gradients, None, by_bias if needs_bias else None, *none)


def _composed(
    needed: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    parts: Sequence[Tensor],
    numbers: Settings,
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    logsumexp: Tensor,
) -> list[Tensor | None]:
    """The gradients of query, key, value and bias, where needed, which autograd differentiates again."""
    size = len(RunPart._fields)
    queries, keys = pairs_of([RunPart(*parts[first : first + size]) for first in range(0, len(parts), size)])
    graph = Graph.from_edge_index(torch.stack([keys, queries]), num_queries=query.shape[1], num_keys=key.shape[1])
    settings = GraphSettings("Dot", True, numbers.scale, numbers.softcap, 0.0, 0.0)
    edges = masked_bias(mask, bias, graph, query)
    kept = None
    if seed is not None and numbers.is_dense:
        every = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        kept = keep_factors(every, numbers.dropout, seed, query.dtype)[:, :, queries, keys].transpose(1, 2)
    elif seed is not None:
        kept = keep_factors((query.shape[0], graph.num_edges, query.shape[2]), numbers.dropout, seed, query.dtype)
    tensors = (query, key, value, None, None, edges, kept)
    cotangents = (grad_output, grad_logsumexp, logsumexp)
    flags = [*needed[:3], False, False, needed[3]]
    *by_rows, by_edges = composed_gradients(flags, tensors, arrays_of(graph), settings, *cotangents)
    by_bias = None
    if by_edges is not None and bias is not None:
        by_head = by_edges.sum(0).T.sum_to_size(len(bias), graph.num_edges)
        by_bias = bias.new_zeros(bias.shape).index_add(1, place_by_distance(graph), by_head)
    return [*by_rows[:3], by_bias]


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    return kernels.attention(*arguments[:7], settings=Settings(*arguments[7:]))


def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    settings, needs_bias = Settings(*arguments[11:-1]), arguments[-1]
    return kernels.attention_backward(*arguments[:11], settings=settings, needs_bias=needs_bias)


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    bias, needs_bias = arguments[8], arguments[-1]
    by_rows = [x.new_empty(x.shape) for x in arguments[4:7]]
    return (*by_rows, arguments[4].new_empty(bias.shape if needs_bias else 0))


_attend = define("run_attention", f"{_ATTENTION}) -> (Tensor, Tensor)", _run, _shapes, _gradients, _keep)
_attend_backward = define(
    "run_attention_backward",
    f"Tensor grad_output, Tensor? grad_logsumexp, Tensor output, Tensor logsumexp, {_ATTENTION}, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _backward_shapes,
    None,
)
