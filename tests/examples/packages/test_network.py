"""What the network reads and computes, against dense matrices and brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anyattention.errors import InvalidConfigError, InvalidInputError, NumericalInstabilityError
from examples.packages import train
from examples.packages.data import Packages, load_packages
from examples.packages.guesses import with_guesses
from examples.packages.inputs import Inputs, prepare_inputs
from examples.packages.model import PackageClassifier, Settings
from examples.packages.train import accuracy, batches, fit, predict, relation_shares

SMALL = Settings(steps=3, width=6, heads=2)


@pytest.fixture(scope="module")
def packages(packages_file: Path) -> Packages:
    return load_packages(packages_file)


@pytest.fixture(scope="module")
def inputs(packages: Packages) -> Inputs:
    return with_guesses(packages, prepare_inputs(packages))


@pytest.fixture
def model(inputs: Inputs, packages: Packages) -> PackageClassifier:
    return PackageClassifier(inputs, SMALL, len(packages.classes)).eval()


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, dim=1, eps=1e-30)


def _dense_words(packages: Packages) -> torch.Tensor:
    words = torch.zeros(len(packages.labels), packages.num_words, dtype=torch.float64)
    for package in range(len(words)):
        first, end = packages.word_offsets[package : package + 2]
        words[package, packages.words[first:end]] = 1
    return words


def _adjacency(packages: Packages, relation: tuple[str, str, str]) -> torch.Tensor:
    counts, edges = packages.graph.num_nodes, packages.graph.edge_index[relation]
    matrix = torch.zeros(counts[relation[2]], counts[relation[0]], dtype=torch.float64)
    matrix[edges[1], edges[0]] = 1
    return matrix


@torch.no_grad()
def test_features_are_those_of_dense_matrices(packages, inputs, model) -> None:
    words, model = _dense_words(packages), model.double()
    inputs = inputs._replace(
        own={kind: table._replace(values=table.values.double()) for kind, table in inputs.own.items()},
        read={kind: table._replace(values=table.values.double()) for kind, table in inputs.read.items()},
        links={kind: table._replace(values=table.values.double()) for kind, table in inputs.links.items()},
        numbers=inputs.numbers.double(),
        guesses={kind: guesses.double() for kind, guesses in inputs.guesses.items()},
    )
    seeds = torch.tensor([59, 7, 58, 0, 31])
    sampled = inputs.graph.sample({"package": seeds}, [-1])
    found = model.features(inputs.batch(sampled))
    layer = model.features
    expected = _unit(words) @ layer.own["package"] + layer.numbers(inputs.numbers)
    guesses = [inputs.guesses["package"]]
    for relation in inputs.links:
        matrix = _adjacency(packages, relation)
        guesses.append(matrix / matrix.sum(1, keepdim=True).clamp(min=1) @ inputs.guesses[relation[0]])
        if relation[0] == "package":
            read = _unit(matrix @ words)
        else:
            others = _unit(matrix.T @ words)
            read = matrix @ others
            guessed = layer.guesses[relation[0]](inputs.guesses[relation[0]])
            rows = F.gelu(layer.norms[relation[0]](others @ layer.own[relation[0]] + guessed))
            torch.testing.assert_close(found[relation[0]], rows[sampled.nodes[relation[0]]], rtol=1e-5, atol=1e-5)
        expected = expected + read @ layer.linked[relation[1]]
    expected = F.gelu(layer.norms["package"](expected + layer.guesses["package"](torch.cat(guesses, 1))))
    torch.testing.assert_close(found["package"], expected[sampled.nodes["package"]], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_package_has_the_same_scores_in_any_batch(packages, inputs, model) -> None:
    model = model.double().float()
    together = model(inputs.whole_batch(torch.arange(60)))
    apart = torch.cat([model(inputs.whole_batch(torch.tensor([package]))) for package in range(60)])
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_shares_are_those_of_the_links_at_the_start(packages, inputs, model) -> None:
    """The priors are 0, so that a package attends to all of its neighbours alike."""
    nodes = torch.tensor([4, 59, 17, 0])
    shares = relation_shares(model, inputs, nodes)
    counts = {relation[1]: _adjacency(packages, relation)[nodes].sum(1) for relation in inputs.links}
    total = torch.stack(list(counts.values())).sum(0)
    assert counts["rev_built_from"].tolist() == [1, 1, 1, 1]
    for name, count in counts.items():
        torch.testing.assert_close(shares.links[name].double(), count / total, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(shares.attention[name].double(), count / total, rtol=1e-5, atol=1e-6)


def test_what_a_package_predicts_does_not_depend_on_how_many_are_taken_together(
    packages, inputs, model, monkeypatch
) -> None:
    nodes = torch.randperm(60)
    whole = predict(model, inputs, nodes)
    shares = relation_shares(model, inputs, nodes)
    monkeypatch.setattr(train, "_TOGETHER", 7)
    assert predict(model, inputs, nodes).equal(whole)
    for name, each in relation_shares(model, inputs, nodes).attention.items():
        torch.testing.assert_close(each, shares.attention[name])


@pytest.mark.parametrize("changes", [{}, {"batch": 2, "fanout": 2}, {"fanout": 1}, {"batch": 2}])
def test_training_lowers_the_loss_and_repeats(changes, packages, inputs) -> None:
    settings = Settings(steps=30, width=8, heads=2, dropout=0.1, word_dropout=0.1, learning_rate=0.02, **changes)
    state, steps = torch.get_rng_state(), []
    done = fit(packages, inputs, settings, steps.append)
    assert torch.get_rng_state().equal(state)
    assert [step.number for step in steps] == list(range(1, 31))
    assert done.losses == [step.loss for step in steps]
    assert done.losses[-1] < 0.7 * done.losses[0]
    assert not done.interrupted
    assert not done.model.training
    assert accuracy(predict(done.model, inputs, packages.train), packages.train, packages.labels) > 0.8
    assert fit(packages, inputs, settings).losses == done.losses


@pytest.mark.parametrize(("batch", "count"), [(0, 5), (1, 6), (4, 5)])
def test_batches_take_each_package_once_an_epoch_beside_those_of_its_fold(batch, count, packages, inputs) -> None:
    drawn = batches(packages.train, inputs, Settings(batch=batch, fanout=1))
    epoch = [next(drawn) for _ in range(count)]
    assert sorted(torch.cat([batch.seeds for batch in epoch]).tolist()) == packages.train.tolist()
    for batch in epoch:
        (fold,) = (fold for fold in inputs.folds if batch.seeds[0] in fold.seeds)
        assert set(batch.seeds.tolist()) <= set(fold.seeds.tolist())
        own = batch.guesses["package"][: len(batch.seeds), : len(packages.classes)]
        assert own.equal(fold.guesses["package"][batch.seeds])
        for edges in batch.block.edge_index.values():
            assert edges.shape[1] == len(edges[1].unique())


def test_a_loss_that_is_not_finite_ends_the_training(packages, inputs) -> None:
    with pytest.raises(NumericalInstabilityError, match=r"loss of step \d"):
        fit(packages, inputs._replace(numbers=inputs.numbers * float("nan")), SMALL)


def test_accuracy() -> None:
    assert accuracy(torch.tensor([1, 0, 2]), torch.tensor([3, 0, 1]), torch.tensor([5, 2, 0, 1])) == 2 / 3


@pytest.mark.parametrize("name", ["dropout", "word_dropout", "smoothing"])
def test_a_share_is_below_1(name: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"{name}: expected a share below 1, got 1.0"):
        Settings(**{name: 1.0})


def test_heads_divide_the_width() -> None:
    with pytest.raises(InvalidConfigError, match="heads: expected a divisor of width=10"):
        Settings(width=10)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"y": None}, "no array 'y'"),
        ({"y": np.array([0.5])}, "numbers of dtype float64"),
        ({"sizes": np.zeros((3, 2))}, "sizes that are not two finite numbers for each package"),
        ({"words_indices": np.array([1])}, "words_indptr that does not divide words_indices"),
        ({"words_shape": np.array([60, 1])}, "words_indices outside the words"),
        ({"classes": np.array(["one"])}, "y outside the classes"),
        ({"train": np.array([60])}, "train with none, or with numbers that are not those of packages"),
        ({"val": np.array([], dtype=np.int64)}, "val with none"),
        ({"package__depends__package": np.array([[0], [60]])}, "package.*depends"),
    ],
)
def test_another_file_is_refused(changes, text, packages_file: Path, tmp_path: Path) -> None:
    with np.load(packages_file) as file:
        arrays = {**file, **changes}
    np.savez(tmp_path / "other.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(InvalidInputError, match=text):
        load_packages(tmp_path / "other.npz")


def test_what_is_no_file_of_arrays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"none\.npz"):
        load_packages(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InvalidInputError, match=r"expected a file as `python -m examples.packages.apt` writes it"):
        load_packages(tmp_path / "text.npz")


def test_the_data_set_is_read(data_folder: Path) -> None:
    packages = load_packages(data_folder / "debian.npz")
    assert packages.graph.num_nodes == {"package": 63_436, "source": 34_169, "maintainer": 2_248}
    assert (len(packages.train), len(packages.validation), len(packages.test)) == (6_241, 6_241, 49_931)
