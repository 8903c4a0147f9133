"""A two-layer graph attention network that classifies nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattention._checks import keep_all_plain, require_number
from anyattention.config import AttentionConfig, Config, GraphAttentionConfig
from anyattention.errors import InvalidConfigError, InvalidInputError
from anyattention.nn import GraphAttention
from anyattention.nn.feature_rows import first_rows, sparse_csr
from anyattention.output import AttentionOutput
from anyattention.patterns import Graph, SampledGraph, SampledHeterogeneousGraph
from anyattention.training.columns import deviates

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NodeClassifier", "NodeClassifierConfig"]


@dataclass(frozen=True)
class NodeClassifierConfig(Config):
    """Settings of `NodeClassifier`.

    Args:
        in_features: width of the node features.
        num_classes: number of classes, at least 2.
        score: "additive" (GAT), "dynamic" (GATv2) or "dot" (graph transformer).
        hidden: width of the hidden layer, all heads together; heads divides it.
        heads: heads of the first layer, side by side.
        output_heads: heads of the second layer, averaged.
        dropout: probability with which an input of either layer is dropped during training.
        attention_dropout: probability with which an attention weight is dropped; None is `dropout`.
        residual: each layer adds a linear map of its own node's features.
        layer_norm: normalise the hidden layer.
        equal_weights: attention off, for comparison: a node weighs all of its neighbours alike.
        edge_dim: width of the edge features that each call brings; None is without.
        standardise: subtract `feature_mean` from the features and divide by `feature_deviation`; `fit` sets this as the
            data asks for it.

    Raises:
        InvalidConfigError: a value is out of range.

    Example:
        >>> NodeClassifierConfig(in_features=5, num_classes=3).layer_configs()[0].base.d_model
        64
    """

    in_features: int
    num_classes: int
    score: Literal["additive", "dynamic", "dot"] = "additive"
    hidden: int = 64
    heads: int = 8
    output_heads: int = 1
    dropout: float = 0.6
    attention_dropout: float | None = None
    residual: bool = False
    layer_norm: bool = False
    equal_weights: bool = False
    edge_dim: int | None = None
    standardise: bool = False

    def __post_init__(self) -> None:
        keep_all_plain(self)
        for name in ("num_classes", "hidden", "heads", "output_heads"):
            value = getattr(self, name)
            at_least = 2 if name == "num_classes" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
                raise InvalidConfigError(argument=name, expected=f"an int of at least {at_least}", actual=repr(value))
        if self.hidden % self.heads:
            raise InvalidConfigError(argument="heads", expected=f"a divisor of hidden={self.hidden}", actual=self.heads)
        require_number("dropout", self.dropout, at_least=0.0, below=1.0, error=InvalidConfigError)
        if self.attention_dropout is not None:
            require_number(
                "attention_dropout", self.attention_dropout, at_least=0.0, below=1.0, error=InvalidConfigError
            )
        for name in ("residual", "layer_norm", "equal_weights", "standardise"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidConfigError(argument=name, expected="True or False", actual=repr(getattr(self, name)))
        self.layer_configs()

    def layer_configs(self) -> tuple[GraphAttentionConfig, GraphAttentionConfig]:
        """The settings of the two attention layers."""
        dropout = self.dropout if self.attention_dropout is None else self.attention_dropout
        # Scores times the least normal number are so small that the softmax is exactly that of zeros.
        scale = torch.finfo(torch.float32).tiny if self.equal_weights else None

        def layer(in_features: int, d_model: int, heads: int, *, concat: bool) -> GraphAttentionConfig:
            return GraphAttentionConfig(
                base=AttentionConfig(d_model=d_model, num_heads=heads, dropout=dropout, scale=scale),
                in_features=in_features,
                score=self.score,
                edge_dim=self.edge_dim,
                concat=concat,
                residual=self.residual,
            )

        return (
            layer(self.in_features, self.hidden, self.heads, concat=True),
            layer(self.hidden, self.num_classes * self.output_heads, self.output_heads, concat=False),
        )


class NodeClassifier(nn.Module):
    """Scores of each class for each node, from the node's neighbours and their neighbours.

        hidden = ELU(LayerNorm?(GraphAttention(dropout(x))))
        logits = GraphAttention(dropout(hidden)), the mean over its heads

    With standardise x is `(x - feature_mean) / feature_deviation` here. Both are buffers `(in_features,)`, saved with
    the weights, and 0 and 1 until `measure_features` sets them.

    Args:
        in_features, num_classes, and the rest by keyword: the fields of `NodeClassifierConfig`.

    Raises:
        InvalidConfigError: a setting is out of range.

    Source: Velickovic et al., 2018, section 3.3 (the network on citation graphs); residual and layer norm as in
    Platonov et al., 2023.

    Example:
        >>> classifier = NodeClassifier(5, 3, hidden=8, heads=2)
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), num_nodes=2)
        >>> classifier(torch.zeros(2, 5), graph).output.shape
        torch.Size([2, 3])
    """

    feature_mean: Tensor
    feature_deviation: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        score: Literal["additive", "dynamic", "dot"] = "additive",
        hidden: int = 64,
        heads: int = 8,
        output_heads: int = 1,
        dropout: float = 0.6,
        attention_dropout: float | None = None,
        residual: bool = False,
        layer_norm: bool = False,
        equal_weights: bool = False,
        edge_dim: int | None = None,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.config = NodeClassifierConfig(
            in_features=in_features,
            num_classes=num_classes,
            score=score,
            hidden=hidden,
            heads=heads,
            output_heads=output_heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            residual=residual,
            layer_norm=layer_norm,
            equal_weights=equal_weights,
            edge_dim=edge_dim,
            standardise=standardise,
        )
        first, second = self.config.layer_configs()
        self.first_layer = GraphAttention.from_config(first)
        self.norm = nn.LayerNorm(hidden) if layer_norm else None
        self.second_layer = GraphAttention.from_config(second)
        if standardise:
            like = next(self.parameters())
            self.register_buffer("feature_mean", like.new_zeros(in_features))
            self.register_buffer("feature_deviation", like.new_ones(in_features))

    @classmethod
    def from_config(cls, config: NodeClassifierConfig) -> Self:
        """The network of a config."""
        return cls(**vars(config))

    def forward(
        self,
        x: Tensor,
        graph: Graph | SampledGraph,
        edge_features: Tensor | None = None,
        *,
        return_weights: bool | str = False,
    ) -> AttentionOutput:
        """Class scores of all nodes, or of a sample's seeds.

        Args:
            x: `(nodes, in_features)`, dense or (without standardise) sparse CSR; of a sample's nodes.
            graph: over the nodes; self-loops are not added here. Or a sample of two hops, one for each layer: only the
                seeds get scores, which are those of the whole graph where all of its edges were drawn.
            edge_features: `(edges, edge_dim)`, in the graph's order, or of a sample's `edges[0]`, exactly when there
                is an edge_dim; both layers see them.
            return_weights: "mean" over heads (or True) or "heads": the second layer's attention weights.

        Returns:
            AttentionOutput(logits `(nodes, num_classes)`, weights `(edges,)` or `(edges, heads)` or None).

        Raises: as `nn.GraphAttention`; InvalidInputError for a sample of another number of hops.
        """
        if self.config.standardise:
            x = (x - self.feature_mean) / self.feature_deviation
        if not isinstance(graph, SampledGraph):
            hidden = self.first_layer(self._drop(x), graph, edge_features).output
            return self.second_layer(self._activated(hidden), graph, edge_features, return_weights=return_weights)
        require_two_hops(graph)
        outer, inner = graph.blocks
        hidden = self.first_layer(_ends(self._drop(x), outer), outer, edge_features).output
        # The edges of the inner block are the first of the outer one's.
        inner_features = None if edge_features is None else edge_features[: inner.num_edges]
        ends = _ends(self._activated(hidden), inner)
        return self.second_layer(ends, inner, inner_features, return_weights=return_weights)

    def measure_features(self, x: Tensor) -> None:
        """Keep mean and deviation of the columns of x `(nodes, in_features)`, by which forward standardises."""
        mean, deviation = mean_and_deviation(x)
        self.feature_mean.copy_(mean)
        self.feature_deviation.copy_(deviation)

    def _activated(self, hidden: Tensor) -> Tensor:
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self._drop(F.elu(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.config.dropout == 0:
            return x
        if x.layout == torch.strided:
            return F.dropout(x, self.config.dropout)
        # Zeros that are not stored stay zero whether dropped or not.
        values = F.dropout(x.values(), self.config.dropout)
        return sparse_csr(x.crow_indices(), x.col_indices(), values, (x.shape[0], x.shape[1]))


def require_two_hops(sampled: SampledGraph | SampledHeterogeneousGraph) -> None:
    """Raise InvalidInputError unless a sample has a block for each of two layers."""
    if len(sampled.blocks) != 2:
        raise InvalidInputError(
            argument="graph", expected="a sample of two hops, one for each layer", actual=f"{len(sampled.blocks)}"
        )


def _ends(x: Tensor, block: Graph) -> tuple[Tensor, Tensor]:
    """The features of a block's keys, and of its queries, which are the first of them."""
    return x, first_rows(x, block.num_queries)


def mean_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns of x `(nodes, in_features)`.

    A constant column's deviation is infinite, so that whatever it is in other data it becomes 0: its weights learnt
    nothing.
    """
    if not len(x):
        return x.new_zeros(x.shape[1]), x.new_full((x.shape[1],), torch.inf)
    # In float32 the squares of large features would overflow.
    wide = x.double()
    deviation, mean = torch.std_mean(wide, 0, correction=0)
    least, most = wide.aminmax(dim=0)
    deviation = deviation.where(deviates(deviation, torch.maximum(-least, most)), torch.inf)
    return mean.to(x.dtype), deviation.to(x.dtype)
