"""Nodes with features, a graph and labels, some of which a training run may look at; of one type or of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from anyattention._checks import Relation
from anyattention.patterns import Graph, HeterogeneousGraph
from anyattention.training.features import Look
from anyattention.training.reading import Reading

__all__ = ["AnyData", "HeterogeneousNodeData", "Metric", "NodeData", "Split"]

Metric = Literal["accuracy", "roc_auc"]


class Split(NamedTuple):
    """Which nodes' labels are for what; three `(nodes,)` int64 index tensors without overlap.

    Attributes:
        train: the labels that the loss sees.
        validation: the labels that every choice is made on.
        test: the labels that are read once, when all is done.
    """

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class NodeData:
    """One data set for node classification.

    Attributes:
        name: what to call it.
        features: `(nodes, in_features)` float32, dense or sparse CSR.
        graph: over the nodes, self-loops included.
        labels: `(nodes,)` int64, from 0; -1 where it is unknown.
        num_classes: number of classes among the labels.
        splits: at least one for a training.
        metric: what the data set is judged by: "accuracy", or "roc_auc" for two classes.
        images: `(nodes, height, width)` in [0, 1] where a node is a picture, or None.
        standardise: whether the columns of the (dense) features have units of their own, so that a network standardises
            them, by mean and deviation of the nodes that it was trained on.
        edge_features: `(edges, edge_dim)` float32, in the graph's order of the edges, or None.
        notes: what was done with the source that its author may not expect, a sentence each.
        ids: what the source calls its nodes, or None where they have numbers only.
        look: what the features are, and why; None leaves that to `preset_for`.
        reading: how the source was read, for a folder to keep, or None.
        facts: what was found in the source, a sentence each.
    """

    name: str
    features: Tensor
    graph: Graph
    labels: Tensor
    num_classes: int
    splits: tuple[Split, ...]
    metric: Metric = "accuracy"
    images: Tensor | None = None
    standardise: bool = False
    edge_features: Tensor | None = None
    notes: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None
    look: Look | None = None
    reading: Reading | None = None
    facts: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.labels.shape[0]

    @property
    def num_edges(self) -> int:
        """Number of edges, self-loops included."""
        return self.graph.num_edges

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the source calls the classes; their numbers where it has none."""
        if self.reading is not None and self.reading.classes:
            return self.reading.classes
        return tuple(map(str, range(self.num_classes)))

    @property
    def in_features(self) -> int:
        """Width of a node's features."""
        return self.features.shape[1]

    @property
    def sizes(self) -> dict[str, Any]:
        """What the data fix of a network's settings."""
        return {"in_features": self.in_features, "num_classes": self.num_classes, "edge_dim": self.edge_dim}

    @property
    def edge_dim(self) -> int | None:
        """Width of an edge's features, where edges have any."""
        return None if self.edge_features is None else self.edge_features.shape[1]


@dataclass(frozen=True, eq=False)
class HeterogeneousNodeData:
    """One data set for the classification of the nodes of one type, among nodes and edges of several types.

    Attributes:
        name: what to call it.
        features: `(nodes, in_features)` float32 of each type, dense or sparse CSR, ready for a network.
        graph: over the nodes.
        target: the type of the nodes that have classes.
        labels: `(nodes,)` int64 of the target's nodes, from 0; -1 where it is unknown.
        num_classes: number of classes among the labels.
        splits: of the target's nodes; at least one for a training.
        reading: how the source was read, for a folder to keep.
        edge_features: `(edges, edge_dim)` float32 of each relation that has any, in the order of its edges.
        metric: what the data set is judged by.
        notes: what was done with the source that its author may not expect, a sentence each.
        ids: what the source calls the target's nodes, or None where they have numbers only.
        facts: what was found in the source, a sentence each.
    """

    name: str
    features: Mapping[str, Tensor]
    graph: HeterogeneousGraph
    target: str
    labels: Tensor
    num_classes: int
    splits: tuple[Split, ...]
    reading: Reading
    edge_features: Mapping[Relation, Tensor] = field(default_factory=dict)
    metric: Metric = "accuracy"
    notes: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None
    facts: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        """Number of nodes of the target type."""
        return self.labels.shape[0]

    @property
    def num_edges(self) -> int:
        """Number of edges of all relations."""
        return self.graph.num_edges

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the source calls the classes."""
        return self.reading.classes

    @property
    def sizes(self) -> dict[str, Any]:
        """What the data fix of a network's settings."""
        return {
            "in_features": {name: each.shape[1] for name, each in self.features.items()},
            "relations": self.graph.relations,
            "target": self.target,
            "num_classes": self.num_classes,
            "edge_dim": {relation: each.shape[1] for relation, each in self.edge_features.items()} or None,
        }


AnyData = NodeData | HeterogeneousNodeData
"""Data of any kind that can be trained on."""
