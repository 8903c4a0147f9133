"""The figures of `anyattention demo sequence`: bits per byte, tokens per second, a training step's time and memory.

python -m benchmarks.sequence [--steps N] [--length N] [--window N] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from anyattention.cli.sequence import run_sequence
from anyattention.training.sequence import SequenceSettings
from benchmarks.harness import write_result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The sequence demo's figures as a result file.")
    for name in ("steps", "length", "window", "threads"):
        parser.add_argument(f"--{name}", type=int)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    threads = given.pop("threads", None)
    with tempfile.TemporaryDirectory() as folder:
        run_sequence(SequenceSettings(**given), threads, Path(folder))
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    if metrics["interrupted"]:
        raise SystemExit("Interrupted, so no result is written.")
    write_result("sequence", metrics)


if __name__ == "__main__":
    main()
