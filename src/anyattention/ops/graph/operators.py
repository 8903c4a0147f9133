"""Fused attention over a graph's edges: an operator, its gradient, and its weights.

The gradient is fused too; where it is differentiated again, it is that of the same computation in the primitives.

Axes: B batch or nothing, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from anyattention.ambient import is_differentiated_again
from anyattention.native import calls, large_empty
from anyattention.native.columns import are_columns
from anyattention.native.structures import Numbers, PerEdge, Rows, Seed
from anyattention.ops.arguments import Scaling
from anyattention.ops.dropout import keep_factors
from anyattention.ops.edges.arrays import GraphArrays
from anyattention.ops.edges.composed import EdgeAttention
from anyattention.ops.operator import Result, operator
from anyattention.scores import SCORES

__all__ = [
    "GraphAttention",
    "GraphAttentionBackward",
    "GraphAttentionWeights",
    "composed",
    "graph_attention",
    "graph_attention_backward",
    "graph_attention_weights",
]


@dataclass(frozen=True, eq=False)
class GraphAttention(Scaling):
    """Attention of each query to the keys of its edges.

    Attributes:
        graph: the edges.
        query, key, value: rows of nodes, columns of matrices where they are; a value of None is the key.
        vector: of the score, where it has one.
        term, bias: added to the raw score and to the score; -inf in the bias hides the edge.
        seed: with dropout, whose position of an edge and head is that in `(B, E, H)`.
        score: the name of the score.
        normalize: softmax, or a sigmoid of each edge.
        negative_slope: of the score, where it has one.
        dropout: 0 for none.
    """

    graph: GraphArrays
    query: Annotated[Tensor, Rows("batch num_queries heads head_dim")]
    key: Annotated[Tensor, Rows("batch num_keys key_heads head_dim")]
    value: Annotated[Tensor | None, Rows("batch num_keys key_heads value_dim", default="key")]
    vector: Annotated[Tensor | None, Numbers("heads head_dim")]
    term: Annotated[Tensor | None, PerEdge("batch num_edges heads")]
    bias: Annotated[Tensor | None, PerEdge("batch num_edges heads")]
    seed: Annotated[Tensor | None, Seed()]
    score: str
    normalize: bool
    negative_slope: float
    dropout: float


@dataclass(frozen=True, eq=False)
class GraphAttentionWeights:
    """The weights before dropout, in the caller's edge order; without gradients."""

    call: GraphAttention
    largest: Annotated[Tensor, Numbers("batch num_queries heads")]
    log_sum: Annotated[Tensor, Numbers("batch num_queries heads")]


@dataclass(frozen=True, eq=False)
class GraphAttentionBackward:
    """The gradients of `GraphAttention`'s six tensors, by its results and the gradients of these."""

    call: GraphAttention
    output: Annotated[Tensor, Numbers("batch num_queries heads value_dim")]
    largest: Annotated[Tensor, Numbers("batch num_queries heads")]
    log_sum: Annotated[Tensor, Numbers("batch num_queries heads")]
    grad_output: Annotated[Tensor, Numbers("batch num_queries heads value_dim")]
    grad_log_sum: Annotated[Tensor | None, Numbers("batch num_queries heads")]


_INPUTS = ("query", "key", "value", "vector", "term", "bias")


def composed(call: GraphAttention) -> EdgeAttention:
    """The same attention in the primitives."""
    kept = None
    if call.seed is not None:
        shape = (*call.query.shape[:-3], call.graph.num_edges, call.query.shape[-2])
        kept = keep_factors(shape, call.dropout, call.seed, call.query.dtype)
    return EdgeAttention(
        **{name: getattr(call, name) for name in ("graph", *_INPUTS)},
        score=SCORES[call.score],
        kept=kept,
        scaling=call,
        negative_slope=call.negative_slope,
        normalize=call.normalize,
    )


def _gradient(
    call: GraphAttention, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    output, largest, log_sum = results
    grad_output, _, grad_log_sum = by
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if is_differentiated_again():
        return composed(call).gradients((grad_output, grad_log_sum), needs)
    found = graph_attention_backward(GraphAttentionBackward(call, output, largest, log_sum, grad_output, grad_log_sum))
    return dict(zip(_INPUTS, found, strict=True))


graph_attention = operator(
    GraphAttention,
    [
        Result("output", "batch num_queries heads value_dim"),
        Result("largest", "batch num_queries heads"),
        Result("log_sum", "batch num_queries heads"),
    ],
    gradient=_gradient,
    keeps_results=True,
)
graph_attention.c_kernel()
graph_attention_weights = operator(GraphAttentionWeights, [Result("weights", "batch num_edges heads")])
graph_attention_weights.c_kernel()
graph_attention_backward = operator(
    GraphAttentionBackward, [Result(f"grad_{name}", like=f"call.{name}") for name in _INPUTS]
)


@graph_attention_backward.kernel("cpu", binds=True)
def _run_backward(record: GraphAttentionBackward) -> tuple[Tensor | None, ...]:
    rows = {name: x for name in ("query", "key", "value") if (x := getattr(record.call, name)) is not None}
    columns = [] if all(x.is_contiguous() for x in rows.values()) else _matrices(rows)
    # Gradients have their tensors' strides: they are columns of a matrix where these are, else whole.
    within = [name for names in columns for name in names]
    whole = {name: x.contiguous() for name, x in rows.items() if name not in within and not x.is_contiguous()}
    if whole:
        record = replace(record, call=replace(record.call, **whole))
    bound = calls.bind(record)
    results = graph_attention_backward.allocate(record, bound)
    for names in columns:
        for name, gradient in zip(names, _columns_like([rows[name] for name in names]), strict=True):
            results[_INPUTS.index(name)] = gradient
    calls.run("graph_attention_backward", bound, *results)
    return tuple(results)


def _matrices(rows: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the rows that are all the columns of a matrix: together, or the query's and the keys' apart."""
    names = list(rows)
    groups = [names] if are_columns(list(rows.values())) else [names[:1], names[1:]]
    return [group for group in groups if are_columns([rows[name] for name in group])]


def _columns_like(columns: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised tensors that lie in a matrix of their own as these do in theirs."""
    # By address: columns may be tensors of storages of their own, as numpy's are.
    begin = min(x.data_ptr() for x in columns)
    width = sum(x.shape[-2] * x.shape[-1] for x in columns)
    matrix = large_empty(columns[0], (columns[0].shape[:-2].numel(), width))
    places = [(x.data_ptr() - begin) // x.element_size() for x in columns]
    return [matrix.as_strided(x.shape, x.stride(), place) for x, place in zip(columns, places, strict=True)]
