"""Draws a language model: its pattern, its loss, and what one head attends to near the end of a passage."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.training.extras import import_demo
from examples.language_model.train import Fit

__all__ = ["Reference", "draw"]

_PURPOSE = "the picture of the attention"
_QUERIES, _KEYS = 24, 56


class Reference(NamedTuple):
    """A line to compare the loss with: its name, and its bits per byte."""

    name: str
    bits: float


class _Head(NamedTuple):
    """One head of one block, both from 0, and its weights `(queries, keys)` over a passage's last bytes."""

    block: int
    head: int
    weights: Tensor


def draw(fit: Fit, passage: Tensor, references: list[Reference]) -> bytes:
    """A PNG picture: the pattern, the loss of each step, and attention over the last bytes of a passage.

    Args:
        fit: a training, whose model has a pattern.
        passage: int64 `(length,)`, as long as the model was trained on, or shorter.
        references: drawn beside the loss.

    Returns:
        The bytes of the file; no window is opened and no figure of pyplot's is touched.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InvalidInputError: the model has no pattern.
    """
    figures = import_demo("matplotlib.figure", _PURPOSE)
    agg = import_demo("matplotlib.backends.backend_agg", _PURPOSE)
    pattern = fit.model.pattern
    if pattern is None:
        raise InvalidInputError(argument="fit", expected="a model with a pattern", actual="none")
    length = len(passage)
    graph = pattern.to_graph(length, length)
    weights = fit.model.weights(passage)
    figure = figures.Figure(figsize=(15, 10.5), facecolor="white", layout="constrained")
    agg.FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    left, middle, right = top.subplots(1, 3, width_ratios=(1, 1.2, 1.2))
    pattern.draw(length, axes=left)
    left.set_title(f"Who may attend to whom: {pattern.density(length):.1%} of all pairs")
    _draw_loss(middle, fit.bits, references)
    distance = graph.query_index - graph.key_index
    near_end = graph.query_index >= length - max(1, length // 8)
    _draw_distances(right, [block[near_end] for block in weights], distance[near_end])
    _draw_weights(bottom, _choose_head(weights, graph.query_index, graph.key_index, length), passage)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _draw_loss(axes: Any, bits: list[float], references: list[Reference]) -> None:
    steps = torch.arange(1, len(bits) + 1)
    axes.plot(steps.numpy(), bits, color="#b8cbe6", linewidth=1, label="each step's own passage")
    span = max(1, len(bits) // 20)
    if span > 1:
        smooth = torch.tensor(bits).unfold(0, span, 1).mean(1)
        axes.plot(steps[span - 1 :].numpy(), smooth.numpy(), color="#1f5fbf", linewidth=2, label=f"mean of {span}")
    for reference, style in zip(references, ("--", ":", "-"), strict=False):
        axes.axhline(reference.bits, color="#333333", linestyle=style, linewidth=1.2, label=reference.name)
    axes.set(xlabel="step", ylabel="bits per byte", title="The training loss", ylim=(0, max(6.0, bits[-1])))
    axes.legend(fontsize=9, loc="lower left")


def _draw_distances(axes: Any, blocks: list[Tensor], distance: Tensor) -> None:
    """The mean weight by how far back, a line for each block."""
    size = int(distance.max()) + 1
    counts = distance.bincount(minlength=size)
    for number, weights in enumerate(blocks, 1):
        sums = torch.zeros(size).index_add_(0, distance, weights.mean(1))
        axes.plot((sums / counts).numpy(), linewidth=1.5, label=f"block {number}")
    axes.axhline(1 / size, color="#333333", linestyle=":", linewidth=1.2, label="paid evenly")
    axes.set(xlabel="bytes back", ylabel="weight, mean of the heads", title="How far back they look")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)


def _choose_head(weights: list[Tensor], query_index: Tensor, key_index: Tensor, length: int) -> _Head:
    """The head that is most decided about keys other than the byte itself."""
    queries, keys = min(_QUERIES, length), min(_KEYS, length)
    shown = (query_index >= length - queries) & (key_index >= length - keys)
    rows, columns = query_index[shown] - (length - queries), key_index[shown] - (length - keys)
    heads = []
    for block, own in enumerate(weights):
        matrix = torch.zeros(own.shape[1], queries, keys)
        matrix[:, rows, columns] = own[shown].T
        heads += [_Head(block, head, matrix[head]) for head in range(len(matrix))]
    itself = (torch.arange(queries), torch.arange(queries) + keys - queries)

    def decided(head: _Head) -> float:
        elsewhere = head.weights.clone()
        elsewhere[itself] = 0
        return float(elsewhere.amax(1).mean())

    return max(heads, key=decided)


def _draw_weights(figure: Any, head: _Head, passage: Tensor) -> None:
    axes = figure.subplots()
    queries, keys = head.weights.shape
    image = axes.imshow(head.weights.numpy(), cmap="Blues", vmin=0, aspect="auto", interpolation="none")
    letters = [_letter(byte) for byte in passage[-keys:].tolist()]
    axes.set_xticks(range(keys), letters, family="monospace", fontsize=10)
    axes.set_yticks(range(queries), letters[-queries:], family="monospace", fontsize=9)
    axes.set(xlabel="key: the last bytes of a held-out passage", ylabel="query: the last of the same bytes")
    axes.set_title(
        f"What head {head.head + 1} of block {head.block + 1}, the most decided, attends to in order to guess the next "
        f"byte (· is a space, ¶ a line's end; {head.weights.sum(1).mean():.0%} of its weight is on these keys)"
    )
    figure.colorbar(image, ax=axes, label="weight", pad=0.01)


def _letter(byte: int) -> str:
    names = {9: "→", 10: "¶", 32: "·"}
    return names.get(byte) or (chr(byte) if 32 < byte < 127 else "□")
