"""Fluent builders: settings one by one, checked together when the module is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from anyattention.config import (
    Activation,
    Aggregation,
    AttentionConfig,
    AttentionOver,
    GraphAttentionConfig,
    GraphScore,
    GraphTransformerConfig,
    HeterogeneousGraphAttentionConfig,
    Positions,
    SoftmaxOver,
    SparseAttentionConfig,
    SparsityPattern,
)
from anyattention.nn import (
    GraphAttention,
    GraphTransformerLayer,
    HeterogeneousGraphAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    SparseAttention,
)
from anyattention.settings import config_of, meanings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AttentionBuilder", "GraphAttentionBuilder", "SparseAttentionBuilder"]

_Method = TypeVar("_Method", bound=Callable[..., Any])

_MEANINGS = {
    name: meaning
    for kind in (
        *(GraphTransformerConfig, HeterogeneousGraphAttentionConfig, AttentionConfig),
        *(GraphAttentionConfig, SparseAttentionConfig),
    )
    for name, meaning in meanings(kind).items()
}


def _setting(method: _Method) -> _Method:
    """Have a method keep its argument as the setting of its name; the config's field says what it means."""
    name, types = method.__name__, get_type_hints(method, localns={"Self": Any})
    expected = inspect.signature(method)
    shown = [item.replace(annotation=types.get(item.name, item.annotation)) for item in expected.parameters.values()]

    @wraps(method)
    def keep(*args: Any, **kwargs: Any) -> Any:
        bound = expected.bind(*args, **kwargs)
        bound.apply_defaults()
        builder, value = bound.args
        builder._settings[name] = value
        return builder

    vars(keep).update(__signature__=expected.replace(parameters=shown))
    keep.__doc__ = f"{_MEANINGS[name][0].upper()}{_MEANINGS[name][1:]}."
    return keep  # pyright: ignore[reportReturnType]  # called as the method is


class _Builder:
    """The settings that every builder has; each call returns the builder."""

    def __init__(self) -> None:
        self._settings: dict[str, Any] = {}

    @_setting
    def d_model(self, width: int) -> Self: ...

    @_setting
    def num_heads(self, count: int) -> Self: ...

    @_setting
    def dropout(self, probability: float) -> Self: ...

    @_setting
    def use_bias(self, use: bool = True) -> Self: ...

    @_setting
    def scale(self, factor: float | None) -> Self: ...

    @_setting
    def check_finite(self, check: bool = True) -> Self: ...


class _SequenceBuilder(_Builder):
    """The settings of attention over sequences."""

    @_setting
    def causal(self, causal: bool = True) -> Self: ...

    @_setting
    def max_seq_len(self, length: int) -> Self: ...

    @_setting
    def positions(self, kind: Positions) -> Self: ...

    @_setting
    def qk_norm(self, normalize: bool = True) -> Self: ...

    @_setting
    def eps(self, eps: float) -> Self: ...

    @_setting
    def num_kv_heads(self, count: int | None) -> Self: ...

    @_setting
    def kdim(self, width: int | None) -> Self: ...

    @_setting
    def vdim(self, width: int | None) -> Self: ...

    @_setting
    def softcap(self, cap: float | None) -> Self: ...

    @_setting
    def rope_theta(self, theta: float) -> Self: ...


class AttentionBuilder(_SequenceBuilder):
    """Builds dense attention modules.

    Raises (when building):
        InvalidConfigError: a setting is out of range, or the module cannot use it.

    Example:
        >>> AttentionBuilder().d_model(512).num_heads(8).dropout(0.1).causal(True).build_multi_head()
        MultiHeadAttention(
          512, 8
          (query_projection): Linear(in_features=512, out_features=512, bias=True)
          (key_projection): Linear(in_features=512, out_features=512, bias=True)
          (value_projection): Linear(in_features=512, out_features=512, bias=True)
          (output_projection): Linear(in_features=512, out_features=512, bias=True)
        )
    """

    def build_config(self) -> AttentionConfig:
        """The settings, checked."""
        return AttentionConfig(**self._settings)

    def build_multi_head(self) -> MultiHeadAttention:
        """A MultiHeadAttention of these settings."""
        return MultiHeadAttention.from_config(self.build_config())

    def build_scaled_dot_product(self) -> ScaledDotProductAttention:
        """A ScaledDotProductAttention of these settings."""
        return ScaledDotProductAttention.from_config(self.build_config())


