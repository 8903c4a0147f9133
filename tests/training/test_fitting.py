import dataclasses

import pytest
import torch
import torch.nn.functional as F

from anyattention.errors import InvalidConfigError, NumericalInstabilityError
from anyattention.training import (
    FitSettings,
    NodeClassifierConfig,
    NodeData,
    fit,
    load_npz,
    metric_value,
    predict_logits,
)


@pytest.fixture
def data(data_files, tmp_path) -> NodeData:
    return load_npz(data_files.write(tmp_path / "made_up.npz", data_files.dense_arrays(num_nodes=29)))


CONFIG = NodeClassifierConfig(3, 2, hidden=4, heads=2, dropout=0.3)


def test_the_best_epoch_is_kept(data: NodeData) -> None:
    epochs = []
    done = fit(data, data.splits[0], CONFIG, FitSettings(epochs=23, learning_rate=0.3), epochs.append)
    assert [epoch.number for epoch in epochs] == list(range(1, 24))
    best = max(epochs, key=lambda epoch: (epoch.validation_score, -epoch.validation_loss))
    assert done.best == best
    assert done.best.number < 23, "the test needs a run whose last epoch is not its best"
    assert (done.epochs, done.interrupted) == (23, False)
    assert not done.model.training
    nodes = data.splits[0].validation
    logits, labels = predict_logits(done.model, data)[nodes], data.labels[nodes]
    assert metric_value(data.metric, logits, labels) == best.validation_score
    assert F.cross_entropy(logits, labels).item() == best.validation_loss


def test_it_learns(data: NodeData) -> None:
    done = fit(data, data.splits[0], CONFIG, FitSettings(epochs=60, learning_rate=0.05))
    nodes = data.splits[0].train
    assert metric_value("accuracy", predict_logits(done.model, data)[nodes], data.labels[nodes]) > 0.8


def test_the_model_keeps_mean_and_deviation_where_the_data_asks_for_it(data: NodeData) -> None:
    kept = fit(data, data.splits[0], CONFIG, FitSettings(epochs=2)).model
    torch.testing.assert_close(kept.feature_mean, data.features.mean(0))
    torch.testing.assert_close(kept.feature_deviation, data.features.std(0, correction=0))
    as_they_are = dataclasses.replace(data, standardise=False)
    model = fit(as_they_are, data.splits[0], CONFIG, FitSettings(epochs=2)).model
    assert (model.config.standardise, list(model.buffers())) == (False, [])


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state(data: NodeData) -> None:
    before = torch.get_rng_state()
    first, second = (fit(data, data.splits[0], CONFIG, FitSettings(epochs=5)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = fit(data, data.splits[0], CONFIG, FitSettings(epochs=5, seed=1))
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])
    assert first.best == second.best
    assert first.best != other.best


def test_patience_ends_the_training(data: NodeData) -> None:
    done = fit(data, data.splits[0], CONFIG, FitSettings(epochs=500, learning_rate=0.3, patience=4))
    assert done.epochs == done.best.number + 4
    assert not done.interrupted


def test_labels_outside_the_split_are_not_looked_at(data: NodeData) -> None:
    """Other test labels, the same weights."""
    split = data.splits[0]
    labels = data.labels.clone()
    labels[split.test] = 1 - labels[split.test]
    turned = dataclasses.replace(data, labels=labels)
    first, second = (fit(given, split, CONFIG, FitSettings(epochs=7)) for given in (data, turned))
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])


def test_an_interrupt_keeps_the_best_epoch_so_far(data: NodeData) -> None:
    settings = FitSettings(epochs=23, learning_rate=0.3)
    epochs = []

    def stop(epoch) -> None:
        epochs.append(epoch)
        if epoch.number == 9:
            raise KeyboardInterrupt

    done = fit(data, data.splits[0], CONFIG, settings, stop)
    assert (done.interrupted, done.epochs) == (True, 9)
    assert done.best == max(epochs, key=lambda epoch: (epoch.validation_score, -epoch.validation_loss))
    shorter = fit(data, data.splits[0], CONFIG, dataclasses.replace(settings, epochs=9))
    for name, weight in shorter.model.state_dict().items():
        assert torch.equal(weight, done.model.state_dict()[name])


def test_an_interrupt_before_the_first_epoch_is_passed_on(data: NodeData, monkeypatch) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(data, data.splits[0], CONFIG, FitSettings(epochs=3))


def test_a_loss_that_is_not_finite_is_named(data: NodeData) -> None:
    features = data.features.clone()
    features[data.splits[0].train[0], 0] = torch.nan
    spoilt = dataclasses.replace(data, features=features)
    with pytest.raises(NumericalInstabilityError, match="loss of epoch 1: expected a finite number, got nan"):
        fit(spoilt, data.splits[0], CONFIG, FitSettings(epochs=3))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"epochs": 0}, "epochs: expected an int of at least 1, got 0"),
        ({"patience": 0.5}, "patience: expected an int of at least 1, got 0.5"),
        ({"seed": -1}, "seed: expected an int of at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number above 0"),
        ({"learning_rate": 1e38}, "learning_rate: expected .* below"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number at least 0"),
    ],
)
def test_settings_are_checked(settings, text: str) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        FitSettings(**settings)
