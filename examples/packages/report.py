"""What the training on packages came to, in numbers and in words."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from examples.packages.baselines import BASELINES, run_baseline
from examples.packages.data import Packages
from examples.packages.inputs import Inputs
from examples.packages.model import Settings
from examples.packages.train import Fit, Shares, accuracy, predict, relation_shares

__all__ = [
    "MEANINGS",
    "Report",
    "describe_data",
    "describe_scores",
    "describe_shares",
    "measure",
    "measure_baselines",
]

MEANINGS = {
    "depends": "packages that depend on it",
    "recommends": "packages that recommend it",
    "suggests": "packages that suggest it",
    "enhances": "packages that enhance it",
    "rev_depends": "packages it depends on",
    "rev_recommends": "packages it recommends",
    "rev_suggests": "packages it suggests",
    "rev_enhances": "packages it enhances",
    "rev_built_from": "the source it is built from",
    "rev_kept_by": "its maintainer",
}
"""Whom a package attends to along each relation."""

_NO_BASELINES = "Logistic regression on the same packages is added by --baselines; it takes minutes."


class Report(NamedTuple):
    """What is said of the network.

    Attributes:
        scores: the accuracy on training, validation and test packages.
        predicted: the sections of the test packages.
        shares: of the attention and of the links of the test packages, by relation.
    """

    scores: dict[str, float]
    predicted: Tensor
    shares: Shares


def describe_data(packages: Packages, settings: Settings) -> str:
    """What is learnt."""
    counts, edges = packages.graph.num_nodes, packages.graph.num_edges
    step = f"samples of {settings.batch:,} packages" if settings.batch else "a fifth of them in each step"
    return f"""\
{counts["package"]:,} packages, {counts["source"]:,} sources and {counts["maintainer"]:,} maintainers, joined by \
{edges // 2:,} links, and {packages.num_words:,} words of
their descriptions. A network learns to tell which of {len(packages.classes)} sections a package is in, from \
{len(packages.train):,} packages
({step}); {len(packages.validation):,} are for validation and {len(packages.test):,} for the test.
"""


def measure(fit: Fit, packages: Packages, inputs: Inputs) -> Report:
    """The accuracies and the attention of a training."""
    parts = {"train": packages.train, "validation": packages.validation, "test": packages.test}
    predicted = {name: predict(fit.model, inputs, nodes) for name, nodes in parts.items()}
    scores = {name: accuracy(predicted[name], nodes, packages.labels) for name, nodes in parts.items()}
    return Report(scores, predicted["test"], relation_shares(fit.model, inputs, packages.test))


def measure_baselines(packages: Packages, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Logistic regression on words, and on words and neighbours' words."""
    return {name: run_baseline(name, packages, inputs) for name in BASELINES}


def describe_scores(report: Report, packages: Packages, baselines: dict[str, dict[str, Any]]) -> str:
    """The accuracies as a table, and a verdict."""
    commonest = float(packages.labels[packages.test].bincount().max()) / len(packages.test)
    rows = [
        (report.scores["test"], "test: this network"),
        *((scores["test"], f"test: logistic regression on {name}") for name, scores in baselines.items()),
        (commonest, "test: the commonest section for all"),
        (report.scores["validation"], "validation: this network"),
        (report.scores["train"], "the packages it learnt from"),
    ]
    lines = ["Share of packages whose section is told:\n", *(f"  {score:.4f}  {name}" for score, name in rows), ""]
    best = max([commonest, *(scores["test"] for scores in baselines.values())])
    if report.scores["test"] <= best:
        lines.append("It has not learnt more than the others: train for longer.")
    elif baselines:
        lines.append(f"That is {100 * (report.scores['test'] - best):.1f} points more than the best of the others.")
    if not baselines:
        lines.append(_NO_BASELINES)
    return "\n".join([*lines, ""])


def describe_shares(shares: Shares) -> str:
    """The attention along each relation as a table, the most attended first."""
    lines = [
        "Where the attention of test packages goes, beside the links that lead there:\n",
        "  attention   links   a package attends to",
    ]
    found = {name: (float(own.mean()), float(shares.links[name].mean())) for name, own in shares.attention.items()}
    for name, (paid, linked) in sorted(found.items(), key=lambda item: -item[1][0]):
        lines.append(f"  {paid:9.1%}  {linked:6.1%}   {MEANINGS[name]}")
    return "\n".join([*lines, ""])
