"""`python -m examples.language_model`: train on the source of Python's standard library, and say how it went."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anyattention.cli.arguments import count
from anyattention.cli.command import Parser, run_command
from anyattention.cli.progress import progress_bar
from anyattention.errors import InvalidInputError
from anyattention.files import make_folder, write_together
from anyattention.training.extras import require_extras
from examples.language_model import report
from examples.language_model.model import Settings
from examples.language_model.picture import Reference, draw
from examples.language_model.text import Text, load_source
from examples.language_model.train import Fit, Step, fit
from examples.settings import add_options, read_settings

__all__ = ["main"]

_DESCRIPTION = """\
Train a small byte-level language model with a window of attention on the source of Python's standard library; about a
minute. Ends with loss, speed, memory beside dense attention, and a picture. Ctrl-C ends the training early and reports
on what there is.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments, None for the process's; the exit code."""
    parser = Parser(prog="python -m examples.language_model", description=_DESCRIPTION)
    add_options(parser, Settings)
    parser.add_argument(
        "--bytes", type=count, default=2_000_000, metavar="N", help="bytes of the text, at most (default: 2000000)"
    )
    parser.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="to compute with (default: PyTorch's choice); 1 is faster on a busy machine",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/language_model"),
        metavar="DIR",
        help="where to write (default: runs/language_model)",
    )
    parser.set_defaults(run=_run)
    return run_command(parser, argv)


def _run(arguments: Namespace) -> int:
    """Train, and say how it went; the exit code."""
    settings = read_settings(Settings, arguments)
    require_extras()
    text = load_source(arguments.bytes)
    if settings.length >= len(text.held_out):
        expected = f"less than the held-out text's {len(text.held_out):,} bytes"
        raise InvalidInputError(argument="--length", expected=expected, actual=settings.length)
    folder = make_folder(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(report.describe_text(text, settings), flush=True)
    done = _fit_with_bar(text, settings)
    scores = report.measure_scores(done, text, settings)
    tokens = len(done.bits) * settings.batch * settings.length
    print(f"\n{tokens:,} bytes in {done.seconds:.0f} s: {tokens / done.seconds:,.0f} tokens per second.\n")
    print(report.describe_scores(scores), flush=True)
    costs = report.measure_costs(text, settings)
    print(report.describe_costs(costs, settings), flush=True)
    print(report.describe_sample(done.model, text, settings), flush=True)
    _write(folder, done, text, settings, scores, costs)
    print(f"The picture {folder / 'attention.png'} shows the pattern, the loss, and what one head attends to.")
    return 0


def _fit_with_bar(text: Text, settings: Settings) -> Fit:
    with progress_bar("training", settings.steps, "step") as bar:

        def show(step: Step) -> None:
            bar.set_postfix({"bits per byte": f"{step.bits:.2f}"}, refresh=False)
            bar.update()

        done = fit(text.train, settings, show)
    if done.interrupted:
        print(f"Interrupted after {len(done.bits)} steps; what follows is about these.", file=sys.stderr)
    return done


def _write(
    folder: Path, done: Fit, text: Text, settings: Settings, scores: report.Scores, costs: list[report.Cost]
) -> None:
    references = [
        Reference("held-out text: single bytes counted", scores.unigram),
        Reference("held-out text: pairs counted", scores.pairs),
        Reference("held-out text: this model", scores.held_out),
    ]
    metrics: dict[str, Any] = {
        "bits_per_byte": scores._asdict(),
        "tokens_per_second": len(done.bits) * settings.batch * settings.length / done.seconds,
        "step": [cost._asdict() for cost in costs],
        "steps": len(done.bits),
        "interrupted": done.interrupted,
        "settings": vars(settings),
    }
    picture = draw(done, text.held_out[: settings.length], references)
    files = {"metrics.json": (json.dumps(metrics, indent=2) + "\n").encode(), "attention.png": picture}
    write_together(folder, files, without=("attention.png",))


if __name__ == "__main__":
    sys.exit(main())
