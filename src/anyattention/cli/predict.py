"""`anyattention predict`: classes and probabilities from a trained model."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyattention.cli.arguments import add_data, load_data, print_notes, use_threads

if TYPE_CHECKING:
    from torch import Tensor

    from anyattention.training import NodeData
    from anyattention.training.data import AnyData
    from anyattention.training.fitting import AnyClassifier, AnyConfig

__all__ = ["add_parser"]

_TABLES = ("nodes.csv", "edges.csv", "nodes-*.csv", "edges-*.csv")

_DESCRIPTION = """\
Load what `anyattention train` wrote and classify every node of the data, which must be of the kind it was trained on.
It needs no labels and no splits; where there are labels, it says how many nodes are classified as they say.

FILE.csv gets a line per node. Where nodes have ids: id, class by its name, and the probability of that class.
Else: node, class, and one probability per class.
FILE.npz gets the arrays classes (nodes,) int64 and probabilities (nodes, classes) float32, and ids and class_names
where there are any.
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
        "--output",
        metavar="FILE",
        type=Path,
        help="where to write, as its suffix says: .csv or .npz (default: predictions.csv in the model's folder)",
    )
    parser.set_defaults(run=_run, imports=("anyattention.training",))


def _run(arguments: argparse.Namespace) -> int:
    import anyattention
    from anyattention.errors import InvalidInputError
    from anyattention.files import make_folder, write_atomically
    from anyattention.saving import read_metadata
    from anyattention.training import (
        HeterogeneousNodeClassifier,
        NodeClassifier,
        NodeData,
        Reading,
        ReadOptions,
        predict_logits,
    )
    from anyattention.training.reading import READING

    out = arguments.out or arguments.model / "predictions.csv"
    if out.suffix not in (".csv", ".npz"):
        raise InvalidInputError(argument="--out", expected="a file that ends in .csv or .npz", actual=repr(str(out)))
    _require_no_input(out, arguments.data)
    model = anyattention.load(arguments.model)
    if not isinstance(model, NodeClassifier | HeterogeneousNodeClassifier):
        raise InvalidInputError(argument="--model", expected="a NodeClassifier", actual=type(model).__name__)
    kept = read_metadata(arguments.model, READING)
    reading = None if kept is None else Reading.from_json(kept)
    data = load_data(arguments.data, ReadOptions(), reading, to_train=False)
    use_threads(arguments.threads, data)
    _require_fit(model, data)
    make_folder(out.parent)
    print_notes(arguments.data, data)
    if isinstance(data, NodeData):
        data = _as_trained(model.config, data, arguments)
        _tell_constant(model, data, arguments.data)
    probabilities = predict_logits(model, data).softmax(1)
    write_atomically(out, _as_npz(data, probabilities) if out.suffix == ".npz" else _as_csv(data, probabilities))
    print(f"Wrote the classes and probabilities of {data.num_nodes:,} nodes to {out}{_counted(data, probabilities)}")
    known = data.labels >= 0
    if known.any():
        right = int((probabilities.argmax(1) == data.labels)[known].sum())
        share = f"{right:,} of the {int(known.sum()):,} labelled nodes ({right / int(known.sum()):.1%})"
        print(f"The class is that of the label for {share}, those that the network was trained on included.")
    return 0


def _require_no_input(out: Path, data: str) -> None:
    """Raise where the predictions would replace a file of the data, or be one of its tables the next time."""
    from anyattention.errors import InvalidInputError

    source = Path(data)
    if source.is_dir():
        inputs = [path for pattern in _TABLES for path in source.glob(pattern)]
        is_table = out.resolve().parent == source.resolve() and any(fnmatch(out.name, each) for each in _TABLES)
    else:
        inputs, is_table = [source], False
    if is_table or (out.exists() and any(path.exists() and path.samefile(out) for path in inputs)):
        raise InvalidInputError(
            argument="--out",
            expected="another file than those of --data, which it would replace",
            actual=repr(str(out)),
        )


