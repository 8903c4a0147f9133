"""The guesses that the network reads: what they are, and whose sections they have not seen."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from examples.packages.data import Packages, load_packages
from examples.packages.guesses import sparse_matrix, with_guesses, words_along_links
from examples.packages.inputs import Inputs, prepare_inputs


@pytest.fixture(scope="module")
def packages(packages_file: Path) -> Packages:
    """More to learn from than the file has."""
    packages = load_packages(packages_file)
    return packages._replace(
        train=torch.arange(0, 60, 2), validation=torch.arange(1, 60, 4), test=torch.arange(3, 60, 4)
    )


@pytest.fixture(scope="module")
def inputs(packages: Packages) -> Inputs:
    return with_guesses(packages, prepare_inputs(packages))


def _words(packages: Packages) -> torch.Tensor:
    """Words of packages and along each relation, by dense matrices."""
    words = torch.zeros(60, packages.num_words, dtype=torch.float64)
    words[torch.arange(60).repeat_interleave(packages.word_offsets.diff()), packages.words] = 1
    parts = [F.normalize(words, dim=1)]
    for relation, (sources, targets) in packages.graph.edge_index.items():
        if relation[2] == "package":
            matrix = torch.zeros(60, packages.graph.num_nodes[relation[0]], dtype=torch.float64)
            matrix[targets, sources] = 1
            own = words if relation[0] == "package" else F.normalize(matrix.T @ words, dim=1)
            parts.append(F.normalize(matrix @ own, dim=1))
    return torch.cat(parts, 1)


def test_they_read_words_along_links(packages, inputs) -> None:
    found = torch.from_numpy(words_along_links(inputs).toarray())
    torch.testing.assert_close(found.double(), _words(packages), rtol=1e-5, atol=1e-6)


def test_they_are_those_of_logistic_regression_on_the_other_folds(packages, inputs) -> None:
    x, y = _words(packages).numpy(), packages.labels.numpy()
    assert sorted(torch.cat([fold.seeds for fold in inputs.folds]).tolist()) == packages.train.tolist()
    assert [len(fold.seeds) for fold in inputs.folds] == [6] * 5
    for seeds, guesses in [*inputs.folds, (torch.tensor([], dtype=torch.int64), inputs.guesses)]:
        known = np.setdiff1d(packages.train.numpy(), seeds.numpy())
        expected = LogisticRegression(C=3.0, tol=1e-3, max_iter=1000).fit(x[known], y[known]).predict_proba(x)
        np.testing.assert_allclose(guesses["package"].numpy(), expected, atol=0.01)


def test_they_have_not_seen_the_sections_that_are_learnt_from_them(packages, inputs) -> None:
    """Nor those of packages for validation and for the test."""
    for fold in inputs.folds:
        labels = packages.labels.clone()
        for hidden in (fold.seeds, packages.validation, packages.test):
            labels[hidden] = (labels[hidden] + 1) % len(packages.classes)
        other = with_guesses(packages._replace(labels=labels), prepare_inputs(packages))
        (same,) = (each for each in other.folds if each.seeds.equal(fold.seeds))
        for kind, guesses in fold.guesses.items():
            assert same.guesses[kind].equal(guesses)
        assert not other.guesses["package"].equal(inputs.guesses["package"])


def test_those_of_a_source_are_the_mean_of_its_packages(packages, inputs) -> None:
    for name, kind in (("built_from", "source"), ("kept_by", "maintainer")):
        members = packages.graph.edge_index["package", name, kind]
        for node in range(packages.graph.num_nodes[kind]):
            own = inputs.guesses["package"][members[0][members[1] == node]]
            torch.testing.assert_close(inputs.guesses[kind][node], own.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_packages_to_learn_from(count: int, packages) -> None:
    """A fold may leave one section, or none."""
    few = packages._replace(train=torch.arange(0, 3 * count, 3))
    found = with_guesses(few, prepare_inputs(packages))
    assert len(found.folds) == count
    assert found.guesses["package"].equal(F.one_hot(few.labels[:1], 3).float().expand(60, 3))
    left = 1.0 if count > 1 else 0.0
    assert (found.folds[0].guesses["package"].sum(1) == left).all()


def test_a_table_is_its_matrix(inputs) -> None:
    table = inputs.own["package"]
    columns, row, values = table.entries(torch.arange(60))
    dense = torch.zeros(60, table.num_columns)
    dense[row, columns] = values
    assert torch.from_numpy(sparse_matrix(table).toarray()).equal(dense)
