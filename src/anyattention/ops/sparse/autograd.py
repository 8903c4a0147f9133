"""Attention over runs as an operator that autograd, opcheck and torch.compile know.

`anyattention::run_attention` is fused, forward and backward; under `create_graph` its backward is that of the same
computation in the primitives of graphs, over the pairs as edges.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention.ops.graph.composed import composed_gradients
from anyattention.ops.graph.edge_operators import arrays_of, define
from anyattention.ops.graph.kernels import Settings
from anyattention.ops.sparse import kernels
from anyattention.ops.sparse.runs import RunPart, pairs_of
from anyattention.patterns import Graph

__all__ = ["attention"]

_ATTENTION = "Tensor query, Tensor key, Tensor value, Tensor[] parts, float scale"


def attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(B, L, H, C)` and logsumexp `(B, L, H)`; see `kernels.attention`."""
    return _attend(query, key, value, list(parts), scale)


def _shapes(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3])


def _keep(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3])
    ctx.scale = inputs[4]


def _gradients(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    query, key, value, output, logsumexp, *parts = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        graph = arrays_of(_graph_of(parts, query.shape[1], key.shape[1]))
        tensors = (query, key, value, None, None, None, None)
        settings = Settings("Dot", True, ctx.scale, 0.0, 0.0, 0.0)
        found = composed_gradients(ctx, tensors, graph, settings, grad_output, grad_logsumexp, logsumexp)
        return (*found[:3], None, None)
    gradients = _attend_backward(grad_output, grad_logsumexp, output, logsumexp, query, key, value, parts, ctx.scale)
    return (*gradients, None, None)


def _graph_of(parts: Sequence[Tensor], num_queries: int, num_keys: int) -> Graph:
    """The pairs of all parts as edges."""
    size = len(RunPart._fields)
    queries, keys = pairs_of([RunPart(*parts[first : first + size]) for first in range(0, len(parts), size)])
    return Graph.from_edge_index(torch.stack([keys, queries]), num_queries=num_queries, num_keys=num_keys)


_attend = define("run_attention", f"{_ATTENTION}) -> (Tensor, Tensor)", kernels.attention, _shapes, _gradients, _keep)
_attend_backward = define(
    "run_attention_backward",
    f"Tensor grad_output, Tensor? grad_logsumexp, Tensor output, Tensor logsumexp, {_ATTENTION})"
    " -> (Tensor, Tensor, Tensor)",
    kernels.attention_backward,
    lambda *arguments: tuple(x.new_empty(x.shape) for x in arguments[4:7]),
    None,
)
