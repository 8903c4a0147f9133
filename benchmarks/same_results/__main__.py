"""Runs two checkouts in turn and prints what differs; exits 1 where a difference breaks the rule."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.same_results.compare import PACKAGE, Difference, compare, kind_of


def run_recording(checkout: Path, path: Path) -> dict[str, np.ndarray]:
    """What the checkout's own interpreter records with the calls of this folder, which serve both."""
    python = checkout / ".venv/bin/python"
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if not python.exists():
        python, environment["PYTHONPATH"] = Path(sys.executable), str(checkout / "src")
    command = [python, "-m", "benchmarks.same_results.record", path]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True)
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    package = Path(str(arrays[PACKAGE])).resolve()
    if not package.is_relative_to(checkout):
        raise SystemExit(f"the recording of {checkout} ran {package}")
    return arrays


def print_table(before: Mapping[str, np.ndarray], differences: list[Difference]) -> None:
    """How many arrays of each kind were compared and differ, then each one that breaks the rule."""
    called = {key.rsplit(" | ", 2)[0] for key in before if key != PACKAGE}
    distinct = {call.rsplit(" | ", 1)[0] for call in called}
    print(f"{len(distinct)} calls, {len(called)} with their dtypes and threads")
    compared = Counter(kind_of(key) for key in before if key != PACKAGE)
    print(f"{'':8}{'compared':>10}{'differ':>10}{'break':>10}{'roundings, at most':>20}")
    for kind in ("output", "first", "second", "error"):
        found = [one for one in differences if kind_of(one.key) == kind]
        broken, most = sum(one.breaks_rule for one in found), max((one.roundings for one in found), default=0.0)
        print(f"{kind:8}{compared[kind]:>10}{len(found):>10}{broken:>10}{most:>20.3g}")
    for one in differences:
        if one.breaks_rule:
            print(f"{one.key}: {one.how}, {one.roundings:.3g} roundings")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_results")
    parser.add_argument("before", type=Path, help="the checkout of before")
    parser.add_argument("after", type=Path, help="the checkout of after")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        before = run_recording(options.before.resolve(), Path(folder) / "before.npz")
        after = run_recording(options.after.resolve(), Path(folder) / "after.npz")
    differences = compare(before, after)
    print_table(before, differences)
    return int(any(one.breaks_rule for one in differences))


if __name__ == "__main__":
    sys.exit(main())
