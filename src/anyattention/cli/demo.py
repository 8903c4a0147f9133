"""`anyattention demo`: train on the digits, and say in plain words how it went."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyattention.cli.arguments import count, seed, use_threads

if TYPE_CHECKING:
    from anyattention.training import NodeData, Split
    from anyattention.training.fitting import AnyClassifier

__all__ = ["add_parser"]

# What was a subject of this command, and the example that it is now.
_EXAMPLES = {"sequence": "language_model", "points": "particles"}
_DESCRIPTION = """\
Train on handwritten digits with the default settings, compare the result with the same network without attention and
with four plain methods that see the same labels, and draw what the network attends to. Ctrl-C ends a training early and
reports on what there is.
"""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "demo",
        help="train on handwritten digits, and say in plain words how it went",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "subject",
        nargs="?",
        type=_subject,
        choices=("digits",),
        default="digits",
        help="what to train on (default: digits)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of all that is drawn at random (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: runs/demo)")
    parser.add_argument("--epochs", type=count, metavar="N", help="at most so many steps (default: as train)")
    parser.set_defaults(run=_run, imports=("anyattention.cli.training", "anyattention.training.baselines"))


def _subject(text: str) -> str:
    if text in _EXAMPLES:
        command = f"python -m examples.{_EXAMPLES[text]}"
        raise argparse.ArgumentTypeError(f"{text!r} is an example now: run `{command}` in a checkout of the repository")
    return text


def _run(arguments: argparse.Namespace) -> int:
    from anyattention.cli.training import name_what_is_missing, run_training, settings_for, write_run
    from anyattention.files import make_folder
    from anyattention.training import load_digits
    from anyattention.training.baselines import run_baselines

    data = load_digits(arguments.seed)
    use_threads(None, data)
    config, settings = settings_for(data, {"seed": arguments.seed, "epochs": arguments.epochs})
    folder = make_folder(arguments.out or Path("runs/demo"))
    split = data.splits[0]
    name_what_is_missing()
    print(_introduction(data, split), flush=True)
    started = time.monotonic()
    run = run_training(data, [0], config, settings)
    seconds = time.monotonic() - started
    written = write_run(run, folder)
    print(f"\nTrained for {run.fits[0].epochs} epochs in {seconds:.0f} s.")
    print(_what_it_learnt(run.fits[0].model, data, split))
    print(
        "\nNow the same network with attention off, all linked digits weighed equally, and four plain methods.",
        flush=True,
    )
    own = run.mean("accuracy")
    try:
        off = run_training(data, [0], replace(config, equal_weights=True), settings).mean("accuracy")
        plain = run_baselines(data, split)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(f"the network is in {folder}") from None
    results = [("graph attention (this package)", own), ("the same network, attention off", off)]
    results += [(result.name, result.test_accuracy) for result in plain]
    print(_comparison(results, len(split.test)))
    print(f"""\
With attention off it reads {100 * abs(own - off):.1f} points {"fewer" if off < own else "more"}. The network sees the \
links only; those methods that look for nearest
neighbours look at all digits.
""")
    if "attention.png" in written:
        print(f"The picture {folder / 'attention.png'} shows some of the test digits, and whom each attended to most.")
    print(f"The network is in {folder}; `anyattention predict --model {folder}` uses it again.")
    return 0


def _introduction(data: NodeData, split: Split) -> str:
    nodes, train, validation, test = data.num_nodes, *map(len, split)
    links = data.graph.num_edges // nodes - 1
    return f"""\
{nodes:,} handwritten digits, 8 x 8 pixels each. Every digit is linked to the {links} that look most like it from afar,
shrunk to 2 x 2 pixels. Only about half of these show the same number. Each link says how different the two whole images
are, and a small network learns whom to attend to, in order to tell which number each digit shows.
It is told the answer for {train} of them; {validation} more serve to pick the best moment of the training.
The other {test:,} are the test.
"""


def _what_it_learnt(model: AnyClassifier, data: NodeData, split: Split) -> str:
    """The digits it reads best and worst, its commonest mistake, and where its attention goes."""

    from anyattention.training import attention_within_classes, predict_logits

    truth, read = data.labels[split.test], predict_logits(model, data)[split.test].argmax(1)
    counts = truth.new_zeros(10, 10).index_put_((truth, read), truth.new_ones(()), accumulate=True)
    correct = counts.diagonal() / counts.sum(1)
    best, worst = int(correct.argmax()), int(correct.argmin())
    mistakes = counts.clone().fill_diagonal_(0)
    taken, said = divmod(int(mistakes.argmax()), 10)
    attended, linked = attention_within_classes(model, data, split.test)
    verdict = "\nSo here the links do most of the work." if attended - linked < 0.01 else ""
    return f"""\
What it learnt: of the test digits, it reads {best} best ({correct[best]:.0%} correct) and {worst} worst \
({correct[worst]:.0%}).
Its commonest mistake, made {int(mistakes.max())} times, is to take {_with_article(taken)} for {_with_article(said)}.
When it looks at other digits, {attended:.1%} of its attention goes to digits of the same number; paid evenly to all
linked digits, it would be {linked:.1%}.{verdict}"""


def _comparison(results: list[tuple[str, float]], num_test: int) -> str:
    """A table of the results, best first, and who won in words."""
    ranked = sorted(results, key=lambda result: -result[1])
    lines = [f"\nShare of the {num_test:,} test digits that were read correctly, same labels for all:\n"]
    lines += [f"  {score:7.2%}  {name}" for name, score in ranked]
    (winner, best), (second, next_best) = ranked[:2]
    points = 100 * (best - next_best)
    if points == 0:
        lines.append(f"\n{_capital(winner)} and {second} share the first place.")
    else:
        lines.append(f"\n{_capital(winner)} won, {points:.1f} points ahead of {second}.")
    own_name, own = results[0]
    if own < best:
        lines.append(f"{_capital(own_name)} came {100 * (best - own):.1f} points behind the winner.")
    return "\n".join(lines)


def _with_article(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {digit}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
