"""Scaled dot-product and multi-head attention over (batch, length, d_model), dense or over a pattern."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.config import AttentionConfig
from anyattention.nn.arguments import ParameterArguments, PatternArgument, arguments_of, shown_settings, takes
from anyattention.nn.base import AttentionModule, require_finite
from anyattention.nn.projected import (
    ProjectedAttention,
    alignment_of,
    allowed_pairs,
    attend_heads,
    check_features,
    check_pattern,
    split_heads,
)
from anyattention.output import AttentionOutput
from anyattention.patterns import Pattern, TopK

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MultiHeadAttention", "ScaledDotProductAttention"]


_NO_PARAMETERS = {"unused": "ScaledDotProductAttention has no parameters"}


@dataclass(frozen=True)
class ScaledDotProductArguments(PatternArgument, AttentionConfig):
    """The arguments of `ScaledDotProductAttention`."""

    use_bias: Any = field(init=False, metadata=_NO_PARAMETERS)
    max_seq_len: Any = field(init=False, metadata=_NO_PARAMETERS)
    eps: Any = field(init=False, metadata=_NO_PARAMETERS)
    positions: Any = field(init=False, metadata=_NO_PARAMETERS)
    qk_norm: Any = field(init=False, metadata=_NO_PARAMETERS)


class ScaledDotProductAttention(AttentionModule):
    """Attention by scaled dot products, without parameters: `softmax(Q K' scale) V` in each head.

    Args: the fields of `ScaledDotProductArguments`.

    Raises:
        InvalidConfigError: a setting is out of range.

    Cost: O(batch x pairs x d_model) time, with query_length x key_length pairs without a pattern.

    Source: Vaswani et al., 2017, equation 1.

    Example:
        >>> attention = ScaledDotProductAttention(8, 2, dropout=0.0)
        >>> output, weights = attention(torch.zeros(1, 3, 8))
        >>> output.shape, weights.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 3, 3]))
    """

    @takes(ScaledDotProductArguments)
    def __init__(self, config: AttentionConfig, pattern: Pattern | TopK | None) -> None:
        super().__init__()
        self.config = config
        check_pattern(pattern, config.causal)
        self.pattern = pattern

    @classmethod
    def from_config(cls, config: AttentionConfig, *, pattern: Pattern | TopK | None = None) -> Self:
        """The module of a config; settings of projections and positions must keep their defaults."""
        return cls(**arguments_of(config, ScaledDotProductArguments), pattern=pattern)

    @property
    def d_model(self) -> int:
        """Width of all heads together."""
        return self.config.d_model

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | RelativeBias | None = None,
        return_weights: bool | str | None = None,
    ) -> AttentionOutput:
        """Attend.

        Args:
            query: `(batch, query_length, d_model)`.
            key: `(batch, key_length, d_model)`; None is the query.
            value: `(batch, key_length, d_model)`; None is the key.
            mask: boolean, True = may attend: `(key_length,)`, `(query_length, key_length)`, `(batch, query_length,
                key_length)` or rank 4 with heads second; sizes of 1 broadcast. Where the pattern is a Graph: of its
                edges, `(edges,)`, `(edges, heads)` or `(batch, edges, heads)`.
            bias: floating, added to the scaled scores; shapes as the mask.
            return_weights: "mean" over heads (or True), "heads", or False, which spares them; None is True, with a
                pattern False.

        Returns:
            AttentionOutput(output `(batch, query_length, d_model)`, weights `(batch, query_length, key_length)`). With
            a pattern that is neither Full nor Causal the weights are those of its pairs, as `attend` has them:
            `(batch, edges)`, for "heads" `(batch, edges, heads)`; with TopK a sparse COO tensor, coalesced, `(batch,
            query_length, key_length)`, for "heads" `(batch, heads, query_length, key_length)`.

        Raises:
            DimensionMismatchError, InvalidInputError, InvalidMaskError: an argument does not fit.
        """
        key, value = check_features(self.config, query, key, value)
        heads = [split_heads(x, self.config.num_heads) for x in (query, key, value)]
        pattern = allowed_pairs(self.pattern, self.config.causal, heads)
        wanted = self.pattern is None if return_weights is None else return_weights
        result = attend_heads(self, self.config, heads, pattern, mask, bias, wanted)
        output = result.output.flatten(-2)
        if self.config.check_finite:
            require_finite(self.name, output)
        return AttentionOutput(output, result.weights)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return _describe(self.config, self.pattern)


@dataclass(frozen=True)
class MultiHeadArguments(ParameterArguments, PatternArgument, AttentionConfig):
    """The arguments of `MultiHeadAttention`."""


class MultiHeadAttention(ProjectedAttention):
    """Multi-head attention: projections of query, key and value, attention in each head, and a projection back.

    `output = concat_h(softmax(Q_h K_h' scale + bias) V_h) W_O` with `Q = query W_Q` and so on.

    Args: the fields of `MultiHeadArguments`.

    Parameters, in the order of `get_parameters()`: position_embedding `(max_seq_len, d_model)` (positions="learned"),
    query_projection, key_projection, value_projection, output_projection (weight `(d_model, d_model)`, then bias),
    query_norm, key_norm `(d_k,)` (qk_norm=True).

    Raises:
        InvalidConfigError: a setting is out of range.

    Cost: O(batch x length x d_model^2) for the projections, O(batch x pairs x d_model) between, with query_length x
    key_length pairs without a pattern.

    Source: Vaswani et al., 2017, section 3.2.2; query/key normalisation: Henry et al., 2020.

    Example:
        >>> attention = MultiHeadAttention(8, 2)
        >>> output, weights = attention(torch.zeros(1, 3, 8), torch.zeros(1, 5, 8))
        >>> output.shape, weights.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 3, 5]))
    """

    @takes(MultiHeadArguments)
    def __init__(
        self,
        config: AttentionConfig,
        pattern: Pattern | TopK | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_pattern(pattern, config.causal)
        super().__init__(config, device, dtype)
        self.config = config
        self.pattern = pattern

    @classmethod
    def from_config(
        cls,
        config: AttentionConfig,
        *,
        pattern: Pattern | TopK | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config."""
        return cls(**arguments_of(config, MultiHeadArguments), pattern=pattern, device=device, dtype=dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | RelativeBias | None = None,
        return_weights: bool | str | None = None,
    ) -> AttentionOutput:
        """Attend.

        Args:
            query: `(batch, query_length, d_model)`.
            key: `(batch, key_length, d_model)`; None is the query.
            value: `(batch, key_length, d_model)`; None is the key.
            mask: boolean, True = may attend: `(key_length,)`, `(query_length, key_length)`, `(batch, query_length,
                key_length)` or rank 4 with heads second; sizes of 1 broadcast. Where the pattern is a Graph: of its
                edges, `(edges,)`, `(edges, heads)` or `(batch, edges, heads)`.
            bias: floating, added to the scaled scores; shapes as the mask.
            return_weights: "mean" over heads (or True), "heads", or False, which spares them; None is True, with a
                pattern False.

        Returns:
            AttentionOutput(output `(batch, query_length, d_model)`, weights `(batch, query_length, key_length)`). With
            a pattern that is neither Full nor Causal the weights are those of its pairs, as `attend` has them:
            `(batch, edges)`, for "heads" `(batch, edges, heads)`; with TopK a sparse COO tensor, coalesced, `(batch,
            query_length, key_length)`, for "heads" `(batch, heads, query_length, key_length)`.

        Raises:
            DimensionMismatchError: a shape does not fit, or a sequence is longer than max_seq_len.
            InvalidInputError, InvalidMaskError: a dtype or device does not fit.
        """
        heads = self._project(query, key, value, alignment_of(self.pattern, bias))
        pattern = allowed_pairs(self.pattern, self.config.causal, heads)
        wanted = self.pattern is None if return_weights is None else return_weights
        return self._attend(heads, pattern, mask, bias, wanted)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return _describe(self.config, self.pattern)


def _describe(config: AttentionConfig, pattern: Pattern | TopK | None) -> str:
    return shown_settings(config) if pattern is None else f"{shown_settings(config)}, pattern={pattern}"
