"""The arguments of `attend` in one record, with the checks that every operation shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from anyattention._checks import (
    Axes,
    describe_shape,
    require_dense,
    require_device,
    require_floating,
    require_mask,
    require_number,
    require_same_kind,
    to_four_axes,
)
from anyattention.bias import RelativeBias
from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.ops.eager import are_plain
from anyattention.patterns import Full, Pattern, TopK
from anyattention.scores import Additive, Dot, Dynamic, EdgeFeatures, Score

__all__ = [
    "Aggregation",
    "Arguments",
    "Weights",
    "check_score",
    "default_scale",
    "read_bias",
    "read_pairs",
    "read_weights",
    "refuse_graph_settings",
    "require_relative",
]

Aggregation = Literal["sum", "mean", "max"]
Weights = Literal["mean", "heads"]


@dataclass(frozen=True, eq=False)
class Arguments:
    """What `attend` was called with; numbers and names are checked, tensors are not yet.

    `weights` is "mean", "heads" or None where none are asked for.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern | TopK
    score: Score
    mask: Tensor | None
    bias: Tensor | RelativeBias | None
    edges: EdgeFeatures | None
    scale: float | None
    softcap: float | None
    dropout: float
    aggregation: Aggregation
    normalize: bool
    weights: Weights | None
    return_logsumexp: bool
    implementation: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern | TopK):
            hint = None
            if isinstance(self.pattern, Tensor):
                hint = "a boolean tensor is given as mask=, a float one as bias="
            raise InvalidInputError(
                argument="pattern",
                expected="a pattern (Full, Causal, Window, Graph ...), TopK or None",
                actual=type(self.pattern).__name__,
                hint=hint,
            )
        if not isinstance(self.score, Dot | Additive | Dynamic):
            raise InvalidInputError(
                argument="score",
                expected="Dot(), Additive() or Dynamic(vector)",
                actual=repr(self.score),
            )
        if self.aggregation not in ("sum", "mean", "max"):
            raise InvalidInputError(
                argument="aggregation",
                expected="'sum', 'mean' or 'max'",
                actual=repr(self.aggregation),
            )
        if not isinstance(self.normalize, bool):
            raise InvalidInputError(argument="normalize", expected="True or False", actual=repr(self.normalize))
        if self.edges is not None and not isinstance(self.edges, EdgeFeatures):
            raise InvalidInputError(
                argument="edges", expected="EdgeFeatures(features, ...) or None", actual=type(self.edges).__name__
            )
        if not isinstance(self.return_logsumexp, bool):
            raise InvalidInputError(
                argument="return_logsumexp", expected="True or False", actual=repr(self.return_logsumexp)
            )
        require_number("dropout", self.dropout, at_least=0.0, below=1.0)
        if self.scale is not None:
            require_number("scale", self.scale)
        if self.softcap is not None:
            require_number("softcap", self.softcap, above=0.0)

    def under_autocast(self) -> "Arguments":
        """These arguments with the floating-point tensors in autocast's dtype, as PyTorch's own attention has it."""
        dtype = torch.get_autocast_dtype(self.query.device.type)

        def cast(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return tensor
            return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

        score, edges = self.score, self.edges
        if isinstance(score, Dynamic):
            score = replace(score, vector=cast(score.vector))
        if edges is not None:
            edges = EdgeFeatures(cast(edges.features), cast(edges.key_weight), cast(edges.value_weight))
        return replace(
            self,
            query=cast(self.query),
            key=cast(self.key),
            value=cast(self.value),
            score=score,
            edges=edges,
        )


def pattern_or_full(pattern: Pattern | TopK | None) -> Pattern | TopK:
    """No pattern means every pair."""
    return Full() if pattern is None else pattern


def read_weights(return_weights: bool | str) -> Weights | None:
    """`return_weights` as "mean", "heads" or None; True is "mean"."""
    if return_weights is False:
        return None
    if return_weights is True or return_weights == "mean":
        return "mean"
    if return_weights == "heads":
        return "heads"
    raise InvalidInputError(
        argument="return_weights",
        expected="False, True, 'mean' or 'heads'",
        actual=repr(return_weights),
    )


def read_bias(bias: Tensor, query: Tensor) -> Tensor:
    """The bias, checked, in a dtype no wider than the sums': a number too low for them is -inf, and hides its pair."""
    require_dense("bias", bias)
    require_floating("bias", bias)
    require_device("bias", bias, query.device, "query")
    sums = torch.promote_types(query.dtype, torch.float32)
    return bias if torch.promote_types(bias.dtype, sums) == sums else bias.to(sums)


def require_relative(bias: RelativeBias, query: Tensor, heads: int) -> None:
    """Raise unless a bias by distance fits the query."""
    require_dense("bias.numbers", bias.numbers)
    require_device("bias.numbers", bias.numbers, query.device, "query")
    if are_plain((bias.numbers,)) and bool((bias.numbers == -torch.inf).any()):
        raise InvalidInputError(
            argument="bias.numbers",
            expected="no -inf",
            actual="-inf among them",
            hint="a pattern or a mask hides pairs",
        )
    if len(bias.numbers) not in (1, heads):
        raise DimensionMismatchError(
            argument="bias.numbers",
            expected=f"(heads={heads}, distances), or one row for all heads",
            actual=describe_shape(bias.numbers),
        )


def read_pairs(arguments: Arguments, sizes: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """Mask and bias of pairs, checked, with four axes (batch, heads, query_length, key_length), each whole or 1.

    A bias of -inf hides a pair as a mask does, so that a row of nothing else is an empty row, not NaN.
    """
    mask, bias = arguments.mask, arguments.bias
    if mask is not None:
        require_mask("mask", mask)
        require_device("mask", mask, arguments.query.device, "query")
        mask = to_four_axes("mask", mask, *sizes)
    if isinstance(bias, RelativeBias):
        require_relative(bias, arguments.query, sizes[1])
        return mask, read_bias(bias.to_dense(*sizes[2:])[None], arguments.query)
    if bias is not None:
        bias = to_four_axes("bias", read_bias(bias, arguments.query), *sizes)
        visible = bias != -torch.inf
        bias = torch.where(visible, bias, 0.0)
        mask = visible if mask is None else mask & visible
    return mask, bias


def check_score(score: Score, axes: Axes, query: Tensor) -> None:
    """Raise unless the score's tensors fit the heads and the head_dim."""
    if isinstance(score, Additive):
        require_number("score.negative_slope", score.negative_slope)
        if axes.sizes["head_dim"] != 1:
            raise DimensionMismatchError(
                argument="query",
                expected="head_dim 1 with the score Additive (one term per node and head)",
                actual=f"head_dim {axes.sizes['head_dim']}",
            )
    if isinstance(score, Dynamic):
        require_number("score.negative_slope", score.negative_slope)
        require_floating("score.vector", score.vector)
        require_same_kind("score.vector", score.vector, "query", query)
        axes.bind("score.vector", score.vector, "heads head_dim")


def default_scale(arguments: Arguments, head_dim: int) -> float:
    """The caller's scale, else 1 / sqrt(head_dim) for Dot and 1 for the other scores."""
    if arguments.scale is not None:
        return float(arguments.scale)
    return 1.0 / math.sqrt(max(head_dim, 1)) if isinstance(arguments.score, Dot) else 1.0


def refuse_graph_settings(arguments: Arguments) -> None:
    """Raise where a pattern that is no Graph is given what only a Graph has."""
    name = type(arguments.pattern).__name__
    if arguments.edges is not None:
        raise InvalidInputError(argument="edges", expected=f"None with the pattern {name}", actual="EdgeFeatures")
    if arguments.aggregation != "sum" or not arguments.normalize:
        raise UnsupportedError(
            f"aggregation={arguments.aggregation!r}, normalize={arguments.normalize}: the pattern {name} has only "
            "aggregation='sum', normalize=True; a Graph has the others (pattern.to_graph(...))",
            argument="aggregation" if arguments.aggregation != "sum" else "normalize",
        )
