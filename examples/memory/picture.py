"""Draws a memory: what queries attend to, the losses, the latent space, and how many answers are right."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention.training.extras import import_demo
from examples.memory.images import CLASSES, Data
from examples.memory.model import Settings
from examples.memory.recall import Answers, Pixels, Recalled
from examples.memory.train import Fit

__all__ = ["draw"]

_PURPOSE = "the picture of the attention"
# Okabe and Ito's colours, which the colour-blind tell apart.
_OWN, _OTHER, _RIGHT, _WRONG = "#0072b2", "#e69f00", "#009e73", "#d55e00"
_COLUMNS, _ROWS, _SHOWN = 2, 3, 7
# Room for an image and the words below it, in widths of an image.
_STEP_ACROSS, _STEP_DOWN = 1.12, 1.85
_POINTS = 100


class _Query(NamedTuple):
    """A test image by its number, and what it was answered."""

    number: int
    answers: Answers
    about: str


def draw(done: Fit, data: Data, recalled: Recalled, pixels: Pixels, settings: Settings) -> bytes:
    """A PNG picture: test images and the memories they attend to, losses, the latent space, and accuracies.

    Args:
        done: the training of both encoders.
        data: the images.
        recalled: what the memories say of the test's images.
        pixels: what simpler methods say of them.
        settings: which class was held out.

    Returns:
        The bytes of the file; no window is opened and no figure of pyplot's is touched.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = import_demo("matplotlib.figure", _PURPOSE)
    agg = import_demo("matplotlib.backends.backend_agg", _PURPOSE)
    pictures = import_demo("PIL.Image", _PURPOSE)
    figure = figures.Figure(figsize=(15, 10.5), facecolor="white", layout="constrained")
    agg.FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    _draw_queries(top.subplots(1, _COLUMNS), _choose_queries(data, recalled, settings), data)
    loss, space, classes, appended = bottom.subplots(1, 4, width_ratios=(0.9, 1.25, 1.1, 0.75))
    _draw_losses(loss, done, settings)
    _draw_space(space, recalled.keys, data.test.labels)
    _draw_classes(classes, recalled, pixels, data.test.labels)
    _draw_appending(appended, recalled, data.test.labels, settings)
    content, drawn = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    # Many greys make a large file; with a palette it is a quarter.
    image = pictures.open(drawn).convert("RGB")
    image.quantize(256, method=pictures.Quantize.FASTOCTREE, dither=pictures.Dither.NONE).save(content, "png")
    return content.getvalue()


def _choose_queries(data: Data, recalled: Recalled, settings: Settings) -> list[_Query]:
    """Right answers, wrong ones, and images of the class held out, as far as there are any: the first of each."""
    labels = data.test.labels
    is_right = recalled.answers.labels == labels
    grown_right = (recalled.after.labels == labels) & (labels == settings.held_out)
    named = f'after "{CLASSES[settings.held_out]}" was appended'
    return [
        *[_Query(number, recalled.answers, "") for number in _first_of_classes(is_right, labels)[:2]],
        *[_Query(number, recalled.answers, "") for number in _first_of_classes(~is_right, labels)[:2]],
        *[_Query(number, recalled.after, named) for number in grown_right.nonzero().flatten().tolist()[:2]],
    ]


def _first_of_classes(mask: Tensor, labels: Tensor) -> list[int]:
    """The first image of each class among those of a mask, in the order of the images."""
    first = {int(labels[number]): number for number in mask.nonzero().flatten().flip(0).tolist()}
    return sorted(first.values())


