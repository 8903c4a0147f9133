"""Reads node classification data from .npz files, whose every part is checked first.

Two formats, told apart by their keys; docs/data.md describes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention.ambient import lasting
from anyattention.errors import InvalidInputError, SparseMatrixError
from anyattention.files import faults_of_file
from anyattention.nn.feature_rows import sparse_csr
from anyattention.training.archive import read_arrays
from anyattention.training.array_features import read_array_features, reading_of_arrays, require_array_reading
from anyattention.training.columns import deviates
from anyattention.training.data import NodeData, Split
from anyattention.training.delimited import listed
from anyattention.training.edges import ListedEdges, graph_of_edges, is_repeated
from anyattention.training.reading import HOMOGENEOUS_TYPE, Reading
from anyattention.training.splits import split_of_masks

__all__ = ["load_npz"]

Arrays = Mapping[str, np.ndarray]

# Of a column's standard deviation, by rounding.
_MOST_LOST = 0.01

_MANY_COLUMNS, _COLUMNS_PER_FEATURE = 1 << 20, 64


class _Format(NamedTuple):
    """The keys of one format: of the nodes and edges, of the labels, of the splits, and those that may be missing."""

    graph: tuple[str, ...]
    labels: str
    splits: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.graph, self.labels, *self.splits)

    def wanted(self, to_train: bool) -> tuple[str, ...]:
        """The keys that are read."""
        return (*(self.keys if to_train else (*self.graph, self.labels)), *self.optional)


_SPARSE = _Format(
    ("x_indptr", "x_indices", "x_data", "x_shape", "edge_index"), "y", ("train", "val", "test"), ("labelled",)
)
_DENSE = _Format(("node_features", "edges"), "node_labels", ("train_masks", "val_masks", "test_masks"))


def load_npz(path: str | os.PathLike[str], *, to_train: bool = True, reading: Reading | None = None) -> NodeData:
    """Node classification data from a file in one of the two formats of docs/data.md.

    Features of which at most a quarter are not 0 become sparse, and each row is divided by the sum of its magnitudes;
    others become dense, and are to be standardised. Where no feature tells one node from another, the structure of the
    graph stands in for them. A graph gets both directions of each edge where the format stores one, and self-loops.

    Args:
        path: of the .npz file. Nothing in it is unpickled.
        to_train: whether labels and splits must be there. Else the splits are not read, labels may be missing (all are
            -1 then), and need not have every class.
        reading: how the data of the training were read, to read these in the same way. Not to train, and without it,
            the sparse format is read as sparse features and the dense one as dense features, whatever they are.

    Raises:
        InvalidInputError: no such file, not an .npz file, or a key, shape, dtype or value is wrong.
        SparseMatrixError: the sparse features' parts do not fit each other.
        GraphStructureError: an edge names a node that is not there.
    """
    path = Path(path)
    with lasting(), faults_of_file(path):
        return _load(path, to_train, reading)


def _load(path: Path, to_train: bool, reading: Reading | None) -> NodeData:
    both = (_SPARSE, _DENSE)
    arrays, others = read_arrays(path, {key for each in both for key in each.wanted(to_train)})
    # A wrong file should be told of the format that it comes closest to.
    own = max(both, key=lambda format: sum(key in arrays for key in format.keys))
    _require_keys(path, arrays, own.keys if to_train else own.graph)
    require_array_reading(path, reading)
    parts = (_dense_format if own is _DENSE else _sparse_format)(path, arrays, to_train)
    if parts.metric == "roc_auc":
        _require_both_classes(parts, own)
    parts = replace(parts, notes=(*parts.notes, *_told_untaught(parts, own)))
    kind = None if reading is None else reading.nodes[HOMOGENEOUS_TYPE].kind
    if kind is None and not to_train:
        kind = "numbers" if own is _DENSE else "words"
    features = read_array_features(parts.features, kind, parts.graph, [str(node) for node in range(parts.num_nodes)])
    data = replace(
        parts,
        features=features.features,
        look=features.look,
        standardise=features.standardise,
        reading=reading_of_arrays((), features.look.kind),
    )
    unused = [key for key in (*arrays, *others) if key not in (*own.keys, *own.optional)]
    if not unused:
        return data
    return replace(data, notes=(*data.notes, f"Not used, since the format has no such key: {', '.join(unused)}."))


def _require_both_classes(data: NodeData, own: _Format) -> None:
    """Raise InvalidInputError where the area under the ROC curve of a part that is scored would have no answer."""
    for number, split in enumerate(data.splits):
        for key, nodes in zip(own.splits[1:], split[1:], strict=True):
            found = set(data.labels[nodes].tolist())
            if len(found) < 2:
                raise InvalidInputError(
                    argument=key,
                    expected="nodes of both classes, for the area under the ROC curve",
                    actual=f"none of class {1 - min(found)} in split {number}",
                )


def _told_untaught(data: NodeData, own: _Format) -> tuple[str, ...]:
    """What is to be told of classes that no training label has."""
    notes = []
    for number, split in enumerate(data.splits):
        untold = sorted(set(range(data.num_classes)) - set(data.labels[split.train].tolist()))
        if untold:
            where = f" in split {number}" if len(data.splits) > 1 else ""
            notes.append(f"{own.splits[0]} has no node of class {listed(untold)}{where}: it cannot be learnt.")
    return tuple(notes)


def _require_keys(path: Path, arrays: Arrays, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise InvalidInputError(
            argument=str(path),
            expected="the keys " + ", ".join(keys),
            actual="no " + ", ".join(missing),
            hint="docs/data.md describes the two formats",
        )


def _sparse_format(path: Path, arrays: Arrays, to_train: bool) -> NodeData:
    shape = _array(arrays, "x_shape", "iu", 1, (2,))
    num_nodes, num_features = int(shape[0]), int(shape[1])
    if num_nodes < 1 or num_features < 1:
        raise InvalidInputError(argument="x_shape", expected="two sizes of at least 1", actual=tuple(shape.tolist()))
    # The network's memory is that of the columns, and a file should not ask for more than it could fill.
    most = max(_MANY_COLUMNS, _COLUMNS_PER_FEATURE * arrays["x_indices"].size)
    if num_features > most:
        raise InvalidInputError(
            argument="x_shape", expected=f"at most {most:,} columns for so few features", actual=f"{num_features:,}"
        )
    features = _sparse_features(arrays, num_nodes, num_features)
    edges = _array(arrays, "edge_index", "iu", 2, (2, None)).astype(np.int64)
    graph = graph_of_edges(edges, num_nodes, "edge_index")
    repeated = int(is_repeated(edges).sum())
    labels, num_classes = _labels(arrays, _SPARSE, num_nodes, to_train)
    return NodeData(
        name=path.stem,
        features=features,
        graph=graph,
        labels=labels,
        num_classes=num_classes,
        splits=(_listed_split(arrays, num_nodes, labels),) if to_train else (),
        notes=(f"edge_index lists {repeated:,} edges again, and each counts as often as it is listed.",)
        if repeated
        else (),
    )


def _listed_split(arrays: Arrays, num_nodes: int, labels: Tensor) -> Split:
    """The split of the sparse format, whose parts list their nodes."""
    parts = {key: _array(arrays, key, "iu", 1, (None,)) for key in _SPARSE.splits}
    for key, nodes in parts.items():
        if nodes.size and (nodes.min() < 0 or nodes.max() >= num_nodes):
            raise InvalidInputError(
                argument=key,
                expected=f"node numbers from 0 to {num_nodes - 1}",
                actual=f"{int(nodes.min())} to {int(nodes.max())}",
            )
    return split_of_masks({key: np.bincount(nodes, minlength=num_nodes) for key, nodes in parts.items()}, labels)


def _sparse_features(arrays: Arrays, num_nodes: int, num_features: int) -> Tensor:
    """CSR features."""
    offsets = _array(arrays, "x_indptr", "iu", 1, (num_nodes + 1,)).astype(np.int64)
    columns = _array(arrays, "x_indices", "iu", 1, (None,)).astype(np.int64)
    values = _finite("x_data", _array(arrays, "x_data", "fiub", 1, columns.shape))
    if offsets[0] != 0 or offsets[-1] != columns.size or (np.diff(offsets) < 0).any():
        raise SparseMatrixError(
            argument="x_indptr",
            expected=f"offsets that rise from 0 to {columns.size}, the number of stored features",
            actual=f"{int(offsets[0])} to {int(offsets[-1])}, falling {int((np.diff(offsets) < 0).sum())} times",
        )
    if columns.size and (columns.min() < 0 or columns.max() >= num_features):
        raise SparseMatrixError(
            argument="x_indices",
            expected=f"columns from 0 to {num_features - 1}",
            actual=f"{int(columns.min())} to {int(columns.max())}",
        )
    rows = np.repeat(np.arange(num_nodes), np.diff(offsets))
    cells = np.sort(rows * num_features + columns)
    if (cells[1:] == cells[:-1]).any():
        raise SparseMatrixError(argument="x_indices", expected="each column once a row", actual="a column twice")
    shape = (num_nodes, num_features)
    return sparse_csr(torch.from_numpy(offsets), torch.from_numpy(columns), torch.from_numpy(values), shape)


def _dense_format(path: Path, arrays: Arrays, to_train: bool) -> NodeData:
    values = _array(arrays, "node_features", "fiub", 2, (None, None))
    features = _finite("node_features", values)
    num_nodes = features.shape[0]
    if not features.size:
        raise InvalidInputError(argument="node_features", expected="nodes and features", actual=features.shape)
    labels, num_classes = _labels(arrays, _DENSE, num_nodes, to_train)
    listed = _array(arrays, "edges", "iu", 2, (None, 2)).astype(np.int64).T
    edges, repeated = ListedEdges(listed).once(directed=False)
    return NodeData(
        name=path.stem,
        features=torch.from_numpy(features),
        graph=graph_of_edges(edges.both_ways().ends, num_nodes, "edges"),
        labels=labels,
        num_classes=num_classes,
        splits=_masked_splits(arrays, num_nodes, labels) if to_train else (),
        metric="roc_auc" if num_classes == 2 else "accuracy",
        notes=(
            *_told_lost(values, features),
            *(
                (f"edges lists {repeated:,} edges again, either way round; each counts once, in both directions.",)
                if repeated
                else ()
            ),
        ),
    )


def _masked_splits(arrays: Arrays, num_nodes: int, labels: Tensor) -> tuple[Split, ...]:
    """The splits of the dense format, whose parts are masks."""
    masks = {key: _array(arrays, key, "b", 2, (None, num_nodes)) for key in _DENSE.splits}
    counts = {key: len(rows) for key, rows in masks.items()}
    if len(set(counts.values())) != 1 or not counts["train_masks"]:
        raise InvalidInputError(argument="train_masks", expected="as many splits in each of the masks", actual=counts)
    return tuple(
        split_of_masks({key: rows[number] for key, rows in masks.items()}, labels)
        for number in range(counts["train_masks"])
    )


def _array(arrays: Arrays, key: str, kinds: str, rank: int, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array of one of numpy's kinds (i, u, f, b) and of a shape, where None is any size."""
    names = {"i": "signed", "u": "unsigned", "f": "floating", "b": "boolean"}
    array = arrays[key]
    if array.dtype.kind not in kinds:
        expected = " or ".join(names[kind] for kind in kinds) + " numbers"
        raise InvalidInputError(argument=key, expected=expected, actual=array.dtype)
    fits = array.ndim == rank and all(size in (None, own) for size, own in zip(shape, array.shape, strict=True))
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise InvalidInputError(argument=key, expected=f"the shape ({sizes})", actual=array.shape)
    return array


