"""Settings of a layer of a graph transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from anyattention.config.attention import AttentionConfig, GraphBase
from anyattention.config.graph import GraphScore
from anyattention.settings import Config, Within, documented, require_defaults, require_usable

__all__ = ["Activation", "AttentionOver", "GraphTransformerConfig"]

AttentionOver = Literal["graph", "all", "expander", "graph + all"]
Activation = Literal["gelu", "relu"]


@documented
@dataclass(frozen=True)
class GraphTransformerConfig(Config):
    """Settings of `nn.GraphTransformerLayer`.

    Args: the fields.

    Raises:
        InvalidConfigError: a value is out of range, or is set and cannot be used.

    Example:
        >>> GraphTransformerConfig(AttentionConfig(64, 4), attention="graph + all").get_hidden_features()
        128
    """

    base: Annotated[
        AttentionConfig,
        "the settings of attention; those that `nn.GraphAttention` does not take must keep their defaults",
    ] = field(default_factory=AttentionConfig)
    attention: Annotated[
        AttentionOver,
        '"graph" (over the edges), "all" (over all nodes of the same graph), "expander" (over the edges of an '
        'ExpanderGraph) or "graph + all" (the sum of both)',
    ] = "graph"
    score: Annotated[
        GraphScore,
        'of the attention over edges: "dot", "additive" (GAT) or "dynamic" (GATv2); "all" has the dot product',
    ] = "dot"
    edge_dim: Annotated[int | None, 'width of the edge features, None where there are none; not for "all"'] = None
    max_distance: Annotated[
        int | None,
        "the largest hop distance that has a learned bias of its own in the attention over all nodes; None is no bias",
    ] = None
    hidden_features: Annotated[int | None, "width inside the feed-forward part; None is 2 x d_model"] = None
    activation: Annotated[Activation, '"gelu" or "relu", inside the feed-forward part'] = "gelu"
    feature_dropout: Annotated[
        float,
        Within(at_least=0.0, below=1.0),
        "probability in [0, 1) with which a number is dropped during training, of what the attention and the "
        "feed-forward part add, and inside the latter",
    ] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_usable(self.base, GraphBase)
        if not self.has_edges:
            require_defaults(self, ("score", "edge_dim"), f"attention={self.attention!r} goes over no edges")
        if not self.has_all:
            require_defaults(self, ("max_distance",), f"attention={self.attention!r} does not go over all nodes")

    @property
    def has_edges(self) -> bool:
        """Whether there is attention over edges."""
        return self.attention != "all"

    @property
    def has_all(self) -> bool:
        """Whether there is attention over all nodes."""
        return self.attention in ("all", "graph + all")

    def get_edge_columns(self) -> int | None:
        """`edge_dim`, and for "expander" three more: one for each kind of edges that it adds."""
        return (self.edge_dim or 0) + 3 if self.attention == "expander" else self.edge_dim

    def get_hidden_features(self) -> int:
        """`hidden_features`, or 2 x d_model."""
        return 2 * self.base.d_model if self.hidden_features is None else self.hidden_features
