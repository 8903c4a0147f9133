"""Linear maps as operators, for compiled programs: a compiler takes PyTorch's products where we have faster ones.

Axes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.native.structures import Numbers
from anyattention.ops.linear_products import map_gradients, map_rows
from anyattention.ops.operator import Result, operator

__all__ = ["LinearMap", "LinearMapByWeight", "linear_map", "linear_map_by_weight"]


@dataclass(frozen=True, eq=False)
class LinearMap:
    """`x weight' + bias`."""

    x: Annotated[Tensor, Numbers("num_rows num_inputs")]
    weight: Annotated[Tensor, Numbers("num_outputs num_inputs")]
    bias: Annotated[Tensor | None, Numbers("num_outputs")]


@dataclass(frozen=True, eq=False)
class LinearMapByWeight:
    """`grad' x`: the gradient by the weight of a linear map."""

    grad: Annotated[Tensor, Numbers("num_rows num_outputs")]
    x: Annotated[Tensor, Numbers("num_rows num_inputs")]


def _gradient(
    call: LinearMap, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    (grad,) = by
    assert grad is not None
    return {
        "x": linear_map(LinearMap(grad, call.weight.T, None)) if "x" in needs else None,
        "weight": linear_map_by_weight(LinearMapByWeight(grad, call.x)) if "weight" in needs else None,
        "bias": grad.sum(0) if "bias" in needs else None,
    }


def _gradient_by_weight(
    call: LinearMapByWeight, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    (grad,) = by
    assert grad is not None
    return {
        "grad": linear_map(LinearMap(call.x, grad, None)) if "grad" in needs else None,
        "x": linear_map(LinearMap(call.grad, grad.T, None)) if "x" in needs else None,
    }


def _tangent(call: LinearMap, results: Sequence[Tensor], by: Mapping[str, Tensor]) -> Tensor:
    parts = []
    if "x" in by:
        parts.append(linear_map(LinearMap(by["x"], call.weight, None)))
    if "weight" in by:
        parts.append(linear_map(LinearMap(call.x, by["weight"], None)))
    if "bias" in by:
        parts.append(by["bias"].expand(call.x.shape[0], -1))
    return sum(parts[1:], parts[0])


linear_map = operator(
    LinearMap,
    [Result("result", "num_rows num_outputs")],
    gradient=_gradient,
    tangent=_tangent,
    keeps=("x", "weight"),
)
linear_map_by_weight = operator(
    LinearMapByWeight,
    [Result("by_weight", "num_outputs num_inputs")],
    gradient=_gradient_by_weight,
    linear_in=("grad", "x"),
)


@linear_map.kernel("cpu")
def _map(record: LinearMap) -> Tensor:
    (result,) = map_rows(record.x, record.weight, record.bias, [record.weight.shape[0]])
    return result


@linear_map_by_weight.kernel("cpu")
def _by_weight(record: LinearMapByWeight) -> Tensor:
    grad, x = record.grad, record.x
    if grad.dtype is not x.dtype or not x.is_cpu or grad.ndim != 2 or x.ndim != 2 or grad.shape[0] != x.shape[0]:
        raise InvalidInputError(
            argument="x",
            expected=f"{grad.dtype} on cpu, a row for each of grad's {tuple(grad.shape)}",
            actual=f"{x.dtype} on {x.device}, {tuple(x.shape)}",
        )
    # Nothing of the weight is read but its shape.
    weight = x.new_empty(1).expand(grad.shape[1], x.shape[1])
    _, by_weight, _ = map_gradients([grad], [grad.shape[1]], x, weight, (False, True, False), True)
    assert by_weight is not None
    return by_weight
