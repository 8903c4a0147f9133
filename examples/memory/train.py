"""Trains encoders so that the images of a batch, attending to each other, tell each other's class.

Axes: N images, D key_dim, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.nn import MemoryAttention
from anyattention.training.steps import require_finite_loss
from examples.memory.images import CLASSES, Images
from examples.memory.model import Encoder, Settings, empty_memory, label_values
from examples.schedule import rate_factor

__all__ = ["Fit", "Step", "Trained", "attention_loss", "fit", "require_trainable"]

# Else an image none of whose neighbours is of its class would have an infinite loss, and no gradient.
_LEAST = 1e-3


class Step(NamedTuple):
    """What a finished step reports: its number from 1, and the loss of each encoder."""

    number: int
    whole: float
    without: float


class Trained(NamedTuple):
    """A trained encoder in evaluation mode, the loss of each step, and the seconds that the steps took."""

    encoder: Encoder
    losses: list[float]
    seconds: float


class Fit(NamedTuple):
    """An encoder of all classes, one that never saw the class held out, and whether Ctrl-C ended the training."""

    whole: Trained
    without: Trained
    interrupted: bool


def require_trainable(images: Images, settings: Settings) -> None:
    """Raise InvalidInputError unless there are images of the class held out, and a batch of others."""
    is_held_out = images.labels == settings.held_out
    if not is_held_out.any():
        name = CLASSES[settings.held_out]
        raise InvalidInputError(argument="--held-out", expected="a class of the images", actual=f"none of {name}")
    others = int((~is_held_out).sum())
    if settings.batch > others:
        expected = f"at most the {others:,} images of the other classes"
        raise InvalidInputError(argument="--batch", expected=expected, actual=settings.batch)


def fit(images: Images, settings: Settings, on_step: Callable[[Step], None] | None = None) -> Fit:
    """Train two encoders side by side: one on all images, one without those of the class held out.

        loss = mean over the batch of -log(p + 0.001)

    where p is the share of its attention that an image gives to others of its class, among the k others of the batch
    whose keys are most like its own. Ctrl-C (KeyboardInterrupt) ends the training early and keeps the weights of that
    moment; before the first step has finished it is passed on.

    Args:
        images: to learn from.
        settings: of the encoders and the training.
        on_step: called after each step of both.

    Raises:
        InvalidInputError: too few images for a batch, or none of the class held out.
        NumericalInstabilityError: a loss is NaN or infinite.

    Cost: a forward and backward pass over `batch` images for each encoder and step. The same arguments give the same
    weights; PyTorch's own random state is left as it was.

    Source: Goldberger et al., 2004 (neighbourhood components analysis). Here a query sees its k nearest alone.
    """
    require_trainable(images, settings)
    steps: list[Step] = []
    interrupted = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        whole = _Trainer(images, torch.arange(len(images.labels)), settings)
        without = _Trainer(images, (images.labels != settings.held_out).nonzero().flatten(), settings)
        try:
            for number in range(1, settings.steps + 1):
                steps.append(Step(number, whole.step(number), without.step(number)))
                if on_step is not None:
                    on_step(steps[-1])
        except KeyboardInterrupt:
            if not steps:
                raise
            interrupted = True
    return Fit(
        Trained(whole.encoder.eval(), [step.whole for step in steps], whole.seconds),
        Trained(without.encoder.eval(), [step.without for step in steps], without.seconds),
        interrupted,
    )


class _Trainer:
    """An encoder's training on the images at some places, and the time it takes."""

    def __init__(self, images: Images, places: Tensor, settings: Settings) -> None:
        self.images, self.places, self.settings, self.seconds = images, places, settings, 0.0
        self.encoder = Encoder(settings)
        # Empty, and it stays so: each step attends to the keys of its own batch.
        self.attention = empty_memory(settings)
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
        self.waiting = places[:0]

    def step(self, number: int) -> float:
        """One step; the loss before it."""
        started = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate_factor(number, self.settings.steps, 0.02)
        batch = self.images.chosen(self._drawn())
        self.optimizer.zero_grad(set_to_none=True)
        loss = attention_loss(self.attention, self.encoder(batch.pixels), batch.labels)
        require_finite_loss(loss.item(), f"step {number}")
        loss.backward()
        self.optimizer.step()
        self.seconds += time.monotonic() - started
        return loss.item()

    def _drawn(self) -> Tensor:
        """The places of a batch: each image is drawn once before any is drawn again."""
        if len(self.waiting) < self.settings.batch:
            self.waiting = self.places[torch.randperm(len(self.places))]
        drawn, self.waiting = self.waiting.tensor_split([self.settings.batch])
        return drawn


def attention_loss(attention: MemoryAttention, keys: Tensor, labels: Tensor) -> Tensor:
    """How badly keys `(N, D)` that attend to each other, but not to themselves, tell the labels `(N,)`."""
    own = torch.arange(len(keys))
    probabilities = attention(keys, keys=keys, values=label_values(labels), exclude=own).output
    return -(probabilities[own, labels] + _LEAST).log().mean()
