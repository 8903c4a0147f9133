"""The primitives of attention over edges, as operators that autograd, opcheck and torch.compile know.

`anyattention::edge_dot`, `edge_sum`, `edge_softmax`, `edge_total` and `edge_spread` are closed under differentiation:
the backward of each is made of the others. `edge_argmax` returns edges, which have no gradient.

A graph crosses as a list of eight arrays: query_offsets, keys_by_query, edges_by_query, key_offsets, queries_by_key,
edges_by_key, query_index, key_index. `flip` exchanges queries and keys.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, F edge_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention.ops.eager import are_plain
from anyattention.ops.graph import kernels
from anyattention.patterns import Graph

__all__ = [
    "arrays_of",
    "define",
    "edge_argmax",
    "edge_dot",
    "edge_softmax",
    "edge_spread",
    "edge_sum",
    "edge_total",
    "keep_inputs",
    "kept_inputs",
]

_library = torch.library.Library("anyattention", "FRAGMENT")


def arrays_of(graph: Graph) -> list[Tensor]:
    """A Graph as the operators take it."""
    return [
        graph.query_offsets,
        graph.keys_by_query,
        graph.edges_by_query,
        graph.key_offsets,
        graph.queries_by_key,
        graph.edges_by_key,
        graph.query_index,
        graph.key_index,
    ]


def edge_dot(rows: Tensor, columns: Tensor, graph: Sequence[Tensor], flip: bool = False) -> Tensor:
    """`result[e, h] = rows[i, h] . columns[j, h]`: `(B, E, H)` from `(B, N, H, D)` and `(B, M, G, D)`."""
    return _edge_dot(rows, columns, list(graph), flip)


def edge_sum(weights: Tensor, columns: Tensor, graph: Sequence[Tensor], flip: bool = False) -> Tensor:
    """`result[i, h] = sum of weights[e, h] columns[j, h]`: `(B, N, H, D)` from `(B, E, H)` and `(B, M, G, D)`.

    An edge of weight 0 is not there: what its column holds, NaN too, does not count.
    """
    return _edge_sum(weights, columns, list(graph), flip)


def edge_softmax(scores: Tensor, graph: Sequence[Tensor]) -> Tensor:
    """The softmax of the scores `(B, E, H)` of each query's edges."""
    return _edge_softmax(scores, list(graph))


def edge_total(numbers: Tensor, graph: Sequence[Tensor], flip: bool = False) -> Tensor:
    """The sum of each query's numbers `(B, E, H)`, `(B, N, H)`."""
    return _edge_total(numbers, list(graph), flip)


def edge_spread(numbers: Tensor, graph: Sequence[Tensor], flip: bool = False) -> Tensor:
    """Each query's numbers `(B, N, H)` on its edges, `(B, E, H)`."""
    return _edge_spread(numbers, list(graph), flip)


def edge_argmax(
    weights: Tensor, columns: Tensor, features: Tensor | None, feature_weight: Tensor | None, graph: Sequence[Tensor]
) -> Tensor:
    """The edge `(B, N, H, D)` of each query's largest `weights[e, h] (columns[j, h] + feature_weight[h] features[e])`.

    From `(B, E, H)`, `(B, M, G, D)`, `(E, F)` and `(H, D, F)`. NaN is larger than any number, and ties go to the first
    edge. A weight of -inf hides its edge; -1 stands where all are hidden.
    """
    inputs = [None if x is None else x.detach() for x in (weights, columns, features, feature_weight)]
    return _edge_argmax(*inputs, list(graph))


def _side(graph: Sequence[Tensor], flip: bool) -> list[Tensor]:
    """Offsets, columns and edges of the rows that reduce."""
    return list(graph[3:6]) if flip else list(graph[:3])


