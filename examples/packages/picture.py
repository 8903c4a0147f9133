"""Draws which kind of link tells the section: the attention by relation and section, and the accuracy by section."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from anyattention.training.extras import import_demo
from examples.packages.data import Packages
from examples.packages.report import MEANINGS, Report

__all__ = ["draw"]

_PURPOSE = "the picture of the attention"
_OWN, _LINKS = "#0072b2", "#bbbbbb"


def draw(losses: list[float], report: Report, packages: Packages) -> bytes:
    """A PNG picture: the loss, attention beside links by relation, both by section, and the accuracy by section.

    Args:
        losses: of each step.
        report: of the trained network.
        packages: of whose test packages the report is.

    Returns:
        The bytes of the file; no window is opened and no figure of pyplot's is touched.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = import_demo("matplotlib.figure", _PURPOSE)
    agg = import_demo("matplotlib.backends.backend_agg", _PURPOSE)
    figure = figures.Figure(figsize=(15, 10.5), facecolor="white", layout="constrained")
    agg.FigureCanvasAgg(figure)
    (loss, relations), (sections, scores) = figure.subplots(
        2, 2, gridspec_kw={"width_ratios": [1.6, 1], "height_ratios": [1, 2.6]}
    )
    loss.plot(range(1, len(losses) + 1), losses, color=_OWN, linewidth=2)
    loss.set(xlabel="step", ylabel="loss (nats, with label smoothing)", title="The training loss", ylim=(0, None))
    labels = packages.labels[packages.test]
    present = labels.unique()
    order = sorted(report.shares.attention, key=lambda name: -float(report.shares.attention[name].mean()))
    _draw_relations(relations, report, order)
    _draw_sections(figure, sections, report, order, labels, present, packages.classes)
    _draw_scores(scores, report.predicted == labels, labels, present, packages.classes)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=75)
    return content.getvalue()


def _draw_relations(axes: Any, report: Report, order: list[str]) -> None:
    places = torch.arange(len(order)).float()
    for shares, color, name, shift in (
        (report.shares.attention, _OWN, "attention", -0.2),
        (report.shares.links, _LINKS, "links", 0.2),
    ):
        means = [100 * float(shares[each].mean()) for each in order]
        axes.barh((places + shift).tolist(), means, height=0.4, color=color, label=name)
    axes.set_yticks(places.tolist(), [MEANINGS[name] for name in order], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="share (%), mean over test packages", title="Where the attention goes, and the links")
    axes.legend(fontsize=8)


def _draw_sections(
    figure: Any, axes: Any, report: Report, order: list[str], labels: Tensor, present: Tensor, classes: list[str]
) -> None:
    """How much more attention than its share of the links each relation gets, in points, by section."""
    more = torch.stack([report.shares.attention[name] - report.shares.links[name] for name in order])
    means = 100 * torch.stack([more[:, labels == section].mean(1) for section in present])
    limit = max(1.0, float(means.abs().max()))
    image = axes.imshow(means.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(order)), [MEANINGS[name] for name in order], rotation=25, ha="right", fontsize=8)
    axes.set_yticks(range(len(present)), [classes[section] for section in present.tolist()], fontsize=7)
    axes.set_title("Which kind of link tells the section: attention beyond the share of the links, by true section")
    figure.colorbar(image, ax=axes, label="attention minus links (points)", pad=0.01)


def _draw_scores(axes: Any, is_right: Tensor, labels: Tensor, present: Tensor, classes: list[str]) -> None:
    shares = [100 * float(is_right[labels == section].double().mean()) for section in present]
    counts = labels.bincount(minlength=len(classes))
    axes.barh(range(len(present)), shares, color=_OWN)
    names = [f"{classes[section]} ({counts[section]:,})" for section in present.tolist()]
    axes.set_yticks(range(len(present)), names, fontsize=7)
    axes.set_ylim(len(present) - 0.5, -0.5)
    axes.set(xlim=(0, 100), xlabel="test packages told right (%)", title="Accuracy by section (test packages)")
