"""What multi-head modules share: projections with positions and norms, and one call of `attend` over a pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anyattention._checks import Axes, conversion_of, require_dense, require_floating, require_mask
from anyattention.bias import RelativeBias
from anyattention.config import AttentionConfig
from anyattention.errors import DimensionMismatchError, InvalidConfigError
from anyattention.nn.bare import initialise_projection
from anyattention.nn.base import (
    AttentionModule,
    plain_parameter,
    require_factory,
    require_finite,
    require_parameter_kind,
)
from anyattention.nn.matrices import require_unmapped, weights_at
from anyattention.ops import attend
from anyattention.output import AttentionOutput, AttentionResult
from anyattention.patterns import Causal, Full, Graph, Pattern, TopK
from anyattention.patterns.base import Align

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ProjectedAttention",
    "alignment_of",
    "allowed_pairs",
    "attend_heads",
    "check_features",
    "check_pattern",
    "split_heads",
]


class ProjectedAttention(AttentionModule):
    """Projections of query, key and value, attention in each head, and a projection back; abstract.

    Parameters, in the order of `get_parameters()`: position_embedding `(max_seq_len, d_model)` (positions="learned"),
    query_projection, key_projection, value_projection, output_projection (weight `(d_model, d_model)`, then bias),
    query_norm, key_norm `(d_k,)` (qk_norm=True).
    """

    def __init__(self, settings: AttentionConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._settings = settings
        require_factory(device, dtype)
        d_model = settings.d_model

        def projection() -> nn.Linear:
            return nn.Linear(d_model, d_model, bias=settings.use_bias, device=device, dtype=dtype)

        if settings.positions == "learned":
            table = torch.empty(settings.max_seq_len, d_model, device=device, dtype=dtype)
            self.position_embedding = nn.Parameter(table)
        elif settings.positions == "sinusoidal":
            table = torch.empty(settings.max_seq_len, d_model, device=device, dtype=dtype)
            self.register_buffer("position_table", table, persistent=False)
            self.register_load_state_dict_post_hook(_follow_weights)
        self.query_projection = projection()
        self.key_projection = projection()
        self.value_projection = projection()
        self.output_projection = projection()
        if settings.qk_norm:
            self.query_norm = nn.RMSNorm(settings.d_k, eps=settings.eps, device=device, dtype=dtype)
            self.key_norm = nn.RMSNorm(settings.d_k, eps=settings.eps, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def d_model(self) -> int:
        """Width of all heads together."""
        return self._settings.d_model

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier-uniform projections, biases 0, gains 1, learned positions normal(0, 0.02).

        Sinusoidal positions are computed anew. Projections that were replaced, or whose weights are made of others,
        are left as they are.
        """
        for module in self.children():
            initialise_projection(module)
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        if self._settings.positions == "learned":
            nn.init.normal_(self.position_embedding, std=0.02)
        elif self._settings.positions == "sinusoidal":
            self._fill_position_table(self.get_buffer("position_table"))

    def _fill_position_table(self, like: Tensor) -> None:
        """Compute the sinusoidal positions, which no state_dict has, on a tensor's device and in its dtype."""
        if not like.is_meta:
            table = sinusoidal_positions(self._settings.max_seq_len, self.d_model)
            self.position_table = table.to(like.device, like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What every change of device or dtype calls, `to_empty` too, after which a table would hold anything."""
        before = self._buffers.get("position_table")
        super()._apply(fn, recurse)
        table = self._buffers.get("position_table")
        if table is not None and table is not before:
            self._fill_position_table(table)
        return self

    def _project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, align: Align | None = None
    ) -> list[Tensor]:
        """Query, key and value, checked, as `(batch, length, heads, d_k)`.

        With positions the last query stands at the last key where `align` is "bottom_right", else the first of both
        have position 0.
        """
        settings = self._settings
        key, value = check_features(settings, query, key, value)
        for name, x in (("query", query), ("key", key), ("value", value)):
            require_parameter_kind(name, x, self)
        ahead = key.shape[1] - query.shape[1] if align == "bottom_right" else 0
        placed_query = self._add_positions("query", query, max(ahead, 0))
        placed_key = placed_query if key is query else self._add_positions("key", key, max(-ahead, 0))
        heads = [
            split_heads(projection(x), settings.num_heads)
            for projection, x in (
                (self.query_projection, placed_query),
                (self.key_projection, placed_key),
                (self.value_projection, value),
            )
        ]
        if settings.qk_norm:
            heads[0], heads[1] = self.query_norm(heads[0]), self.key_norm(heads[1])
        return heads

    def _attend(
        self,
        heads: list[Tensor],
        pattern: Pattern | TopK | None,
        mask: Tensor | None,
        bias: Tensor | RelativeBias | None,
        return_weights: bool | str,
    ) -> AttentionOutput:
        """Attention over the pattern's pairs, projected back."""
        result = attend_heads(self, self._settings, heads, pattern, mask, bias, return_weights)
        output = self.output_projection(result.output.flatten(-2))
        if self._settings.check_finite:
            require_finite(self.name, output)
        return AttentionOutput(output, result.weights)

    def _add_positions(self, argument: str, x: Tensor, first: int) -> Tensor:
        settings = self._settings
        if settings.positions == "none":
            return x
        length = first + x.shape[1]
        if length > settings.max_seq_len:
            raise DimensionMismatchError(
                argument=argument,
                expected=f"a length of at most max_seq_len={settings.max_seq_len}, which "
                f"positions={settings.positions!r} encode",
                actual=length,
            )
        is_learned = settings.positions == "learned"
        table = self.position_embedding if is_learned else self.get_buffer("position_table")
        return x + table[first:length].to(x.dtype)


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Sines and cosines `(length, width)`, float64: `sin(p / 10000^(2 i / width))` at 2 i, the cosine at 2 i + 1.

    Source: Vaswani et al., 2017, section 3.5.
    """
    # On the CPU, whatever device new tensors go to.
    position = torch.arange(length, dtype=torch.float64, device="cpu")[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") * (-math.log(1e4) / width))
    table = torch.empty(length, width, dtype=torch.float64, device="cpu")
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: width // 2])
    return table


def _follow_weights(module: ProjectedAttention, _: object) -> None:
    """After `load_state_dict`: where weights have replaced those of a module without memory, the table goes there."""
    table, weight = module._buffers.get("position_table"), plain_parameter(module)
    if table is not None and weight is not None and (table.device, table.dtype) != (weight.device, weight.dtype):
        module._fill_position_table(weight)


def check_features(
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


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(batch, length, d_model)` as `(batch, length, heads, d_k)`."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))


def check_pattern(pattern: Pattern | TopK | None, causal: bool) -> None:
    """Raise unless a module can be built over a pattern: that of its pairs, which `causal` joins."""
    if pattern is None:
        return
    if not isinstance(pattern, Pattern | TopK):
        raise InvalidConfigError(
            argument="pattern",
            expected="a pattern (Causal, Window, Graph, ...), TopK or None",
            actual=type(pattern).__name__,
            hint=conversion_of(pattern),
        )
    _joined(pattern, causal)


def allowed_pairs(pattern: Pattern | TopK | None, causal: bool, heads: list[Tensor]) -> Pattern | TopK | None:
    """The pattern, joined by `causal`, for a call with these heads.

    Raises:
        DimensionMismatchError: causal, and the lengths differ.
    """
    num_queries, num_keys = heads[0].shape[1], heads[1].shape[1]
    if causal and num_queries != num_keys:
        raise DimensionMismatchError(
            argument="causal",
            expected="as many queries as keys",
            actual=f"{num_queries} queries and {num_keys} keys",
            hint="for others build the module without causal, and with pattern=Causal(align='bottom_right')",
        )
    return _joined(pattern, causal)


def alignment_of(pattern: Pattern | TopK | None, bias: Tensor | RelativeBias | None) -> Align | None:
    """Where a pattern, or a bias by distance, has the queries stand beside the keys; None where nothing says."""
    among = pattern.among if isinstance(pattern, TopK) else pattern
    return (None if among is None else among.align) or (bias.align if isinstance(bias, RelativeBias) else None)


def attend_heads(
    module: nn.Module,
    settings: AttentionConfig,
    heads: list[Tensor],
    pattern: Pattern | TopK | None,
    mask: Tensor | None,
    bias: Tensor | RelativeBias | None,
    return_weights: bool | str,
) -> AttentionResult:
    """`attend` with a module's settings; a mask or bias of rank 3 is (batch, query_length, key_length).

    The weights of a selection are a sparse tensor, since a module returns no `indices`.
    """
    if mask is not None:
        require_mask("mask", mask)
    query, key, value = heads
    if isinstance(pattern, Graph):
        pattern = pattern.to(query.device)
    else:
        mask = None if mask is None else _insert_heads(mask)
        bias = _insert_heads(bias) if isinstance(bias, Tensor) else bias
    result = attend(
        query,
        key,
        value,
        pattern,
        mask=mask,
        bias=bias,
        scale=settings.scale,
        dropout=settings.dropout if module.training else 0.0,
        return_weights=return_weights,
    )
    if result.weights is None or result.indices is None:
        return result
    weights = _chosen_weights(result.weights, result.indices, key.shape[1])
    return result._replace(weights=weights if return_weights == "heads" else _mean_of_heads(weights))


def _joined(pattern: Pattern | TopK | None, causal: bool) -> Pattern | TopK | None:
    if not causal:
        return pattern
    # At equal lengths, the only ones here, every alignment is the same.
    return Causal() if pattern is None or isinstance(pattern, Full | Causal) else pattern & Causal()


def _insert_heads(tensor: Tensor) -> Tensor:
    """A mask or bias of rank 3, (batch, query_length, key_length) in modules, as rank 4."""
    return tensor[:, None] if tensor.ndim == 3 else tensor


def _chosen_weights(weights: Tensor, indices: Tensor, num_keys: int) -> Tensor:
    """The weights `(batch, queries, heads, k)` of chosen keys as a sparse tensor `(batch, heads, queries, keys)`."""
    require_unmapped(weights)
    weights, indices = weights.transpose(1, 2), indices.transpose(1, 2)
    is_used = indices >= 0
    batch, head, query, _ = is_used.nonzero(as_tuple=True)
    places = torch.stack([batch, head, query, indices[is_used]])
    return weights_at(places, weights[is_used], (*weights.shape[:3], num_keys))


def _mean_of_heads(weights: Tensor) -> Tensor:
    """The mean `(batch, queries, keys)` of sparse weights, over the pairs that any head has."""
    places, values = weights.indices()[[0, 2, 3]], weights.values()
    batch, heads, *lengths = weights.shape
    sums = values.to(torch.promote_types(values.dtype, torch.float32)) / heads
    return weights_at(places, sums, (batch, *lengths)).to(values.dtype)
