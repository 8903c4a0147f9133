"""The primitives of attention over edges: operators that are closed under differentiation.

`edge_dot`, `edge_sum`, `edge_softmax`, `edge_total` and `edge_spread`: the derivatives of each are made of the others.
`edge_argmax` returns edges, which have no gradient. For sums over the edges of keys give the transposed graph.

Axes: B batch or nothing, N queries, M keys, E edges, H heads, G key heads, D width, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from anyattention.ambient import Moment, moment_of
from anyattention.native.structures import Numbers
from anyattention.ops.edges.arrays import GraphArrays
from anyattention.ops.operator import Result, operator

__all__ = ["edge_argmax", "edge_dot", "edge_softmax", "edge_spread", "edge_sum", "edge_total"]

_Found = Mapping[str, Tensor | None]
_Needs = frozenset[str]


@dataclass(frozen=True, eq=False)
class EdgeDot:
    """`result[e, h] = query[i, h] . key[j, g]`."""

    graph: GraphArrays
    query: Annotated[Tensor, Numbers("batch num_queries heads width")]
    key: Annotated[Tensor, Numbers("batch num_keys key_heads width")]


@dataclass(frozen=True, eq=False)
class EdgeSum:
    """`result[i, h] = sum of weights[e, h] key[j, g]`. An edge of weight 0 is not there, whatever its key holds."""

    graph: GraphArrays
    weights: Annotated[Tensor, Numbers("batch num_edges heads")]
    key: Annotated[Tensor, Numbers("batch num_keys key_heads width")]


@dataclass(frozen=True, eq=False)
class EdgeTotal:
    """`result[i, h] = sum of numbers[e, h]`."""

    graph: GraphArrays
    numbers: Annotated[Tensor, Numbers("batch num_edges heads")]


@dataclass(frozen=True, eq=False)
class EdgeSpread:
    """`result[e, h] = numbers[i, h]`."""

    graph: GraphArrays
    numbers: Annotated[Tensor, Numbers("batch num_queries heads")]


@dataclass(frozen=True, eq=False)
class EdgeSoftmax:
    """The softmax of the scores of each query's edges."""

    graph: GraphArrays
    scores: Annotated[Tensor, Numbers("batch num_edges heads")]


@dataclass(frozen=True, eq=False)
class EdgeArgmax:
    """The edge of each query's largest `weights[e, h] (value[j, g] + feature_weight[h] features[e])`, by channel."""

    graph: GraphArrays
    weights: Annotated[Tensor, Numbers("batch num_edges heads")]
    value: Annotated[Tensor, Numbers("batch num_keys key_heads width")]
    features: Annotated[Tensor | None, Numbers("num_edges num_features")]
    feature_weight: Annotated[Tensor | None, Numbers("heads width num_features")]


def _dot_gradient(call: EdgeDot, _: Sequence[Tensor], by: Sequence[Any], needs: _Needs) -> _Found:
    found: dict[str, Tensor | None] = {}
    if "query" in needs:
        found["query"] = _edge_sum(EdgeSum(call.graph, by[0], call.key))
    if "key" in needs:
        found["key"] = _in_groups(_edge_sum(EdgeSum(call.graph.transposed, by[0], call.query)), call.key)
    return found


def _sum_gradient(call: EdgeSum, _: Sequence[Tensor], by: Sequence[Any], needs: _Needs) -> _Found:
    found: dict[str, Tensor | None] = {}
    if "weights" in needs:
        found["weights"] = _without_absent(_edge_dot(EdgeDot(call.graph, by[0], call.key)), call.weights)
    if "key" in needs:
        found["key"] = _in_groups(_edge_sum(EdgeSum(call.graph.transposed, call.weights, by[0])), call.key)
    return found


def _total_gradient(call: EdgeTotal, _: Sequence[Tensor], by: Sequence[Any], needs: _Needs) -> _Found:
    return {"numbers": _edge_spread(EdgeSpread(call.graph, by[0]))}


def _spread_gradient(call: EdgeSpread, _: Sequence[Tensor], by: Sequence[Any], needs: _Needs) -> _Found:
    return {"numbers": _edge_total(EdgeTotal(call.graph, by[0]))}


def _softmax_gradient(call: EdgeSoftmax, results: Sequence[Tensor], by: Sequence[Any], needs: _Needs) -> _Found:
    return {"scores": _softmax_product(call.graph, results[0], by[0])}


def _softmax_tangent(call: EdgeSoftmax, results: Sequence[Tensor], by: Mapping[str, Tensor]) -> Tensor:
    # The Jacobian of the softmax is symmetric.
    return _softmax_product(call.graph, results[0], by["scores"])


