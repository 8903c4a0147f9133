"""Settings of graph attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from anyattention.config.attention import AttentionConfig, GraphBase
from anyattention.errors import InvalidConfigError
from anyattention.settings import Config, documented, require_count, require_defaults, require_usable

__all__ = ["Aggregation", "GraphAttentionConfig", "GraphScore"]

GraphScore = Literal["additive", "dynamic", "dot"]
Aggregation = Literal["sum", "mean", "max"]


@documented
@dataclass(frozen=True)
class GraphAttentionConfig(Config):
    """Settings of `nn.GraphAttention`.

    Args: the fields.

    Raises:
        InvalidConfigError: a value is out of range, or is set and cannot be used.

    Example:
        >>> GraphAttentionConfig(AttentionConfig(64, 4), edge_dim=3).use_edge_features
        True
    """

    base: Annotated[
        AttentionConfig,
        "the settings of attention; those that `nn.GraphAttention` does not take must keep their defaults",
    ] = field(default_factory=AttentionConfig)
    use_edge_features: Annotated[
        bool | None, "whether calls bring edge features; None means: when edge_dim is given"
    ] = None
    edge_dim: Annotated[int | None, "width of the edge features; given alone it is enough"] = None
    aggregation: Annotated[Aggregation, '"sum", "mean" or "max" of the weighted values'] = "sum"
    normalize: Annotated[bool, "softmax over a node's edges; False gates each edge by itself with a sigmoid"] = True
    negative_slope: Annotated[float, 'slope of the LeakyReLU in the additive and dynamic scores; not for "dot"'] = 0.2
    score: Annotated[GraphScore, '"additive" (GAT), "dynamic" (GATv2) or "dot" (graph transformer)'] = "dynamic"
    in_features: Annotated[
        int | tuple[int, int] | None,
        "width of the node features, a pair (source, target) for bipartite graphs; None is d_model",
    ] = None
    concat: Annotated[bool, "output the heads side by side (width d_model) or their mean (width d_k)"] = True
    residual: Annotated[bool, "add a linear map of the target's features to the output"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_usable(self.base, GraphBase)
        if self.use_edge_features is None:
            object.__setattr__(self, "use_edge_features", self.edge_dim is not None)
        if self.use_edge_features != (self.edge_dim is not None):
            raise InvalidConfigError(
                argument="edge_dim",
                expected="a width" if self.use_edge_features else "None",
                actual=self.edge_dim,
                hint=f"use_edge_features is {self.use_edge_features}",
            )
        if self.score == "dot":
            require_defaults(self, ("negative_slope",), "the dot product has no LeakyReLU")
        if isinstance(self.in_features, list | tuple):
            if len(self.in_features) != 2:
                raise InvalidConfigError(
                    argument="in_features",
                    expected="an int, a pair (source, target) or None",
                    actual=self.in_features,
                )
            object.__setattr__(self, "in_features", tuple(self.in_features))
            for width in self.in_features:
                require_count("in_features", width)
        elif self.in_features is not None:
            require_count("in_features", self.in_features)

    @property
    def source_features(self) -> int:
        """Width of the source's (key's) features."""
        widths = self.in_features
        return widths[0] if isinstance(widths, tuple) else widths or self.base.d_model

    @property
    def target_features(self) -> int:
        """Width of the target's (query's) features."""
        widths = self.in_features
        return widths[1] if isinstance(widths, tuple) else widths or self.base.d_model

    def get_scale(self) -> float:
        """`base.scale`; where that is None, 1 / sqrt(d_k) for "dot" and 1 for the other scores."""
        is_default = self.base.scale is None and self.score != "dot"
        return 1.0 if is_default else self.base.get_scale()
