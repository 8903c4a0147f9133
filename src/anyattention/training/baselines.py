"""Plain methods to compare with, on the same labels; each one's setting is chosen on the validation labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from anyattention.errors import InvalidInputError
from anyattention.training.data import NodeData, Split
from anyattention.training.extras import import_demo

__all__ = ["Baseline", "run_baselines"]

_PURPOSE = "the comparison with baselines"
_ALPHAS = (0.2, 0.5, 0.8, 0.9, 0.95, 0.99)


class Baseline(NamedTuple):
    """One baseline at its best setting: names, and the accuracy on validation and test labels."""

    name: str
    setting: str
    validation_accuracy: float
    test_accuracy: float


def run_baselines(data: NodeData, split: Split) -> tuple[Baseline, ...]:
    """The vote of the nearest labelled nodes, logistic regression, and LabelSpreading over two graphs.

    The graphs are the data's own, and that of the nearest neighbours by the features.

    Each fits the training labels with a handful of settings and keeps the one with the best accuracy on the
    validation labels (the first among equals); the test labels are read once for that one.

    Args:
        data: with dense features.
        split: whose labels to use.

    Raises:
        InvalidInputError: sparse features.
        MissingExtraError: scikit-learn is not installed.
    """
    if data.features.is_sparse_csr:
        raise InvalidInputError(argument="data", expected="dense features", actual="sparse CSR")
    x = data.features.double().numpy()
    train, labels = split.train.numpy(), data.labels.numpy()
    neighbours = import_demo("sklearn.neighbors", _PURPOSE)
    linear = import_demo("sklearn.linear_model", _PURPOSE)

    def vote(count: int) -> np.ndarray:
        model = neighbours.KNeighborsClassifier(n_neighbors=count, weights="distance")
        return model.fit(x[train], labels[train]).predict(x)

    def regression(strength: float) -> np.ndarray:
        model = linear.LogisticRegression(C=strength, max_iter=1000)
        return model.fit(x[train], labels[train]).predict(x)

    linked = data.graph.to_dense().double().numpy()
    nearest = neighbours.kneighbors_graph(x, min(10, len(x) - 1)).toarray()
    counts = [count for count in (1, 3, 5, 7) if count <= len(train)]
    return (
        _best("nearest-neighbour vote", "neighbours", counts, vote, data, split),
        _best("logistic regression", "C", (0.1, 1.0, 10.0, 100.0, 1000.0), regression, data, split),
        _best("LabelSpreading, same links", "alpha", _ALPHAS, _spreading(linked, data, split), data, split),
        _best("LabelSpreading, nearest neighbours", "alpha", _ALPHAS, _spreading(nearest, data, split), data, split),
    )


def _spreading(links: np.ndarray, data: NodeData, split: Split) -> Callable[[float], np.ndarray]:
    """LabelSpreading over links `(nodes, nodes)`, either way round; it leaves self-loops out by itself."""
    semi_supervised = import_demo("sklearn.semi_supervised", _PURPOSE)
    adjacency = np.maximum(links, links.T)
    known = np.full(data.num_nodes, -1)
    known[split.train.numpy()] = data.labels.numpy()[split.train.numpy()]
    # The kernel is only asked for the affinity of the nodes it was given: the graph, whatever it is given.
    nodes = np.arange(data.num_nodes, dtype=float)[:, None]

    def spread(alpha: float) -> np.ndarray:
        model = semi_supervised.LabelSpreading(kernel=lambda *_: adjacency.copy(), alpha=alpha, max_iter=1000)
        return model.fit(nodes, known).transduction_

    return spread


def _best(
    name: str,
    setting: str,
    values: Iterable[float],
    predict: Callable[[Any], np.ndarray],
    data: NodeData,
    split: Split,
) -> Baseline:
    labels = data.labels.numpy()

    def score(predicted: np.ndarray, nodes: np.ndarray) -> float:
        return float((predicted[nodes] == labels[nodes]).mean())

    tried = [(value, predict(value)) for value in values]
    value, predicted = max(tried, key=lambda item: score(item[1], split.validation.numpy()))
    return Baseline(
        name,
        f"{setting} {value:g}",
        score(predicted, split.validation.numpy()),
        score(predicted, split.test.numpy()),
    )
