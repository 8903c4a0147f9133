"""`python -m examples.packages --data FILE`: learn which section a Debian package is in, and say how it went."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from anyattention.cli.arguments import count
from anyattention.cli.command import Parser, run_command
from anyattention.cli.progress import progress_bar
from anyattention.files import make_folder, write_together
from anyattention.training.extras import import_demo, require_extras
from examples.packages import report
from examples.packages.data import Packages, load_packages
from examples.packages.guesses import with_guesses
from examples.packages.inputs import Inputs, prepare_inputs
from examples.packages.model import Settings
from examples.packages.picture import draw
from examples.packages.train import Fit, Step, fit
from examples.settings import add_options, read_settings

__all__ = ["main"]

_DESCRIPTION = """\
Learn which section a Debian package is in, by attention over packages, sources and maintainers; one or two minutes.
Ends with accuracies, the share of the attention along each kind of link, and a picture. Ctrl-C ends the training early
and reports on what there is. `python -m examples.packages.apt --out FILE` makes the data of a machine's package lists.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments, None for the process's; the exit code."""
    parser = Parser(prog="python -m examples.packages", description=_DESCRIPTION)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="what examples.packages.apt wrote")
    add_options(parser, Settings)
    parser.add_argument(
        "--baselines", action="store_true", help="logistic regression on the same packages too; minutes"
    )
    parser.add_argument("--threads", type=count, metavar="N", help="to compute with (default: PyTorch's choice)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/packages"),
        metavar="DIR",
        help="where to write (default: runs/packages)",
    )
    parser.set_defaults(run=_run)
    return run_command(parser, argv)


def _run(arguments: Namespace) -> int:
    """Train, and say how it went; the exit code."""
    settings = read_settings(Settings, arguments)
    require_extras()
    import_demo("sklearn", "the comparison with logistic regression")
    packages = load_packages(arguments.data)
    folder = make_folder(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(report.describe_data(packages, settings), flush=True)
    inputs = with_guesses(packages, prepare_inputs(packages))
    done = _fit_with_bar(packages, inputs, settings)
    print(f"\n{len(done.losses)} steps in {done.seconds:.0f} s.\n", flush=True)
    found = report.measure(done, packages, inputs)
    baselines = report.measure_baselines(packages, inputs) if arguments.baselines else {}
    print(report.describe_scores(found, packages, baselines), flush=True)
    print(report.describe_shares(found.shares), flush=True)
    _write(folder, done, packages, settings, found, baselines)
    print(f"""\
The picture {folder / "attention.png"} shows the attention along each kind of link, by section, and the accuracy of each
section. The network's weights are in {folder / "model.safetensors"}.""")
    return 0


def _fit_with_bar(packages: Packages, inputs: Inputs, settings: Settings) -> Fit:
    with progress_bar("training", settings.steps, "step") as bar:

        def show(step: Step) -> None:
            bar.set_postfix({"loss": f"{step.loss:.3f}"}, refresh=False)
            bar.update()

        done = fit(packages, inputs, settings, show)
    if done.interrupted:
        print(f"Interrupted after {len(done.losses)} steps; what follows is about these.", file=sys.stderr)
    return done


def _write(
    folder: Path,
    done: Fit,
    packages: Packages,
    settings: Settings,
    found: report.Report,
    baselines: dict[str, dict[str, Any]],
) -> None:
    shares = found.shares
    metrics: dict[str, Any] = {
        "accuracy": found.scores,
        "baselines": baselines,
        "relations": {
            name: {"attention": float(paid.mean()), "links": float(shares.links[name].mean())}
            for name, paid in shares.attention.items()
        },
        "loss": done.losses[-1],
        "seconds": done.seconds,
        "steps": len(done.losses),
        "interrupted": done.interrupted,
        "settings": vars(settings),
    }
    picture = draw(done.losses, found, packages)
    weights = {name: tensor.contiguous() for name, tensor in done.model.state_dict().items()}
    files = {
        "metrics.json": (json.dumps(metrics, indent=2) + "\n").encode(),
        "attention.png": picture,
        "model.safetensors": save(weights),
    }
    write_together(folder, files, without=("attention.png", "model.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