class GraphAttentionBuilder(_Builder):
    """Builds graph attention modules.

    Raises (when building):
        InvalidConfigError: a setting is out of range, or the module cannot use it.

    Example:
        >>> builder = GraphAttentionBuilder().d_model(64).num_heads(8).in_features(7).score("additive")
        >>> builder.build().value_projection
        Linear(in_features=7, out_features=64, bias=False)
        >>> types = GraphAttentionBuilder().in_features({"author": 7, "paper": 11}).relations(
        ...     [("author", "writes", "paper")]
        ... )
        >>> GraphAttentionBuilder().d_model(64).attention("all").build_transformer_layer().config.attention
        'all'
        >>> types.d_model(64).num_heads(8).build_heterogeneous().supports_heterogeneous
        True
    """

    @_setting
    def in_features(self, width: int | tuple[int, int] | Mapping[str, int]) -> Self: ...

    @_setting
    def relations(self, relations: Sequence[tuple[str, str, str]]) -> Self: ...

    @_setting
    def softmax_over(self, edges: SoftmaxOver) -> Self: ...

    @_setting
    def score(self, score: GraphScore) -> Self: ...

    @_setting
    def edge_dim(self, width: int | Mapping[tuple[str, str, str], int]) -> Self: ...

    @_setting
    def aggregation(self, aggregation: Aggregation) -> Self: ...

    @_setting
    def normalize(self, normalize: bool = True) -> Self: ...

    @_setting
    def negative_slope(self, slope: float) -> Self: ...

    @_setting
    def concat(self, concat: bool = True) -> Self: ...

    @_setting
    def residual(self, residual: bool = True) -> Self: ...

    @_setting
    def attention(self, over: AttentionOver) -> Self: ...

    @_setting
    def max_distance(self, distance: int) -> Self: ...

    @_setting
    def hidden_features(self, width: int) -> Self: ...

    @_setting
    def activation(self, activation: Activation) -> Self: ...

    @_setting
    def feature_dropout(self, probability: float) -> Self: ...

    def build_config(self) -> GraphAttentionConfig:
        """The settings, checked."""
        return config_of(GraphAttentionConfig, self._settings)

    def build(self) -> GraphAttention:
        """A GraphAttention of these settings."""
        return GraphAttention.from_config(self.build_config())

    def build_heterogeneous_config(self) -> HeterogeneousGraphAttentionConfig:
        """The settings over several types, checked; in_features is then a dictionary."""
        return config_of(HeterogeneousGraphAttentionConfig, self._settings)

    def build_heterogeneous(self) -> HeterogeneousGraphAttention:
        """A HeterogeneousGraphAttention of these settings."""
        return HeterogeneousGraphAttention.from_config(self.build_heterogeneous_config())

    def build_transformer_config(self) -> GraphTransformerConfig:
        """The settings of a layer of a graph transformer, checked."""
        return config_of(GraphTransformerConfig, self._settings)

    def build_transformer_layer(self) -> GraphTransformerLayer:
        """A GraphTransformerLayer of these settings."""
        return GraphTransformerLayer.from_config(self.build_transformer_config())


class SparseAttentionBuilder(_SequenceBuilder):
    """Builds attention over part of a sequence's pairs.

    Raises (when building):
        InvalidConfigError: a setting is out of range, or the pattern cannot use it.

    Example:
        >>> module = SparseAttentionBuilder().d_model(64).num_heads(8).local_window(2).causal().build_sparse()
        >>> module.pattern, module.max_attended_positions
        (Intersection(first=Window(left=2, right=2, align=None), second=Causal(align=None)), 3)
    """

    @_setting
    def sparsity_pattern(self, pattern: SparsityPattern) -> Self: ...

    @_setting
    def block_size(self, size: int) -> Self: ...

    @_setting
    def local_window(self, width: int) -> Self: ...

    @_setting
    def num_global_tokens(self, count: int) -> Self: ...

    @_setting
    def top_k(self, count: int) -> Self: ...

    def build_config(self) -> SparseAttentionConfig:
        """The settings, checked."""
        return config_of(SparseAttentionConfig, self._settings)

    def build_sparse(self) -> SparseAttention:
        """A SparseAttention of these settings."""
        return SparseAttention.from_config(self.build_config())
