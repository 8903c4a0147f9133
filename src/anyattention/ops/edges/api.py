"""What attention over edges is made of, as public functions: products, weighted sums and the softmax of edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import (
    Axes,
    allocation_failures_named,
    no_graph,
    require_device,
    require_floating,
    require_same_kind,
)
from anyattention.ambient import is_autocast_enabled, is_compiling, is_transformed
from anyattention.ops import dispatch
from anyattention.ops.dispatch import Implementation
from anyattention.ops.edges import operators, reference
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.refusals import refusal_of_device
from anyattention.patterns import Graph

__all__ = ["edge_dot", "edge_softmax", "edge_sum"]


@dataclass(frozen=True, eq=False)
class _Call:
    """Checked arguments of one primitive: tensors with a batch axis, in the dtype of the sums."""

    graph: Graph
    tensors: tuple[Tensor, ...]


def edge_dot(query: Tensor, key: Tensor, graph: Graph, *, implementation: str | None = None) -> Tensor:
    """The product of each edge's query and key, a sampled dense-dense matrix product (SDDMM).

        result[e, h] = sum over d of query[i, h, d] key[j, g, d],  edge e from key j to query i,  g = h // group

    Args:
        query: `(queries, heads, head_dim)` or `(batch, queries, heads, head_dim)`.
        key: `(keys, key_heads, head_dim)`, with the query's batch; each key head serves `group = heads / key_heads`
            heads in a row.
        graph: the edges.
        implementation: force "cpu" or "reference"; None takes the first that can run the call.

    Returns:
        `(edges, heads)` or `(batch, edges, heads)`, in the caller's edge order and the query's dtype; float16 and
        bfloat16 are summed in float32. Differentiable to any order.

    Raises:
        DimensionMismatchError, InvalidInputError: an argument does not fit the others.
        UnsupportedError: the forced implementation cannot run the call.
        OutOfMemoryError: memory ran out.

    Cost: O(edges x heads x head_dim) time. Memory above the result: none in "cpu", for any derivative;
    O(edges x heads x head_dim) in "reference".

    Source: Nisa et al., 2018, "Sampled dense matrix multiplication for high-performance machine learning"; here
    for several heads at once, and without values of the sparse matrix.

    Example:
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [0, 0]]), num_queries=1, num_keys=2)
        >>> query, key = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 0.0]], [[0.0, 5.0]]])
        >>> edge_dot(query, key, graph)
        tensor([[ 3.],
                [10.]])
    """
    axes = _axes(graph)
    require_floating("query", query)
    batch = "batch " if query.ndim == 4 else ""
    axes.bind("query", query, f"{batch}queries heads head_dim")
    axes.bind_keys("key", key, f"{batch}keys key_heads head_dim")
    return _run(_DOT, graph, {"query": query, "key": key}, bool(batch), implementation)


def edge_sum(weights: Tensor, value: Tensor, graph: Graph, *, implementation: str | None = None) -> Tensor:
    """The weighted sum of the values that each query's edges lead to, a sparse-dense matrix product (SpMM).

        result[i, h] = sum over the edges e from a key j to i of weights[e, h] value[j, g],  g = h // group

    An edge of weight 0 is not there: what its value holds, NaN too, reaches neither the result nor a gradient.
    A query without edges gets 0.

    Args:
        weights: `(edges, heads)` or `(batch, edges, heads)`, in the caller's edge order.
        value: `(keys, key_heads, value_dim)`, with the weights' batch; each key head serves
            `group = heads / key_heads` heads in a row.
        graph: the edges.
        implementation: force "cpu" or "reference"; None takes the first that can run the call.

    Returns:
        `(queries, heads, value_dim)` or `(batch, queries, heads, value_dim)`, in the value's dtype; float16 and
        bfloat16 are summed in float32. Differentiable to any order.

    Raises:
        DimensionMismatchError, InvalidInputError: an argument does not fit the others.
        UnsupportedError: the forced implementation cannot run the call.
        OutOfMemoryError: memory ran out.

    Cost: O(edges x heads x value_dim) time. Memory above the result: none in "cpu", O(edges x heads) in its
    derivatives; O(edges x heads x value_dim) in "reference".

    Source: Yang, Buluc and Owens, 2018, "Design principles for sparse matrix multiplication on the GPU"; here for
    several heads at once.

    Example:
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [0, 0]]), num_queries=1, num_keys=2)
        >>> edge_sum(torch.tensor([[0.5], [2.0]]), torch.tensor([[[2.0, 4.0]], [[1.0, 0.0]]]), graph)
        tensor([[[3., 2.]]])
    """
    axes = _axes(graph)
    require_floating("weights", weights)
    batch = "batch " if weights.ndim == 3 else ""
    axes.bind("weights", weights, f"{batch}edges heads")
    axes.bind_keys("value", value, f"{batch}keys key_heads value_dim")
    return _run(_SUM, graph, {"weights": weights, "value": value}, bool(batch), implementation)


def edge_softmax(scores: Tensor, graph: Graph, *, implementation: str | None = None) -> Tensor:
    """The softmax of the scores of each query's edges.

        result[e, h] = exp(scores[e, h]) / sum over the edges f of the same query of exp(scores[f, h])

    A score of -inf hides its edge: the result is 0, and so is every edge's of a query all of whose scores are -inf.
    NaN and +inf make all of their query's results NaN.

    Args:
        scores: `(edges, heads)` or `(batch, edges, heads)`, in the caller's edge order.
        graph: the edges.
        implementation: force "cpu" or "reference"; None takes the first that can run the call.

    Returns:
        The scores' shape and dtype; float16 and bfloat16 are summed in float32. Differentiable to any order.

    Raises:
        DimensionMismatchError, InvalidInputError: the scores do not fit the graph.
        UnsupportedError: the forced implementation cannot run the call.
        OutOfMemoryError: memory ran out.

    Cost: O(edges x heads) time; memory above the result O(queries x heads), in derivatives O(edges x heads).

    Source: Velickovic et al., 2018, "Graph attention networks", equation 2.

    Example:
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 0], [0, 0, 1]]), num_nodes=2)
        >>> edge_softmax(torch.tensor([[1.0], [1.0], [7.0]]), graph)
        tensor([[0.5000],
                [0.5000],
                [1.0000]])
    """
    axes = _axes(graph)
    require_floating("scores", scores)
    batch = "batch " if scores.ndim == 3 else ""
    axes.bind("scores", scores, f"{batch}edges heads")
    # PyTorch's autocast takes a softmax to float32, too.
    return _run(_SOFTMAX, graph, {"scores": scores}, bool(batch), implementation, torch.float32)


def _axes(graph: Graph) -> Axes:
    if not isinstance(graph, Graph):
        raise no_graph("graph", graph)
    sizes = {"queries": graph.num_queries, "keys": graph.num_keys, "edges": graph.num_edges}
    return Axes("the graph", **sizes)


def _run(
    table: tuple[Implementation, ...],
    graph: Graph,
    named: dict[str, Tensor],
    has_batch: bool,
    implementation: str | None,
    autocast_to: torch.dtype | None = None,
) -> Tensor:
    """Checks dtypes and devices, and runs the first implementation that can."""
    first = next(iter(named))
    device = named[first].device
    if is_autocast_enabled(device):
        dtype = autocast_to or torch.get_autocast_dtype(device.type)
        named = {name: x.to(dtype) if _is_cast(x) else x for name, x in named.items()}
    for name, tensor in named.items():
        require_same_kind(name, tensor, first, named[first])
    require_device("graph", graph.edge_index, device, first)
    dtype = named[first].dtype
    sums = torch.promote_types(dtype, torch.float32)
    tensors = tuple(x.to(sums) if has_batch else x.to(sums)[None] for x in named.values())
    call = _Call(graph, tensors)
    run = dispatch.choose(table, call, implementation).run
    if is_compiling():
        result = run(call)
    else:
        with allocation_failures_named():
            result = run(call)
    return (result if has_batch else result[0]).to(dtype)


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast casts it; float64 stays, as in PyTorch's own operators."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _refusal(call: _Call) -> str | None:
    if is_compiling() and is_transformed(*call.tensors):
        return "compiled, the kernels have no rules for the transforms of torch.func"
    return refusal_of_device(call.tensors[0], "tensors are")


def _table(fused: Callable[..., Tensor], plain: Callable[..., Tensor]) -> tuple[Implementation, ...]:
    def run_fused(call: _Call) -> Any:
        return fused(*call.tensors, arrays_of(call.graph))

    def run_plain(call: _Call) -> Any:
        return plain(*call.tensors, call.graph)

    return (
        Implementation("cpu", run_fused, _refusal),
        Implementation("reference", run_plain, lambda call: None),
    )


_DOT = _table(operators.edge_dot, reference.edge_dot)
_SUM = _table(operators.edge_sum, reference.edge_sum)
_SOFTMAX = _table(operators.edge_softmax, reference.edge_softmax)
