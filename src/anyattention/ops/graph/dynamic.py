"""The score `Dynamic` of edges, with or without edge features, and its derivatives: no channel per edge in any of them.

`anyattention::dynamic_dot` and `dynamic_sums` are closed under differentiation. LeakyReLU's slopes are constants almost
everywhere: they are taken at one set of arguments, the base, through which nothing is differentiated.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, P features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention import _native
from anyattention.ops.graph.edge_operators import define, keep_inputs, kept_inputs
from anyattention.ops.graph.kernels import GraphArrays, pointer, require_numbers, require_rows

__all__ = ["dynamic_scores"]

# Query, key, weight and features: what is summed up before the LeakyReLU.
_Arguments = Sequence[Tensor | None]


def dynamic_scores(
    query: Tensor,
    key: Tensor,
    vector: Tensor,
    weight: Tensor | None,
    features: Tensor | None,
    graph: Sequence[Tensor],
    negative_slope: float,
) -> Tensor:
    """`vector . LeakyReLU(query + key + weight features)` of each edge and head, `(B, E, H)`.

    Args:
        query, key: `(B, N, H, D)`, `(B, M, G, D)`.
        vector: `(H, D)`.
        weight, features: `(H, D, P)` and `(E, P)`, or None.
        graph: as the operators take it.
        negative_slope: of the LeakyReLU.

    Cost: O(E x H x D x (1 + P)) time; no memory above the results, for any derivative.
    """
    # A feature at a time is added to a head's channels: those lie side by side.
    by_feature = None if weight is None else weight.permute(2, 0, 1).contiguous()
    arguments = [query, key, by_feature, features]
    base = [None if x is None else x.detach() for x in arguments]
    return _dot(vector, arguments, base, graph, negative_slope)


def _dot(
    vector: Tensor, arguments: _Arguments, base: _Arguments, graph: Sequence[Tensor], negative_slope: float
) -> Tensor:
    return _dynamic_dot(vector, *arguments, *base, list(graph), negative_slope)


def _sums(
    numbers: Tensor,
    vector: Tensor,
    arguments: _Arguments,
    base: _Arguments,
    needed: Sequence[bool],
    graph: Sequence[Tensor],
    negative_slope: float,
) -> list[Tensor | None]:
    """The gradients of `(numbers * _dot(...)).sum()` by the vector and the arguments, where needed."""
    found = _dynamic_sums(numbers, vector, *arguments, *base, list(graph), negative_slope, list(needed))
    return [each if is_needed else None for each, is_needed in zip(found, needed, strict=True)]


class _ArgumentPointers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "weight", "features")),
        ("num_features", ctypes.c_int64),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("graph", GraphArrays),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "width", "num_threads")),
        ("is_double", ctypes.c_int32),
        ("negative_slope", ctypes.c_double),
        ("vector", ctypes.c_void_p),
        ("base", _ArgumentPointers),
        ("at", _ArgumentPointers),
    ]


def _call(
    vector: Tensor, arguments: _Arguments, base: _Arguments, graph: Sequence[Tensor], negative_slope: float
) -> _Call:
    """The call's structure; its pointers look into the tensors given, which are contiguous."""
    query, key = base[:2]
    assert query is not None
    assert key is not None
    batch, num_queries, heads, width = query.shape
    num_keys, key_heads, num_edges = key.shape[1], key.shape[2], graph[1].shape[0]
    require_rows(graph[:3], num_queries, num_edges)
    require_rows(graph[3:6], num_keys, num_edges)
    require_numbers("vector", vector, (heads, width), query.dtype)
    pointers = []
    for given in (base, arguments):
        num_features = 0 if given[3] is None else given[3].shape[1]
        shapes = (query.shape, (batch, num_keys, key_heads, width), (num_features, heads, width))
        names = ("query", "key", "weight", "features")
        for name, tensor, shape in zip(names, given, (*shapes, (num_edges, num_features)), strict=True):
            if tensor is not None:
                require_numbers(name, tensor, shape, query.dtype)
        pointers.append(_ArgumentPointers(*map(pointer, given), num_features))
    return _Call(
        graph=GraphArrays(num_queries, num_keys, num_edges, *(array.data_ptr() for array in graph[:6])),
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        width=width,
        num_threads=_native.num_threads(),
        is_double=query.dtype == torch.float64,
        negative_slope=negative_slope,
        vector=vector.data_ptr(),
        base=pointers[0],
        at=pointers[1],
    )


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _run_dot(*given: Any) -> Tensor:
    vector, *rows = _contiguous(*given[:9])
    call = _call(vector, rows[:4], rows[4:], *given[9:])
    result = vector.new_empty(call.batch, call.graph.num_edges, call.heads)
    _native.run("dynamic_dot", ctypes.byref(call), result.data_ptr())
    return result


