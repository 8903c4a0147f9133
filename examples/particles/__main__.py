"""`python -m examples.particles`: simulate clusters of particles, learn their energies and forces, say how it went."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anyattention import Graph
from anyattention.cli.arguments import count
from anyattention.cli.command import Parser, run_command
from anyattention.cli.progress import progress_bar
from anyattention.files import make_folder, write_together
from anyattention.training.extras import require_extras
from examples.particles import report
from examples.particles.model import Settings
from examples.particles.picture import draw
from examples.particles.train import Data, Fit, Step, fit, simulate_data
from examples.settings import add_options, read_settings

__all__ = ["main"]

_DESCRIPTION = """\
Simulate clusters of charged particles and learn their energies and forces with equivariant attention; one or two
minutes. Ends with errors beside a plain transformer's, checks of the forces, and a picture. Ctrl-C ends the training
early and reports on what there is.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments, None for the process's; the exit code."""
    parser = Parser(prog="python -m examples.particles", description=_DESCRIPTION)
    add_options(parser, Settings)
    # The tensors are small: threads gain little, and on a busy machine they wait for each other at length.
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="to compute with (default: 1)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/particles"),
        metavar="DIR",
        help="where to write (default: runs/particles)",
    )
    parser.set_defaults(run=_run)
    return run_command(parser, argv)


def _run(arguments: Namespace) -> int:
    """Simulate, train, and say how it went; the exit code."""
    settings = read_settings(Settings, arguments)
    require_extras()
    _require_neighbours()
    folder = make_folder(arguments.out)
    torch.set_num_threads(arguments.threads)
    print(report.describe_settings(settings), flush=True)
    started = time.monotonic()
    data = simulate_data(settings)
    print(report.describe_data(data, time.monotonic() - started), flush=True)
    done = _fit_with_bar(data, settings)
    found = report.measure(done, data, settings)
    print(report.describe_errors(found, done), flush=True)
    print(report.describe_checks(found), flush=True)
    _write(folder, done, data, settings, found)
    print(f"""\
The picture {folder / "attention.png"} shows the losses, predicted against true energies and forces, and who attends
to whom in one test cluster.""")
    return 0


def _require_neighbours() -> None:
    """Raise MissingExtraError before the work unless neighbours can be found, in one cloud and in several."""
    points = torch.zeros(2, 3)
    Graph.radius(points, 1.0)
    Graph.radius(points, 1.0, torch.arange(2))


def _fit_with_bar(data: Data, settings: Settings) -> Fit:
    with progress_bar("training", settings.steps, "step") as bar:

        def show(step: Step) -> None:
            losses = {"loss": f"{step.equivariant:.3f}", "plain": f"{step.plain:.3f}"}
            bar.set_postfix(losses, refresh=False)
            bar.update()

        done = fit(data.train, settings, show)
    if done.interrupted:
        steps = len(done.equivariant.losses)
        print(f"Interrupted after {steps} steps; what follows is about these.", file=sys.stderr)
    return done


def _write(folder: Path, done: Fit, data: Data, settings: Settings, found: report.Report) -> None:
    metrics: dict[str, Any] = {
        "errors": {name: errors._asdict() for name, errors in found.errors.items()},
        "finite_difference_error": found.finite_differences,
        "rotation_error": found.rotation,
        "energy_drift": data.drift,
        "configurations": {"train": len(data.train.energies), "test": len(data.test.energies)},
        "parameters": {
            "equivariant": sum(parameter.numel() for parameter in done.equivariant.model.parameters()),
            "plain": sum(parameter.numel() for parameter in done.plain.model.parameters()),
        },
        "seconds": {"equivariant": done.equivariant.seconds, "plain": done.plain.seconds},
        "steps": len(done.equivariant.losses),
        "interrupted": done.interrupted,
        "settings": vars(settings),
    }
    picture = draw(done, data.test, found.equivariant, found.plain)
    files = {"metrics.json": (json.dumps(metrics, indent=2) + "\n").encode(), "attention.png": picture}
    write_together(folder, files, without=("attention.png",))


if __name__ == "__main__":
    sys.exit(main())
