"""Fluent builders: settings one by one, checked together when the module is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyattention.config import AttentionConfig, GraphAttentionConfig, SparseAttentionConfig
from anyattention.nn import GraphAttention, MultiHeadAttention, ScaledDotProductAttention, SparseAttention

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AttentionBuilder", "GraphAttentionBuilder", "SparseAttentionBuilder"]


class _Builder:
    """The settings that every builder has; each call returns the builder."""

    def __init__(self) -> None:
        self._base: dict[str, Any] = {}

    def d_model(self, width: int) -> Self:
        """Width of all heads together."""
        return self._set(d_model=width)

    def num_heads(self, count: int) -> Self:
        """Number of heads."""
        return self._set(num_heads=count)

    def dropout(self, probability: float) -> Self:
        """Probability with which a weight is dropped during training."""
        return self._set(dropout=probability)

    def use_bias(self, use: bool = True) -> Self:
        """Whether projections have a bias."""
        return self._set(use_bias=use)

    def scale(self, factor: float | None) -> Self:
        """Factor of the score; None is the mechanism's own."""
        return self._set(scale=factor)

    def check_finite(self, check: bool = True) -> Self:
        """Raise when an output holds NaN or Inf."""
        return self._set(check_finite=check)

    def _set(self, **settings: Any) -> Self:
        self._base.update(settings)
        return self


class _SequenceBuilder(_Builder):
    """The settings of attention over sequences."""

    def causal(self, causal: bool = True) -> Self:
        """A query attends to the past only."""
        return self._set(causal=causal)

    def max_seq_len(self, length: int) -> Self:
        """The longest sequence that positions encode."""
        return self._set(max_seq_len=length)

    def positions(self, kind: str) -> Self:
        """The positional encoding: "none", "sinusoidal" or "learned"."""
        return self._set(positions=kind)

    def qk_norm(self, normalize: bool = True) -> Self:
        """Normalise queries and keys by their root mean square."""
        return self._set(qk_norm=normalize)

    def eps(self, eps: float) -> Self:
        """Added inside the root mean square of query/key normalisation."""
        return self._set(eps=eps)


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
        return AttentionConfig(**self._base)

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
    """

    def __init__(self) -> None:
        super().__init__()
        self._graph: dict[str, Any] = {}

    def in_features(self, width: int | tuple[int, int]) -> Self:
        """Width of the node features, a pair (source, target) for bipartite graphs."""
        return self._set_graph(in_features=width)

    def score(self, score: str) -> Self:
        """The score: "additive", "dynamic" or "dot"."""
        return self._set_graph(score=score)

    def edge_dim(self, width: int) -> Self:
        """Width of the edge features; the module then needs them in every call."""
        return self._set_graph(edge_dim=width)

    def aggregation(self, aggregation: str) -> Self:
        """The aggregation: "sum", "mean" or "max" of the weighted values."""
        return self._set_graph(aggregation=aggregation)

    def normalize(self, normalize: bool = True) -> Self:
        """Softmax over a node's edges, or (False) a sigmoid of each."""
        return self._set_graph(normalize=normalize)

    def negative_slope(self, slope: float) -> Self:
        """Slope of the LeakyReLU."""
        return self._set_graph(negative_slope=slope)

    def concat(self, concat: bool = True) -> Self:
        """Output the heads side by side, or (False) their mean."""
        return self._set_graph(concat=concat)

    def residual(self, residual: bool = True) -> Self:
        """Add a linear map of the target's features."""
        return self._set_graph(residual=residual)

    def build_config(self) -> GraphAttentionConfig:
        """The settings, checked."""
        return GraphAttentionConfig(base=AttentionConfig(**self._base), **self._graph)

    def build(self) -> GraphAttention:
        """A GraphAttention of these settings."""
        return GraphAttention.from_config(self.build_config())

    def _set_graph(self, **settings: Any) -> Self:
        self._graph.update(settings)
        return self


class SparseAttentionBuilder(_SequenceBuilder):
    """Builds attention over part of a sequence's pairs.

    Raises (when building):
        InvalidConfigError: a setting is out of range, or the pattern cannot use it.

    Example:
        >>> module = SparseAttentionBuilder().d_model(64).num_heads(8).local_window(2).causal().build_sparse()
        >>> module.pattern, module.max_attended_positions
        (Intersection(first=Window(left=2, right=2, align=None), second=Causal(align=None)), 3)
    """

    def __init__(self) -> None:
        super().__init__()
        self._sparse: dict[str, Any] = {}

    def sparsity_pattern(self, pattern: str) -> Self:
        """Which pairs exist: "local", "strided", "fixed", "global", "block" or "top_k"."""
        return self._set_sparse(sparsity_pattern=pattern)

    def block_size(self, size: int) -> Self:
        """The stride of "strided", the block of "fixed" and "block"."""
        return self._set_sparse(block_size=size)

    def local_window(self, width: int) -> Self:
        """Keys on either side of "local" and "global", recent keys of "strided"."""
        return self._set_sparse(local_window=width)

    def num_global_tokens(self, count: int) -> Self:
        """Tokens of "global", or summary tokens per block of "fixed"."""
        return self._set_sparse(num_global_tokens=count)

    def top_k(self, count: int) -> Self:
        """Keys that each query of "top_k" keeps."""
        return self._set_sparse(top_k=count)

    def build_config(self) -> SparseAttentionConfig:
        """The settings, checked."""
        return SparseAttentionConfig(base=AttentionConfig(**self._base), **self._sparse)

    def build_sparse(self) -> SparseAttention:
        """A SparseAttention of these settings."""
        return SparseAttention.from_config(self.build_config())

    def _set_sparse(self, **settings: Any) -> Self:
        self._sparse.update(settings)
        return self
