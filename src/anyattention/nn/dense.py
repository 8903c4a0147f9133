"""Scaled dot-product and multi-head attention over (batch, length, d_model), dense or over a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import require_count
from anyattention.bias import RelativeBias
from anyattention.config import AttentionConfig
from anyattention.nn.arguments import (
    ImplementationArgument,
    ParameterArguments,
    PatternArgument,
    arguments_of,
    shown_settings,
    takes,
)
from anyattention.nn.base import AttentionModule, require_finite
from anyattention.nn.key_value_cache import Grown, KeyValueCache
from anyattention.nn.padding import of_kept, packed, refuse_beside, with_padding, within
from anyattention.nn.projected import (
    ProjectedAttention,
    alignment_of,
    allowed_pairs,
    at_the_end,
    attend_heads,
    call_of_heads,
    check_features,
    check_pattern,
    past_pairs,
    split_heads,
)
from anyattention.nn.torch_weights import from_torch, to_torch
from anyattention.ops import explain
from anyattention.ops.dispatch import Explanation
from anyattention.output import AttentionOutput
from anyattention.patterns import Causal, Full, Pattern, TopK

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MultiHeadAttention", "ScaledDotProductAttention"]


_NO_PARAMETERS = {"unused": "ScaledDotProductAttention has no parameters"}
_NO_PROJECTIONS = {"unused": "ScaledDotProductAttention takes query, key and value as wide as d_model"}


@dataclass(frozen=True)
class ScaledDotProductArguments(ImplementationArgument, PatternArgument, AttentionConfig):
    """The arguments of `ScaledDotProductAttention`."""

    use_bias: Any = field(init=False, metadata=_NO_PARAMETERS)
    max_seq_len: Any = field(init=False, metadata=_NO_PARAMETERS)
    eps: Any = field(init=False, metadata=_NO_PARAMETERS)
    positions: Any = field(init=False, metadata=_NO_PARAMETERS)
    qk_norm: Any = field(init=False, metadata=_NO_PARAMETERS)
    num_kv_heads: Any = field(init=False, metadata=_NO_PROJECTIONS)
    kdim: Any = field(init=False, metadata=_NO_PROJECTIONS)
    vdim: Any = field(init=False, metadata=_NO_PROJECTIONS)
    rope_theta: Any = field(init=False, metadata=_NO_PARAMETERS)


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
    def __init__(self, config: AttentionConfig, pattern: Pattern | TopK | None, implementation: str | None) -> None:
        super().__init__()
        self.config = config
        check_pattern(pattern, config.causal)
        self.pattern = pattern
        self.implementation = implementation

    @classmethod
    def from_config(
        cls,
        config: AttentionConfig,
        *,
        pattern: Pattern | TopK | None = None,
        implementation: str | None = None,
    ) -> Self:
        """The module of a config; settings of projections and positions must keep their defaults."""
        settings = arguments_of(config, ScaledDotProductArguments)
        return cls(**settings, pattern=pattern, implementation=implementation)

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
        result = attend_heads(self._arguments(query, key, value, mask, bias=bias, return_weights=return_weights))
        output = result.output.flatten(-2)
        if self.config.check_finite:
            require_finite(self.name, output)
        return AttentionOutput(output, result.weights)

    def explain_forward(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which implementation a call with these arguments of `forward` runs, and why each faster one does not."""
        return explain(**self._arguments(*args, **kwargs))

    def _arguments(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | RelativeBias | None = None,
        return_weights: bool | str | None = None,
    ) -> dict[str, Any]:
        """The arguments of `attend` for those of `forward`."""
        key, value = check_features(self.config, query, key, value)
        heads = [split_heads(x, self.config.num_heads) for x in (query, key, value)]
        pattern = allowed_pairs(self.pattern, self.config.causal, heads)
        wanted = self.pattern is None if return_weights is None else return_weights
        return call_of_heads(self, self.config, heads, pattern, mask, bias, wanted)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return _describe(self.config, self.pattern)


