"""Trains the language model, and asks it for bits per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattention.errors import InvalidInputError
from anyattention.training.steps import require_finite_loss
from examples.language_model.model import LanguageModel, Settings
from examples.schedule import rate_factor

__all__ = ["Fit", "Step", "bits_per_byte", "draw_passages", "fit", "train_step"]


class Step(NamedTuple):
    """What a finished step reports: its number from 1, and the loss in bits per byte."""

    number: int
    bits: float


class Fit(NamedTuple):
    """A trained model, in evaluation mode.

    Attributes:
        model: as the last step left it.
        bits: the training loss of each step, in bits per byte.
        seconds: that the steps took.
        interrupted: whether Ctrl-C ended them.
    """

    model: LanguageModel
    bits: list[float]
    seconds: float
    interrupted: bool


def fit(tokens: Tensor, settings: Settings, on_step: Callable[[Step], None] | None = None) -> Fit:
    """Train a new model to tell each byte from those before it, on passages drawn at random.

    Ctrl-C (KeyboardInterrupt) ends the training early and keeps the weights of that moment; before the first step has
    finished it is passed on.

    Args:
        tokens: the text, int64 `(bytes,)`.
        settings: of the model and the training.
        on_step: called after each step.

    Raises:
        InvalidInputError: the text is no longer than a passage.
        NumericalInstabilityError: the loss is NaN or infinite.

    Cost: a forward and backward pass over `batch` passages each step. The same arguments give the same weights;
    PyTorch's own random state is left as it was.
    """
    require_passage("tokens", tokens, settings.length)
    bits: list[float] = []
    interrupted = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LanguageModel(settings, settings.pattern)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
        started = time.monotonic()
        try:
            for number in range(1, settings.steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * rate_factor(number, settings.steps, 0.05)
                loss = train_step(model, optimizer, draw_passages(tokens, settings))
                require_finite_loss(loss, f"step {number}")
                bits.append(loss)
                if on_step is not None:
                    on_step(Step(number, loss))
        except KeyboardInterrupt:
            if not bits:
                raise
            interrupted = True
        seconds = time.monotonic() - started
    return Fit(model.eval(), bits, seconds, interrupted)


def require_passage(argument: str, tokens: Tensor, length: int) -> None:
    """Raise unless a text holds a passage and the byte after it."""
    if len(tokens) <= length:
        expected = f"more than the length of a passage, {length} bytes"
        raise InvalidInputError(argument=argument, expected=expected, actual=f"{len(tokens)} bytes")


def draw_passages(tokens: Tensor, settings: Settings) -> Tensor:
    """Passages and the byte after each, `(batch, length + 1)`, from anywhere in the text."""
    starts = torch.randint(len(tokens) - settings.length, (settings.batch, 1))
    return tokens[starts + torch.arange(settings.length + 1)]


def train_step(model: LanguageModel, optimizer: torch.optim.Optimizer, passages: Tensor) -> float:
    """One step; the loss before it, in bits per byte. Nothing changes where that is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss = _loss(model, passages)
    if math.isfinite(loss.item()):
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item() / math.log(2)


@torch.no_grad()
def bits_per_byte(model: LanguageModel, tokens: Tensor, length: int) -> float:
    """The loss over a text cut into passages of one length; what is left at its end is not counted."""
    require_passage("tokens", tokens, length)
    passages = tokens.unfold(0, length + 1, length)
    losses = [_loss(model, passage[None]).item() for passage in passages]
    return sum(losses) / len(losses) / math.log(2)


def _loss(model: LanguageModel, passages: Tensor) -> Tensor:
    scores = model(passages[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), passages[:, 1:].flatten())
