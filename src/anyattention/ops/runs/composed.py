"""Attention over runs in the primitives of graphs, over the pairs as edges: differentiable to any order.

Axes: B batch, L query_length, S key_length, H heads, E pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anyattention.ops.dropout import keep_factors
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.composed import EdgeAttention, recorded_gradients
from anyattention.ops.runs.call import RunAttention, RunAttentionBackward, in_parts, widened
from anyattention.ops.runs.pairs import bias_of_edges, masked_bias
from anyattention.ops.runs.parts import pairs_of
from anyattention.patterns import Graph
from anyattention.scores import Dot

__all__ = ["at_edges", "composed_gradients", "composed_second_gradients", "graph_of_parts"]

_ROWS = ("query", "key", "value", "bias")
_DIFFERENTIABLE = (*[f"call.{name}" for name in _ROWS], "grad_output", "grad_log_sum")


def at_edges(call: RunAttention, graph: Graph, kept: Tensor | None) -> EdgeAttention:
    """The same attention in the primitives over the pairs as edges, with the factors of dropout."""
    call = widened(call)
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
    queries, keys = pairs_of(in_parts(call).parts)
    lengths = call.query.shape[1], call.key.shape[1]
    return Graph.from_edge_index(torch.stack([keys, queries]), num_queries=lengths[0], num_keys=lengths[1])


def composed_gradients(
    call: RunAttention, by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    """The gradients of a call by name, of those by its output and log_sum, which autograd differentiates again."""
    call = widened(call)
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


def composed_second_gradients(
    record: RunAttentionBackward, by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    """The gradients of a backward by the names of its fields, which autograd differentiates again."""
    names = [name for name in _DIFFERENTIABLE if name in needs]
    asked = [name for name, each in zip(_ROWS, by, strict=True) if each is not None]

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, inputs, strict=True))
        own = {name: given[f"call.{name}"] for name in _ROWS if f"call.{name}" in given}
        cotangents = given.get("grad_output", record.grad_output), given.get("grad_log_sum", record.grad_log_sum)
        found = composed_gradients(replace(record.call, **own), cotangents, frozenset(asked))
        return tuple([x for name in asked if (x := found[name]) is not None])

    given = {f"call.{name}": getattr(record.call, name) for name in _ROWS}
    given |= {"grad_output": record.grad_output, "grad_log_sum": record.grad_log_sum}
    found = recorded_gradients(gradients, [given[name] for name in names], [x for x in by if x is not None])
    return dict(zip(names, found, strict=True))
