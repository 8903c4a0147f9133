"""The compiled kernels of graph attention, called on tensors: plain functions without gradients.

Every tensor is on the CPU and has a batch axis; float32 or float64. Sizes and dtypes are checked here once more, so
that no call, however it came about, hands out a pointer to less than the kernel reads.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim, F edge_dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyattention import _native
from anyattention.errors import InvalidInputError
from anyattention.ops.graph.columns import are_columns, gradients_of, row_stride, with_rows

__all__ = [
    "GraphArrays",
    "Settings",
    "attention",
    "attention_backward",
    "attention_weights",
    "edge_argmax",
    "edge_dot",
    "edge_softmax",
    "edge_sum",
    "edge_total",
    "pointer",
    "require_numbers",
    "require_rows",
]

_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_int64
_DTYPES = (torch.float32, torch.float64)
_SCORES = {"Dot": 0, "Additive": 1, "Dynamic": 2}


@dataclass(frozen=True)
class Settings:
    """The numbers of a call, as the operators pass them.

    Attributes:
        score: "Dot", "Additive" or "Dynamic".
        normalize: softmax, or a sigmoid of each edge.
        scale: factor of the raw score.
        softcap: 0 for none.
        negative_slope: of the LeakyReLU.
        dropout: 0 for none.
    """

    score: str
    normalize: bool
    scale: float
    softcap: float
    negative_slope: float
    dropout: float


class _Rows(ctypes.Structure):
    _fields_ = [  # ctypes' own way
        *((name, _SIZE) for name in ("num_rows", "num_columns", "num_edges")),
        *((name, _POINTER) for name in ("offsets", "columns", "edges")),
    ]


class _EdgeCall(ctypes.Structure):
    _fields_ = [
        ("rows", _Rows),
        *((name, _SIZE) for name in ("batch", "heads", "column_heads", "width", "num_threads")),
        ("is_double", ctypes.c_int32),
    ]


class _EdgeFeatures(ctypes.Structure):
    _fields_ = [("features", _POINTER), ("weight", _POINTER), ("width", _SIZE)]


class GraphArrays(ctypes.Structure):
    """`anyattention_graph` of csrc/anyattention.h."""

    _fields_ = [
        *((name, _SIZE) for name in ("num_queries", "num_keys", "num_edges")),
        *((name, _POINTER) for name in ("query_offsets", "keys_by_query", "edges_by_query")),
        *((name, _POINTER) for name in ("key_offsets", "queries_by_key", "edges_by_key")),
    ]


class _EdgeNumbers(ctypes.Structure):
    _fields_ = [
        ("data", _POINTER),
        *((name, _SIZE) for name in ("batch_stride", "edge_stride", "head_stride")),
    ]


class _AttentionCall(ctypes.Structure):
    _fields_ = [
        ("graph", GraphArrays),
        *((name, _SIZE) for name in ("batch", "heads", "key_heads", "head_dim", "value_dim", "num_threads", "seed")),
        *((name, ctypes.c_int32) for name in ("is_double", "score", "normalize")),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "negative_slope", "dropout")),
        *((name, _POINTER) for name in ("query", "key", "value", "vector")),
        *((name, _SIZE) for name in ("query_stride", "key_stride", "value_stride")),
        ("term", _EdgeNumbers),
        ("bias", _EdgeNumbers),
    ]


@dataclass(frozen=True)
class _Call:
    """A call's structure, and the tensors that its pointers look into."""

    structure: _AttentionCall
    kept: tuple[Tensor, ...]


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
    """Output `(B, N, H, C)` and logsumexp `(B, N, H)`.

    Args:
        query, key, value: `(B, N, H, D)`, `(B, M, G, D)`, `(B, M, G, C)`; None is a value that is the key.
        vector: `(H, D)`, Dynamic only.
        term, bias: `(B, E, H)`, added to the raw score and to the score; -inf in the bias hides the edge.
        seed: 0-d int64, with dropout.
        graph: a Graph's six row arrays, in the order of its fields.
        settings: the numbers.
    """
    call = _call(query, key, value, vector, term, bias, seed, graph, settings)
    batch, num_queries, heads, _ = query.shape
    output = _empty((batch, num_queries, heads, (key if value is None else value).shape[3]), query)
    logsumexp = _empty((batch, num_queries, heads), query)
    _native.run("graph_attention_forward", ctypes.byref(call.structure), output.data_ptr(), logsumexp.data_ptr())
    return output, logsumexp


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
    """Weights `(B, E, H)` before dropout, in the caller's edge order."""
    call = _call(query, key, value, vector, term, bias, None, graph, settings)
    weights = query.new_empty(query.shape[0], graph[1].shape[0], query.shape[2])
    logsumexp = logsumexp.contiguous()
    require_numbers("logsumexp", logsumexp, query.shape[:3], query.dtype)
    _native.run("graph_attention_weights", ctypes.byref(call.structure), logsumexp.data_ptr(), weights.data_ptr())
    return weights


