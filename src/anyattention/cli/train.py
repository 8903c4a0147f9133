"""`anyattention train`: semi-supervised node classification with a two-layer graph attention network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anyattention.cli.arguments import add_data, count, fanout, load_data, print_notes, seed, use_threads

__all__ = ["add_parser"]

_SCORES = {"gat": "additive", "gatv2": "dynamic", "dot": "dot"}

_DESCRIPTION = """\
Train a two-layer graph attention network to tell the classes of all nodes from the labels of a few, and write to DIR:

  model.safetensors, config.json   the network, for `anyattention predict` and `anyattention.load`
  reading.json                     how tables were read: columns, categories, classes
  metrics.json                     test_accuracy (and test_roc_auc where the data is judged by it), and settings
  attention.png                    what some test nodes attend to (where matplotlib is installed)

The epoch that does best on the validation labels is kept; the test labels are read once, after training. Ctrl-C ends
the training early and writes the best epoch so far.
"""

_EPILOG = """\
Settings that are not given suit what the features are: sparse ones such as words, or none (the published settings of
GAT on citation graphs: 8 heads of 8, dropout 0.6, lr 0.005, weight decay 5e-4); numbers (residual, layer norm); the
digits. A line says which, and metrics.json has them.
"""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train",
        help="train a graph attention network on the digits or on a file",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data(parser)
    add_reading(parser)
    add_model(parser)
    add_training(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: runs/ and the data's name)")
    parser.set_defaults(run=_run, imports=("anyattention.cli.training",))


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options of how tables are read."""
    group = parser.add_argument_group("tables")
    group.add_argument("--directed", action="store_true", help="edges go from source to target only")
    group.add_argument("--target", metavar="TYPE", help="the type of nodes to classify, where several have labels")
    for name, text in (("category", "read a column of numbers as categories"), ("ignore", "do not use a column")):
        group.add_argument(f"--{name}", action="append", default=[], metavar="COLUMN", help=f"{text}; may be repeated")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options of the network."""
    group = parser.add_argument_group("network")
    group.add_argument("--layer", choices=tuple(_SCORES), help="how attention is scored: GAT, GATv2 or dot product")
    group.add_argument("--hidden", type=count, metavar="N", help="width of the hidden layer, all heads together")
    group.add_argument("--heads", type=count, metavar="N", help="heads of the first layer; a divisor of --hidden")
    group.add_argument("--output-heads", type=count, metavar="N", help="heads of the second layer, averaged")
    group.add_argument("--dropout", type=float, metavar="P", help="of inputs and attention weights, in [0, 1)")
    group.add_argument("--attention-dropout", type=float, metavar="P", help="of attention weights, where it differs")
    for name, text in (
        ("residual", "each layer adds a linear map of its own node's features"),
        ("layer-norm", "normalise the hidden layer"),
    ):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Options of the training."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=count, metavar="N", help="at most so many passes over the training nodes")
    group.add_argument("--lr", type=float, metavar="RATE", help="Adam's learning rate")
    group.add_argument("--weight-decay", type=float, metavar="FACTOR", help="of Adam, at least 0")
    group.add_argument("--patience", type=count, metavar="N", help="stop after so many epochs without a better one")
    group.add_argument(
        "--batch-size", type=count, metavar="N", help="a step for each N training nodes (default: one for all nodes)"
    )
    group.add_argument(
        "--fanout",
        type=fanout,
        metavar="N,N",
        help="with --batch-size, the most edges that are drawn of each training node, and of each node that these lead "
        "to; -1 for all (default: 10,10)",
    )
    group.add_argument(
        "--split", type=seed, metavar="N", help="one of the file's splits, from 0 (default: all of them)"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of all that is drawn at random (default: 0)")


def _run(arguments: argparse.Namespace) -> int:
    from anyattention.cli.training import (
        METRIC_NAMES,
        chosen_splits,
        name_what_is_missing,
        run_training,
        settings_for,
        write_run,
    )
    from anyattention.errors import InvalidInputError
    from anyattention.files import make_folder
    from anyattention.training import ReadOptions
    from anyattention.training.presets import told_choice

    if arguments.fanout is not None and arguments.batch_size is None:
        raise InvalidInputError(
            argument="--fanout",
            expected="--batch-size with it, since a step over all nodes takes all neighbours",
            actual="--fanout alone",
        )
    options = ReadOptions(
        arguments.seed, arguments.directed, tuple(arguments.category), tuple(arguments.ignore), arguments.target
    )
    data = load_data(arguments.data, options)
    use_threads(arguments.threads, data)
    config, settings = settings_for(data, _given(arguments))
    splits = chosen_splits(data, arguments.split)
    folder = make_folder(arguments.out or Path("runs") / data.name)
    name_what_is_missing()
    print_notes(arguments.data, data)
    for fact in (*data.facts, told_choice(data)):
        print(fact, flush=True)
    run = run_training(data, splits, config, settings)
    *written, last = write_run(run, folder)
    for metric in run.scores[run.chosen]:
        over = f", mean of {len(run.scores)} splits" if len(run.scores) > 1 else ""
        print(f"Test {METRIC_NAMES[metric]}: {run.mean(metric):.4f}{over}")
    print(f"Wrote {', '.join(written)} and {last} to {folder}")
    return 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options by the names of `NodeClassifierConfig` and `FitSettings`; None where not given."""
    return {
        "score": _SCORES.get(arguments.layer),
        "hidden": arguments.hidden,
        "heads": arguments.heads,
        "output_heads": arguments.output_heads,
        "dropout": arguments.dropout,
        "attention_dropout": arguments.attention_dropout,
        "residual": arguments.residual,
        "layer_norm": arguments.layer_norm,
        "epochs": arguments.epochs,
        "learning_rate": arguments.lr,
        "weight_decay": arguments.weight_decay,
        "patience": arguments.patience,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "fanout": arguments.fanout,
    }
