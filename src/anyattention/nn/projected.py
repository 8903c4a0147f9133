"""What multi-head modules share: projections with positions and norms, and one call of `attend` over a pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import Axes, conversion_of, require_dense, require_floating, require_mask
from anyattention.bias import RelativeBias
from anyattention.config import AttentionConfig
from anyattention.errors import DimensionMismatchError, InvalidConfigError, InvalidInputError
from anyattention.nn.bare import initialise_projection
from anyattention.nn.base import (
    AttentionModule,
    plain_parameter,
    require_factory,
    require_finite,
    require_parameter_kind,
)
from anyattention.nn.key_value_cache import KeyValueCache
from anyattention.nn.matrices import require_unmapped, weights_at
from anyattention.nn.padding import insert_heads, places_in
from anyattention.nn.positions import alibi_bias, rotary_angles, rotated, sinusoidal_positions
from anyattention.ops import attend
from anyattention.output import AttentionOutput, AttentionResult
from anyattention.patterns import Causal, Documents, Full, Graph, Pattern, TopK
from anyattention.patterns.base import Align
from anyattention.patterns.growing import of_growing, reach_back

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ProjectedAttention",
    "alignment_of",
    "allowed_pairs",
    "at_the_end",
    "attend_heads",
    "call_of_heads",
    "check_features",
    "check_pattern",
    "past_pairs",
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
        d_model, key_width = settings.d_model, settings.d_k * settings.key_heads

        def projection(inputs: int | None, outputs: int) -> nn.Linear:
            width = d_model if inputs is None else inputs
            return nn.Linear(width, outputs, bias=settings.use_bias, device=device, dtype=dtype)

        if settings.positions == "learned":
            table = torch.empty(settings.max_seq_len, d_model, device=device, dtype=dtype)
            self.position_embedding = nn.Parameter(table)
        elif settings.positions == "sinusoidal":
            table = torch.empty(settings.max_seq_len, d_model, device=device, dtype=dtype)
            self.register_buffer("position_table", table, persistent=False)
            self.register_load_state_dict_post_hook(_follow_weights)
        self.query_projection = projection(None, d_model)
        self.key_projection = projection(settings.kdim, key_width)
        self.value_projection = projection(settings.vdim, key_width)
        self.output_projection = projection(None, d_model)
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
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        align: Align | None = None,
        first: int = 0,
        documents: Documents | None = None,
    ) -> list[Tensor]:
        """Query, key and value, checked, as `(batch, length, heads, d_k)`.

        With positions the last query stands at the last key where `align` is "bottom_right", else the first of both
        have position `first`. In each of several documents they begin anew.
        """
        settings = self._settings
        key, value = check_features(settings, query, key, value)
        for name, x in (("query", query), ("key", key), ("value", value)):
            require_parameter_kind(name, x, self)
        ahead = key.shape[1] - query.shape[1] if align == "bottom_right" else 0
        firsts = first + max(ahead, 0), first + max(-ahead, 0)
        placed_query = self._add_positions("query", query, firsts[0], documents)
        placed_key = placed_query if key is query else self._add_positions("key", key, firsts[1], documents)
        heads = [
            split_heads(projection(x), number)
            for projection, x, number in (
                (self.query_projection, placed_query, settings.num_heads),
                (self.key_projection, placed_key, settings.key_heads),
                (self.value_projection, value, settings.key_heads),
            )
        ]
        if settings.qk_norm:
            heads[0], heads[1] = self.query_norm(heads[0]), self.key_norm(heads[1])
        if settings.positions == "rope":
            places = [(place, x.shape[1]) for place, x in zip(firsts, heads, strict=False)]
            of_query = rotary_angles(*places[0], heads[0], settings.rope_theta)
            of_key = of_query if places[0] == places[1] else rotary_angles(*places[1], heads[1], settings.rope_theta)
            heads[0], heads[1] = rotated(heads[0], *of_query), rotated(heads[1], *of_key)
        return heads

    def _call(
        self,
        heads: list[Tensor],
        pattern: Pattern | TopK | None,
        mask: Tensor | None,
        bias: Tensor | RelativeBias | None,
        return_weights: bool | str,
    ) -> dict[str, Any]:
        """The arguments of `attend` for heads over a pattern's pairs."""
        call = call_of_heads(self, self._settings, heads, pattern, mask, bias, return_weights)
        if self._settings.positions == "alibi":
            pattern, bias = call["pattern"], call["bias"]
            call["bias"] = alibi_bias(self._settings.num_heads, pattern, bias, heads, alignment_of(pattern, bias))
        return call

    def _attend(self, call: dict[str, Any]) -> AttentionOutput:
        """Attention over the pattern's pairs, projected back."""
        result = attend_heads(call)
        output = self.output_projection(result.output.flatten(-2))
        if self._settings.check_finite:
            require_finite(self.name, output)
        return AttentionOutput(output, result.weights)

    def _add_positions(self, argument: str, x: Tensor, first: int, documents: Documents | None) -> Tensor:
        settings = self._settings
        if settings.positions not in ("sinusoidal", "learned"):
            return x
        length = first + (x.shape[1] if documents is None else max((0, *documents.lengths)))
        if length > settings.max_seq_len:
            raise DimensionMismatchError(
                argument=argument,
                expected=f"a length of at most max_seq_len={settings.max_seq_len}, which "
                f"positions={settings.positions!r} encode",
                actual=length,
            )
        is_learned = settings.positions == "learned"
        table = self.position_embedding if is_learned else self.get_buffer("position_table")
        rows = (
            table[first:length] if documents is None else table.index_select(0, places_in(documents, x.device) + first)
        )
        return x + rows.to(x.dtype)


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
    for name, x, width in (("key", key, config.kdim), ("value", value, config.vdim)):
        if width is None:
            axes.bind(name, x, "batch key_length d_model")
        else:
            axes.set(f"{name}_features", width, "the module")
            axes.bind(name, x, f"batch key_length {name}_features")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dense(name, tensor)
        require_floating(name, tensor)
    return key, value


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(batch, length, d_model)` as `(batch, length, heads, d_k)`."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))


def check_pattern(pattern: Pattern | TopK | None, causal: bool) -> None:
    """Raise unless a module can be built over a pattern: that of its pairs, which `causal` joins."""
    _require_pattern(pattern)
    if pattern is not None:
        _joined(pattern, causal)


def _require_pattern(pattern: object) -> None:
    if pattern is not None and not isinstance(pattern, Pattern | TopK):
        raise InvalidConfigError(
            argument="pattern",
            expected="a pattern (Causal, Window, Graph, ...), TopK or None",
            actual=type(pattern).__name__,
            hint=conversion_of(pattern),
        )


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


def past_pairs(pattern: Pattern | TopK | None, causal: bool, past: KeyValueCache) -> Pattern | TopK:
    """The pattern, joined by `causal`, for queries behind the tokens of a cache.

    Raises:
        InvalidConfigError: a query may see keys after it, or keys that the cache has dropped.
        UnsupportedError: the pattern belongs to a length.
    """
    if not isinstance(past, KeyValueCache):
        raise InvalidInputError(argument="past", expected="a KeyValueCache or None", actual=type(past).__name__)
    joined = of_growing(_joined(pattern, causal) or Full())
    reach = reach_back(joined)
    if past.window is not None and (reach is None or reach > past.window):
        raise InvalidConfigError(
            argument="past",
            expected=f"a cache that keeps what {joined} sees: "
            + ("KeyValueCache()" if reach is None else f"KeyValueCache(window={max(reach, 1)})"),
            actual=f"one of the last {past.window} tokens",
        )
    return joined


def at_the_end(bias: Tensor | RelativeBias | None) -> Tensor | RelativeBias | None:
    """A bias whose distances, where it has them, are those of a last query at the last key."""
    if not isinstance(bias, RelativeBias):
        return bias
    if bias.align == "top_left":
        raise InvalidConfigError(
            argument="bias.align",
            expected="None or 'bottom_right' with a cache: the last query stands at the last key",
            actual="'top_left'",
        )
    return replace(bias, align="bottom_right")


def alignment_of(pattern: Pattern | TopK | None, bias: Tensor | RelativeBias | None) -> Align | None:
    """Where a pattern, or a bias by distance, has the queries stand beside the keys; None where nothing says."""
    _require_pattern(pattern)
    among = pattern.among if isinstance(pattern, TopK) else pattern
    return (None if among is None else among.align) or (bias.align if isinstance(bias, RelativeBias) else None)


def call_of_heads(
    module: Any,
    settings: AttentionConfig,
    heads: list[Tensor],
    pattern: Pattern | TopK | None,
    mask: Tensor | None,
    bias: Tensor | RelativeBias | None,
    return_weights: bool | str,
) -> dict[str, Any]:
    """The arguments of `attend` by a module's settings; a mask or bias of rank 3 is (batch, queries, keys)."""
    if mask is not None:
        require_mask("mask", mask)
    query, key, value = heads
    if not isinstance(pattern, Graph):
        mask = None if mask is None else insert_heads(mask)
        bias = insert_heads(bias) if isinstance(bias, Tensor) else bias
    return {
        "query": query,
        "key": key,
        "value": value,
        "pattern": pattern.to(query.device) if isinstance(pattern, Graph) else pattern,
        "mask": mask,
        "bias": bias,
        "scale": settings.scale,
        "softcap": settings.softcap,
        "dropout": settings.dropout if module.training else 0.0,
        "return_weights": return_weights,
        "implementation": module.implementation,
    }


def attend_heads(call: dict[str, Any]) -> AttentionResult:
    """`attend`; the weights of a selection are a sparse tensor, since a module returns no `indices`."""
    result = attend(**call)
    if result.weights is None or result.indices is None:
        return result
    weights = _chosen_weights(result.weights, result.indices, call["key"].shape[1])
    return result._replace(weights=weights if call["return_weights"] == "heads" else _mean_of_heads(weights))


def _joined(pattern: Pattern | TopK | None, causal: bool) -> Pattern | TopK | None:
    if not causal:
        return pattern
    # At equal lengths, the only ones here, every alignment is the same.
    return Causal() if pattern is None or isinstance(pattern, Full | Causal) else pattern & Causal()


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
