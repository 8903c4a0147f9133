"""Nodes with features, a graph and labels, some of which a training run may look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from anyattention.patterns import Graph

__all__ = ["Metric", "NodeData", "Split"]

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
        labels: `(nodes,)` int64, from 0.
        num_classes: number of classes.
        splits: at least one.
        metric: what the data set is judged by: "accuracy", or "roc_auc" for two classes.
        images: `(nodes, height, width)` in [0, 1] where a node is a picture, or None.
    """

    name: str
    features: Tensor
    graph: Graph
    labels: Tensor
    num_classes: int
    splits: tuple[Split, ...]
    metric: Metric = "accuracy"
    images: Tensor | None = None

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.labels.shape[0]

    @property
    def in_features(self) -> int:
        """Width of a node's features."""
        return self.features.shape[1]
