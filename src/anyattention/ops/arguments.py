"""The arguments of `attend` in one record, with the checks that every operation shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from anyattention._checks import (
    Axes,
    conversion_of,
    describe_shape,
    keep_plain,
    plain,
    require_dense,
    require_device,
    require_floating,
    require_mask,
    require_number,
    to_four_axes,
)
from anyattention.ambient import is_compiling, is_plainly_readable
from anyattention.bias import RelativeBias
from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.patterns import Full, Graph, Pattern, TopK
from anyattention.scores import Dot, EdgeFeatures, Score

__all__ = [
    "Aggregation",
    "Arguments",
    "Scaling",
    "Weights",
    "of_pairs",
    "read_bias",
    "read_pairs",
    "refuse_graph_settings",
    "require_relative",
    "require_sinks",
    "weights_asked_for",
]

Aggregation = Literal["sum", "mean", "max"]
Weights = Literal["mean", "heads"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaling:
    """What is between the raw score and the bias: `softcap(scale raw)`. The records of the kernels inherit its fields.

    Attributes:
        scale: the factor of the raw score.
        softcap: c in c tanh(score / c); 0 for none.
    """

    scale: float
    softcap: float

    def of(self, raw: Tensor) -> Tensor:
        """The scores. Infinity becomes NaN: -inf would pass for a hidden pair, and a cap would hide it."""
        return self.of_shown(raw * self.scale)

    def of_shown(self, scores: Tensor) -> Tensor:
        """The same of raw scores times the scale."""
        return self.of_scaled(scores * scores.new_ones(()).where(scores.isfinite(), torch.nan))

    def of_scaled(self, scores: Tensor) -> Tensor:
        """The same of raw scores times the scale, infinity as it is.

        Dividing by a large c may leave the dtype. So c tanh(x / c) is x itself where x / c is below the root of the
        dtype's epsilon: the same to half a digit.
        """
        if self.softcap <= 0:
            return scores
        limits = torch.finfo(scores.dtype)
        cap = min(max(self.softcap, limits.tiny), limits.max)
        bends = scores.detach().abs() > cap * math.sqrt(limits.eps)
        return torch.where(bends, cap * torch.tanh(torch.where(bends, scores, 0.0) / cap), scores)


@dataclass(frozen=True, eq=False)
class Arguments:
    """What `attend` takes, in its order and with its defaults: the one list of these settings.

    Numbers and names are checked when it is made. An operation checks the tensors, and hands on the arguments with mask
    and bias in their full rank.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern | TopK | None = None
    _: KW_ONLY
    score: Score = Dot()  # noqa: RUF009  # a frozen dataclass without fields
    mask: Tensor | None = None
    bias: Tensor | RelativeBias | None = None
    edges: EdgeFeatures | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    aggregation: Aggregation = "sum"
    normalize: bool = True
    return_weights: bool | str = False
    return_logsumexp: bool = False
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is None:
            object.__setattr__(self, "pattern", Full())
        elif not isinstance(self.pattern, Pattern | TopK):
            hint = conversion_of(self.pattern)
            if isinstance(self.pattern, Tensor):
                hint = "a boolean tensor is given as mask=, a float one as bias="
            raise InvalidInputError(
                argument="pattern",
                expected="a pattern (Full, Causal, Window, Graph ...), TopK or None",
                actual=type(self.pattern).__name__,
                hint=hint,
            )
        if not isinstance(self.score, Score):
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
        if self.edges is not None and not isinstance(self.edges, EdgeFeatures):
            raise InvalidInputError(
                argument="edges", expected="EdgeFeatures(features, ...) or None", actual=type(self.edges).__name__
            )
        if self.return_weights is not False and self.return_weights != "heads":
            object.__setattr__(self, "return_weights", weights_asked_for(self.return_weights))
        for name in ("normalize", "return_logsumexp"):
            if not isinstance(keep_plain(self, name), bool):
                raise InvalidInputError(argument=name, expected="True or False", actual=repr(getattr(self, name)))
        if type(self.dropout) is not float or self.dropout != 0.0:
            require_number("dropout", keep_plain(self, "dropout"), at_least=0.0, below=1.0)
        if self.scale is not None:
            require_number("scale", keep_plain(self, "scale"))
        if self.softcap is not None:
            require_number("softcap", keep_plain(self, "softcap"), above=0.0)

    @property
    def weights(self) -> Weights | None:
        """Which weights are asked for; True is "mean"."""
        return self.return_weights or None  # pyright: ignore[reportReturnType]  # as __post_init__ left it

    @property
    def bias_numbers(self) -> Tensor | None:
        """Those of the bias, of pairs or by distance."""
        return self.bias.numbers if isinstance(self.bias, RelativeBias) else self.bias

    @property
    def graph(self) -> Graph:
        """The pattern of a call over a Graph."""
        assert isinstance(self.pattern, Graph)
        return self.pattern

    @property
    def scaling(self) -> Scaling:
        """The caller's scale, else the score's, and the soft cap."""
        scale = self.score.default_scale(self.query.shape[-1]) if self.scale is None else float(self.scale)
        return Scaling(scale=scale, softcap=self.softcap or 0.0)

    @property
    def sums_dtype(self) -> torch.dtype:
        """The dtype that the call is computed in, at least float32."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def results_dtype(self) -> torch.dtype:
        """The dtype of output and weights: the query's, but that of the sums where sinks are still to scale them."""
        return self.query.dtype if self.sinks is None else self.sums_dtype

    def changed(self, **changes: Any) -> Arguments:
        """These arguments but for some, which are not checked again."""
        if is_compiling():
            return replace(self, **changes)
        made = object.__new__(Arguments)
        made.__dict__.update(self.__dict__, **changes)
        return made

    def under_autocast(self) -> Arguments:
        """These arguments with the floating-point tensors in autocast's dtype, as PyTorch's own attention has it."""
        dtype = torch.get_autocast_dtype(self.query.device.type)

        def cast(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return tensor
            return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

        edges = self.edges
        if edges is not None:
            edges = EdgeFeatures(cast(edges.features), cast(edges.key_weight), cast(edges.value_weight))
        rows = {name: cast(getattr(self, name)) for name in ("query", "key", "value")}
        return self.changed(**rows, score=self.score.cast(cast), edges=edges)


def weights_asked_for(return_weights: bool | str) -> Weights | None:
    """`return_weights` as "mean", "heads" or None; True is "mean"."""
    return_weights = plain(return_weights)
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
    if is_plainly_readable(bias.numbers) and bool((bias.numbers == -torch.inf).any()):
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


def require_sinks(arguments: Arguments, axes: Axes) -> None:
    """Raise unless sinks, where given, fit the query, whose axes are bound."""
    sinks = arguments.sinks
    if sinks is None:
        return
    require_dense("sinks", sinks)
    require_floating("sinks", sinks)
    require_device("sinks", sinks, arguments.query.device, "query")
    axes.bind("sinks", sinks, "heads")
    if not arguments.normalize:
        raise UnsupportedError(
            "sinks with normalize=False: each edge is gated by itself, and has no denominator for a sink to be in",
            argument="sinks",
        )


def read_pairs(arguments: Arguments, sizes: Sequence[int]) -> Arguments:
    """The arguments with mask and bias checked, those of pairs with four axes (batch, heads, query_length, key_length).

    Each axis is whole or 1. A bias by distance stays one.
    """
    mask, bias = arguments.mask, arguments.bias
    if mask is not None:
        require_mask("mask", mask)
        require_device("mask", mask, arguments.query.device, "query")
        mask = to_four_axes("mask", mask, *sizes)
    if isinstance(bias, RelativeBias):
        require_relative(bias, arguments.query, sizes[1])
    elif bias is not None:
        bias = to_four_axes("bias", read_bias(bias, arguments.query), *sizes)
    return arguments.changed(mask=mask, bias=bias)


def of_pairs(call: Arguments) -> Arguments:
    """A call that was read, with a bias of pairs, without those of -inf, which the mask hides.

    So a row of nothing else is an empty row, not NaN.
    """
    mask, bias = call.mask, call.bias
    if isinstance(bias, RelativeBias):
        dense = bias.to_dense(call.query.shape[1], call.key.shape[1])[None]
        return call.changed(bias=read_bias(dense, call.query))
    if bias is None:
        return call
    visible = bias != -torch.inf
    return call.changed(mask=visible if mask is None else mask & visible, bias=torch.where(visible, bias, 0.0))


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
