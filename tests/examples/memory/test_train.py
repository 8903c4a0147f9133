"""The encoders: they learn, never see the class held out, end when told to."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from anyattention.errors import InvalidConfigError, InvalidInputError, NumericalInstabilityError
from examples.memory import train
from examples.memory.images import Data, load_data
from examples.memory.model import Encoder, Settings, empty_memory
from examples.memory.recall import accuracy, recall
from examples.memory.train import attention_loss, fit

SMALL = Settings(steps=30, batch=100, k=7, key_dim=11, channels=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def data(data_folder: Path) -> Data:
    return load_data(data_folder / "fashion_small.npz")


def test_the_encoders_learn(data: Data) -> None:
    done = fit(data.train, SMALL)
    told = recall(done, data, SMALL)
    labels = data.test.labels
    of_class = labels == SMALL.held_out
    assert accuracy(told.answers.labels, labels) > 0.7
    assert accuracy(told.before.labels[of_class], labels[of_class]) == 0
    assert accuracy(told.after.labels[of_class], labels[of_class]) > 0.6
    for trained in (done.whole, done.without):
        assert (len(trained.losses), trained.encoder.training) == (30, False)
        assert sum(trained.losses[-5:]) < 0.85 * sum(trained.losses[:5])
        assert trained.seconds > 0
    assert done.interrupted is False


def test_the_loss_is_that_of_dense_attention() -> None:
    count, labels = 13, torch.arange(13) % 3
    keys = torch.randn(count, SMALL.key_dim, dtype=torch.float64, requires_grad=True)
    cosines = normalize(keys, dim=1) @ normalize(keys, dim=1).T
    cosines = cosines.masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    least = cosines.topk(SMALL.k).values[:, -1:]
    weights = (SMALL.scale * cosines).masked_fill(cosines < least, -torch.inf).softmax(1)
    probabilities = (weights * (labels[:, None] == labels)).sum(1)
    expected = -(probabilities + 1e-3).log().mean()
    with torch.random.fork_rng(devices=[]):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            found = attention_loss(empty_memory(SMALL), keys, labels)
        finally:
            torch.set_default_dtype(default)
    torch.testing.assert_close(found, expected)
    own, other = (torch.autograd.grad(loss, keys)[0] for loss in (found, expected))
    torch.testing.assert_close(own, other)


def test_the_class_held_out_is_never_drawn(data: Data, monkeypatch) -> None:
    drawn = []
    loss = train.attention_loss

    def record(attention, keys, labels):
        drawn.append(labels)
        return loss(attention, keys, labels)

    monkeypatch.setattr(train, "attention_loss", record)
    settings = dataclasses.replace(SMALL, steps=3, batch=1000, held_out=5)
    fit(data.train, settings)
    whole, without = torch.cat(drawn[::2]), torch.cat(drawn[1::2])
    # Of 3,000 images three batches of 1,000 are all.
    assert torch.equal(whole.bincount(), data.train.labels.bincount())
    assert set(without.tolist()) == set(range(10)) - {5}


def test_the_same_settings_give_the_same_weights_and_leave_the_random_state(data: Data) -> None:
    settings = dataclasses.replace(SMALL, steps=2)
    state = torch.get_rng_state()
    first, second = fit(data.train, settings), fit(data.train, settings)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in ((first.whole, second.whole), (first.without, second.without)):
        assert one.losses == other.losses
        for name, weight in one.encoder.state_dict().items():
            assert torch.equal(weight, other.encoder.state_dict()[name])


def test_an_interrupt_keeps_what_there_is(data: Data) -> None:
    def stop(step) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    done = fit(data.train, SMALL, stop)
    assert done.interrupted
    assert len(done.whole.losses) == len(done.without.losses) == 2
    assert not done.whole.encoder.training


def test_an_interrupt_before_the_first_step_is_passed_on(data: Data, monkeypatch) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "attention_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(data.train, SMALL)


def test_a_loss_that_is_not_finite_ends_the_training(data: Data, monkeypatch) -> None:
    monkeypatch.setattr(train, "attention_loss", lambda attention, keys, labels: keys.sum() * torch.nan)
    with pytest.raises(NumericalInstabilityError, match="step 1"):
        fit(data.train, SMALL)


def test_images_that_do_not_suffice_are_refused(data: Data) -> None:
    trousers = data.train.chosen(data.train.labels == 1)
    with pytest.raises(InvalidInputError, match="--held-out: expected a class of the images, got none of bag"):
        fit(trousers, SMALL)
    few = data.train.chosen(torch.arange(50))
    with pytest.raises(
        InvalidInputError, match=r"--batch: expected at most the \d+ images of the other classes, got 100"
    ):
        fit(few, SMALL)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": 100}, "k: expected less than batch=100, got 100"),
        ({"held_out": 10}, "held_out: expected a class from 0 to 9, got 10"),
        ({"held_out": -1}, "held_out: expected an int of at least 0, got -1"),
        ({"scale": 0.0}, "scale: expected a finite number above 0"),
        ({"batch": 1}, "batch: expected an int of at least 2, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, float], text: str) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        dataclasses.replace(SMALL, **change)


def test_an_encoder_takes_bytes_and_gives_keys(data: Data) -> None:
    encoder = Encoder(SMALL).eval().double()
    keys = encoder(data.test.pixels[:5])
    assert (tuple(keys.shape), keys.dtype) == ((5, SMALL.key_dim), torch.float64)
    torch.testing.assert_close(keys[3:], encoder(data.test.pixels[3:5]))
