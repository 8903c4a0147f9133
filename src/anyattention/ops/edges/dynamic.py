"""The score `Dynamic` of edges, with or without edge features, and its derivatives: no channel per edge in any of them.

`dynamic_dot` and `dynamic_sums` are closed under differentiation. LeakyReLU's slopes are constants almost everywhere:
they are taken at one set of arguments, the base, through which nothing is differentiated.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, P features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from anyattention.native import calls
from anyattention.native.structures import Numbers
from anyattention.ops.edges.arrays import GraphArrays
from anyattention.ops.operator import Result, operator

__all__ = ["dynamic_scores"]


@dataclass(frozen=True, eq=False)
class DynamicDot:
    """`result[e, h] = vector[h] . (LeakyReLU'(x[e, h]) y[e, h])`, the score where y is x.

    `y[e, h] = query[i, h] + key[j, g] + weight[:, h] features[e]`, and x is that of the base, where the slopes are
    taken. What is absent counts as 0.
    """

    graph: GraphArrays
    negative_slope: float
    vector: Annotated[Tensor, Numbers("heads width")]
    query: Annotated[Tensor | None, Numbers("batch num_queries heads width")]
    key: Annotated[Tensor | None, Numbers("batch num_keys key_heads width")]
    weight: Annotated[Tensor | None, Numbers("num_features heads width")]
    features: Annotated[Tensor | None, Numbers("num_edges num_features")]
    base_query: Annotated[Tensor, Numbers("batch num_queries heads width")]
    base_key: Annotated[Tensor, Numbers("batch num_keys key_heads width")]
    base_weight: Annotated[Tensor | None, Numbers("num_base_features heads width")]
    base_features: Annotated[Tensor | None, Numbers("num_edges num_base_features")]


_ARGUMENTS = ("query", "key", "weight", "features")


@dataclass(frozen=True, eq=False)
class DynamicSums:
    """The gradients of `sum of numbers[e, h] result[e, h]` by the vector and the four arguments, where needed."""

    call: DynamicDot
    numbers: Annotated[Tensor, Numbers("batch num_edges heads")]
    needed: tuple[bool, ...]


def dynamic_scores(
    query: Tensor,
    key: Tensor,
    vector: Tensor,
    weight: Tensor | None,
    features: Tensor | None,
    graph: GraphArrays,
    negative_slope: float,
) -> Tensor:
    """`vector . LeakyReLU(query + key + weight features)` of each edge and head, `(B, E, H)`.

    Args:
        query, key: `(B, N, H, D)`, `(B, M, G, D)`.
        vector: `(H, D)`.
        weight, features: `(H, D, P)` and `(E, P)`, or None.
        graph: the edges.
        negative_slope: of the LeakyReLU.

    Cost: O(E x H x D x (1 + P)) time; no memory above the results, for any derivative.
    """
    # A feature at a time is added to a head's channels: those lie side by side.
    by_feature = None if weight is None else weight.permute(2, 0, 1).contiguous()
    arguments: tuple[Any, ...] = (query, key, by_feature, features)
    base = [None if x is None else x.detach() for x in arguments]
    return _dynamic_dot(DynamicDot(graph, negative_slope, vector, *arguments, *base))


def _sums(call: DynamicDot, numbers: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients by the vector and the four arguments, None where not needed."""
    return list(_dynamic_sums(DynamicSums(call, numbers, tuple(needed))))


def _at_directions(call: DynamicDot, by: Mapping[str, Tensor | None]) -> DynamicDot | None:
    """The call whose result is the derivative along directions of the four arguments, by name; None without any."""
    if all(by.get(name) is None for name in _ARGUMENTS):
        return None
    weight, features = by.get("weight"), by.get("features")
    if call.features is not None and call.weight is not None:
        # Both (direction of the weight) features and weight (direction of the features): more features, that is.
        weight = torch.cat([torch.zeros_like(call.weight) if weight is None else weight, call.weight])
        zeros = torch.zeros_like(call.features) if features is None else features
        features = torch.cat([call.features, zeros], dim=1)
    return replace(call, query=by.get("query"), key=by.get("key"), weight=weight, features=features)


