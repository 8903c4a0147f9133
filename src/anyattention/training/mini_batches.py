"""Mini-batches of the training nodes: samples of their neighbours, and the scores of a sample's seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import plain
from anyattention.errors import InvalidConfigError
from anyattention.loader import NeighborLoader
from anyattention.nn.feature_rows import rows_at
from anyattention.patterns import SampledGraph, SampledHeterogeneousGraph
from anyattention.training.data import AnyData, NodeData
from anyattention.training.heterogeneous_model import HeterogeneousNodeClassifier
from anyattention.training.model import NodeClassifier

__all__ = ["DEFAULT_FANOUT", "batch_loader", "classify_seeds", "require_fanout"]

DEFAULT_FANOUT = (10, 10)
"""The most edges of a seed, and of each node that these lead to."""


def require_fanout(fanout: object) -> tuple[int, int]:
    """The fanout as a pair of plain ints; raise InvalidConfigError unless each is -1 or at least 1."""
    given = plain(fanout)
    if not isinstance(given, list | tuple) or len(given) != 2 or not all(map(_is_fanout, given)):
        raise InvalidConfigError(
            argument="fanout",
            expected="a number for each of the two layers, at least 1, or -1 for all neighbours",
            actual=repr(given),
        )
    return given[0], given[1]


def batch_loader(
    data: AnyData, training_nodes: Tensor, batch_size: int, fanout: Sequence[int], seed: int
) -> NeighborLoader:
    """Each pass has all training nodes once, in another order and with other neighbours, as the seed decides."""
    seeds: Any = training_nodes if isinstance(data, NodeData) else (data.target, training_nodes)
    generator = torch.Generator("cpu").manual_seed(seed)
    return NeighborLoader(data.graph, seeds, fanout, batch_size=batch_size, shuffle=True, generator=generator)


def classify_seeds(
    model: NodeClassifier | HeterogeneousNodeClassifier,
    data: AnyData,
    sampled: SampledGraph | SampledHeterogeneousGraph,
) -> tuple[Tensor, Tensor]:
    """Class scores `(seeds, num_classes)` and labels `(seeds,)` of the seeds of a sample of the data's graph."""
    if isinstance(data, NodeData):
        assert isinstance(model, NodeClassifier)
        assert isinstance(sampled, SampledGraph)
        edges = None if model.config.edge_dim is None else data.edge_features
        edges = None if edges is None else edges[sampled.edges[0]]
        logits = model(rows_at(data.features, sampled.nodes), sampled, edges).output
        return logits, data.labels[sampled.nodes[: sampled.num_seeds]]
    assert isinstance(model, HeterogeneousNodeClassifier)
    assert isinstance(sampled, SampledHeterogeneousGraph)
    x = {kind: rows_at(data.features[kind], nodes) for kind, nodes in sampled.nodes.items()}
    edges = {relation: each[sampled.edges[0][relation]] for relation, each in data.edge_features.items()}
    logits = model(x, sampled, edges).output
    return logits, data.labels[sampled.nodes[data.target][: sampled.num_seeds[data.target]]]


def _is_fanout(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (value == -1 or 1 <= value < 2**63)