def _softmax_product(graph: GraphArrays, weights: Tensor, by: Tensor) -> Tensor:
    product = _without_absent(weights * by, weights)
    return product - weights * _edge_spread(EdgeSpread(graph, _edge_total(EdgeTotal(graph, product))))


def _in_groups(heads: Tensor, like: Tensor) -> Tensor:
    """The gradients of H heads added up to the G heads that they share."""
    if heads.shape[-2] == like.shape[-2]:
        return heads
    *batch, nodes, count, width = heads.shape
    return heads.reshape(*batch, nodes, like.shape[-2], count // like.shape[-2], width).sum(-2)


def _without_absent(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient, 0 in place of NaN and Inf of an edge of weight 0: it is not there, whatever its key holds."""
    # Nearly always all are finite, as one pass tells.
    if moment_of((gradient, weights)) is Moment.PLAIN and gradient.detach().sum().isfinite():
        return gradient
    return torch.where((weights == 0) & ~gradient.isfinite(), 0.0, gradient)


_edge_dot = operator(
    EdgeDot, [Result("result", "batch num_edges heads")], gradient=_dot_gradient, linear_in=("query", "key")
)
_edge_sum = operator(
    EdgeSum, [Result("result", "batch num_queries heads width")], gradient=_sum_gradient, linear_in=("weights", "key")
)
_edge_total = operator(
    EdgeTotal,
    [Result("result", "batch num_queries heads")],
    gradient=_total_gradient,
    linear_in=("numbers",),
    keeps=("graph",),
)
_edge_spread = operator(
    EdgeSpread,
    [Result("result", "batch num_edges heads")],
    gradient=_spread_gradient,
    linear_in=("numbers",),
    keeps=("graph",),
)
_edge_softmax = operator(
    EdgeSoftmax,
    [Result("result", "batch num_edges heads")],
    gradient=_softmax_gradient,
    tangent=_softmax_tangent,
    keeps=("graph",),
    keeps_results=True,
)
_edge_argmax = operator(EdgeArgmax, [Result("result", "batch num_queries heads width", dtype=torch.int64)])

for _each in (_edge_dot, _edge_sum, _edge_total, _edge_softmax):
    _each.c_kernel(empty=0)
_edge_argmax.c_kernel(empty=-1)


@_edge_spread.kernel("cpu")
def _spread(call: EdgeSpread) -> Tensor:
    return call.numbers.index_select(-2, call.graph.query_index)


def edge_dot(query: Tensor, key: Tensor, graph: GraphArrays) -> Tensor:
    """`(B, E, H)` from `(B, N, H, D)` and `(B, M, G, D)`: see `EdgeDot`."""
    return _edge_dot(EdgeDot(graph, query, key))


def edge_sum(weights: Tensor, key: Tensor, graph: GraphArrays) -> Tensor:
    """`(B, N, H, D)` from `(B, E, H)` and `(B, M, G, D)`: see `EdgeSum`."""
    return _edge_sum(EdgeSum(graph, weights, key))


def edge_softmax(scores: Tensor, graph: GraphArrays) -> Tensor:
    """`(B, E, H)` from `(B, E, H)`: the softmax of the scores of each query's edges."""
    return _edge_softmax(EdgeSoftmax(graph, scores))


def edge_total(numbers: Tensor, graph: GraphArrays) -> Tensor:
    """`(B, N, H)`: the sum of each query's numbers `(B, E, H)`."""
    return _edge_total(EdgeTotal(graph, numbers))


def edge_spread(numbers: Tensor, graph: GraphArrays) -> Tensor:
    """`(B, E, H)`: each query's numbers `(B, N, H)` on its edges."""
    return _edge_spread(EdgeSpread(graph, numbers))


def edge_argmax(
    weights: Tensor, value: Tensor, features: Tensor | None, feature_weight: Tensor | None, graph: GraphArrays
) -> Tensor:
    """The edge `(B, N, H, D)` of each query's largest `weights[e, h] (value[j, g] + feature_weight[h] features[e])`.

    From `(B, E, H)`, `(B, M, G, D)`, `(E, F)` and `(H, D, F)`. NaN is larger than any number, and ties go to the first
    edge. A weight of -inf hides its edge; -1 stands where all are hidden.
    """
    if features is not None and features.shape[1] == 0:
        features = feature_weight = None
    given = [None if x is None else x.detach() for x in (weights, value, features, feature_weight)]
    return _edge_argmax(EdgeArgmax(graph, *given))  # pyright: ignore[reportArgumentType]  # the first two are there