def _draw_queries(columns: Any, queries: list[_Query], data: Data) -> None:
    """Each query on the left of a row, and the memories it attends to most, with their weights."""
    for axes in columns:
        axes.set(xlim=(-0.1, (_SHOWN + 1) * _STEP_ACROSS + 0.3), ylim=(_ROWS * _STEP_DOWN - 0.4, -0.5), aspect="equal")
        axes.axis("off")
    for position, query in enumerate(queries):
        axes, row = columns[position // _ROWS], position % _ROWS
        label, answers = int(data.test.labels[query.number]), query.answers
        answered = int(answers.labels[query.number])
        share = float(answers.probabilities[query.number, answered])
        words = f"{CLASSES[label]}, {'told right' if answered == label else f'told wrong as {CLASSES[answered]}'}"
        axes.text(
            0,
            row * _STEP_DOWN - 0.06,
            f"{words} ({share:.0%} of the attention) {query.about}",
            fontsize=9.5,
            va="bottom",
        )
        _draw_image(axes, data.test.pixels[query.number], 0, row, "query", "#222222")
        for place in range(min(_SHOWN, answers.weights.shape[1])):
            memory = int(answers.memories[query.number, place])
            named = int(data.train.labels[memory])
            text = f"{CLASSES[named]}\n{float(answers.weights[query.number, place]):.1%}"
            color = _RIGHT if named == label else _WRONG
            _draw_image(axes, data.train.pixels[memory], place + 1.2, row, text, color)


def _draw_image(axes: Any, pixels: Tensor, column: float, row: int, text: str, color: str) -> None:
    left, top = column * _STEP_ACROSS, row * _STEP_DOWN
    axes.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=255, extent=(left, left + 1, top + 1, top))
    frame = [left, left + 1, left + 1, left, left], [top, top, top + 1, top + 1, top]
    axes.plot(*frame, color=color, linewidth=2)
    axes.text(left + 0.5, top + 1.04, text, fontsize=8, ha="center", va="top", color=color, linespacing=1.1)


def _draw_losses(axes: Any, done: Fit, settings: Settings) -> None:
    for trained, color, name in (
        (done.without, _OTHER, f'without "{CLASSES[settings.held_out]}"'),
        (done.whole, _OWN, "all classes"),
    ):
        losses = torch.tensor(trained.losses)
        steps = torch.arange(1, len(losses) + 1)
        axes.plot(steps.numpy(), losses.numpy(), color=color, alpha=0.3, linewidth=1)
        span = max(1, len(losses) // 20)
        smooth = losses.unfold(0, span, 1).mean(1)
        axes.plot(steps[span - 1 :].numpy(), smooth.numpy(), color=color, linewidth=2, label=f"{name}, mean of {span}")
    axes.set(xlabel="step", ylabel="-log of the attention to one's class", ylim=(0, None), title="The training loss")
    axes.legend(fontsize=9)


def _draw_space(axes: Any, keys: Tensor, labels: Tensor) -> None:
    """The directions of keys along their two widest axes, of some test images of each class."""
    directions = torch.nn.functional.normalize(keys, dim=1)
    directions = directions - directions.mean(0)
    places = directions @ torch.linalg.svd(directions, full_matrices=False).Vh[:2].T
    for label, name in enumerate(CLASSES):
        x, y = places[labels == label][:_POINTS].T
        axes.plot(x, y, ".", color=f"C{label}", markersize=6, alpha=0.6, mew=0, label=name)
    axes.set(xticks=[], yticks=[], title="Directions of keys, two main axes", aspect="equal", adjustable="datalim")
    legend = axes.legend(
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=4,
        markerscale=2,
        columnspacing=0.8,
        handletextpad=0,
    )
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _draw_classes(axes: Any, recalled: Recalled, pixels: Pixels, labels: Tensor) -> None:
    """The share of right answers of each class."""
    for answered, color, move, name in (
        (recalled.answers.labels, _OWN, -0.2, "memory"),
        (pixels.neighbours, _OTHER, 0.2, "neighbours in pixels"),
    ):
        shares = [float((answered[labels == label] == label).double().mean()) for label in range(len(CLASSES))]
        axes.barh([label + move for label in range(len(CLASSES))], shares, 0.4, color=color, label=name)
    axes.set(yticks=range(len(CLASSES)), yticklabels=CLASSES, xlim=(0, 1), xlabel="share told right", title="By class")
    axes.invert_yaxis()
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=2)


def _draw_appending(axes: Any, recalled: Recalled, labels: Tensor, settings: Settings) -> None:
    """The share of right answers before and after a class was appended, of this class and of the others."""
    of_class = labels == settings.held_out
    for answers, color, move, name in (
        (recalled.before, "#bbbbbb", -0.2, "before"),
        (recalled.after, _OWN, 0.2, "after"),
    ):
        is_right = (answers.labels == labels).double()
        for place, which in enumerate((of_class, ~of_class)):
            share = float(is_right[which].mean())
            bar = axes.bar(place + move, share, 0.4, color=color, label=name if place == 0 else None)
            axes.bar_label(bar, [f"{share:.0%}"], fontsize=9)
    name = CLASSES[settings.held_out]
    axes.set(xticks=(0, 1), xticklabels=(f'"{name}"', "the others"), ylim=(0, 1.1), ylabel="share told right")
    axes.set_title(f'"{name}" appended')
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