@dataclass(frozen=True)
class MultiHeadArguments(ParameterArguments, ImplementationArgument, PatternArgument, AttentionConfig):
    """The arguments of `MultiHeadAttention`."""


class MultiHeadAttention(ProjectedAttention):
    """Multi-head attention: projections of query, key and value, attention in each head, and a projection back.

    `output = concat_h(softmax(Q_h K_h' scale + bias) V_h) W_O` with `Q = query W_Q` and so on.

    Args: the fields of `MultiHeadArguments`.

    Parameters, in the order of `get_parameters()`: position_embedding `(max_seq_len, d_model)` (positions="learned"),
    query_projection, key_projection, value_projection, output_projection (weight `(outputs, inputs)`, then bias; those
    of key and value have num_kv_heads x d_k outputs, and kdim and vdim inputs), query_norm, key_norm `(d_k,)`
    (qk_norm=True).

    Raises:
        InvalidConfigError: a setting is out of range.

    Cost: O(batch x length x d_model^2) for the projections, O(batch x pairs x d_model) between, with query_length x
    key_length pairs without a pattern.

    Source: Vaswani et al., 2017, section 3.2.2; query/key normalisation: Henry et al., 2020; shared key heads: Ainslie
    et al., 2023; "rope": Su et al., 2021; "alibi": Press et al., 2022.

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
        implementation: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_pattern(pattern, config.causal)
        super().__init__(config, device, dtype)
        self.config = config
        self.pattern = pattern
        self.implementation = implementation

    @classmethod
    def from_config(
        cls,
        config: AttentionConfig,
        *,
        pattern: Pattern | TopK | None = None,
        implementation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config."""
        settings = arguments_of(config, MultiHeadArguments)
        return cls(**settings, pattern=pattern, implementation=implementation, device=device, dtype=dtype)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> Self:
        """A module with copies of the weights of PyTorch's, all trainable, and its dropout and mode.

        This one takes `(batch, length, width)` whatever `batch_first` says, its masks are True where a query may
        attend, and a query that may attend to nothing gets attention 0, not NaN.

        Raises:
            InvalidInputError: another module.
            UnsupportedError: it adds keys of its own (add_bias_kv, add_zero_attn), or something watches or replaces
                one of its parts: `interop.torch.MultiheadAttention` takes those.

        Example:
            >>> theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            >>> x = torch.randn(1, 3, 8)
            >>> ours = MultiHeadAttention.from_torch(theirs)
            >>> torch.allclose(ours(x).output, theirs(x, x, x)[0], atol=1e-6)
            True
        """
        return from_torch(cls, module)

    def to_torch(self, *, batch_first: bool = True) -> nn.MultiheadAttention:
        """PyTorch's module with copies of these weights; the way back of `from_torch`.

        Raises:
            UnsupportedError: a setting that PyTorch's module does not have, or a projection that was replaced.
        """
        return to_torch(self, batch_first)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | RelativeBias | None = None,
        key_mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        documents: Sequence[Sequence[int]] | None = None,
        past: KeyValueCache | None = None,
        position_offset: int = 0,
        return_weights: bool | str | None = None,
    ) -> AttentionOutput:
        """Attend.

        Args:
            query: `(batch, query_length, d_model)`.
            key: `(batch, key_length, kdim)`; None is the query.
            value: `(batch, key_length, vdim)`; None is the key.
            mask: boolean, True = may attend: `(key_length,)`, `(query_length, key_length)`, `(batch, query_length,
                key_length)` or rank 4 with heads second; sizes of 1 broadcast. Where the pattern is a Graph: of its
                edges, `(edges,)`, `(edges, heads)` or `(batch, edges, heads)`.
            bias: floating, added to the scaled scores; shapes as the mask.
            key_mask: boolean `(batch, key_length)`, True = a real token, which may be attended to. With past it is of
                all tokens so far.
            lengths: of each sequence of keys, `(batch,)`: those behind are padding. Both go with mask.
            documents: for each sequence the lengths of the documents packed into it, which add up to its length: a
                token attends within its document, and positions begin anew in each. Instead of key, mask and bias.
            past: the tokens before these, to which these are added: the query's tokens attend to them and to
                themselves. For a module that hides the future. The keys of mask, bias and weights are then those that
                `past` keeps and the query's together.
            position_offset: the position of the first token. With past it follows from it.
            return_weights: "mean" over heads (or True), "heads", or False, which spares them; None is True, with a
                pattern or documents False.

        Returns:
            AttentionOutput(output `(batch, query_length, d_model)`, weights `(batch, query_length, key_length)`). With
            a pattern that is neither Full nor Causal the weights are those of its pairs, as `attend` has them:
            `(batch, edges)`, for "heads" `(batch, edges, heads)`; with TopK a sparse COO tensor, coalesced, `(batch,
            query_length, key_length)`, for "heads" `(batch, heads, query_length, key_length)`. With documents the
            pairs are those of all sequences laid end to end, and batch is 1.

        Raises:
            DimensionMismatchError: a shape does not fit, or a sequence is longer than max_seq_len.
            InvalidInputError, InvalidMaskError: a dtype, a device or a length does not fit.
            InvalidConfigError: `past` with a module that does not hide the future.
            UnsupportedError: arguments that do not go together.
        """
        call, grown = self._arguments(
            query,
            key,
            value,
            mask,
            bias=bias,
            key_mask=key_mask,
            lengths=lengths,
            documents=documents,
            past=past,
            position_offset=position_offset,
            return_weights=return_weights,
        )
        output, weights = self._attend(call)
        if past is not None and grown is not None:
            past.grow(self, grown)
        return AttentionOutput(output if documents is None else output.reshape(query.shape), weights)

    def explain_forward(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which implementation a call with these arguments of `forward` runs, and why each faster one does not."""
        return explain(**self._arguments(*args, **kwargs)[0])

    def _arguments(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | RelativeBias | None = None,
        key_mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        documents: Sequence[Sequence[int]] | None = None,
        past: KeyValueCache | None = None,
        position_offset: int = 0,
        return_weights: bool | str | None = None,
    ) -> tuple[dict[str, Any], Grown | None]:
        """The arguments of `attend` for those of `forward`, and what becomes of the cache."""
        first = require_count("position_offset", position_offset, 0)
        grown = None
        wanted = self.pattern is None and documents is None if return_weights is None else return_weights
        if documents is not None:
            given = {"key": key, "value": value, "mask": mask, "bias": bias, "key_mask": key_mask, "lengths": lengths}
            refuse_beside("documents", given | {"past": past})
            check_features(self.config, query, None, None)
            own = packed(documents, query)
            laid_out = query.reshape(1, -1, self.d_model)
            heads = self._project(laid_out, None, None, first=first, documents=own)
            pattern = within(own, allowed_pairs(self.pattern, self.config.causal, heads))
        elif past is not None:
            refuse_beside("past", {"key": key, "value": value, "lengths": lengths, "position_offset": first or None})
            pattern, bias = past_pairs(self.pattern, self.config.causal, past), at_the_end(bias)
            heads = self._project(query, None, None, first=past.length)
            *heads[1:], grown = past.extended(self, *heads[1:])
            key_mask = of_kept(key_mask, past.length + query.shape[1], heads[1])
        else:
            heads = self._project(query, key, value, alignment_of(self.pattern, bias), first)
            pattern = allowed_pairs(self.pattern, self.config.causal, heads)
        mask = with_padding(mask, lengths, key_mask, pattern, heads)
        call = self._call(heads, pattern, mask, bias, wanted)
        if past is not None and isinstance(pattern, Causal) and query.shape[1] == 1:
            # A token sees all there is. Of such calls the checks are kept, for any number of keys.
            call["pattern"] = Full()
        return call, grown

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return _describe(self.config, self.pattern)


def _describe(config: AttentionConfig, pattern: Pattern | TopK | None) -> str:
    return shown_settings(config) if pattern is None else f"{shown_settings(config)}, pattern={pattern}"