def _dot_gradient(
    call: DynamicDot, _: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    assert by[0] is not None
    names = ("vector", *_ARGUMENTS)
    return dict(zip(names, _sums(call, by[0], [name in needs for name in names]), strict=True))


def _dot_tangent(call: DynamicDot, _: Sequence[Tensor], by: Mapping[str, Tensor]) -> Tensor:
    parts = [_dynamic_dot(replace(call, vector=by["vector"]))] if "vector" in by else []
    beside = _at_directions(call, by)
    parts += [] if beside is None else [_dynamic_dot(beside)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _sums_gradient(
    record: DynamicSums, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    # What is differentiated is numbers . (dot at the directions `by`) + numbers . (dot of the direction of the vector):
    # the operator's results, each times its cotangent.
    call, numbers = record.call, record.numbers
    by_vector, *others = (x if is_needed else None for x, is_needed in zip(by, record.needed, strict=True))
    found: list[list[Tensor | None]] = []
    by_numbers: list[Tensor | None] = []
    beside = _at_directions(call, dict(zip(_ARGUMENTS, others, strict=True)))
    if beside is not None:
        if "numbers" in needs:
            by_numbers.append(_dynamic_dot(beside))
        wanted = ("call.vector" in needs, False, False, "call.weight" in needs, "call.features" in needs)
        of_vector, _, _, of_weight, of_features = _sums(beside, numbers, wanted)
        num_features = 0 if call.features is None else call.features.shape[1]
        of_weight = None if of_weight is None else of_weight[num_features:]
        of_features = None if of_features is None else of_features[:, :num_features]
        found.append([of_vector, None, None, of_weight, of_features])
    if by_vector is not None:
        along = replace(call, vector=by_vector)
        if "numbers" in needs:
            by_numbers.append(_dynamic_dot(along))
        found.append(_sums(along, numbers, (False, *[f"call.{name}" in needs for name in _ARGUMENTS])))
    gradients = [_total(parts) for parts in zip(*found, strict=True)] if found else [None] * 5
    names = [f"call.{name}" for name in ("vector", *_ARGUMENTS)]
    return {"numbers": _total(by_numbers), **dict(zip(names, gradients, strict=True))}


def _sums_tangent(record: DynamicSums, results: Sequence[Tensor | None], by: Mapping[str, Tensor]) -> tuple[Any, ...]:
    call, numbers, needed = record.call, record.numbers, record.needed
    directions = {name: by.get(f"call.{name}") for name in _ARGUMENTS}
    vector, beside = by.get("call.vector"), _at_directions(call, directions)
    found: list[Sequence[Tensor | None]] = []
    if "numbers" in by:
        found.append(_sums(call, by["numbers"], needed))
    if vector is not None:
        found.append(_sums(replace(call, vector=vector), numbers, (False, *needed[1:])))
    if beside is not None:
        found.append([_sums(beside, numbers, (needed[0], *[False] * 4))[0], None, None, None, None])
    # Of weight and features, which are multiplied, each has the other in its gradient.
    for name, place in (("weight", 4), ("features", 3)):
        if directions[name] is not None and needed[place]:
            wanted = [n == place for n in range(5)]
            found.append(_sums(replace(call, **{name: directions[name]}), numbers, wanted))
    totals = [_total(parts) for parts in zip(*found, strict=True)]
    return tuple(
        [
            torch.zeros_like(x) if total is None and x is not None else total
            for x, total in zip(results, totals, strict=True)
        ]
    )


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return sum(given[1:], given[0]) if given else None


_dynamic_dot = operator(
    DynamicDot, [Result("result", "batch num_edges heads")], gradient=_dot_gradient, tangent=_dot_tangent
)
_dynamic_dot.c_kernel()
_dynamic_sums = operator(
    DynamicSums,
    [Result(name, like=f"call.{name}") for name in ("vector", *_ARGUMENTS)],
    gradient=_sums_gradient,
    tangent=_sums_tangent,
)


@_dynamic_sums.kernel("cpu", binds=True)
def _run_sums(record: DynamicSums) -> tuple[Tensor | None, ...]:
    bound = calls.bind(record)
    results = _dynamic_sums.allocate(record, bound)
    for result in results:
        if result is not None:
            result.zero_()
    calls.run("dynamic_sums", bound, *results)
    return tuple(results)
