"""`python -m benchmarks.nbody`: attention and EGNN trained side by side, a core and a thread each, seed after seed.

With `--trials`, each of the settings that were considered is trained on seed 0 instead, for the same time; the result
keeps their validation errors beside what was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import nn
from tqdm import tqdm

from anyattention.files import make_folder, write_atomically
from benchmarks.harness import require_tests, write_result
from benchmarks.nbody.data import Systems, simulate
from benchmarks.nbody.training import MARKS, Data, Mark, Training

PUBLISHED = {
    "EGNN": 0.0071,
    "TFN": 0.0155,
    "SE(3)-Transformer": 0.0244,
    "source": "Satorras et al., 2021, table 2: 10,000 epochs of 3,000 systems, which is 300,000 steps of 100",
}
SIZES, SEEDS = {"train": 3000, "validation": 2000, "test": 2000}, {"train": 1, "validation": 2, "test": 3}


class Setting(NamedTuple):
    """A contestant: "anyattention" or "egnn-pytorch", the width of its features, and Adam's learning rate."""

    name: str
    width: int
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.name}-{self.width}-{self.learning_rate:g}"

    def file(self, seed: int, folder: Path) -> Path:
        """Where its training is kept."""
        return folder / f"{self}-{seed}.safetensors"


_GRID = list(itertools.product((32, 64), (1e-3, 2e-3, 4e-3)))
# And one beyond the best rate of each.
TRIALS = {
    "anyattention": [Setting("anyattention", *parts) for parts in [*_GRID, (32, 8e-3)]],
    "egnn-pytorch": [Setting("egnn-pytorch", *parts) for parts in [*_GRID, (32, 5e-4)]],
}
# The two of either with the lowest validation errors after two minutes of the trials, on a seed of their own; in pairs.
CHOSEN = (
    (Setting("anyattention", 32, 4e-3), Setting("egnn-pytorch", 32, 1e-3)),
    (Setting("anyattention", 32, 8e-3), Setting("egnn-pytorch", 32, 5e-4)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, for each contestant and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs/nbody"), help="of checkpoints, from which it goes on")
    parser.add_argument("--trials", action="store_true", help="train every setting on seed 0")
    parser.add_argument("--train", nargs=4, metavar=("NAME", "WIDTH", "RATE", "SEED"), help="this one alone")
    arguments = parser.parse_args()
    folder = make_folder(arguments.folder)
    if arguments.train:
        name, width, rate, seed = arguments.train
        train(Setting(name, int(width), float(rate)), int(seed), arguments.seconds, folder)
    elif arguments.trials:
        load_data(folder)
        for pair in zip(*TRIALS.values(), strict=True):
            train_side_by_side(pair, 0, arguments.seconds, folder)
        print(json.dumps(trial_errors(folder), indent=2))
    else:
        require_tests("tests/test_nbody.py")
        load_data(folder)
        for seed, pair in itertools.product(arguments.seeds, CHOSEN):
            train_side_by_side(pair, seed, arguments.seconds, folder)
        report(arguments.seeds, folder)


def train_side_by_side(settings: tuple[Setting, ...], seed: int, seconds: float, folder: Path) -> None:
    """Each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.nbody", "--seconds", str(seconds), "--folder", str(folder), "--train"]
    processes = [subprocess.Popen([*command, *map(str, setting), str(seed)]) for setting in settings]
    if any([process.wait() for process in processes]):  # noqa: C419 - waits for all
        raise SystemExit("A training was ended early; the next run goes on from there.")


def train(setting: Setting, seed: int, seconds: float, folder: Path) -> None:
    """Go on with one contestant's training."""
    torch.set_num_threads(1)
    data, training, path = load_data(folder), build(setting, seed), setting.file(seed, folder)
    if path.exists():
        training.load(path)
    stopped: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    with tqdm(
        total=seconds,
        initial=min(training.seconds, seconds),
        desc=f"{setting}, seed {seed}",
        position=list(TRIALS).index(setting.name),
        # A log file is not redrawn in place, so it gets a line now and then.
        mininterval=0.5 if sys.stderr.isatty() else 60.0,
        bar_format="{desc}: |{bar}| {n:.0f} of {total:.0f} s",
    ) as bar:

        def show(taken: float) -> None:
            bar.update(min(taken, bar.total - bar.n))
            if stopped:
                raise KeyboardInterrupt

        training.run(data, seconds, path, show)


def build(setting: Setting, seed: int) -> Training:
    """A contestant that has learned nothing yet."""
    torch.manual_seed(seed)
    return Training(build_model(setting), setting.learning_rate, seed)


def build_model(setting: Setting) -> nn.Module:
    """A new network; the peer's package is needed for the peer alone."""
    if setting.name == "anyattention":
        from benchmarks.nbody.attention import AttentionDynamics

        return AttentionDynamics(setting.width)
    from benchmarks.nbody.egnn import EgnnDynamics

    return EgnnDynamics(setting.width)


def load_data(folder: Path) -> Data:
    """The systems, simulated once and kept in the folder."""
    path = folder / "systems.safetensors"
    if not path.exists():
        print("Simulating the systems, once.", flush=True)
        parts = {part: simulate(count, SEEDS[part]) for part, count in SIZES.items()}
        tensors = {f"{part}.{field}": x for part, systems in parts.items() for field, x in systems._asdict().items()}
        write_atomically(path, save(tensors))
    tensors = load(path.read_bytes())
    return Data(*(Systems(*(tensors[f"{part}.{field}"] for field in Systems._fields)) for part in Data._fields))


def trial_errors(folder: Path) -> dict[str, dict[str, float | None]]:
    """The lowest validation error so far at each mark of every setting tried on seed 0; None where it diverged."""
    found = {}
    for setting in itertools.chain(*TRIALS.values()):
        path = setting.file(0, folder)
        if path.exists():
            training = build(setting, 0)
            training.load(path)
            best = best_by_time(training.marks)
            found[str(setting)] = {str(at): x.validation if isfinite(x.validation) else None for at, x in best.items()}
    return found


def report(seeds: list[int], folder: Path) -> None:
    """Print the errors after each span of time, and write the result."""
    runs: dict[str, Any] = {}
    chosen: dict[str, list[dict[int, Mark]]] = {}
    for setting in itertools.chain(*CHOSEN):
        trainings = [build(setting, seed) for seed in seeds]
        for seed, training in zip(seeds, trainings, strict=True):
            training.load(setting.file(seed, folder))
        chosen[str(setting)] = [best_by_time(training.marks) for training in trainings]
        runs[str(setting)] = {
            **setting._asdict(),
            "parameters": sum(x.numel() for x in trainings[0].model.parameters()),
            "marks": {str(s): [m._asdict() for m in t.marks] for s, t in zip(seeds, trainings, strict=True)},
        }
    reached = [mark for mark in MARKS if all(mark in found for both in chosen.values() for found in both)]
    table = {str(mark): {name: _row(found, mark) for name, found in chosen.items()} for mark in reached}
    print(f"\nTest error (mean squared, of a coordinate) of {len(seeds)} seeds, by seconds of training on one thread")
    for mark, rows in table.items():
        cells = (f"{name} {row['mean']:.4f} ({row['low']:.4f} to {row['high']:.4f})" for name, row in rows.items())
        print(f"  {mark:>5s} s   " + "   ".join(cells))
    baselines = errors_without_learning(load_data(folder))
    for name, value in baselines.items():
        print(f"  {name}: {value:.4f}")
    print("Published, with a far larger budget:", json.dumps(PUBLISHED))
    result = {"test error": table, "baselines": baselines, "published": PUBLISHED, "runs": runs}
    write_result("nbody", {**result, "validation error of the trials": trial_errors(folder)})


def best_by_time(marks: list[Mark]) -> dict[int, Mark]:
    """For each mark that was reached, the examination of the lowest validation error up to there."""
    return {
        last.mark: min(marks[: number + 1], key=lambda found: found.validation) for number, last in enumerate(marks)
    }


def _row(found: list[dict[int, Mark]], mark: int) -> dict[str, float]:
    tests = [best[mark].test for best in found]
    return {"mean": statistics.fmean(tests), "low": min(tests), "high": max(tests)}


def errors_without_learning(data: Data) -> dict[str, float]:
    """Test errors of the static baseline, and of the linear one: the multiple of the velocity that fits best."""
    moved, velocities = data.train.targets - data.train.positions, data.train.velocities
    factor = (moved * velocities).sum() / velocities.square().sum()
    _, positions, velocities, targets = data.test
    return {
        "static": (positions - targets).square().mean().item(),
        "linear": (positions + factor * velocities - targets).square().mean().item(),
    }


if __name__ == "__main__":
    main()