def _require_fit(model: AnyClassifier, data: AnyData) -> None:
    """Raise where the data are not of the kind and the sizes of those that the model was trained on."""
    from anyattention.errors import InvalidInputError
    from anyattention.training import NodeClassifier, NodeData

    is_one_type = isinstance(model, NodeClassifier)
    if is_one_type != isinstance(data, NodeData):
        kind = "one type" if is_one_type else "several types"
        raise InvalidInputError(argument="--data", expected=f"data of {kind}, as in the training", actual=data.name)
    config, sizes = model.config, data.sizes
    # Names must be there for each class of the model.
    fits = config.num_classes == data.num_classes if data.ids else config.num_classes >= data.num_classes
    if config.in_features != _plain(sizes["in_features"]) or not fits:
        bound = "" if data.ids else "at most "
        raise InvalidInputError(
            argument="--data",
            expected=f"{_told(config.in_features)} features and {bound}{config.num_classes} classes, as in the "
            "training",
            actual=f"{_told(_plain(sizes['in_features']))} features and {data.num_classes} classes",
        )
    if is_one_type and config.edge_dim is not None and config.edge_dim != sizes["edge_dim"]:
        raise InvalidInputError(
            argument="--data",
            expected=f"edges with {config.edge_dim} features, as in the training",
            actual=f"edges with {sizes['edge_dim'] or 'no'} features",
        )


def _plain(in_features: Any) -> Any:
    """The widths as a config has them: a number, or pairs of a type and a number."""
    return tuple(in_features.items()) if isinstance(in_features, dict) else in_features


def _told(in_features: Any) -> str:
    if isinstance(in_features, int):
        return str(in_features)
    return ", ".join(f"{width} {name}" for name, width in in_features)


def _as_trained(config: AnyConfig, data: NodeData, arguments: argparse.Namespace) -> NodeData:
    """The data as the model takes them; what is not as in the training is told."""
    if data.edge_dim is not None and config.edge_dim is None:
        print(
            f"{arguments.model}: trained without features of edges, so those of {arguments.data} are not used",
            file=sys.stderr,
        )
    if not data.standardise or getattr(config, "standardise", True):
        return data
    print(
        f"{arguments.model}: saved without the mean and deviation of its training's features, so those of "
        f"{arguments.data} are used; train again to predict on other nodes.",
        file=sys.stderr,
    )
    return _standardised_by_itself(data)


def _tell_constant(model: AnyClassifier, data: NodeData, name: str) -> None:
    """Say which features were the same for all nodes of the training and are others now."""
    from anyattention.training.columns import deviates
    from anyattention.training.delimited import listed

    if not data.standardise or not getattr(model.config, "standardise", False):
        return
    mean, deviation = model.get_buffer("feature_mean"), model.get_buffer("feature_deviation")
    is_changed = deviation.isinf() & deviates((data.features - mean).abs().amax(0), mean.abs())
    if is_changed.any():
        told = listed(is_changed.nonzero()[:, 0].tolist())
        print(f"{name}: not used, since the training had the same number everywhere: feature {told}.", file=sys.stderr)


def _standardised_by_itself(data: NodeData) -> NodeData:
    """The data with its features standardised by their own mean and deviation."""
    from anyattention.training.model import mean_and_deviation

    mean, deviation = mean_and_deviation(data.features)
    return replace(data, features=(data.features - mean) / deviation)


def _counted(data: AnyData, probabilities: Tensor) -> str:
    """How many nodes each class got, the commonest first, where classes have names."""
    if data.ids is None:
        return ""
    counts = Counter(probabilities.argmax(1).tolist()).most_common()
    shown = [f"{data.class_names[label]} ({count:,})" for label, count in counts[:10]]
    more = f" and {len(counts) - 10:,} classes more" if len(counts) > 10 else ""
    return f": {', '.join(shown)}{more}."


def _as_csv(data: AnyData, probabilities: Tensor) -> bytes:
    best, classes = probabilities.max(1)
    content = io.StringIO()
    # Before Python 3.13 csv leaves a lone carriage return without quotes, and would read it as the end of a line.
    has_return = any("\r" in name for name in (*(data.ids or ()), *data.class_names))
    writer = csv.writer(content, lineterminator="\n", quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL)
    # Nine digits give every float32 back exactly.
    if data.ids is None:
        writer.writerow(["node", "class", *(f"probability_{label}" for label in range(probabilities.shape[1]))])
        for node, (label, row) in enumerate(zip(classes.tolist(), probabilities.tolist(), strict=True)):
            writer.writerow([node, label, *(f"{value:.9g}" for value in row)])
    else:
        names = data.class_names
        writer.writerow(["id", "class", "probability"])
        for name, label, value in zip(data.ids, classes.tolist(), best.tolist(), strict=True):
            writer.writerow([name, names[label], f"{value:.9g}"])
    return content.getvalue().encode()


def _as_npz(data: AnyData, probabilities: Tensor) -> bytes:
    import numpy as np

    content = io.BytesIO()
    arrays: dict[str, Any] = {"classes": probabilities.argmax(1).numpy(), "probabilities": probabilities.numpy()}
    if data.ids is not None:
        arrays |= {"ids": np.array(data.ids), "class_names": np.array(data.class_names)}
    np.savez(content, **arrays)
    return content.getvalue()
