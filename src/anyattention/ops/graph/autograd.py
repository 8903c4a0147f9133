"""Graph attention and its primitives as operators that autograd, opcheck and torch.compile know.

`anyattention::edge_dot`, `edge_sum`, `edge_softmax`, `edge_total` and `edge_spread` are closed under differentiation:
the backward of each is made of the others. `anyattention::graph_attention` is fused, forward and backward; under
`create_graph` its backward is that of the same computation written in the primitives, so no derivative of any order
keeps a channel per edge.

A graph crosses as a list of eight arrays: query_offsets, keys_by_query, edges_by_query, key_offsets, queries_by_key,
edges_by_key, query_index, key_index. `flip` exchanges queries and keys.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ops.graph import kernels
from anyattention.ops.graph.kernels import Settings
from anyattention.ops.random import keep_factors
from anyattention.patterns import Graph

__all__ = [
    "arrays_of",
    "attention",
    "attention_weights",
    "edge_dot",
    "edge_scores",
    "edge_softmax",
    "edge_spread",
    "edge_sum",
    "edge_total",
]

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? vector, Tensor? term, Tensor? bias"
_NUMBERS = "str score, bool normalize, float scale, float softcap, float negative_slope, float dropout"
_ATTENTION = f"{_TENSORS}, Tensor? seed, Tensor[] graph, {_NUMBERS}"
_library = torch.library.Library("anyattention", "FRAGMENT")
# What a backward returns for the arrays of the graph.
_NO_GRAPH = [None] * 8


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
    return torch.ops.anyattention.edge_dot(rows, columns, list(graph), flip)


def edge_sum(weights: Tensor, columns: Tensor, graph: Sequence[Tensor], flip: bool = False) -> Tensor:
    """`result[i, h] = sum of weights[e, h] columns[j, h]`: `(B, N, H, D)` from `(B, E, H)` and `(B, M, G, D)`.

    An edge of weight 0 is not there: what its column holds, NaN too, does not count.
    """
    return torch.ops.anyattention.edge_sum(weights, columns, list(graph), flip)


def edge_softmax(scores: Tensor, graph: Sequence[Tensor]) -> Tensor:
    """The softmax of the scores `(B, E, H)` of each query's edges."""
    return torch.ops.anyattention.edge_softmax(scores, list(graph))


def edge_total(numbers: Tensor, graph: Sequence[Tensor], flip: bool = False) -> Tensor:
    """The sum of each query's numbers `(B, E, H)`, `(B, N, H)`."""
    return torch.ops.anyattention.edge_total(numbers, list(graph), flip)


def edge_spread(numbers: Tensor, graph: Sequence[Tensor], flip: bool = False) -> Tensor:
    """Each query's numbers `(B, N, H)` on its edges, `(B, E, H)`."""
    return torch.ops.anyattention.edge_spread(numbers, list(graph), flip)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Output `(B, N, H, C)` and logsumexp `(B, N, H)`; see `kernels.attention`."""
    return torch.ops.anyattention.graph_attention(
        query, key, value, vector, term, bias, seed, list(graph), *_numbers(settings)
    )


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    logsumexp: Tensor,
    graph: Sequence[Tensor],
    settings: Settings,
) -> Tensor:
    """Weights `(B, E, H)` before dropout, without gradients; see `kernels.attention_weights`."""
    return torch.ops.anyattention.graph_attention_weights(
        query, key, value, vector, term, bias, logsumexp, list(graph), *_numbers(settings)
    )


def edge_scores(
    query: Tensor,
    key: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
) -> Tensor:
    """The score `(B, E, H)` of each edge in differentiable primitives; -inf on hidden edges."""
    hidden = None if bias is None else bias == -torch.inf
    if settings.score == "Dot":
        raw = edge_dot(query, key, graph)
        raw = raw if term is None else raw + term
    elif settings.score == "Additive":
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        raw = edge_spread(query.squeeze(-1), graph) + edge_spread(key.squeeze(-1), graph, True)
        raw = F.leaky_relu(raw if term is None else raw + term, settings.negative_slope)
    else:
        raw = _dynamic_scores(query, key, vector, hidden, graph, settings)
    if hidden is not None:
        # A gradient of 0 through NaN would be NaN.
        raw = torch.where(hidden, 0.0, raw)
    # Infinity becomes NaN: -inf would pass for a hidden edge.
    scores = raw * torch.where(raw.isfinite(), 1.0, torch.nan) * settings.scale
    if settings.softcap > 0:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    return scores if hidden is None or bias is None else torch.where(hidden, -torch.inf, scores + bias)


def _dynamic_scores(
    query: Tensor,
    key: Tensor,
    vector: Tensor | None,
    hidden: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
) -> Tensor:
    """`vector . LeakyReLU(query + key)` of each edge, head by head: E x D numbers at a time."""
    assert vector is not None
    group = query.shape[2] // key.shape[2]
    heads = []
    for head in range(query.shape[2]):
        own = query[:, :, head].index_select(1, graph[6]) + key[:, :, head // group].index_select(1, graph[7])
        if hidden is not None:
            own = torch.where(hidden[:, :, head, None], 0.0, own)
        # Not a matrix product, whose bits depend on the number of threads.
        heads.append((F.leaky_relu(own, settings.negative_slope) * vector[head]).sum(-1))
    return torch.stack(heads, dim=-1)


def _composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp in the primitives, differentiable to any order; `shift` is a constant near logsumexp."""
    scores = edge_scores(query, key, vector, term, bias, graph, settings)
    hidden = scores == -torch.inf
    if settings.normalize:
        shift = torch.where(shift == -torch.inf, 0.0, shift)
        terms = torch.where(hidden, 0.0, torch.exp(scores - edge_spread(shift, graph)))
        total = edge_total(terms, graph)
        is_empty = total == 0
        total = torch.where(is_empty, 1.0, total)
        weights = terms / edge_spread(total, graph)
        logsumexp = torch.where(is_empty, -torch.inf, total.log() + shift)
    else:
        weights = torch.where(hidden, 0.0, torch.sigmoid(scores))
        logsumexp = shift
    if seed is not None:
        weights = weights * keep_factors(tuple(weights.shape), settings.dropout, seed, weights.dtype)
    return edge_sum(weights, value, graph), logsumexp