def _run_sums(*given: Any) -> tuple[Tensor, ...]:
    numbers, vector, *rows = _contiguous(*given[:10])
    call = _call(vector, rows[:4], rows[4:], *given[10:12])
    require_numbers("numbers", numbers, (call.batch, call.graph.num_edges, call.heads), vector.dtype)
    results = _sums_shapes(numbers, vector, *rows, *given[10:])
    for result in results:
        result.zero_()
    pointers = [result.data_ptr() if is_needed else None for result, is_needed in zip(results, given[12], strict=True)]
    _native.run("dynamic_sums", ctypes.byref(call), numbers.data_ptr(), *pointers)
    return results


def _dot_shapes(vector: Tensor, *rest: Any) -> Tensor:
    query, graph = rest[4], rest[8]
    return vector.new_empty(query.shape[0], graph[1].shape[0], vector.shape[0])


def _sums_shapes(*given: Any) -> tuple[Tensor, ...]:
    vector, weight, features, query, key = given[1], *given[4:8]
    like = (vector, query, key, weight, features)
    return tuple(
        vector.new_empty(shaped.shape if is_needed else 0) for shaped, is_needed in zip(like, given[12], strict=True)
    )


def _dot_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    vector, *rows = kept_inputs(ctx)
    gradients = _sums(grad, vector, rows[:4], rows[4:8], ctx.needs_input_grad[:5], *rows[8:])
    return (*gradients, *(None,) * 4, None, None)


def _keep_sums(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    # Zeros for the unused among the results would cost as much as a gradient.
    ctx.set_materialize_grads(False)
    keep_inputs(ctx, inputs, output)


def _sums_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    # What is differentiated is numbers . (dot of the vector at `beside`) + numbers . (dot of `by_vector` at the
    # arguments): the operator's results, each times its cotangent.
    numbers, vector, *rows, needed = kept_inputs(ctx)[:13]
    arguments, base, settings = rows[:4], rows[4:8], rows[8:]
    by_vector, *beside = (x if is_needed else None for x, is_needed in zip(cotangents, needed, strict=True))
    needs = ctx.needs_input_grad
    found: list[list[Tensor | None]] = []
    by_numbers: list[Tensor | None] = []
    if any(x is not None for x in beside):
        _, _, weight, features = arguments
        num_features = 0 if features is None else features.shape[1]
        if features is not None:
            # Both (cotangent of the weight) features and weight (cotangent of the features): more features, that is.
            beside[2] = torch.cat([_or_zeros(beside[2], weight), weight])
            beside[3] = torch.cat([features, _or_zeros(beside[3], features)], dim=1)
        if needs[0]:
            by_numbers.append(_dot(vector, beside, base, *settings))
        of_vector, _, _, of_weight, of_features = _sums(
            numbers, vector, beside, base, (needs[1], False, False, needs[4], needs[5]), *settings
        )
        if of_weight is not None:
            of_weight = of_weight[num_features:]
        if of_features is not None:
            of_features = of_features[:, :num_features]
        found.append([of_vector, None, None, of_weight, of_features])
    if by_vector is not None:
        if needs[0]:
            by_numbers.append(_dot(by_vector, arguments, base, *settings))
        found.append(_sums(numbers, by_vector, arguments, base, (False, *needs[2:6]), *settings))
    gradients = [_total(parts) for parts in zip(*found, strict=True)] if found else [None] * 5
    return (_total(by_numbers), *gradients, *(None,) * 4, None, None, None)


def _or_zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return sum(given[1:], given[0]) if given else None


_ARGUMENTS = "Tensor vector, Tensor? query, Tensor? key, Tensor? weight, Tensor? features"
_BASE = "Tensor base_query, Tensor base_key, Tensor? base_weight, Tensor? base_features"
_SETTINGS = "Tensor[] graph, float negative_slope"
_dynamic_dot = define(
    "dynamic_dot", f"{_ARGUMENTS}, {_BASE}, {_SETTINGS}) -> Tensor", _run_dot, _dot_shapes, _dot_backward
)
_dynamic_sums = define(
    "dynamic_sums",
    f"Tensor numbers, {_ARGUMENTS}, {_BASE}, {_SETTINGS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_sums,
    _sums_shapes,
    _sums_backward,
    _keep_sums,
)