def _sum_groups(heads: Tensor, like: Tensor) -> Tensor:
    """The gradients of H heads added up to the G heads that they share."""
    if heads.shape[2] == like.shape[2]:
        return heads
    return heads.unflatten(2, (like.shape[2], -1)).sum(3)


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    shapes: Callable[..., Any],
    backward: Callable[..., Any] | None,
    keep: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register an operator and return the function that calls it.

    `run` is its CPU kernel, `shapes` returns empty tensors like its results, and `backward(ctx, *gradients)` is its
    gradient; `keep(ctx, inputs, output)` saves what that needs; None saves the inputs.

    Plain tensors go to the kernel straight: the dispatcher and `torch.library.register_autograd`, which takes the list
    of a graph's arrays apart and together again, cost more than the kernel does on a graph of 10,000 edges.
    """
    _library.define(f"{name}({schema}")
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"anyattention::{name}", shapes, lib=_library)
    operator = getattr(torch.ops.anyattention, name).default
    if backward is None:
        return lambda *arguments: (run if are_plain(arguments) else operator)(*arguments)

    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, below = arguments
        output = below(*inputs)
        (keep or keep_inputs)(ctx, inputs, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(lambda ctx, *gradients: (*backward(ctx, *gradients), None)),
    }
    function: Any = type(name, (torch.autograd.Function,), members)

    def differentiable(below: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return function.apply(*arguments, below)
        return below(*arguments)

    def dispatched(keyset: Any, *arguments: Any) -> Any:
        def below(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        return differentiable(below, arguments)

    _library.impl(name, dispatched, "Autograd", with_keyset=True)
    return lambda *arguments: differentiable(run, arguments) if are_plain(arguments) else operator(*arguments)


def keep_inputs(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """Save every tensor among the inputs, and the rest as it is."""
    flat: list[Tensor | None] = []
    ctx.layout = []
    for item in inputs:
        if isinstance(item, list | tuple) and all(isinstance(each, Tensor) for each in item):
            ctx.layout.append(len(item))
            flat.extend(item)
        elif isinstance(item, Tensor) or item is None:
            ctx.layout.append(None)
            flat.append(item)
        else:
            ctx.layout.append((item,))
    ctx.save_for_backward(*flat)


def kept_inputs(ctx: Any) -> list[Any]:
    """What `keep_inputs` saved, in order."""
    saved = iter(ctx.saved_tensors)
    kept: list[Any] = []
    for entry in ctx.layout:
        if isinstance(entry, int):
            kept.append([next(saved) for _ in range(entry)])
        else:
            kept.append(next(saved) if entry is None else entry[0])
    return kept


def _edge_dot_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, columns, graph, flip = kept_inputs(ctx)
    by_rows = edge_sum(grad, columns, graph, flip) if ctx.needs_input_grad[0] else None
    by_columns = None
    if ctx.needs_input_grad[1]:
        by_columns = _sum_groups(edge_sum(grad, rows, graph, not flip), columns)
    return by_rows, by_columns, None, None


def _edge_sum_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, columns, graph, flip = kept_inputs(ctx)
    by_weights = by_columns = None
    if ctx.needs_input_grad[0]:
        by_weights = _without_absent(edge_dot(grad, columns, graph, flip), weights)
    if ctx.needs_input_grad[1]:
        by_columns = _sum_groups(edge_sum(weights, grad, graph, not flip), columns)
    return by_weights, by_columns, None, None


def _without_absent(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient, 0 in place of NaN and Inf of an edge of weight 0: it is not there, whatever its column holds."""
    # Nearly always all are finite, as one pass tells.
    if are_plain((gradient, weights)) and gradient.detach().sum().isfinite():
        return gradient
    return torch.where((weights == 0) & ~gradient.isfinite(), 0.0, gradient)


def _keep_output(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[1])


def _edge_softmax_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, *graph = ctx.saved_tensors
    product = _without_absent(weights * grad, weights)
    return product - weights * edge_spread(edge_total(product, graph), graph), None


def _edge_total_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, graph, flip = kept_inputs(ctx)
    return edge_spread(grad, graph, flip), None, None


def _edge_spread_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, graph, flip = kept_inputs(ctx)
    return edge_total(grad, graph, flip), None, None


_edge_dot = define(
    "edge_dot",
    "Tensor rows, Tensor columns, Tensor[] graph, bool flip) -> Tensor",
    lambda rows, columns, graph, flip: kernels.edge_dot(rows, columns, _side(graph, flip)),
    lambda rows, columns, graph, flip: rows.new_empty(rows.shape[0], graph[1].shape[0], rows.shape[2]),
    _edge_dot_backward,
)
_edge_sum = define(
    "edge_sum",
    "Tensor weights, Tensor columns, Tensor[] graph, bool flip) -> Tensor",
    lambda weights, columns, graph, flip: kernels.edge_sum(weights, columns, _side(graph, flip)),
    lambda weights, columns, graph, flip: weights.new_empty(
        weights.shape[0], graph[3 if flip else 0].shape[0] - 1, weights.shape[2], columns.shape[3]
    ),
    _edge_sum_backward,
)
_edge_total = define(
    "edge_total",
    "Tensor numbers, Tensor[] graph, bool flip) -> Tensor",
    lambda numbers, graph, flip: kernels.edge_total(numbers, _side(graph, flip), graph[0 if flip else 3].shape[0] - 1),
    lambda numbers, graph, flip: numbers.new_empty(
        numbers.shape[0], graph[3 if flip else 0].shape[0] - 1, numbers.shape[2]
    ),
    _edge_total_backward,
)
_edge_spread = define(
    "edge_spread",
    "Tensor numbers, Tensor[] graph, bool flip) -> Tensor",
    lambda numbers, graph, flip: numbers.index_select(1, graph[7 if flip else 6]),
    lambda numbers, graph, flip: numbers.new_empty(numbers.shape[0], graph[1].shape[0], numbers.shape[2]),
    _edge_spread_backward,
)
_edge_softmax = define(
    "edge_softmax",
    "Tensor scores, Tensor[] graph) -> Tensor",
    lambda scores, graph: kernels.edge_softmax(scores, _side(graph, False), graph[3].shape[0] - 1),
    lambda scores, graph: scores.new_empty(scores.shape),
    _edge_softmax_backward,
    _keep_output,
)
_edge_argmax = define(
    "edge_argmax",
    "Tensor weights, Tensor columns, Tensor? features, Tensor? feature_weight, Tensor[] graph) -> Tensor",
    lambda weights, columns, features, feature_weight, graph: kernels.edge_argmax(
        weights, columns, features, feature_weight, _side(graph, False)
    ),
    lambda weights, columns, features, feature_weight, graph: graph[0].new_empty(
        weights.shape[0], graph[0].shape[0] - 1, weights.shape[2], columns.shape[3]
    ),
    None,
)
