"""One training run, from the data to the files: what `train` and `demo` share."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyattention.cli.progress import progress_bar
from anyattention.errors import InvalidConfigError, InvalidInputError
from anyattention.files import make_folder, write_together
from anyattention.saving import model_files
from anyattention.training import (
    Fit,
    FitSettings,
    HeterogeneousNodeClassifierConfig,
    HeterogeneousNodeData,
    NodeClassifier,
    NodeClassifierConfig,
    NodeData,
    accuracy,
    draw_attention,
    fit,
    metric_value,
    predict_logits,
    preset_for,
)
from anyattention.training.data import AnyData
from anyattention.training.extras import is_installed
from anyattention.training.fitting import AnyConfig
from anyattention.training.reading import READING

if TYPE_CHECKING:
    from anyattention.training import Epoch

__all__ = ["METRIC_NAMES", "Run", "chosen_splits", "name_what_is_missing", "run_training", "settings_for", "write_run"]

# As people call them.
METRIC_NAMES = {"accuracy": "accuracy", "roc_auc": "ROC AUC"}


@dataclass(frozen=True, eq=False)
class Run:
    """What came of a training run.

    Attributes:
        data: what it was trained on.
        settings: of the training.
        fits: by the number of their split; only those that were reached, when Ctrl-C ended the run.
        scores: the scores on the test labels, by name (accuracy, and roc_auc where the data asks for it), by split.
        chosen: the split whose model is kept: the one with the best validation score.
    """

    data: AnyData
    settings: FitSettings
    fits: dict[int, Fit]
    scores: dict[int, dict[str, float]]
    chosen: int

    def mean(self, metric: str) -> float:
        """The mean over the splits of one test score."""
        return statistics.fmean(scores[metric] for scores in self.scores.values())

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return any(fit.interrupted for fit in self.fits.values())


def settings_for(data: AnyData, given: dict[str, Any]) -> tuple[AnyConfig, FitSettings]:
    """The data's preset, with what was given in its place; None means not given.

    Raises:
        InvalidConfigError: a value is out of range, two do not fit, or the network has no such setting.
    """
    preset = preset_for(data)
    chosen = {name: value for name, value in given.items() if value is not None}
    training = {item.name for item in fields(FitSettings)}
    model = {**preset.model, **{name: value for name, value in chosen.items() if name not in training}}
    if isinstance(data, HeterogeneousNodeData):
        known = {item.name for item in fields(HeterogeneousNodeClassifierConfig)}
        for name in set(model) - known:
            option = f"--{name.replace('_', '-')}"
            raise InvalidConfigError(argument=option, expected="data of one type", actual="several types of nodes")
        config = HeterogeneousNodeClassifierConfig(**data.sizes, **model)
    else:
        if "dropout" in chosen and "attention_dropout" not in chosen:
            # A dropout that was asked for is meant for both.
            model["attention_dropout"] = None
        config = NodeClassifierConfig(**data.sizes, **model)
    return config, FitSettings(**{**preset.fit, **{name: value for name, value in chosen.items() if name in training}})


def chosen_splits(data: AnyData, split: int | None) -> list[int]:
    """The numbers of the splits to train on: the one given, or all.

    Raises:
        InvalidInputError: there is no such split.
    """
    if split is None:
        return list(range(len(data.splits)))
    if split >= len(data.splits):
        raise InvalidInputError(argument="--split", expected=f"from 0 to {len(data.splits) - 1}", actual=split)
    return [split]


def name_what_is_missing() -> None:
    """Say on stderr, a line for each package of the `demo` extra, what a training goes without."""
    for package, loss in (("tqdm", "no progress bar"), ("matplotlib", "no picture of the attention")):
        if not is_installed(package):
            print(f"{package} is not installed: {loss} (pip install 'anyattention[demo]')", file=sys.stderr)


def run_training(data: AnyData, splits: list[int], config: AnyConfig, settings: FitSettings) -> Run:
    """Train on each split, one after the other; then read the test labels.

    Raises:
        NumericalInstabilityError: the loss, or a class score, is NaN or infinite.
        KeyboardInterrupt: Ctrl-C before a first epoch had finished.
    """
    fits: dict[int, Fit] = {}
    for number in splits:
        try:
            fits[number] = _fit_with_bar(data, number, config, settings)
        except KeyboardInterrupt:
            if not fits:
                raise
            last = max(fits)
            fits[last] = fits[last]._replace(interrupted=True)
        if any(done.interrupted for done in fits.values()):
            break
    chosen = max(fits, key=lambda number: fits[number].best.validation_score)
    scores = {number: _test_scores(data, number, done) for number, done in fits.items()}
    return Run(data, settings, fits, scores, chosen)


def write_run(run: Run, folder: Path) -> list[str]:
    """Write model.safetensors, config.json, metrics.json, for named classes reading.json, and, for data of one type
    where matplotlib is installed, attention.png.

    Returns:
        The names of the files.

    Raises:
        InvalidInputError: the folder cannot be written.
    """
    model = run.fits[run.chosen].model
    reading = run.data.reading
    files = model_files(model, None if reading is None else {READING: reading.to_json()})
    if reading is not None and reading.classes:
        files["reading.json"] = reading.to_json().encode()
    files |= {"metrics.json": (json.dumps(_metrics(run), indent=2) + "\n").encode()}
    if isinstance(run.data, NodeData) and isinstance(model, NodeClassifier) and is_installed("matplotlib"):
        files["attention.png"] = draw_attention(model, run.data, run.data.splits[run.chosen])
    # Those of an earlier run would be of another network.
    write_together(make_folder(folder), files, without=("metrics.json", "attention.png", "reading.json"))
    return list(files)


def _fit_with_bar(data: AnyData, number: int, config: AnyConfig, settings: FitSettings) -> Fit:
    label = "training" if len(data.splits) == 1 else f"split {number + 1} of {len(data.splits)}"
    name = f"validation {METRIC_NAMES[data.metric]}"
    with progress_bar(label, settings.epochs, "epoch") as bar:

        def show(epoch: Epoch) -> None:
            bar.set_postfix({"loss": f"{epoch.loss:.3f}", name: f"{epoch.validation_score:.3f}"}, refresh=False)
            bar.update()

        done = fit(data, data.splits[number], config, settings, show)
    if done.interrupted:
        print(f"Interrupted after {done.epochs} epochs; the best one, {done.best.number}, is kept.", file=sys.stderr)
    return done


def _test_scores(data: AnyData, number: int, done: Fit) -> dict[str, float]:
    test = data.splits[number].test
    logits, labels = predict_logits(done.model, data)[test], data.labels[test]
    scores = {"accuracy": accuracy(logits, labels)}
    scores[data.metric] = metric_value(data.metric, logits, labels)
    return scores


def _metrics(run: Run) -> dict[str, Any]:
    data, chosen = run.data, run.fits[run.chosen]
    metrics: dict[str, Any] = {"data": data.name, "metric": data.metric}
    for metric in next(iter(run.scores.values())):
        values = [scores[metric] for scores in run.scores.values()]
        metrics[f"test_{metric}"] = statistics.fmean(values)
        if len(values) > 1:
            metrics[f"test_{metric}_standard_deviation"] = statistics.stdev(values)
    metrics["splits"] = [
        {
            "split": number,
            "best_epoch": done.best.number,
            "epochs": done.epochs,
            f"validation_{data.metric}": done.best.validation_score,
            **{f"test_{metric}": value for metric, value in run.scores[number].items()},
        }
        for number, done in run.fits.items()
    ]
    metrics["saved_split"] = run.chosen
    metrics["interrupted"] = run.interrupted
    metrics["nodes"] = data.num_nodes
    metrics["edges"] = data.num_edges
    metrics["labels"] = {part: len(nodes) for part, nodes in data.splits[run.chosen]._asdict().items()}
    metrics["model"] = chosen.model.config.to_dict()
    metrics["training"] = vars(run.settings)
    return metrics
