"""`anyattention predict`: classes and probabilities from a trained model."""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyattention.cli.arguments import add_data, load_data, print_notes, use_threads

if TYPE_CHECKING:
    from torch import Tensor

    from anyattention.training import NodeClassifierConfig, NodeData

__all__ = ["add_parser"]

_DESCRIPTION = """\
Load what `anyattention train` wrote and classify every node of the data, which must be of the kind it was trained on.
It needs no labels and no splits; where there are labels, it says how many nodes are classified as they say.

FILE.csv gets a line per node: node, class, and one probability per class.
FILE.npz gets the arrays classes (nodes,) int64 and probabilities (nodes, classes) float32.
"""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "predict",
        help="write the classes and probabilities that a trained model gives",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", type=Path, help="the folder that train wrote")
    add_data(parser)
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="where to write, as its suffix says: .csv or .npz (default: predictions.csv in the model's folder)",
    )
    parser.set_defaults(run=_run, imports=("anyattention.training",))


def _run(arguments: argparse.Namespace) -> int:
    import anyattention
    from anyattention.errors import InvalidInputError
    from anyattention.files import make_folder, write_atomically
    from anyattention.training import NodeClassifier, predict_logits

    out = arguments.out or arguments.model / "predictions.csv"
    if out.suffix not in (".csv", ".npz"):
        raise InvalidInputError(argument="--out", expected="a file that ends in .csv or .npz", actual=repr(str(out)))
    model = anyattention.load(arguments.model)
    if not isinstance(model, NodeClassifier):
        raise InvalidInputError(argument="--model", expected="a NodeClassifier", actual=type(model).__name__)
    data = load_data(arguments.data, seed=0, to_train=False)
    use_threads(arguments.threads, data)
    _require_fit(model.config, data)
    make_folder(out.parent)
    print_notes(arguments.data, data)
    if data.edge_dim is not None and model.config.edge_dim is None:
        print(
            f"{arguments.model}: trained without features of edges, so those of {arguments.data} are not used",
            file=sys.stderr,
        )
    if data.standardise and not model.config.standardise:
        data = _standardised_by_itself(data)
        print(
            f"{arguments.model}: saved without the mean and deviation of its training's features, so those of "
            f"{arguments.data} are used; train again to predict on other nodes.",
            file=sys.stderr,
        )
    probabilities = predict_logits(model, data).softmax(1)
    write_atomically(out, _as_csv(probabilities) if out.suffix == ".csv" else _as_npz(probabilities))
    print(f"Wrote the classes and probabilities of {data.num_nodes:,} nodes to {out}")
    known = data.labels >= 0
    if known.any():
        right = int((probabilities.argmax(1) == data.labels)[known].sum())
        share = f"{right:,} of the {int(known.sum()):,} labelled nodes ({right / int(known.sum()):.1%})"
        print(f"The class is that of the label for {share}, those that the network was trained on included.")
    return 0


def _require_fit(config: NodeClassifierConfig, data: NodeData) -> None:
    from anyattention.errors import InvalidInputError

    if config.in_features != data.in_features or config.num_classes < data.num_classes:
        raise InvalidInputError(
            argument="--data",
            expected=f"{config.in_features} features and at most {config.num_classes} classes, as in the training",
            actual=f"{data.in_features} features and {data.num_classes} classes",
        )
    if config.edge_dim is not None and config.edge_dim != data.edge_dim:
        raise InvalidInputError(
            argument="--data",
            expected=f"edges with {config.edge_dim} features, as in the training",
            actual=f"edges with {data.edge_dim or 'no'} features",
        )


def _standardised_by_itself(data: NodeData) -> NodeData:
    """The data with its features standardised by their own mean and deviation."""
    from anyattention.training.model import mean_and_deviation

    mean, deviation = mean_and_deviation(data.features)
    return replace(data, features=(data.features - mean) / deviation)


def _as_csv(probabilities: Tensor) -> bytes:
    header = ",".join(["node", "class", *(f"probability_{label}" for label in range(probabilities.shape[1]))])
    classes = probabilities.argmax(1).tolist()
    lines = [
        # Nine digits give every float32 back exactly.
        ",".join([str(node), str(label), *(f"{value:.9g}" for value in row)])
        for node, (label, row) in enumerate(zip(classes, probabilities.tolist(), strict=True))
    ]
    return ("\n".join([header, *lines]) + "\n").encode()


def _as_npz(probabilities: Tensor) -> bytes:
    import numpy as np

    content = io.BytesIO()
    np.savez(content, classes=probabilities.argmax(1).numpy(), probabilities=probabilities.numpy())
    return content.getvalue()
