"""`python -m examples.memory`: remember images by keys that are learnt, tell new images by them, say how it went."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from anyattention import save
from anyattention.cli.arguments import count
from anyattention.cli.command import Parser, run_command
from anyattention.cli.progress import progress_bar
from anyattention.files import make_folder, write_together
from anyattention.training.extras import require_extras
from examples.memory import report
from examples.memory.images import Data, load_data
from examples.memory.model import Settings
from examples.memory.picture import draw
from examples.memory.recall import (
    Pixels,
    Recalled,
    ask_pixels,
    number_of_parts,
    number_of_pixel_parts,
    recall,
    require_pixels,
)
from examples.memory.train import Fit, Step, fit, require_trainable
from examples.settings import add_options, read_settings

__all__ = ["main"]

_DESCRIPTION = """\
Remember the training images of Fashion-MNIST in a learnt latent space, and tell the test's images by attention to this
memory; some minutes. Then a class that an encoder never saw is appended to its memory. Ends with accuracies beside
those of simpler methods, and a picture. Ctrl-C ends the training early and reports on what there is.
"""
_DATA = Path("/usr/share/datasets/fashion-mnist")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments, None for the process's; the exit code."""
    parser = Parser(prog="python -m examples.memory", description=_DESCRIPTION)
    add_options(parser, Settings)
    parser.add_argument(
        "--data",
        type=Path,
        default=_DATA,
        metavar="PATH",
        help=f"the folder of Fashion-MNIST's four files, or an .npz (default: {_DATA}, of Debian's package "
        "dataset-fashion-mnist)",
    )
    parser.add_argument(
        "--threads", type=count, metavar="N", help="to compute with (default: PyTorch's choice); 1 on a busy machine"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/memory"),
        metavar="DIR",
        help="where to write (default: runs/memory)",
    )
    parser.set_defaults(run=_run)
    return run_command(parser, argv)


def _run(arguments: Namespace) -> int:
    """Train, remember, ask, and say how it went; the exit code."""
    settings = read_settings(Settings, arguments)
    require_extras()
    require_pixels()
    data = load_data(arguments.data)
    require_trainable(data.train, settings)
    folder = make_folder(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(report.describe_data(data, settings), flush=True)
    # Before the training, whose end Ctrl-C may bring on: nothing slow comes after it.
    with progress_bar("from pixels", number_of_pixel_parts(data), "part") as bar:
        pixels = ask_pixels(data, torch.get_num_threads(), bar.update)
    done = _fit_with_bar(data, settings)
    with progress_bar("encoding", number_of_parts(data), "part") as bar:
        recalled = recall(done, data, settings, bar.update)
    found = report.measure(recalled, pixels, data, settings)
    print(report.describe_scores(found, done, recalled, data), flush=True)
    print(report.describe_appending(found, settings), flush=True)
    _write(folder, done, data, recalled, pixels, settings, found)
    print(f"""\
The picture {folder / "attention.png"} shows test images, the memories they attend to, and the latent space.
{folder / "memory"} is the memory, for anyattention.load; {folder / "encoder.safetensors"} has the encoder's
weights.""")
    return 0


def _fit_with_bar(data: Data, settings: Settings) -> Fit:
    with progress_bar("training", settings.steps, "step") as bar:

        def show(step: Step) -> None:
            losses = {"loss": f"{step.whole:.3f}", "without a class": f"{step.without:.3f}"}
            bar.set_postfix(losses, refresh=False)
            bar.update()

        done = fit(data.train, settings, show)
    if done.interrupted:
        print(f"Interrupted after {len(done.whole.losses)} steps; what follows is about these.", file=sys.stderr)
    return done


def _write(
    folder: Path,
    done: Fit,
    data: Data,
    recalled: Recalled,
    pixels: Pixels,
    settings: Settings,
    found: report.Report,
) -> None:
    metrics: dict[str, Any] = {
        "accuracy": {name: getattr(found, name) for name in ("memory", "neighbours", "logistic")},
        "held_out": {
            "class": settings.held_out,
            "before": found.before._asdict(),
            "after": found.after._asdict(),
            "attention_to_appended": found.appended,
        },
        "images": {"train": len(data.train.labels), "test": len(data.test.labels)},
        "parameters": sum(parameter.numel() for parameter in done.whole.encoder.parameters()),
        "seconds": {"whole": done.whole.seconds, "without": done.without.seconds, **recalled.seconds},
        "steps": len(done.whole.losses),
        "interrupted": done.interrupted,
        "settings": vars(settings),
    }
    picture = draw(done, data, recalled, pixels, settings)
    files = {
        "metrics.json": (json.dumps(metrics, indent=2) + "\n").encode(),
        "encoder.safetensors": safetensors.torch.save(done.whole.encoder.state_dict()),
        "attention.png": picture,
    }
    save(recalled.memory, folder / "memory")
    write_together(folder, files, without=("attention.png",))


if __name__ == "__main__":
    sys.exit(main())
