import dataclasses

import numpy as np
import pytest
import torch

from anyattention.errors import InvalidInputError
from anyattention.training import load_digits
from anyattention.training.baselines import run_baselines

pytest.importorskip("sklearn")


@pytest.mark.exhaustive
def test_each_setting_is_the_best_on_the_validation_labels(require) -> None:
    data = load_digits(0)
    split = data.splits[0]
    vote, regression, *spreadings = run_baselines(data, split)
    assert [vote.name, regression.name, *(spreading.name for spreading in spreadings)] == [
        "nearest-neighbour vote",
        "logistic regression",
        "LabelSpreading, same links",
        "LabelSpreading, nearest neighbours",
    ]

    x, labels = data.features.double().numpy(), data.labels.numpy()
    train, validation, test = (part.numpy() for part in split)
    # The vote by hand: distances of all to the labelled, the nearest one's label.
    distances = np.linalg.norm(x[:, None] - x[train][None], axis=2)
    nearest = labels[train][distances.argmin(1)]
    assert vote.validation_accuracy >= (nearest[validation] == labels[validation]).mean()
    if vote.setting == "neighbours 1":
        assert vote.test_accuracy == pytest.approx((nearest[test] == labels[test]).mean())

    # The spreading by hand: (1 - alpha) (I - alpha S)^-1 Y, S without self-loops.
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = distances <= np.sort(distances, axis=1)[:, 9:10]
    for spreading, links in zip(spreadings, (data.graph.to_dense().numpy(), nearest), strict=True):
        alpha = float(spreading.setting.split()[1])
        adjacency = (links | links.T).astype(float)
        np.fill_diagonal(adjacency, 0)
        degrees = adjacency.sum(1)
        normalised = adjacency / np.sqrt(degrees[:, None] * degrees[None])
        known = np.zeros((len(labels), 10))
        known[train, labels[train]] = 1
        spread = np.linalg.solve(np.eye(len(labels)) - alpha * normalised, known).argmax(1)
        assert spreading.test_accuracy == pytest.approx((spread[test] == labels[test]).mean(), abs=0.005)

    logistic = require("sklearn.linear_model").LogisticRegression
    scores = {}
    for strength in (0.1, 1.0, 10.0, 100.0, 1000.0):
        fitted = logistic(C=strength, max_iter=1000).fit(x[train], labels[train])
        scores[f"C {strength:g}"] = fitted.score(x[validation], labels[validation])
    assert regression.validation_accuracy == max(scores.values())
    assert scores[regression.setting] == max(scores.values())


@pytest.mark.exhaustive
def test_test_labels_are_used_for_the_score_only() -> None:
    data = load_digits(0)
    labels = data.labels.clone()
    labels[data.splits[0].test] = (labels[data.splits[0].test] + 1) % 10
    turned = dataclasses.replace(data, labels=labels)
    for plain, other in zip(run_baselines(data, data.splits[0]), run_baselines(turned, data.splits[0]), strict=True):
        assert (plain.setting, plain.validation_accuracy) == (other.setting, other.validation_accuracy)
        assert other.test_accuracy < 0.1 < plain.test_accuracy


def test_sparse_features_are_refused(data_files, tmp_path) -> None:
    from anyattention.training import load_npz

    data = load_npz(data_files.write(tmp_path / "sparse.npz", data_files.sparse_arrays()))
    with pytest.raises(InvalidInputError, match="data: expected dense features, got sparse CSR"):
        run_baselines(data, data.splits[0])
    assert torch.is_tensor(data.features)
