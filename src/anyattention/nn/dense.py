"""Dense attention modules: scaled dot-product and multi-head attention over (batch, length, d_model)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anyattention._checks import Axes, require_dense, require_floating, require_mask
from anyattention.config import AttentionConfig, Positions, require_config, require_defaults
from anyattention.errors import DimensionMismatchError
from anyattention.nn.base import AttentionModule, require_factory, require_finite, require_parameter_kind
from anyattention.ops import attend
from anyattention.output import AttentionOutput, AttentionResult
from anyattention.patterns import Causal

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MultiHeadAttention", "ScaledDotProductAttention"]


class ScaledDotProductAttention(AttentionModule):
    """Attention by scaled dot products, without parameters: `softmax(Q K' scale) V` in each head.

    Args:
        d_model: width of the features; each of the `num_heads` heads takes d_model / num_heads of them.
        num_heads: number of heads.
        dropout: probability with which a weight is dropped during training.
        scale: factor of the dot product; None is 1 / sqrt(d_k).
        causal: a query attends to the past only; raises when a call's lengths differ.
        check_finite: raise NumericalInstabilityError when an output holds NaN or Inf.

    Raises:
        InvalidConfigError: a setting is out of range.

    Cost: O(batch x query_length x key_length x d_model) time.

    Source: Vaswani et al., 2017, equation 1.

    Example:
        >>> attention = ScaledDotProductAttention(8, 2, dropout=0.0)
        >>> output, weights = attention(torch.zeros(1, 3, 8))
        >>> output.shape, weights.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 3, 3]))
    """

    def __init__(
        self,
        d_model: int = 512,
        num_heads: int = 8,
        *,
        dropout: float = 0.1,
        scale: float | None = None,
        causal: bool = False,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        self.config = AttentionConfig(
            d_model=d_model,
            num_heads=num_heads,
            dropout=dropout,
            scale=scale,
            causal=causal,
            check_finite=check_finite,
        )

    @classmethod
    def from_config(cls, config: AttentionConfig) -> Self:
        """The module of a config; settings of projections and positions must keep their defaults."""
        require_config("config", config, AttentionConfig)
        unused = ("use_bias", "max_seq_len", "eps", "positions", "qk_norm")
        require_defaults(config, unused, "ScaledDotProductAttention has no parameters")
        return cls(
            config.d_model,
            config.num_heads,
            dropout=config.dropout,
            scale=config.scale,
            causal=config.causal,
            check_finite=config.check_finite,
        )

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
        bias: Tensor | None = None,
        return_weights: bool | str = True,
    ) -> AttentionOutput:
        """Attend.

        Args:
            query: `(batch, query_length, d_model)`.
            key: `(batch, key_length, d_model)`; None is the query.
            value: `(batch, key_length, d_model)`; None is the key.
            mask: boolean, True = may attend: `(key_length,)`, `(query_length, key_length)`, `(batch, query_length,
                key_length)` or rank 4 with heads second; sizes of 1 broadcast.
            bias: floating, added to the scaled scores; shapes as the mask.
            return_weights: "mean" over heads (or True), "heads", or False, which spares them.

        Returns:
            AttentionOutput(output `(batch, query_length, d_model)`, weights `(batch, query_length, key_length)`).

        Raises:
            DimensionMismatchError, InvalidInputError, InvalidMaskError: an argument does not fit.
        """
        key, value = _check_features(self.config, query, key, value)
        heads = [_split_heads(x, self.config.num_heads) for x in (query, key, value)]
        result = _attend(self, self.config, heads, mask, bias, return_weights)
        output = result.output.flatten(-2)
        if self.config.check_finite:
            require_finite(self.name, output)
        return AttentionOutput(output, result.weights)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f"{self.config.d_model}, {self.config.num_heads}"


class MultiHeadAttention(AttentionModule):
    """Multi-head attention: projections of query, key and value, attention in each head, and a projection back.

    `output = concat_h(softmax(Q_h K_h' scale + bias) V_h) W_O` with `Q = query W_Q` and so on.

    Args:
        d_model: width of the features; each of the `num_heads` heads takes d_model / num_heads of them.
        num_heads: number of heads.
        dropout: probability with which a weight is dropped during training.
        use_bias: whether the four projections have a bias.
        scale: factor of the dot product; None is 1 / sqrt(d_k).
        max_seq_len: the longest sequence that positions encode; inert with positions="none".
        causal: a query attends to the past only; raises when a call's lengths differ.
        eps: added inside the root mean square of query/key normalisation; inert with qk_norm=False.
        positions: "none", "sinusoidal" or "learned", added to query and key (not value) before their projection.
        qk_norm: normalise each head's query and key by their root mean square, with a learned gain.
        check_finite: raise NumericalInstabilityError when an output holds NaN or Inf.
        device, dtype: of the parameters.

    Parameters, in the order of `get_parameters()`: position_embedding `(max_seq_len, d_model)` (positions="learned"),
    query_projection, key_projection, value_projection, output_projection (weight `(d_model, d_model)`, then bias),
    query_norm, key_norm `(d_k,)` (qk_norm=True).

    Raises:
        InvalidConfigError: a setting is out of range.

    Cost: O(batch x length x d_model^2) for the projections, O(batch x query_length x key_length x d_model) between.

    Source: Vaswani et al., 2017, section 3.2.2; query/key normalisation: Henry et al., 2020.

    Example:
        >>> attention = MultiHeadAttention(8, 2)
        >>> output, weights = attention(torch.zeros(1, 3, 8), torch.zeros(1, 5, 8))
        >>> output.shape, weights.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 3, 5]))
    """

    def __init__(
        self,
        d_model: int = 512,
        num_heads: int = 8,
        *,
        dropout: float = 0.1,
        use_bias: bool = True,
        scale: float | None = None,
        max_seq_len: int = 512,
        causal: bool = False,
        eps: float = 1e-6,
        positions: Positions = "none",
        qk_norm: bool = False,
        check_finite: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = AttentionConfig(
            d_model=d_model,
            num_heads=num_heads,
            dropout=dropout,
            use_bias=use_bias,
            scale=scale,
            max_seq_len=max_seq_len,
            causal=causal,
            eps=eps,
            positions=positions,
            qk_norm=qk_norm,
            check_finite=check_finite,
        )
        require_factory(device, dtype)

        def projection() -> nn.Linear:
            return nn.Linear(d_model, d_model, bias=use_bias, device=device, dtype=dtype)

        if positions == "learned":
            table = torch.empty(max_seq_len, d_model, device=device, dtype=dtype)
            self.position_embedding = nn.Parameter(table)
        elif positions == "sinusoidal":
            table = sinusoidal_positions(max_seq_len, d_model)
            self.register_buffer("position_table", table.to(device, dtype), persistent=False)
        self.query_projection = projection()
        self.key_projection = projection()
        self.value_projection = projection()
        self.output_projection = projection()
        if qk_norm:
            width = self.config.d_k
            self.query_norm = nn.RMSNorm(width, eps=eps, device=device, dtype=dtype)
            self.key_norm = nn.RMSNorm(width, eps=eps, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: AttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config."""
        require_config("config", config, AttentionConfig)
        return cls(**config.to_dict(), device=device, dtype=dtype)

    @property
    def d_model(self) -> int:
        """Width of all heads together."""
        return self.config.d_model

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier-uniform projections, biases 0, gains 1, positions normal(0, 0.02)."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        if self.config.positions == "learned":
            nn.init.normal_(self.position_embedding, std=0.02)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        return_weights: bool | str = True,
    ) -> AttentionOutput:
        """Attend.

        Args:
            query: `(batch, query_length, d_model)`.
            key: `(batch, key_length, d_model)`; None is the query.
            value: `(batch, key_length, d_model)`; None is the key.
            mask: boolean, True = may attend: `(key_length,)`, `(query_length, key_length)`, `(batch, query_length,
                key_length)` or rank 4 with heads second; sizes of 1 broadcast.
            bias: floating, added to the scaled scores; shapes as the mask.
            return_weights: "mean" over heads (or True), "heads", or False, which spares them.

        Returns:
            AttentionOutput(output `(batch, query_length, d_model)`, weights `(batch, query_length, key_length)`).

        Raises:
            DimensionMismatchError: a shape does not fit, or a sequence is longer than max_seq_len.
            InvalidInputError, InvalidMaskError: a dtype or device does not fit.
        """
        key, value = _check_features(self.config, query, key, value)
        for name, x in (("query", query), ("key", key), ("value", value)):
            require_parameter_kind(name, x, self.output_projection.weight)
        placed_query = self._add_positions("query", query)
        placed_key = placed_query if key is query else self._add_positions("key", key)
        heads = [
            _split_heads(projection(x), self.config.num_heads)
            for projection, x in (
                (self.query_projection, placed_query),
                (self.key_projection, placed_key),
                (self.value_projection, value),
            )
        ]
        if self.config.qk_norm:
            heads[0], heads[1] = self.query_norm(heads[0]), self.key_norm(heads[1])
        result = _attend(self, self.config, heads, mask, bias, return_weights)
        output = self.output_projection(result.output.flatten(-2))
        if self.config.check_finite:
            require_finite(self.name, output)
        return AttentionOutput(output, result.weights)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f"{self.config.d_model}, {self.config.num_heads}"

    def _add_positions(self, argument: str, x: Tensor) -> Tensor:
        if self.config.positions == "none":
            return x
        length = x.shape[1]
        if length > self.config.max_seq_len:
            raise DimensionMismatchError(
                argument=argument,
                expected=f"a length of at most max_seq_len={self.config.max_seq_len}, which "
                f"positions={self.config.positions!r} encode",
                actual=length,
            )
        is_learned = self.config.positions == "learned"
        table = self.position_embedding if is_learned else self.get_buffer("position_table")
        return x + table[:length].to(x.dtype)


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Sines and cosines `(length, width)`: `sin(p / 10000^(2 i / width))` at 2 i, the cosine at 2 i + 1.

    Source: Vaswani et al., 2017, section 3.5.
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(1e4) / width))
    table = torch.empty(length, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: width // 2])
    return table


def _check_features(
    config: AttentionConfig, query: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Key and value with their defaults filled in."""
    key = query if key is None else key
    value = key if value is None else value
    axes = Axes()
    axes.set("d_model", config.d_model, "the module")
    axes.bind("query", query, "batch query_length d_model")
    axes.bind("key", key, "batch key_length d_model")
    axes.bind("value", value, "batch key_length d_model")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dense(name, tensor)
        require_floating(name, tensor)
    return key, value


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(batch, length, d_model)` as `(batch, length, heads, d_k)`."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))


def _attend(
    module: nn.Module,
    config: AttentionConfig,
    heads: list[Tensor],
    mask: Tensor | None,
    bias: Tensor | None,
    return_weights: bool | str,
) -> AttentionResult:
    if mask is not None:
        require_mask("mask", mask)
    query, key, value = heads
    if config.causal and query.shape[1] != key.shape[1]:
        raise DimensionMismatchError(
            argument="causal",
            expected="as many queries as keys",
            actual=f"{query.shape[1]} queries and {key.shape[1]} keys",
            hint="for others build the module without causal, and call it with "
            "mask=Causal(align='bottom_right').to_dense(query_length, key_length)",
        )
    return attend(
        query,
        key,
        value,
        Causal() if config.causal else None,
        mask=_insert_heads(mask),
        bias=_insert_heads(bias),
        scale=config.scale,
        dropout=config.dropout if module.training else 0.0,
        return_weights=return_weights,
    )


def _insert_heads(tensor: Tensor | None) -> Tensor | None:
    """A mask or bias of rank 3, (batch, query_length, key_length) in modules, as rank 4."""
    return tensor[:, None] if isinstance(tensor, Tensor) and tensor.ndim == 3 else tensor
