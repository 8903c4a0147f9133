"""Accuracy of `anyattention train` with its default settings, repeated: `python -m benchmarks.accuracy digits`.

digits: 5 seeds (each draws other known labels), beside the same network with attention off and plain methods, on the
same labels; and the share of the attention that digits pay to digits of the same number. cora: 10 seeds on the public
split. tolokers: its ten splits. Every finished run is kept in results/accuracy-<name>.json, so that an interrupted
benchmark goes on where it stopped; other settings start anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anyattention.cli.training import settings_for
from anyattention.files import write_atomically
from anyattention.training import (
    NodeData,
    attention_within_classes,
    fit,
    load_digits,
    load_npz,
    metric_value,
    predict_logits,
)
from anyattention.training.baselines import run_baselines
from benchmarks.harness import RESULTS, environment

# What others reached on the same task, for comparison.
PUBLISHED = {
    "digits": None,
    "cora": "GAT 0.830 +- 0.007 (Velickovic et al., 2018, 100 runs)",
    "tolokers": "GAT about 0.837 (Platonov et al., 2023, deeper and wider networks)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the default settings, repeated.")
    parser.add_argument("name", choices=tuple(PUBLISHED))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fresh", action="store_true", help="forget the runs that were kept")
    parser.add_argument("--runs", type=int, nargs="+", help="these only, so that several processes share the work")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name = arguments.name
    path = RESULTS / f"accuracy-{name}.json"
    if arguments.fresh:
        path.unlink(missing_ok=True)
    runs: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for number, (data, split, seed) in enumerate(tasks(name)):
        config, training = settings_for(data, {"seed": seed})
        own = {"model": config.to_dict(), "training": {**vars(training), "seed": "as each run says"}}
        if not settings:
            settings, runs = own, kept_runs(path, own)
        is_done = any((done["split"], done["seed"]) == (split, seed) for done in runs)
        if is_done or (arguments.runs and number not in arguments.runs):
            continue
        started = time.monotonic()
        done = fit(data, data.splits[split], config, training)
        if done.interrupted:
            raise KeyboardInterrupt
        test = data.splits[split].test
        score = metric_value(data.metric, predict_logits(done.model, data)[test], data.labels[test])
        run = {
            "split": split,
            "seed": seed,
            "test": score,
            "validation": done.best.validation_score,
            "best_epoch": done.best.number,
            "epochs": done.epochs,
            "seconds": round(time.monotonic() - started, 1),
        }
        if name == "digits":
            learnt, evenly = attention_within_classes(done.model, data, test)
            run["attention within the class"] = {"learnt": learnt, "evenly paid": evenly}
            off = fit(data, data.splits[split], replace(config, equal_weights=True), training)
            score = metric_value(data.metric, predict_logits(off.model, data)[test], data.labels[test])
            run["baselines"] = {"attention off": {"test": score, "validation": off.best.validation_score}}
            run["baselines"] |= {
                result.name: {
                    "test": result.test_accuracy,
                    "validation": result.validation_accuracy,
                    "setting": result.setting,
                }
                for result in run_baselines(data, data.splits[split])
            }
        # Another process may have finished runs of its own meanwhile.
        runs = sorted([*kept_runs(path, settings), run], key=lambda run: (run["split"], run["seed"]))
        print(json.dumps(run), flush=True)
        write(path, name, data.metric, settings, runs)
    print(json.dumps(summary(runs), indent=2))


def tasks(name: str) -> Iterator[tuple[NodeData, int, int]]:
    """Data, split and seed of each run."""
    if name == "digits":
        for seed in range(5):
            yield load_digits(seed), 0, seed
        return
    folder = Path(os.environ.get("ANYATTENTION_DATA") or Path(__file__).parents[1] / "../shared/data")
    data = load_npz(folder / f"{name}.npz")
    for number in range(10):
        yield (data, 0, number) if name == "cora" else (data, number, 0)


def kept_runs(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an earlier call with the same settings."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    return earlier["runs"] if earlier["settings"] == settings else []


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the test scores, the baselines' beside them."""
    values = {"anyattention": [run["test"] for run in runs]}
    for baseline in runs[0].get("baselines", ()):
        values[baseline] = [run["baselines"][baseline]["test"] for run in runs]
    return {
        name: {
            "mean": statistics.fmean(scores),
            "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        }
        for name, scores in values.items()
    }


def write(path: Path, name: str, metric: str, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    source = "digits" if name == "digits" else f"{name}.npz"
    result = {
        "workload": f"accuracy {name}",
        "metric": f"test {metric}",
        "command": f"anyattention train --data {source}"
        + (" --seed N, N from 0" if name != "tolokers" else " (all ten splits)"),
        "summary": summary(runs),
        "published": PUBLISHED[name],
        "environment": environment(),
        "settings": settings,
        "runs": runs,
    }
    shares = [run["attention within the class"] for run in runs if "attention within the class" in run]
    if shares:
        result["attention within the class"] = {
            kind: statistics.fmean(share[kind] for share in shares) for kind in shares[0]
        }
    RESULTS.mkdir(exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
