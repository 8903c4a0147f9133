"""The figures of a demo as a result file: `python -m benchmarks.demos sequence|points [the demo's own options]`.

sequence: bits per byte, tokens per second, a training step's time and memory. points: errors of energies and forces.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from anyattention.cli import main as run_command
from benchmarks.harness import write_result


def main(arguments: list[str]) -> None:
    subject, *options = arguments or [""]
    if subject not in ("sequence", "points"):
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        if run_command(["demo", subject, "--out", folder, *options]):
            raise SystemExit("The demo failed, so no result is written.")
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    if metrics["interrupted"]:
        raise SystemExit("Interrupted, so no result is written.")
    write_result(subject, metrics)


if __name__ == "__main__":
    main(sys.argv[1:])
