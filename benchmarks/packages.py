"""Accuracy of `examples.packages`: `python -m benchmarks.packages --data FILE [--runs "full 0" "sampled 2" ...]`.

full, sampled: a fifth of the packages to learn from in a step, or 625 with 10 neighbours by relation. HGTConv (PyTorch
Geometric's), GAT (nn.GraphAttention over all relations and types as one graph): the same network with this layer in the
place of ours, as in full. 6 seeds each. words, neighbours: logistic regression. Each run is kept in
results/accuracy-debian.json when it has finished, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyattention import Graph
from anyattention.files import write_atomically
from anyattention.nn import GraphAttention
from benchmarks.harness import RESULTS, environment
from examples.packages.baselines import BASELINES, run_baseline
from examples.packages.data import Packages, load_packages
from examples.packages.guesses import with_guesses
from examples.packages.inputs import Batch, Inputs, prepare_inputs
from examples.packages.model import PackageClassifier, Settings
from examples.packages.train import accuracy, fit, predict

PATH = RESULTS / "accuracy-debian.json"
SAMPLED = {"batch": 625, "fanout": 10, "steps": 200, "learning_rate": 5e-3}


class HGTClassifier(PackageClassifier):
    """The network with PyTorch Geometric's HGTConv."""

    def __init__(self, inputs: Inputs, settings: Settings, classes: int) -> None:
        from torch_geometric.nn import HGTConv

        super().__init__(inputs, settings, classes)
        config = self.attention.config
        metadata = (list(config.widths), list(config.relations))
        self.attention: Any = HGTConv(config.widths, settings.width, metadata, settings.heads)

    def attend(self, x: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.attention(self.roles(x, batch), dict(batch.block.edge_index))["package"]


class GATClassifier(PackageClassifier):
    """The network with one graph of all relations and types."""

    def __init__(self, inputs: Inputs, settings: Settings, classes: int) -> None:
        super().__init__(inputs, settings, classes)
        self.attention: Any = GraphAttention(
            settings.width, settings.heads, in_features=(settings.width, settings.width), residual=True
        )

    def attend(self, x: dict[str, Tensor], batch: Batch) -> Tensor:
        firsts, count = {}, 0
        for kind, rows in x.items():
            firsts[kind], count = count, count + len(rows)
        edges = []
        for relation, nodes in batch.attended.items():
            sources, targets = batch.block.edge_index[relation[1], relation[1], relation[2]]
            edges.append(torch.stack([nodes[sources] + firsts[relation[0]], targets]))
        seeds = x["package"][: len(batch.seeds)]
        graph = Graph.from_edge_index(torch.cat(edges, 1), num_queries=len(seeds), num_keys=count)
        return self.attention((torch.cat(list(x.values())), seeds), graph).output


NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "full": (PackageClassifier, {}),
    "sampled": (PackageClassifier, SAMPLED),
    "HGTConv": (HGTClassifier, {}),
    "GAT": (GATClassifier, {}),
}
LOGISTIC = dict(zip(("words", "neighbours"), BASELINES, strict=True))
RUNS = [
    *(f"{kind} {seed}" for kind in NETWORKS for seed in range(6)),
    *LOGISTIC,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(os.environ.get("ANYATTENTION_DATA") or Path(__file__).parents[1] / "../shared/data")
    parser.add_argument("--data", type=Path, default=folder / "debian.npz")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="forget the runs that were kept")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, metavar="RUN")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.fresh:
        PATH.unlink(missing_ok=True)
    packages = load_packages(arguments.data)
    inputs = with_guesses(packages, prepare_inputs(packages))
    for name in arguments.runs:
        if name in kept_runs():
            continue
        run = run_one(name, packages, inputs)
        print(name, json.dumps(run), flush=True)
        # Another process may have finished runs of its own meanwhile.
        write({**kept_runs(), name: run})
    print(json.dumps(summary(kept_runs()), indent=2))


def run_one(name: str, packages: Packages, inputs: Inputs) -> dict[str, Any]:
    if name in LOGISTIC:
        return run_baseline(LOGISTIC[name], packages, inputs)
    kind, seed = name.split()
    network, changed = NETWORKS[kind]
    settings = Settings(**{**changed, "seed": int(seed)})
    done = fit(packages, inputs, settings, network=network)  # pyright: ignore[reportArgumentType]
    if done.interrupted:
        raise KeyboardInterrupt
    return {
        **{
            part: accuracy(predict(done.model, inputs, nodes), nodes, packages.labels)
            for part, nodes in (("validation", packages.validation), ("test", packages.test))
        },
        "seconds": round(done.seconds, 1),
        "settings": vars(settings),
    }


def kept_runs() -> dict[str, Any]:
    return json.loads(PATH.read_text())["runs"] if PATH.exists() else {}


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation of the test accuracy; ours is the full batch."""
    names = {
        "full": "anyattention",
        "sampled": "sampled",
        "HGTConv": "HGTConv",
        "GAT": "GATv2",
        "words": "logistic regression, words",
        "neighbours": "logistic regression, words along links too",
    }
    found = {}
    for kind, label in names.items():
        scores = [run["test"] for name, run in runs.items() if name.split()[0] == kind]
        if scores:
            deviation = statistics.stdev(scores) if len(scores) > 1 else None
            found[label] = {"mean": statistics.fmean(scores), "standard_deviation": deviation}
    return found


def write(runs: dict[str, Any]) -> None:
    result = {
        "workload": "accuracy debian",
        "metric": "test accuracy",
        "command": "python -m benchmarks.packages",
        "seeds": sum(name.startswith("full") for name in runs),
        "summary": summary(runs),
        "published": None,
        "environment": environment(),
        "runs": {name: runs[name] for name in RUNS if name in runs},
    }
    write_atomically(PATH, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