def attention_backward(
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
    graph: Sequence[Tensor],
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, vector, term `(B, E, H)` and bias `(B, E, H)`; None for what is not there.

    Where query, key and value are columns of one matrix, so are their gradients.
    """
    rows = [x for x in (query, key, value) if x is not None]
    if not are_columns(rows):
        rows = [x.contiguous() for x in rows]
    query, key, value = rows[0], rows[1], None if value is None else rows[2]
    call = _call(query, key, value, vector, term, bias, seed, graph, settings)
    grad_query, grad_key, *grad_values = gradients_of(rows)
    grad_value = grad_values[0] if grad_values else None
    grad_vector = None if vector is None else _empty(vector.shape, vector)
    edges = (query.shape[0], graph[1].shape[0], query.shape[2])
    grad_term = None if term is None else _empty(edges, query)
    grad_bias = None if bias is None else _empty(edges, query)
    whole, by_query = (*query.shape[:3], (key if value is None else value).shape[3]), query.shape[:3]
    results = {
        "output": (output, whole),
        "logsumexp": (logsumexp, by_query),
        "grad_output": (grad_output, whole),
        "grad_logsumexp": (grad_logsumexp, by_query),
    }
    for name, (tensor, shape) in results.items():
        if tensor is not None:
            require_numbers(name, tensor, shape, query.dtype)
    kept = [None if tensor is None else tensor.contiguous() for tensor, _ in results.values()]
    _native.run(
        "graph_attention_backward",
        ctypes.byref(call.structure),
        *map(pointer, kept),
        *map(pointer, (grad_query, grad_key, grad_value, grad_vector, grad_term, grad_bias)),
    )
    return grad_query, grad_key, grad_value, grad_vector, grad_term, grad_bias


def edge_dot(rows: Tensor, columns: Tensor, arrays: Sequence[Tensor]) -> Tensor:
    """`result[e, h] = rows[i, h] . columns[j, h]`: `(B, E, H)` from `(B, N, H, D)` and `(B, M, G, D)`."""
    rows, columns = rows.contiguous(), columns.contiguous()
    result = rows.new_empty(rows.shape[0], arrays[1].shape[0], rows.shape[2])
    if rows.shape[3] == 0 or result.numel() == 0:
        return result.zero_()
    require_numbers("rows", rows, (rows.shape[0], arrays[0].shape[0] - 1, *rows.shape[2:]), rows.dtype)
    require_numbers("columns", columns, (rows.shape[0], *columns.shape[1:3], rows.shape[3]), rows.dtype)
    call = _edge_call(rows.shape, columns.shape[1], columns.shape[2], arrays, rows.dtype)
    _native.run("edge_dot", ctypes.byref(call), rows.data_ptr(), columns.data_ptr(), result.data_ptr())
    return result


def edge_sum(weights: Tensor, columns: Tensor, arrays: Sequence[Tensor]) -> Tensor:
    """`result[i, h] = sum of weights[e, h] columns[j, h]`: `(B, N, H, D)` from `(B, E, H)` and `(B, M, G, D)`."""
    weights, columns = weights.contiguous(), columns.contiguous()
    shape = (weights.shape[0], arrays[0].shape[0] - 1, weights.shape[2], columns.shape[3])
    result = weights.new_empty(shape)
    if result.numel() == 0:
        return result
    require_numbers("weights", weights, (shape[0], arrays[1].shape[0], shape[2]), weights.dtype)
    require_numbers("columns", columns, (shape[0], *columns.shape[1:3], shape[3]), weights.dtype)
    call = _edge_call(shape, columns.shape[1], columns.shape[2], arrays, weights.dtype)
    _native.run("edge_sum", ctypes.byref(call), weights.data_ptr(), columns.data_ptr(), result.data_ptr())
    return result


def edge_softmax(scores: Tensor, arrays: Sequence[Tensor], num_columns: int) -> Tensor:
    """The softmax of the scores `(B, E, H)` of each row's edges."""
    scores = scores.contiguous()
    result = scores.new_empty(scores.shape)
    if result.numel() == 0:
        return result
    require_numbers("scores", scores, (scores.shape[0], arrays[1].shape[0], scores.shape[2]), scores.dtype)
    shape = (scores.shape[0], arrays[0].shape[0] - 1, scores.shape[2], 1)
    call = _edge_call(shape, num_columns, scores.shape[2], arrays, scores.dtype)
    _native.run("edge_softmax", ctypes.byref(call), scores.data_ptr(), result.data_ptr())
    return result


def edge_argmax(
    weights: Tensor, columns: Tensor, features: Tensor | None, feature_weight: Tensor | None, arrays: Sequence[Tensor]
) -> Tensor:
    """The edge `(B, N, H, D)` of each row's largest `weights[e, h] (columns[j, h] + feature_weight[h] features[e])`."""
    weights, columns = weights.contiguous(), columns.contiguous()
    shape = (weights.shape[0], arrays[0].shape[0] - 1, weights.shape[2], columns.shape[3])
    result = arrays[0].new_empty(shape)
    if result.numel() == 0:
        return result
    num_edges = arrays[1].shape[0]
    require_numbers("weights", weights, (shape[0], num_edges, shape[2]), weights.dtype)
    require_numbers("columns", columns, (shape[0], *columns.shape[1:3], shape[3]), weights.dtype)
    by_features = None
    if features is not None and feature_weight is not None:
        features, feature_weight = features.contiguous(), feature_weight.contiguous()
        require_numbers("features", features, (num_edges, features.shape[1]), weights.dtype)
        require_numbers("feature_weight", feature_weight, (*shape[2:], features.shape[1]), weights.dtype)
        by_features = _EdgeFeatures(features.data_ptr(), feature_weight.data_ptr(), features.shape[1])
    call = _edge_call(shape, columns.shape[1], columns.shape[2], arrays, weights.dtype)
    _native.run(
        "edge_argmax",
        ctypes.byref(call),
        weights.data_ptr(),
        columns.data_ptr(),
        None if by_features is None else ctypes.byref(by_features),
        result.data_ptr(),
    )
    return result


def edge_total(numbers: Tensor, arrays: Sequence[Tensor], num_columns: int) -> Tensor:
    """`result[i, h] = sum of numbers[e, h]`: `(B, N, H)` from `(B, E, H)`."""
    numbers = numbers.contiguous()
    result = numbers.new_empty(numbers.shape[0], arrays[0].shape[0] - 1, numbers.shape[2])
    if result.numel() == 0:
        return result
    require_numbers("numbers", numbers, (numbers.shape[0], arrays[1].shape[0], numbers.shape[2]), numbers.dtype)
    call = _edge_call((*result.shape, 1), num_columns, result.shape[2], arrays, numbers.dtype)
    _native.run("edge_total", ctypes.byref(call), numbers.data_ptr(), result.data_ptr())
    return result


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    graph: Sequence[Tensor],
    settings: Settings,
) -> _Call:
    query, key = with_rows(query), with_rows(key)
    value = key if value is None else with_rows(value)
    vector = None if vector is None else vector.contiguous()
    _require_call(query, key, value, vector, term, bias, graph)
    pointers = [array.data_ptr() for array in graph[:6]]
    batch, num_queries, heads, head_dim = query.shape
    _, num_keys, key_heads, value_dim = value.shape
    structure = _AttentionCall(
        GraphArrays(num_queries, num_keys, graph[1].shape[0], *pointers),
        batch,
        heads,
        key_heads,
        head_dim,
        value_dim,
        _native.num_threads(),
        0 if seed is None else int(seed),
        query.dtype == torch.float64,
        _SCORES[settings.score],
        settings.normalize,
        settings.scale,
        settings.softcap,
        settings.negative_slope,
        settings.dropout,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        pointer(vector),
        *(row_stride(x) for x in (query, key, value)),
        _edge_numbers(term),
        _edge_numbers(bias),
    )
    kept = tuple(x for x in (query, key, value, vector, term, bias) if x is not None)
    return _Call(structure, kept)


