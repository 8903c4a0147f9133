"""A two-layer attention network over nodes and edges of several types that classifies the nodes of one type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from anyattention._checks import Relation, keep_all_plain, require_number
from anyattention.config import AttentionConfig, Config, HeterogeneousGraphAttentionConfig
from anyattention.errors import InvalidConfigError
from anyattention.nn import HeterogeneousGraphAttention
from anyattention.nn.bare import is_bare
from anyattention.nn.feature_rows import first_rows
from anyattention.ops.linear_maps import linear_maps
from anyattention.patterns import HeterogeneousGraph, SampledHeterogeneousGraph
from anyattention.training.model import require_two_hops

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HeterogeneousNodeClassifier", "HeterogeneousNodeClassifierConfig"]


@dataclass(frozen=True)
class HeterogeneousNodeClassifierConfig(Config):
    """Settings of `HeterogeneousNodeClassifier`.

    Args:
        in_features: width of the features of each type of nodes, a dictionary; kept as pairs.
        relations: (type of sources, name, type of targets) of each kind of edges.
        target: the type of the nodes that are classified; a relation ends in it.
        num_classes: number of classes, at least 2.
        score: "dot" (HGT), "additive" (HAN) or "dynamic" (GATv2).
        hidden: width of the hidden layers, all heads together; heads divides it.
        heads: heads of both layers, side by side.
        dropout: probability with which hidden features and attention weights are dropped during training.
        edge_dim: width of the edge features, a dictionary by relation; kept as one for each relation.

    Raises:
        InvalidConfigError: a value is out of range, or two do not fit.

    Example:
        >>> relations = [("author", "writes", "paper")]
        >>> HeterogeneousNodeClassifierConfig({"author": 3, "paper": 5}, relations, "paper", 2).in_features
        (('author', 3), ('paper', 5))
    """

    in_features: Mapping[str, int] | tuple[tuple[str, int], ...]
    relations: tuple[Relation, ...] | Any
    target: str
    num_classes: int
    score: Literal["additive", "dynamic", "dot"] = "dot"
    hidden: int = 64
    heads: int = 4
    dropout: float = 0.5
    edge_dim: Mapping[Relation, int] | tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        keep_all_plain(self)
        for name, at_least in (("num_classes", 2), ("hidden", 1), ("heads", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
                raise InvalidConfigError(argument=name, expected=f"an int of at least {at_least}", actual=repr(value))
        if self.hidden % self.heads:
            raise InvalidConfigError(argument="heads", expected=f"a divisor of hidden={self.hidden}", actual=self.heads)
        require_number("dropout", self.dropout, at_least=0.0, below=1.0, error=InvalidConfigError)
        first, _ = self.layer_configs()
        for name in ("in_features", "relations", "edge_dim"):
            object.__setattr__(self, name, getattr(first, name))
        ends = {target for _, _, target in self.relations}
        if self.target not in ends:
            raise InvalidConfigError(
                argument="target",
                expected="a type that a relation ends in: " + ", ".join(map(repr, sorted(ends))),
                actual=repr(self.target),
            )

    @property
    def widths(self) -> dict[str, int]:
        """The width of the features of each type of nodes."""
        return dict(self.in_features)

    def layer_configs(self) -> tuple[HeterogeneousGraphAttentionConfig, HeterogeneousGraphAttentionConfig]:
        """The settings of the two attention layers."""

        def layer(in_features: Any) -> HeterogeneousGraphAttentionConfig:
            return HeterogeneousGraphAttentionConfig(
                base=AttentionConfig(d_model=self.hidden, num_heads=self.heads, dropout=self.dropout),
                in_features=in_features,
                relations=self.relations,
                score=self.score,
                edge_dim=self.edge_dim,
                residual=True,
            )

        first = layer(self.in_features)
        return first, layer(dict.fromkeys(first.widths, self.hidden))


class ClassScores(NamedTuple):
    """What `HeterogeneousNodeClassifier` returns.

    Attributes:
        output: `(nodes, num_classes)`, the scores of each node of the target type.
        weights: the second layer's attention weights by relation, or None where they were not asked for.
    """

    output: Tensor
    weights: Mapping[Relation, Tensor] | None = None


class HeterogeneousNodeClassifier(nn.Module):
    """Scores of each class for each node of one type, from its neighbours over all relations, and from theirs.

        hidden_t = dropout(GELU(LayerNorm_t(HeterogeneousGraphAttention(x)_t)))
        logits = W dropout(GELU(LayerNorm(HeterogeneousGraphAttention(hidden)_target))) + b

    with residual maps in both layers. A type that no relation ends in has `W_t x_t + b_t` in place of the attention.

    Args:
        in_features, relations, target, num_classes, and the rest by keyword: the fields of
            `HeterogeneousNodeClassifierConfig`.

    Raises:
        InvalidConfigError: a setting is out of range.

    Source: the layer is that of Hu et al., 2020 (HGT), of Wang et al., 2019 (HAN) or of Brody et al., 2022, as `score`
    says; layer norm as in Platonov et al., 2023.

    Example:
        >>> import torch
        >>> relations = [("author", "writes", "paper")]
        >>> classifier = HeterogeneousNodeClassifier({"author": 3, "paper": 5}, relations, "paper", 2, hidden=8)
        >>> edges = {("author", "writes", "paper"): torch.tensor([[0, 1], [1, 0]])}
        >>> graph = HeterogeneousGraph.from_edge_index(edges, {"author": 2, "paper": 4})
        >>> classifier({"author": torch.zeros(2, 3), "paper": torch.zeros(4, 5)}, graph).output.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: Mapping[str, int] | tuple[tuple[str, int], ...],
        relations: Any,
        target: str,
        num_classes: int,
        *,
        score: Literal["additive", "dynamic", "dot"] = "dot",
        hidden: int = 64,
        heads: int = 4,
        dropout: float = 0.5,
        edge_dim: Mapping[Relation, int] | tuple[int | None, ...] | None = None,
    ) -> None:
        super().__init__()
        self.config = HeterogeneousNodeClassifierConfig(
            in_features=in_features,
            relations=relations,
            target=target,
            num_classes=num_classes,
            score=score,
            hidden=hidden,
            heads=heads,
            dropout=dropout,
            edge_dim=edge_dim,
        )
        first, second = self.config.layer_configs()
        self.first_layer = HeterogeneousGraphAttention.from_config(first)
        self.second_layer = HeterogeneousGraphAttention.from_config(second)
        widths, ends = self.config.widths, set(self.first_layer.target_types)
        self.types = tuple(widths)
        # Lists, since the name of a type may be no name of a module.
        self.sources_alone = tuple(name for name in widths if name not in ends)
        self.input_maps = nn.ModuleList(nn.Linear(widths[name], hidden) for name in self.sources_alone)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in widths)
        self.output_norm = nn.LayerNorm(hidden)
        self.output_map = nn.Linear(hidden, num_classes)

    @classmethod
    def from_config(cls, config: HeterogeneousNodeClassifierConfig) -> Self:
        """The network of a config."""
        return cls(**vars(config))

    def forward(
        self,
        x: Mapping[str, Tensor],
        graph: HeterogeneousGraph | SampledHeterogeneousGraph,
        edge_features: Mapping[Relation, Tensor] | None = None,
        *,
        return_weights: bool | str = False,
    ) -> ClassScores:
        """Class scores of all nodes of the target type, or of those that are a sample's seeds.

        Args:
            x: `(nodes, in_features)` of each type, dense or sparse CSR; of a sample's nodes.
            graph: over the nodes, of relations of the config; some may be missing. Or a sample of two hops, one for
                each layer: only the seeds get scores, which are those of the whole graph where all of its edges were
                drawn.
            edge_features: `(edges, edge_dim)` of each relation that has an edge_dim, or of a sample's `edges[0]`; both
                layers see them.
            return_weights: "mean" over heads (or True) or "heads": the second layer's attention weights, by relation.

        Returns:
            ClassScores(logits `(nodes, num_classes)`, weights by relation or None).

        Raises: as `nn.HeterogeneousGraphAttention`; InvalidInputError for a sample of another number of hops.
        """
        if not isinstance(graph, SampledHeterogeneousGraph):
            hidden = self._hidden(x, self.first_layer(x, graph, edge_features).output)
            second = self.second_layer(hidden, graph, edge_features, return_weights=return_weights)
            return ClassScores(self._scores(second.output[self.config.target]), second.weights)
        require_two_hops(graph)
        outer, inner = graph.blocks
        first = graph.queries_of(self.first_layer(x, outer, edge_features).output, 0)
        own = {name: first_rows(x[name], inner.num_nodes[name]) for name in self.sources_alone}
        # The edges of the inner block are the first of the outer one's.
        if edge_features is not None:
            edge_features = {name: each[: len(graph.edges[1][name])] for name, each in edge_features.items()}
        second = self.second_layer(self._hidden(own, first), inner, edge_features, return_weights=return_weights)
        seeds = second.output[self.config.target][: graph.num_seeds[self.config.target]]
        return ClassScores(self._scores(seeds), second.weights)

    def _hidden(self, x: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the second layer reads, from x of types that no relation ends in, and the first layer's output."""
        given = {
            name: linear_maps(x[name], [each.weight], [each.bias])[0] if is_bare(each) else each(x[name])
            for name, each in zip(self.sources_alone, self.input_maps, strict=True)
        }
        return {
            name: self._activated(norm, given[name] if name in given else first[name])
            for name, norm in zip(self.types, self.norms, strict=True)
        }

    def _scores(self, x: Tensor) -> Tensor:
        return self.output_map(self._activated(self.output_norm, x))

    def _activated(self, norm: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(F.gelu(norm(x)), self.config.dropout, self.training)