def _numbers(settings: Settings) -> tuple[str, bool, float, float, float, float]:
    return (
        settings.score,
        settings.normalize,
        settings.scale,
        settings.softcap,
        settings.negative_slope,
        settings.dropout,
    )


def _side(graph: Sequence[Tensor], flip: bool) -> list[Tensor]:
    """Offsets, columns and edges of the rows that reduce."""
    return list(graph[3:6]) if flip else list(graph[:3])


def _sum_groups(heads: Tensor, like: Tensor) -> Tensor:
    """The gradients of H heads added up to the G heads that they share."""
    if heads.shape[2] == like.shape[2]:
        return heads
    return heads.unflatten(2, (like.shape[2], -1)).sum(3)


def _define(
    name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any], backward: Callable[..., Any] | None
) -> None:
    """Register an operator: its CPU kernel, the shapes it returns, and its gradient `backward(ctx, *gradients)`."""
    _library.define(f"{name}({schema}")
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"anyattention::{name}", shapes, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"anyattention::{name}", backward, setup_context=_keep_inputs, lib=_library)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save every tensor among the inputs and outputs, and the rest as it is."""
    # Of several outputs some may be unused; zeros for them would cost as much as a gradient.
    ctx.set_materialize_grads(not isinstance(output, tuple))
    flat: list[Tensor | None] = []
    ctx.layout = []
    for item in (*inputs, *(output if isinstance(output, tuple) else ())):
        if isinstance(item, list | tuple):
            ctx.layout.append(len(item))
            flat.extend(item)
        elif isinstance(item, Tensor) or item is None:
            ctx.layout.append(None)
            flat.append(item)
        else:
            ctx.layout.append((item,))
    ctx.save_for_backward(*flat)


def _kept(ctx: Any) -> list[Any]:
    """What `_keep_inputs` saved, in order."""
    saved = iter(ctx.saved_tensors)
    kept: list[Any] = []
    for entry in ctx.layout:
        if isinstance(entry, int):
            kept.append([next(saved) for _ in range(entry)])
        else:
            kept.append(next(saved) if entry is None else entry[0])
    return kept


def _edge_dot_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, columns, graph, flip = _kept(ctx)
    by_rows = edge_sum(grad, columns, graph, flip) if ctx.needs_input_grad[0] else None
    by_columns = None
    if ctx.needs_input_grad[1]:
        by_columns = _sum_groups(edge_sum(grad, rows, graph, not flip), columns)
    return by_rows, by_columns, _NO_GRAPH, None


def _edge_sum_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, columns, graph, flip = _kept(ctx)
    by_weights = by_columns = None
    if ctx.needs_input_grad[0]:
        by_weights = edge_dot(grad, columns, graph, flip)
        # An edge of weight 0 is not there for its gradient either, whatever its column holds.
        by_weights = torch.where((weights == 0) & ~by_weights.isfinite(), 0.0, by_weights)
    if ctx.needs_input_grad[1]:
        by_columns = _sum_groups(edge_sum(weights, grad, graph, not flip), columns)
    return by_weights, by_columns, _NO_GRAPH, None


def _edge_softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[1])


def _edge_softmax_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, *graph = ctx.saved_tensors
    # A hidden edge's gradient may be NaN.
    product = torch.where(weights == 0, 0.0, weights * grad)
    return product - weights * edge_spread(edge_total(product, graph), graph), _NO_GRAPH


def _edge_total_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, graph, flip = _kept(ctx)
    return edge_spread(grad, graph, flip), _NO_GRAPH, None


def _edge_spread_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, graph, flip = _kept(ctx)
    return edge_total(grad, graph, flip), _NO_GRAPH, None


def _run_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    return kernels.attention(*arguments[:8], settings=Settings(*arguments[8:]))


def _attention_shapes(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3])


def _run_attention_backward(*arguments: Any) -> list[Tensor]:
    gradients = kernels.attention_backward(*arguments[:12], settings=Settings(*arguments[12:]))
    return [arguments[0].new_empty(0) if gradient is None else gradient for gradient in gradients]


def _attention_backward_shapes(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    graph: list[Tensor],
    *settings: Any,
) -> list[Tensor]:
    edges = query.new_empty(query.shape[0], graph[1].shape[0], query.shape[2])
    by_vector = query.new_empty(0 if vector is None else vector.shape)
    by_bias = query.new_empty(0 if bias is None else edges.shape)
    return [*(x.new_empty(x.shape) for x in (query, key, value)), by_vector, edges, by_bias]


def _attention_gradients(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    *inputs, output, logsumexp = _kept(ctx)
    tensors, graph, numbers = inputs[:7], inputs[7], inputs[8:]
    none = (None, _NO_GRAPH, *(None,) * len(numbers))
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return (
            *_composed_gradients(ctx, tensors, graph, Settings(*numbers), grad_output, grad_logsumexp, logsumexp),
            *none,
        )
    gradients = torch.ops.anyattention.graph_attention_backward(
        grad_output, grad_logsumexp, output, logsumexp, *tensors, graph, *numbers
    )
    given = [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
    return (*given, *none)


def _composed_gradients(
    ctx: Any,
    tensors: Sequence[Any],
    graph: list[Tensor],
    settings: Settings,
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    logsumexp: Tensor,
) -> list[Tensor | None]:
    """The gradients as a graph of primitives, which autograd differentiates again."""
    needed = [n for n in range(6) if ctx.needs_input_grad[n]]
    # One input may be computed from another (the term from the query): a node of its own for each keeps them apart.
    own: Any = [x.view_as(x) if n in needed else x for n, x in enumerate(tensors)]
    outputs = list(_composed(*own, graph=graph, settings=settings, shift=logsumexp.detach()))
    cotangents: list[Tensor | None] = [grad_output, grad_logsumexp]
    pairs = [
        (out, grad) for out, grad in zip(outputs, cotangents, strict=True) if grad is not None and out.requires_grad
    ]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [own[n] for n in needed],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    by_position = dict(zip(needed, found, strict=True))
    return [by_position.get(n) for n in range(6)]


_define(
    "edge_dot",
    "Tensor rows, Tensor columns, Tensor[] graph, bool flip) -> Tensor",
    lambda rows, columns, graph, flip: kernels.edge_dot(rows, columns, _side(graph, flip)),
    lambda rows, columns, graph, flip: rows.new_empty(rows.shape[0], graph[1].shape[0], rows.shape[2]),
    _edge_dot_backward,
)
_define(
    "edge_sum",
    "Tensor weights, Tensor columns, Tensor[] graph, bool flip) -> Tensor",
    lambda weights, columns, graph, flip: kernels.edge_sum(weights, columns, _side(graph, flip)),
    lambda weights, columns, graph, flip: weights.new_empty(
        weights.shape[0], graph[3 if flip else 0].shape[0] - 1, weights.shape[2], columns.shape[3]
    ),
    _edge_sum_backward,
)
_define(
    "edge_total",
    "Tensor numbers, Tensor[] graph, bool flip) -> Tensor",
    lambda numbers, graph, flip: kernels.edge_total(numbers, _side(graph, flip), graph[0 if flip else 3].shape[0] - 1),
    lambda numbers, graph, flip: numbers.new_empty(
        numbers.shape[0], graph[3 if flip else 0].shape[0] - 1, numbers.shape[2]
    ),
    _edge_total_backward,
)
_define(
    "edge_spread",
    "Tensor numbers, Tensor[] graph, bool flip) -> Tensor",
    lambda numbers, graph, flip: numbers.index_select(1, graph[7 if flip else 6]),
    lambda numbers, graph, flip: numbers.new_empty(numbers.shape[0], graph[1].shape[0], numbers.shape[2]),
    _edge_spread_backward,
)
_define(
    "edge_softmax",
    "Tensor scores, Tensor[] graph) -> Tensor",
    lambda scores, graph: kernels.edge_softmax(scores, _side(graph, False), graph[3].shape[0] - 1),
    lambda scores, graph: scores.new_empty(scores.shape),
    None,
)
torch.library.register_autograd(
    "anyattention::edge_softmax", _edge_softmax_backward, setup_context=_edge_softmax_setup, lib=_library
)
_define(
    "graph_attention",
    f"{_ATTENTION}) -> (Tensor, Tensor)",
    _run_attention,
    _attention_shapes,
    _attention_gradients,
)
_define(
    "graph_attention_weights",
    f"{_TENSORS}, Tensor logsumexp, Tensor[] graph, {_NUMBERS}) -> Tensor",
    lambda *arguments: kernels.attention_weights(*arguments[:8], settings=Settings(*arguments[8:])),
    lambda query, *rest: query.new_empty(query.shape[0], rest[6][1].shape[0], query.shape[2]),
    None,
)
_define(
    "graph_attention_backward",
    f"Tensor grad_output, Tensor? grad_logsumexp, Tensor output, Tensor logsumexp, {_ATTENTION}) -> Tensor[]",
    _run_attention_backward,
    _attention_backward_shapes,
    None,
)
