"""Graph attention: checks the arguments and chooses the implementation."""

from __future__ import annotations

from torch import Tensor

from anyattention._checks import (
    Axes,
    describe_shape,
    require_device,
    require_mask,
    require_same_kind,
    require_tensor,
)
from anyattention.bias import RelativeBias
from anyattention.errors import (
    AttentionError,
    DimensionMismatchError,
    InvalidInputError,
    InvalidMaskError,
    UnsupportedError,
)
from anyattention.ops import dispatch
from anyattention.ops.arguments import Arguments, read_bias, require_sinks
from anyattention.ops.dispatch import Explanation, Implementation
from anyattention.ops.graph import cpu, reference
from anyattention.ops.refusals import refusal_of_rows
from anyattention.output import AttentionResult
from anyattention.patterns import Graph
from anyattention.scores import EdgeFeatures

__all__ = ["explain_graph", "graph_attention"]

_TABLE = (
    Implementation("cpu", cpu.run, refusal_of_rows),
    Implementation("reference", reference.run, reference.refusal),
)


def graph_attention(arguments: Arguments) -> AttentionResult:
    """`attend` over a Graph; see there."""
    call = _check(arguments)
    result = dispatch.choose(_TABLE, call, arguments.implementation).run(call)
    if result.weights is not None and arguments.return_weights == "mean":
        return result._replace(weights=result.weights.mean(-1))
    return result


def explain_graph(arguments: Arguments) -> Explanation:
    """`explain` over a Graph."""
    return dispatch.explain(_TABLE, _check(arguments), arguments.implementation)


def _check(arguments: Arguments) -> Arguments:
    """The arguments with mask and bias as `(edges, 1)`, `(edges, heads)` or `(batch, edges, heads)`."""
    graph = arguments.pattern
    assert isinstance(graph, Graph)
    query, key, value = arguments.query, arguments.key, arguments.value
    batch = "batch " if query.ndim == 4 else ""
    sizes = {"queries": graph.num_queries, "keys": graph.num_keys, "edges": graph.num_edges}
    axes = Axes("the graph", **sizes)
    axes.bind("query", query, f"{batch}queries heads head_dim")
    axes.bind_keys("key", key, f"{batch}keys key_heads head_dim")
    axes.bind("value", value, f"{batch}keys key_heads value_dim")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_same_kind(name, tensor, "query", query)
    require_device("graph", graph.edge_index, query.device, "query")
    arguments.score.check(axes, query)
    require_sinks(arguments, axes)
    if arguments.edges is not None:
        _check_edges(arguments.edges, axes, query)
    mask, bias = arguments.mask, arguments.bias
    if mask is not None:
        require_mask("mask", mask)
        require_device("mask", mask, query.device, "query")
        mask = _to_edges_and_heads("mask", mask, axes, InvalidMaskError)
    if bias is not None:
        bias = _to_edges_and_heads("bias", _tensor(bias, query), axes, DimensionMismatchError)
        visible = bias != -float("inf")
        bias = bias.masked_fill(~visible, 0.0)
        mask = visible if mask is None else mask & visible
    if arguments.return_logsumexp and not arguments.normalize:
        raise UnsupportedError(
            "return_logsumexp=True: with normalize=False there is no softmax to take it from",
            argument="return_logsumexp",
        )
    return arguments if mask is None and bias is None else arguments.changed(mask=mask, bias=bias)


def _check_edges(edges: EdgeFeatures, axes: Axes, query: Tensor) -> None:
    require_tensor("edges.features", edges.features)
    for name, tensor, names in (
        ("edges.features", edges.features, "edges edge_dim"),
        ("edges.key_weight", edges.key_weight, "heads head_dim edge_dim"),
        ("edges.value_weight", edges.value_weight, "heads value_dim edge_dim"),
    ):
        if tensor is not None:
            axes.bind(name, tensor, names)
            require_same_kind(name, tensor, "query", query)


def _tensor(bias: Tensor | RelativeBias, query: Tensor) -> Tensor:
    if isinstance(bias, RelativeBias):
        raise InvalidInputError(
            argument="bias",
            expected="a tensor with a Graph, whose nodes have no positions",
            actual="RelativeBias",
            hint="bias.at(graph.query_index, graph.key_index, num_queries, num_keys).T is one",
        )
    return read_bias(bias, query)


def _to_edges_and_heads(argument: str, tensor: Tensor, axes: Axes, error: type[AttentionError]) -> Tensor:
    """A mask or bias as `(edges, 1)`, `(edges, heads)` or `(batch, edges, heads)`."""
    edges, heads, batch = (axes.sizes.get(axis) for axis in ("edges", "heads", "batch"))
    allowed = [(edges,), (edges, heads)] if batch is None else [(edges,), (edges, heads), (batch, edges, heads)]
    if not any(len(shape) == tensor.ndim and shape == tuple(tensor.shape) for shape in allowed):
        shapes = " or ".join(str(shape) for shape in allowed)
        raise error(
            argument=argument,
            expected=f"{shapes}: edges={edges}, heads={heads}" + ("" if batch is None else f", batch={batch}"),
            actual=describe_shape(tensor),
        )
    return tensor[:, None] if tensor.ndim == 1 else tensor