def _labels(arrays: Arrays, own: _Format, num_nodes: int, to_train: bool) -> tuple[Tensor, int]:
    """The labels, -1 where there is none, and how many classes there are."""
    if own.labels not in arrays and not to_train:
        return torch.full((num_nodes,), -1, dtype=torch.int64, device="cpu"), 0
    labels = _array(arrays, own.labels, "iu", 1, (num_nodes,)).astype(np.int64)
    if "labelled" in own.optional and "labelled" in arrays:
        labels = np.where(_array(arrays, "labelled", "b", 1, (num_nodes,)), labels, -1)
    classes = np.unique(labels[labels != -1])
    # A class without a node would be a mistake in the numbering, or a file of another kind.
    is_complete = len(classes) >= 2 and classes[0] == 0 and classes[-1] == len(classes) - 1
    if not is_complete and (to_train or (len(classes) and classes[0] < 0)):
        raise InvalidInputError(
            argument=own.labels,
            expected="class numbers from 0 (or -1: unlabelled), at least two classes, none left out",
            actual=f"{len(classes)} classes" + (f" from {classes[0]} to {classes[-1]}" if len(classes) else ""),
        )
    return torch.from_numpy(labels), int(classes.max(initial=-1)) + 1


def _told_lost(values: np.ndarray, narrow: np.ndarray) -> tuple[str, ...]:
    """What is to be told of columns that differ by little more than 32 bits keep of them, such as times."""
    if narrow.dtype == values.dtype:
        return ()
    wide = values.astype(np.float64)
    deviation, lost = wide.std(0), np.abs(wide - narrow).max(0)
    is_lost = deviates(deviation, np.abs(wide).max(0)) & (lost > _MOST_LOST * deviation)
    columns = np.flatnonzero(is_lost).tolist()
    told = f"node_features: 32 bits keep little of how the numbers of column {listed(columns)} differ. Subtract a mean."
    return (told,) if columns else ()


def _finite(key: str, values: np.ndarray) -> np.ndarray:
    """An array as float32."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise InvalidInputError(argument=key, expected="finite numbers of 32 bits", actual="NaN or Inf")
    return narrow
