"""Fused graph attention as an operator that autograd, opcheck and torch.compile know.

`anyattention::graph_attention` is fused, forward and backward; under `create_graph` its backward is that of the same
computation written in the primitives (`composed.py`), which autograd differentiates again.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention.ops.eager import are_plain
from anyattention.ops.graph import kernels
from anyattention.ops.graph.composed import composed_gradients
from anyattention.ops.graph.edge_operators import define
from anyattention.ops.graph.kernels import Settings
from anyattention.ops.random import keep_factors

__all__ = ["attention", "attention_weights"]

_TENSORS = "Tensor query, Tensor key, Tensor? value, Tensor? vector, Tensor? term, Tensor? bias"
_NUMBERS = "str score, bool normalize, float scale, float softcap, float negative_slope, float dropout"
_ATTENTION = f"{_TENSORS}, Tensor? seed, Tensor[] graph, {_NUMBERS}"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Output `(B, N, H, C)` and logsumexp `(B, N, H)`; see `kernels.attention`. A value of None is the key."""
    return _attend(query, key, value, vector, term, bias, seed, list(graph), *_numbers(settings))


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    logsumexp: Tensor,
    graph: Sequence[Tensor],
    settings: Settings,
) -> Tensor:
    """Weights `(B, E, H)` before dropout, without gradients; see `kernels.attention_weights`."""
    return _attend_weights(query, key, value, vector, term, bias, logsumexp, list(graph), *_numbers(settings))


def _numbers(settings: Settings) -> tuple[str, bool, float, float, float, float]:
    return (
        settings.score,
        settings.normalize,
        settings.scale,
        settings.softcap,
        settings.negative_slope,
        settings.dropout,
    )


def _run_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    return kernels.attention(*arguments[:8], settings=Settings(*arguments[8:]))


def _attention_shapes(query: Tensor, key: Tensor, value: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    width = (key if value is None else value).shape[3]
    return query.new_empty(*query.shape[:3], width), query.new_empty(query.shape[:3])


def _run_attention_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    return kernels.attention_backward(*arguments[:12], settings=Settings(*arguments[12:]))


def _run_separate_backward(*arguments: Any) -> list[Tensor]:
    # Results of an operator must not share memory, as the gradients of one matrix's columns do.
    query, key, value = (None if x is None else x.contiguous() for x in arguments[4:7])
    gradients = _run_attention_backward(*arguments[:4], query, key, value, *arguments[7:])
    return [arguments[0].new_empty(0) if gradient is None else gradient for gradient in gradients]


def _attention_backward_shapes(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    graph: list[Tensor],
    *settings: Any,
) -> list[Tensor]:
    edges = (query.shape[0], graph[1].shape[0], query.shape[2])
    by_vector = query.new_empty(0 if vector is None else vector.shape)
    by_edges = [query.new_empty(0 if given is None else edges) for given in (term, bias)]
    by_rows = [query.new_empty(0 if x is None else x.shape) for x in (query, key, value)]
    return [*by_rows, by_vector, *by_edges]


def _keep_attention(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    # Zeros for a logsumexp that nobody used would cost as much as a gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output, *inputs[7])
    ctx.numbers = inputs[8:]


def _attention_gradients(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, (output, logsumexp), graph = saved[:7], saved[7:9], list(saved[9:])
    numbers = ctx.numbers
    none = (None,) * (2 + len(numbers))
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        needed, settings, (query, seed) = ctx.needs_input_grad[:6], Settings(*numbers), (tensors[0], tensors[6])
        edges = (query.shape[0], graph[1].shape[0], query.shape[2])
        kept = None if seed is None else keep_factors(edges, settings.dropout, seed, query.dtype)
        given = ((*tensors[:6], kept), graph, settings, grad_output, grad_logsumexp, logsumexp)
        return (*composed_gradients(needed, *given), *none)
    arguments = (grad_output, grad_logsumexp, output, logsumexp, *tensors, graph, *numbers)
    gradients = (_run_attention_backward if are_plain(arguments) else _attend_backward)(*arguments)
    given = [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
    return (*given, *none)


_attend = define(
    "graph_attention",
    f"{_ATTENTION}) -> (Tensor, Tensor)",
    _run_attention,
    _attention_shapes,
    _attention_gradients,
    _keep_attention,
)
_attend_weights = define(
    "graph_attention_weights",
    f"{_TENSORS}, Tensor logsumexp, Tensor[] graph, {_NUMBERS}) -> Tensor",
    lambda *arguments: kernels.attention_weights(*arguments[:8], settings=Settings(*arguments[8:])),
    lambda query, *rest: query.new_empty(query.shape[0], rest[6][1].shape[0], query.shape[2]),
    None,
)
_attend_backward = define(
    "graph_attention_backward",
    f"Tensor grad_output, Tensor? grad_logsumexp, Tensor output, Tensor logsumexp, {_ATTENTION}) -> Tensor[]",
    _run_separate_backward,
    _attention_backward_shapes,
    None,
)