def _edge_call(
    shape: Sequence[int], num_columns: int, column_heads: int, arrays: Sequence[Tensor], dtype: torch.dtype
) -> _EdgeCall:
    batch, num_rows, heads, width = shape
    require_rows(arrays, num_rows, arrays[1].shape[0])
    rows = _Rows(num_rows, num_columns, arrays[1].shape[0], *(array.data_ptr() for array in arrays))
    threads = _native.num_threads()
    return _EdgeCall(rows, batch, heads, column_heads, width, threads, dtype == torch.float64)


def _require_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    term: Tensor | None,
    bias: Tensor | None,
    graph: Sequence[Tensor],
) -> None:
    """Raise unless the sizes of an attention call fit each other."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, key_heads, num_edges = key.shape[1], key.shape[2], graph[1].shape[0]
    require_rows(graph[:3], num_queries, num_edges)
    require_rows(graph[3:6], num_keys, num_edges)
    edges = (batch, num_edges, heads)
    for name, tensor, shape in (
        ("query", query, query.shape),
        ("key", key, (batch, num_keys, key_heads, head_dim)),
        ("value", value, (batch, num_keys, key_heads, value.shape[3])),
        ("vector", vector, (heads, head_dim)),
        ("term", term, edges),
        ("bias", bias, edges),
    ):
        if tensor is not None:
            require_numbers(name, tensor, shape, query.dtype)


def require_rows(arrays: Sequence[Tensor], num_rows: int, num_edges: int) -> None:
    """Raise unless the arrays are as long as the kernels take them for; what is in them, the kernels compare."""
    for array, size in zip(arrays, (num_rows + 1, num_edges, num_edges), strict=True):
        fits = array.dtype == torch.int64 and array.shape == (size,)
        if not fits or not array.is_cpu or not array.is_contiguous():
            raise InvalidInputError(
                argument="graph",
                expected=f"arrays of contiguous int64 on the CPU, here ({size},)",
                actual=f"{array.dtype} on {array.device}, {tuple(array.shape)}",
            )


def require_numbers(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless a tensor has the shape and the dtype that its pointer is read with."""
    if tensor.shape != tuple(shape) or tensor.dtype != dtype or dtype not in _DTYPES or not tensor.is_cpu:
        raise InvalidInputError(
            argument=name,
            expected=f"{dtype if dtype in _DTYPES else 'float32 or float64'} on cpu, {tuple(shape)}",
            actual=f"{tensor.dtype} on {tensor.device}, {tuple(tensor.shape)}",
        )


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _edge_numbers(numbers: Tensor | None) -> _EdgeNumbers:
    return _EdgeNumbers() if numbers is None else _EdgeNumbers(numbers.data_ptr(), *numbers.stride())


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None without a tensor."""
    return None if tensor is None else tensor.data_ptr()
