"""`python -m benchmarks.nbody`: attention and EGNN trained side by side, a core and a thread each, seed after seed."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from anyattention.saving import make_folder
from benchmarks.harness import require_tests, write_result
from benchmarks.nbody.data import Systems, simulate
from benchmarks.nbody.training import MARKS, Data, Mark, Training

PUBLISHED = {
    "EGNN": 0.0071,
    "TFN": 0.0155,
    "SE(3)-Transformer": 0.0244,
    "source": "Satorras et al., 2021, table 2: 10,000 epochs of 3,000 systems, which is 300,000 steps of 100",
}
NAMES = ("anyattention", "egnn-pytorch")
# The best of 5e-4, 1e-3 and 2e-3 for either, by the validation error of seed 0 after 90 seconds.
LEARNING_RATE = 2e-3
SIZES, SEEDS = {"train": 3000, "validation": 2000, "test": 2000}, {"train": 1, "validation": 2, "test": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, for each contestant and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/nbody"), help="of checkpoints, from which it goes on")
    parser.add_argument("--train", nargs=2, metavar=("NAME", "SEED"), help="this one alone, without a result")
    arguments = parser.parse_args()
    folder = make_folder(arguments.folder)
    if arguments.train:
        name, seed = arguments.train
        train(name, int(seed), arguments.seconds, folder)
        return
    require_tests("tests/test_nbody.py", "tests/nn/test_symmetries.py")
    load_data(folder)
    for seed in arguments.seeds:
        command = [sys.executable, "-m", "benchmarks.nbody", "--seconds", str(arguments.seconds), "--folder", folder]
        pair = [subprocess.Popen([*command, "--train", name, str(seed)]) for name in NAMES]
        if any([process.wait() for process in pair]):  # noqa: C419 - waits for both
            raise SystemExit("A training failed; what there is lies in the folder.")
    report(arguments.seeds, folder)


def train(name: str, seed: int, seconds: float, folder: Path) -> None:
    """Go on with one contestant's training."""
    torch.set_num_threads(1)
    path = folder / f"{name}-{seed}.safetensors"
    training = build(name, seed)
    if path.exists():
        training.load(path)
    with tqdm(
        total=seconds,
        initial=training.seconds,
        desc=f"{name}, seed {seed}",
        position=NAMES.index(name),
        # A log file is not redrawn in place, so it gets a line now and then.
        mininterval=0.5 if sys.stderr.isatty() else 60.0,
        bar_format="{desc}: |{bar}| {n:.0f} of {total:.0f} s",
    ) as bar:
        training.run(load_data(folder), seconds, path, lambda taken: bar.update(min(taken, bar.total - bar.n)))


def build(name: str, seed: int) -> Training:
    """A contestant that has learned nothing yet."""
    torch.manual_seed(seed)
    return Training(build_model(name), LEARNING_RATE, seed)


def build_model(name: str) -> nn.Module:
    """A new network of the name; the peer's package is needed for the peer alone."""
    if name == "anyattention":
        from benchmarks.nbody.attention import AttentionDynamics

        return AttentionDynamics()
    from benchmarks.nbody.egnn import EgnnDynamics

    return EgnnDynamics()


def load_data(folder: Path) -> Data:
    """The systems, simulated once and kept in the folder."""
    from safetensors.torch import load, save

    from anyattention.saving import write_atomically

    path = folder / "systems.safetensors"
    if not path.exists():
        print("Simulating the systems, once.", flush=True)
        parts = {part: simulate(count, SEEDS[part]) for part, count in SIZES.items()}
        tensors = {f"{part}.{field}": x for part, systems in parts.items() for field, x in systems._asdict().items()}
        write_atomically(path, save(tensors))
    tensors = load(path.read_bytes())
    return Data(*(Systems(*(tensors[f"{part}.{field}"] for field in Systems._fields)) for part in Data._fields))


def report(seeds: list[int], folder: Path) -> None:
    """Print the errors after each span of time, and write the result."""
    runs: dict[str, Any] = {}
    chosen: dict[str, list[dict[float, Mark]]] = {}
    for name in NAMES:
        trainings = [build(name, seed) for seed in seeds]
        for seed, training in zip(seeds, trainings, strict=True):
            training.load(folder / f"{name}-{seed}.safetensors")
        chosen[name] = [best_by_time(training.marks) for training in trainings]
        runs[name] = {
            "parameters": sum(x.numel() for x in trainings[0].model.parameters()),
            "learning rate": LEARNING_RATE,
            "marks": {str(s): [m._asdict() for m in t.marks] for s, t in zip(seeds, trainings, strict=True)},
        }
    reached = [mark for mark in MARKS if all(mark in found for both in chosen.values() for found in both)]
    table = {str(mark): {name: _row(found, mark) for name, found in chosen.items()} for mark in reached}
    print(f"\nTest error (mean squared, of a coordinate) of {len(seeds)} seeds, by seconds of training on one thread")
    for mark, rows in table.items():
        cells = (f"{name} {row['mean']:.4f} ({row['low']:.4f} to {row['high']:.4f})" for name, row in rows.items())
        print(f"  {mark:>5s} s   " + "   ".join(cells))
    plain = without_learning(load_data(folder))
    for name, value in plain.items():
        print(f"  {name}: {value:.4f}")
    print("Published, with a far larger budget:", json.dumps(PUBLISHED))
    write_result("nbody", {"test error": table, "without learning": plain, "published": PUBLISHED, "runs": runs})


def best_by_time(marks: list[Mark]) -> dict[float, Mark]:
    """For each planned mark, the examination of lowest validation error up to there."""
    reached = [mark for mark in MARKS if marks and mark <= marks[-1].seconds]
    return {mark: min(marks[: number + 1], key=lambda found: found.validation) for number, mark in enumerate(reached)}


def _row(found: list[dict[float, Mark]], mark: float) -> dict[str, float]:
    tests = [best[mark].test for best in found]
    return {"mean": statistics.fmean(tests), "low": min(tests), "high": max(tests)}


def without_learning(data: Data) -> dict[str, float]:
    """Test errors of standing still, and of going straight on by the multiple of the velocity that fits best."""
    moved, velocities = data.train.targets - data.train.positions, data.train.velocities
    factor = (moved * velocities).sum() / velocities.square().sum()
    _, positions, velocities, targets = data.test
    return {
        "standing still": (positions - targets).square().mean().item(),
        "going straight on": (positions + factor * velocities - targets).square().mean().item(),
    }


if __name__ == "__main__":
    main()
