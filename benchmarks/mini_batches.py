"""Training in mini-batches beside training on all nodes at once: `python -m benchmarks.mini_batches`.

The ten splits of Tolokers, each in both ways, with the same network and the same number of epochs at most: the score on
the test labels, the seconds of a fit, and the most memory that a training step takes. Validation, after each epoch, is
over the whole graph in both. The settings of the batches were chosen on the validation labels of two splits.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from anyattention.cli.training import settings_for
from anyattention.training import FitSettings, NodeClassifier, NodeData, fit, metric_value, predict_logits
from anyattention.training.data import Split
from anyattention.training.fitting import classify
from anyattention.training.mini_batches import batch_loader, classify_seeds
from benchmarks.accuracy import tasks
from benchmarks.harness import write_result
from benchmarks.peak_memory import peak_memory

IN_BATCHES: dict[str, Any] = {"batch_size": 1024, "fanout": (25, 25), "learning_rate": 0.02}


def main() -> None:
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for data, number, seed in tasks("tolokers"):
        config, all_nodes = settings_for(data, {"seed": seed})
        both = {"all nodes": all_nodes, "in batches": replace(all_nodes, **IN_BATCHES)}
        runs.append({name: run(data, data.splits[number], config, each) for name, each in both.items()})
        print(number, json.dumps(runs[-1]), flush=True)
    cases = {name: summary([each[name] for each in runs]) for name in ("all nodes", "in batches")}
    points = 100 * (cases["in batches"]["ROC AUC"] - cases["all nodes"]["ROC AUC"])
    write_result(
        "mini_batches",
        {
            **cases,
            "points gained": points,
            "splits": len(runs),
            "settings": {**IN_BATCHES, "fanout": IN_BATCHES["fanout"][0]},
        },
    )


def run(data: NodeData, split: Split, config: Any, settings: FitSettings) -> dict[str, float]:
    """One fit, and then the memory of the steps of one epoch more."""
    started = time.monotonic()
    done = fit(data, split, config, settings)
    seconds = time.monotonic() - started
    score = metric_value(data.metric, predict_logits(done.model, data)[split.test], data.labels[split.test])
    assert isinstance(done.model, NodeClassifier)
    model = done.model.train()
    logits = [lambda: (classify(model, data).output[split.train], data.labels[split.train])]
    if settings.batch_size is not None and settings.fanout is not None:
        loader = batch_loader(data, split.train, settings.batch_size, settings.fanout, settings.seed)
        logits = [partial(classify_seeds, model, data, sampled) for sampled in loader]
    peak = max(peak_memory(lambda each=each: F.cross_entropy(*each()).backward()) or 0 for each in logits)
    return {"ROC AUC": score, "epochs": done.epochs, "seconds": seconds, "MiB of a step": peak / 2**20}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Means over the splits, and the spread of the score."""
    found = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
    return {**found, "standard deviation": statistics.stdev(run["ROC AUC"] for run in runs)}


if __name__ == "__main__":
    main()
