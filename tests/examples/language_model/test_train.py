"""The language model: it learns, is causal, ends when told to, and says what does not fit."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from anyattention import Causal, Window, attend, explain, native
from anyattention.errors import InvalidConfigError, InvalidInputError, NumericalInstabilityError
from anyattention.nn import projected
from examples.language_model import train
from examples.language_model.generate import generate, speed_of_reading_again
from examples.language_model.model import LanguageModel, Settings
from examples.language_model.text import split_text, unigram_entropy
from examples.language_model.train import bits_per_byte, fit

SMALL = Settings(steps=30, batch=1, length=48, window=11, width=16, heads=2, blocks=2, learning_rate=2e-2)
TEXT = split_text(b"for index in range(7):\n    total += index\n" * 60)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_learns_a_repetitive_text() -> None:
    done = fit(TEXT.train, SMALL)
    entropy = unigram_entropy(TEXT.held_out)
    assert done.bits[0] > entropy
    assert done.bits[-1] < entropy / 2
    assert bits_per_byte(done.model, TEXT.held_out, SMALL.length) < entropy / 2
    assert (len(done.bits), done.interrupted, done.model.training) == (30, False, False)
    written = generate(done.model, TEXT.held_out[:20], 15, temperature=0.1).text
    assert len(written) == 15
    assert set(written) <= set(TEXT.train.tolist())
    assert len(generate(done.model, TEXT.held_out[:1], 2).text) == 2


@pytest.mark.parametrize("pattern", [SMALL.pattern, Causal(), None], ids=str)
def test_from_what_is_kept_it_writes_what_it_would_from_the_whole_text(pattern) -> None:
    model, tokens = LanguageModel(SMALL, pattern).eval(), TEXT.held_out[:20]
    written = generate(model, tokens, 25, seed=3).text
    generator, expected = torch.Generator().manual_seed(3), tokens
    with torch.no_grad():
        for _ in range(25):
            scores = model(expected[None])[0, -1] / 0.9
            expected = torch.cat([expected, torch.multinomial(scores.softmax(0), 1, generator=generator)])
    assert written == bytes(expected[20:].tolist())
    assert speed_of_reading_again(model, tokens) > 0


def test_the_same_settings_give_the_same_weights_and_leave_the_random_state() -> None:
    settings = dataclasses.replace(SMALL, steps=2)
    state = torch.get_rng_state()
    first, second = fit(TEXT.train, settings), fit(TEXT.train, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.bits == second.bits
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])


@pytest.mark.parametrize("pattern", [Window(5, 0), Causal(), None], ids=str)
def test_a_byte_does_not_see_what_comes_later(pattern) -> None:
    model = LanguageModel(SMALL, pattern)
    tokens = torch.randint(256, (1, 23), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 13] += 1
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :13], after[:, :13])
    assert not torch.allclose(before[:, 13], after[:, 13])


def test_a_wide_window_is_dense_causal_attention() -> None:
    torch.manual_seed(0)
    window = LanguageModel(SMALL, Window(47, 0))
    tokens = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))
    for pattern in (Causal(), None):
        dense = LanguageModel(SMALL, pattern)
        dense.load_state_dict(window.state_dict())
        torch.testing.assert_close(dense(tokens), window(tokens), atol=1e-5, rtol=1e-4)


def test_the_kernels_of_patterns_run_it(monkeypatch) -> None:
    ran = []

    def explained(*tensors, **options):
        ran.append(explain(*tensors, **options).implementation)
        return attend(*tensors, **options)

    monkeypatch.setattr(projected, "attend", explained)
    LanguageModel(SMALL, SMALL.pattern).train()(TEXT.train[None, :48]).sum().backward()
    assert ran == ["cpu" if native.info().level else "reference"] * 2


def test_weights_are_those_of_the_pairs() -> None:
    model = LanguageModel(SMALL, SMALL.pattern)
    weights = model.weights(TEXT.train[:48])
    graph = SMALL.pattern.to_graph(48, 48)
    assert [tuple(block.shape) for block in weights] == [(graph.num_edges, 2)] * 2
    sums = torch.zeros(48, 2).index_add_(0, graph.query_index, weights[1])
    torch.testing.assert_close(sums, torch.ones(48, 2))


def test_bits_per_byte_are_a_mean_over_whole_passages() -> None:
    model = LanguageModel(SMALL, SMALL.pattern)
    tokens = TEXT.held_out[:110]
    losses = [train._loss(model, tokens[None, start : start + 49]).item() for start in (0, 48)]
    assert bits_per_byte(model, tokens, 48) == pytest.approx(sum(losses) / 2 / math.log(2))


def test_an_interrupt_keeps_what_there_is() -> None:
    def stop(step) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    done = fit(TEXT.train, SMALL, stop)
    assert (len(done.bits), done.interrupted, done.model.training) == (3, True, False)


def test_an_interrupt_before_the_first_step_is_passed_on(monkeypatch) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(TEXT.train, SMALL)


def test_a_loss_that_is_not_finite_is_named(monkeypatch) -> None:
    monkeypatch.setattr(train, "_loss", lambda model, passages: torch.tensor(torch.nan))
    with pytest.raises(NumericalInstabilityError, match="loss of step 1: expected a finite number, got nan"):
        fit(TEXT.train, SMALL)


def test_a_text_that_is_too_short_is_named() -> None:
    with pytest.raises(InvalidInputError, match="tokens: expected more than the length of a passage, 48 bytes, got 48"):
        fit(TEXT.train[:48], SMALL)
    with pytest.raises(InvalidInputError, match="tokens: expected more than the length of a passage"):
        bits_per_byte(LanguageModel(SMALL, None), TEXT.train[:48], 48)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps: expected an int of at least 1, got 0"),
        ({"length": 1}, "length: expected an int of at least 2, got 1"),
        ({"window": True}, "window: expected an int of at least 1, got True"),
        ({"length": 64, "window": 64}, "window: expected less than length=64, got 64"),
        ({"width": 16, "heads": 3}, "heads: expected a divisor of width=16, got 3"),
        ({"seed": -1}, "seed: expected an int of at least 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number above 0"),
    ],
)
def test_settings_are_checked(settings, text: str) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        Settings(**settings)
