"""Draws what some test nodes attend to: the images themselves, or small node-link pictures."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention.training.data import NodeData, Split
from anyattention.training.extras import import_demo
from anyattention.training.fitting import classify
from anyattention.training.model import NodeClassifier

__all__ = ["draw_attention"]

_RIGHT, _WRONG, _QUIET, _UNLABELLED = "#1b7f4d", "#c0392b", "#666666", "#d9d9d9"
_PURPOSE = "the picture of the attention"


class _Attended(NamedTuple):
    """A test node, its predicted class, and its neighbours (itself included) by falling attention weight."""

    node: int
    predicted: int
    neighbours: list[int]
    weights: list[float]


def draw_attention(model: NodeClassifier, data: NodeData, split: Split) -> bytes:
    """A PNG picture of what some test nodes attend to in the second layer, which decides the class.

    Digits are drawn as the images themselves; other nodes as circles, with lines as wide as the attention.

    Args:
        model: a trained classifier; it is put into evaluation mode.
        data: what it classifies.
        split: its test nodes are drawn from.

    Returns:
        The bytes of the file; no window is opened and matplotlib's global state is not touched.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = import_demo("matplotlib.figure", _PURPOSE)
    agg = import_demo("matplotlib.backends.backend_agg", _PURPOSE)
    model.eval()
    with torch.no_grad():
        logits, weights = classify(model, data, return_weights="mean")
    assert isinstance(weights, Tensor)
    predicted = logits.argmax(1)
    shown = 8 if data.images is not None else 6
    nodes = _choose_nodes(data, split.test, predicted, shown)
    attended = [_attended(data, weights, node, int(predicted[node])) for node in nodes]
    if data.images is not None:
        figure = figures.Figure(figsize=(13, 8.6), facecolor="white")
        _draw_images(figure, data, data.images, split, predicted, attended)
    else:
        figure = figures.Figure(figsize=(13, 9.2), facecolor="white")
        _draw_neighbourhoods(figure, data, split, attended)
    agg.FigureCanvasAgg(figure)
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Names may be in scripts that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _choose_nodes(data: NodeData, test: Tensor, predicted: Tensor, count: int) -> list[int]:
    """Test nodes of many classes: about a quarter mistakes, where there are any, the others right.

    The order is drawn at random, always the same, and nodes with few neighbours come last.
    """
    order = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0), device="cpu")]
    degrees = data.graph.query_offsets.diff()[order]
    order = torch.cat([order[degrees >= 4], order[degrees < 4]])
    is_right = predicted[order] == data.labels[order]
    wrong = _by_turns(order[~is_right], data.labels)[: max(count // 4, count - int(is_right.sum()))]
    right = _by_turns(order[is_right], data.labels)[: count - len(wrong)]
    return right + wrong


def _by_turns(nodes: Tensor, labels: Tensor) -> list[int]:
    """The nodes, one of each class in turn."""
    by_class: dict[int, list[int]] = {}
    for node in nodes.tolist():
        by_class.setdefault(int(labels[node]), []).append(node)
    ranked = [(turn, label, node) for label, own in by_class.items() for turn, node in enumerate(own)]
    return [node for _, _, node in sorted(ranked)]


def _attended(data: NodeData, weights: Tensor, node: int, predicted: int) -> _Attended:
    graph = data.graph
    slots = slice(int(graph.query_offsets[node]), int(graph.query_offsets[node + 1]))
    keys, own = graph.keys_by_query[slots], weights[graph.edges_by_query[slots]]
    own, order = own.sort(descending=True, stable=True)
    return _Attended(node, predicted, keys[order].tolist(), own.tolist())


def _draw_images(
    figure: Any, data: NodeData, images: Tensor, split: Split, predicted: Tensor, attended: list[_Attended]
) -> None:
    """Two columns of rows: a test digit, then the digits it attends to most, each with its share."""
    known = set(split.train.tolist())
    right = float((predicted[split.test] == data.labels[split.test]).double().mean())
    _write_title(
        figure,
        "How the network reads a handwritten digit: it looks at similar ones",
        "On the left of each row, framed: a digit whose answer the network was not told. Right of it: the digits it "
        "paid most attention to, and their share.\n"
        f"Blue “told: 3”: one of the {len(known)} digits whose answer it was told. Green: read correctly. Red: a "
        f"mistake; of all test digits it reads {right:.0%} correctly.",
    )
    shown, top, height, half = 6, 0.845, 0.205, 0.485
    for place, row in enumerate(attended):
        left = 0.025 + half * (place % 2)
        bottom = top - height * (place // 2 + 1) + 0.075
        truth = int(data.labels[row.node])
        colour = _RIGHT if truth == row.predicted else _WRONG
        axes = _add_image(figure, [left, bottom, 0.075, 0.113], images[row.node], colour, 4)
        verdict = (
            f"read as {row.predicted}" if truth == row.predicted else f"read as {row.predicted},\nbut is a {truth}"
        )
        axes.set_xlabel(verdict, color=colour, fontsize=11, fontweight="bold", labelpad=5)
        for column, (neighbour, weight) in enumerate(zip(row.neighbours[:shown], row.weights, strict=False)):
            start = left + 0.103 + column * 0.058
            axes = _add_image(figure, [start, bottom + 0.012, 0.05, 0.0756], images[neighbour], "#bbbbbb", 1)
            name = "itself, " if neighbour == row.node else ""
            axes.set_xlabel(f"{name}{weight:.0%}", fontsize=9.5, labelpad=7)
            _add_bar(axes, weight / row.weights[0])
            if neighbour in known:
                axes.set_title(f"told: {int(data.labels[neighbour])}", fontsize=9, color="#1f5fbf", pad=2)
        rest = len(row.neighbours) - shown
        if rest > 0:
            share = sum(row.weights[shown:])
            figure.text(
                left + 0.103, bottom - 0.036, f"and {rest} more digits, {share:.0%}", fontsize=8.5, color=_QUIET
            )


def _add_image(figure: Any, place: list[float], image: Tensor, colour: str, width: float) -> Any:
    axes = figure.add_axes(place)
    axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(width)
    return axes


def _add_bar(axes: Any, share: float) -> None:
    """A bar under an image; the largest share of a row fills its width."""
    bar = {"color": "#e08a1e", "linewidth": 4, "solid_capstyle": "butt", "clip_on": False}
    axes.plot([0, share], [-0.08, -0.08], transform=axes.transAxes, **bar)


def _draw_neighbourhoods(figure: Any, data: NodeData, split: Split, attended: list[_Attended]) -> None:
    """A panel per test node: itself in the middle, the nodes it attends to most around it."""
    lines = import_demo("matplotlib.lines", _PURPOSE)
    palette = import_demo("matplotlib", _PURPOSE).colormaps["tab10"]
    colours = {label: palette(label % 10) for label in range(data.num_classes)}
    names = {label: _class_name(data, label) for label in colours}
    if (data.labels < 0).any():
        colours[-1], names[-1] = _UNLABELLED, "unlabelled"
    _write_title(
        figure,
        f"Whom some nodes of “{_plain(data.name)}” attend to when the network decides their class",
        "In the middle of each panel: a node whose class the network was not told. Around it: the nodes it is linked "
        "to and attends to most.\nThe wider the line, the more attention; the percentage is its share. The colour is a "
        "node's true class; a black ring marks a class the network was told.",
    )
    known = set(split.train.tolist())
    for place, row in enumerate(attended):
        axes = figure.add_axes([0.02 + 0.325 * (place % 3), 0.46 - 0.39 * (place // 3), 0.31, 0.355])
        _draw_neighbourhood(axes, data, row, colours, known)
    handles = [
        lines.Line2D([], [], marker="o", linestyle="", markersize=10, color=colour, label=names[label])
        for label, colour in colours.items()
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.005),
        ncols=min(len(handles), 10),
        frameon=False,
        fontsize=10,
    )


def _draw_neighbourhood(axes: Any, data: NodeData, row: _Attended, colours: dict[int, Any], known: set[int]) -> None:
    truth = int(data.labels[row.node])
    others = [pair for pair in zip(row.neighbours, row.weights, strict=True) if pair[0] != row.node]
    own_share = sum(row.weights) - sum(weight for _, weight in others)
    shown = others[:8]
    for position, (neighbour, weight) in enumerate(shown):
        angle = math.pi / 2 - 2 * math.pi * position / max(len(shown), 1)
        x, y = math.cos(angle), math.sin(angle)
        # The widest line of a panel is its strongest neighbour, whatever its share.
        width = 0.6 + 8 * weight / shown[0][1] if shown[0][1] > 0 else 0.6
        axes.plot([0, x], [0, y], color="#b0b0b0", linewidth=width, zorder=1, solid_capstyle="butt")
        ring = "black" if neighbour in known else "white"
        colour = colours[int(data.labels[neighbour])]
        axes.scatter([x], [y], s=230, color=[colour], edgecolors=ring, linewidths=2, zorder=2)
        axes.text(1.42 * x, 1.27 * y, f"{weight:.1%}", ha="center", va="center", fontsize=9.5)
    axes.scatter([0], [0], s=620, color=[colours[truth]], edgecolors="white", linewidths=2, zorder=3)
    axes.text(0, 0, f"{own_share:.0%}", ha="center", va="center", fontsize=9, color="white", zorder=4)
    is_right = truth == row.predicted
    predicted = _class_name(data, row.predicted)
    verdict = f"predicted {predicted}: " + ("right" if is_right else f"wrong, it is {_class_name(data, truth)}")
    axes.set_title(verdict, color=_RIGHT if is_right else _WRONG, fontsize=11.5, fontweight="bold", pad=4)
    extra = f"{len(shown)} of its {len(others)} neighbours" if len(others) > len(shown) else "all of its neighbours"
    axes.text(0, -1.58, f"{extra}; in the middle, its share for itself", ha="center", fontsize=9, color=_QUIET)
    axes.set_xlim(-1.9, 1.9)
    axes.set_ylim(-1.65, 1.5)
    axes.set_aspect("equal")
    axes.axis("off")


def _class_name(data: NodeData, label: int) -> str:
    """What the picture calls a class; where the source has names, that name."""
    return f"class {label}" if data.ids is None else f"“{_plain(data.class_names[label])}”"


def _plain(name: str) -> str:
    """A name from a file, short, and no formula where it has dollars."""
    short = name if len(name) <= 24 else f"{name[:23]}…"
    return short.replace("$", r"\$")


def _write_title(figure: Any, title: str, text: str) -> None:
    figure.text(0.025, 0.945, title, fontsize=18, fontweight="bold")
    figure.text(0.025, 0.925, text, fontsize=11, color="#333333", va="top", linespacing=1.5)
