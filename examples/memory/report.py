"""What the memories came to, in numbers and in words."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from examples.memory.images import CLASSES, Data
from examples.memory.model import Settings
from examples.memory.recall import NEIGHBOURS, Pixels, Recalled, accuracy
from examples.memory.train import Fit

__all__ = ["Report", "Shares", "describe_appending", "describe_data", "describe_scores", "measure"]


class Shares(NamedTuple):
    """The share of the test's images that is told right: of the class held out, of the others, and of all."""

    held_out: float
    others: float
    all: float


class Report(NamedTuple):
    """Accuracies on the test's images.

    Attributes:
        memory: of attention to the memory of all training images.
        neighbours, logistic: of the same images from their pixels, by k nearest neighbours and logistic regression.
        before, after: of the encoder that never saw a class, before and after its images were appended.
        appended: the share of their attention that the test's images of that class give to these memories.
    """

    memory: float
    neighbours: float
    logistic: float
    before: Shares
    after: Shares
    appended: float


def describe_data(data: Data, settings: Settings) -> str:
    """What is remembered and asked."""
    return f"""\
{len(data.train.labels):,} images of clothes to remember, {len(data.test.labels):,} for the test. An encoder learns to \
give images of one class
keys of one direction. The memory keeps the key and the label of each. A new image attends to the {settings.k} memories
most like its key, and the labels of these, by weight, are its answer.
"""


def measure(recalled: Recalled, pixels: Pixels, data: Data, settings: Settings) -> Report:
    """The accuracies."""
    labels = data.test.labels
    of_class = labels == settings.held_out
    is_appended = data.train.labels[recalled.after.memories[of_class]] == settings.held_out
    return Report(
        memory=accuracy(recalled.answers.labels, labels),
        neighbours=accuracy(pixels.neighbours, labels),
        logistic=accuracy(pixels.logistic, labels),
        before=_shares(recalled.before.labels, labels, of_class),
        after=_shares(recalled.after.labels, labels, of_class),
        appended=float((recalled.after.weights[of_class] * is_appended).sum(1).mean()),
    )


def _shares(answered: Tensor, labels: Tensor, of_class: Tensor) -> Shares:
    return Shares(
        held_out=accuracy(answered[of_class], labels[of_class]),
        others=accuracy(answered[~of_class], labels[~of_class]),
        all=accuracy(answered, labels),
    )


def describe_scores(report: Report, done: Fit, recalled: Recalled, data: Data) -> str:
    """The accuracies with all classes as a table, and a verdict."""
    size = sum(parameter.numel() for parameter in done.whole.encoder.parameters())
    count, asked = (len(images.labels) for images in data)
    return f"""
Test images told right:

  {report.memory:6.1%}  attention to the memory ({size:,} parameters, {len(done.whole.losses)} steps in \
{done.whole.seconds:.0f} s)
  {report.neighbours:6.1%}  {NEIGHBOURS} nearest neighbours in pixels
  {report.logistic:6.1%}  logistic regression in pixels

{_verdict(report)}
Encoding took {recalled.seconds["encoding"]:.1f} s; attending from {asked:,} images to {count:,} memories took \
{recalled.seconds["attending"]:.2f} s.
"""


def _verdict(report: Report) -> str:
    gain = 100 * (report.memory - max(report.neighbours, report.logistic))
    if gain > 0:
        return f"Of 100 images the memory tells {gain:.1f} more right than the better of the others."
    return "The memory answers no better than pixels alone: train for longer."


def describe_appending(report: Report, settings: Settings) -> str:
    """The accuracies around the appending of a class, as a table."""
    name, before, after = CLASSES[settings.held_out], report.before, report.after
    return f"""\
A second encoder never saw the class "{name}". Its memory held the images of the other classes; then those of this one
were appended, without a step of training. Test images told right:

  before   after
  {before.held_out:6.1%}  {after.held_out:6.1%}  of the class "{name}"
  {before.others:6.1%}  {after.others:6.1%}  of the other classes
  {before.all:6.1%}  {after.all:6.1%}  of all

Afterwards images of this class pay {report.appended:.0%} of their attention to the memories that were appended.
"""
