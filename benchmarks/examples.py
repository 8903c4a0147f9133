"""An example's figures as a result: `python -m benchmarks.examples sequence|points|images [the example's own options]`.

sequence, of examples.language_model: bits per byte, tokens per second, a training step's time and memory. points, of
examples.particles: errors of energies and forces. images, of examples.memory: accuracies of attention to a memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import write_result
from examples.language_model import __main__ as language_model
from examples.memory import __main__ as memory
from examples.particles import __main__ as particles

_EXAMPLES = {"sequence": language_model, "points": particles, "images": memory}


def main(arguments: list[str]) -> None:
    subject, *options = arguments or [""]
    if subject not in _EXAMPLES:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        if _EXAMPLES[subject].main(["--out", folder, *options]):
            raise SystemExit("The example failed, so no result is written.")
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    if metrics["interrupted"]:
        raise SystemExit("Interrupted, so no result is written.")
    write_result(subject, metrics)


if __name__ == "__main__":
    main(sys.argv[1:])
