"""Reads node classification data from .npz files, whose every part is checked first.

Two formats, told apart by their keys; docs/data.md describes them.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyattention.errors import GraphStructureError, InvalidInputError, SparseMatrixError
from anyattention.patterns import Graph
from anyattention.training.data import NodeData, Split
from anyattention.training.model import sparse_csr

__all__ = ["load_npz"]

Arrays = Mapping[str, np.ndarray]

_SPARSE_KEYS = ("x_indptr", "x_indices", "x_data", "x_shape", "edge_index", "y", "train", "val", "test")
_DENSE_KEYS = ("node_features", "node_labels", "edges", "train_masks", "val_masks", "test_masks")


def load_npz(path: str | os.PathLike[str]) -> NodeData:
    """Node classification data from a file in one of the two formats of docs/data.md.

    Sparse features stay sparse, and each row is divided by the sum of its magnitudes; dense ones are standardised,
    column by column, over all nodes. A graph gets both directions of each edge where the format stores one, and
    self-loops.

    Args:
        path: of the .npz file. Nothing in it is unpickled.

    Raises:
        InvalidInputError: no such file, not an .npz file, or a key, shape, dtype or value is wrong.
        SparseMatrixError: the sparse features' parts do not fit each other.
        GraphStructureError: an edge names a node that is not there.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    # A wrong file should be told of the format that it comes closest to.
    if sum(key in arrays for key in _DENSE_KEYS) > sum(key in arrays for key in _SPARSE_KEYS):
        _require_keys(path, arrays, _DENSE_KEYS)
        return _dense_format(path, arrays)
    _require_keys(path, arrays, _SPARSE_KEYS)
    return _sparse_format(path, arrays)


def _read_arrays(path: Path) -> Arrays:
    expected = "a readable .npz file"
    try:
        # numpy leaves a file of its own opening open when the archive is broken.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise InvalidInputError(argument=str(path), expected=expected, actual="a single array (.npy)")
            with loaded:
                return {key: loaded[key] for key in loaded.files}
    except InvalidInputError:
        raise
    except OSError as fault:
        raise InvalidInputError(argument=str(path), expected=expected, actual=fault.strerror or str(fault)) from fault
    # A broken archive fails in the archive, in its compression or in an array's header, each in its own way.
    except (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zipfile.zlib.error) as fault:  # pyright: ignore[reportAttributeAccessIssue]
        reason = "it holds pickled objects, which are never loaded" if "pickle" in str(fault) else str(fault)
        raise InvalidInputError(argument=str(path), expected=expected, actual=reason or type(fault).__name__) from fault


def _require_keys(path: Path, arrays: Arrays, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise InvalidInputError(
            argument=str(path),
            expected="the keys " + ", ".join(keys),
            actual="no " + ", ".join(missing),
            hint="docs/data.md describes the two formats",
        )


def _sparse_format(path: Path, arrays: Arrays) -> NodeData:
    shape = _array(arrays, "x_shape", "iu", 1, (2,))
    num_nodes, num_features = int(shape[0]), int(shape[1])
    if num_nodes < 1 or num_features < 1:
        raise InvalidInputError(argument="x_shape", expected="two sizes of at least 1", actual=tuple(shape.tolist()))
    features = _sparse_features(arrays, num_nodes, num_features)
    edges = _array(arrays, "edge_index", "iu", 2, (2, None))
    # Nodes without a known label are kept, for the graph, and take no part in any split.
    known = np.ones(num_nodes, dtype=bool)
    if "labelled" in arrays:
        known = _array(arrays, "labelled", "b", 1, (num_nodes,))
    labels, num_classes = _labels(arrays, "y", num_nodes, known)
    parts = {key: _array(arrays, key, "iu", 1, (None,)) for key in ("train", "val", "test")}
    for key, nodes in parts.items():
        if nodes.size and (nodes.min() < 0 or nodes.max() >= num_nodes):
            raise InvalidInputError(
                argument=key,
                expected=f"node numbers from 0 to {num_nodes - 1}",
                actual=f"{int(nodes.min())} to {int(nodes.max())}",
            )
    masks = {key: np.bincount(nodes, minlength=num_nodes) for key, nodes in parts.items()}
    return NodeData(
        name=path.stem,
        features=features,
        graph=_graph(edges.astype(np.int64), num_nodes, "edge_index"),
        labels=labels,
        num_classes=num_classes,
        splits=(_split(masks, known),),
    )


def _sparse_features(arrays: Arrays, num_nodes: int, num_features: int) -> Tensor:
    """CSR features, each row divided by the sum of its magnitudes."""
    offsets = _array(arrays, "x_indptr", "iu", 1, (num_nodes + 1,)).astype(np.int64)
    columns = _array(arrays, "x_indices", "iu", 1, (None,)).astype(np.int64)
    values = _array(arrays, "x_data", "fiub", 1, columns.shape).astype(np.float32)
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
    _require_finite("x_data", values)
    rows = np.repeat(np.arange(num_nodes), np.diff(offsets))
    cells = np.sort(rows * num_features + columns)
    if (cells[1:] == cells[:-1]).any():
        raise SparseMatrixError(argument="x_indices", expected="each column once a row", actual="a column twice")
    sums = np.bincount(rows, weights=np.abs(values), minlength=num_nodes)
    factors = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums != 0)
    scaled = torch.from_numpy((values * factors[rows]).astype(np.float32))
    return sparse_csr(torch.from_numpy(offsets), torch.from_numpy(columns), scaled, (num_nodes, num_features))


def _dense_format(path: Path, arrays: Arrays) -> NodeData:
    features = _array(arrays, "node_features", "fiub", 2, (None, None)).astype(np.float32)
    num_nodes = features.shape[0]
    if not features.size:
        raise InvalidInputError(argument="node_features", expected="nodes and features", actual=features.shape)
    _require_finite("node_features", features)
    known = np.ones(num_nodes, dtype=bool)
    labels, num_classes = _labels(arrays, "node_labels", num_nodes, known)
    edges = _array(arrays, "edges", "iu", 2, (None, 2)).astype(np.int64).T
    masks = {key: _array(arrays, f"{key}_masks", "b", 2, (None, num_nodes)) for key in ("train", "val", "test")}
    counts = {f"{key}_masks": len(rows) for key, rows in masks.items()}
    if len(set(counts.values())) != 1 or not counts["train_masks"]:
        raise InvalidInputError(argument="train_masks", expected="as many splits in each of the masks", actual=counts)
    splits = tuple(
        _split({key: rows[number] for key, rows in masks.items()}, known) for number in range(counts["train_masks"])
    )
    # In float32 the squares of large features would overflow.
    wide = features.astype(np.float64)
    spread = wide.std(0)
    centred = (wide - wide.mean(0)) / np.where(spread > 0, spread, 1.0)
    return NodeData(
        name=path.stem,
        features=torch.from_numpy(centred.astype(np.float32)),
        graph=_graph(np.concatenate([edges, edges[::-1, edges[0] != edges[1]]], axis=1), num_nodes, "edges"),
        labels=labels,
        num_classes=num_classes,
        splits=splits,
        metric="roc_auc" if num_classes == 2 else "accuracy",
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


def _labels(arrays: Arrays, key: str, num_nodes: int, known: np.ndarray) -> tuple[Tensor, int]:
    labels = _array(arrays, key, "iu", 1, (num_nodes,)).astype(np.int64)
    seen = labels[known]
    # A class without a node would be a mistake in the numbering, or a file of another kind.
    classes = np.unique(seen)
    if len(classes) < 2 or classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise InvalidInputError(
            argument=key,
            expected="class numbers from 0, at least two classes, none left out",
            actual=f"{len(classes)} classes" + (f" from {classes[0]} to {classes[-1]}" if len(classes) else ""),
        )
    return torch.from_numpy(np.where(known, labels, 0)), len(classes)


def _graph(edges: np.ndarray, num_nodes: int, key: str) -> Graph:
    try:
        graph = Graph.from_edge_index(torch.from_numpy(np.ascontiguousarray(edges)), num_nodes)
    except GraphStructureError as fault:
        raise GraphStructureError(f"{key}: {fault}", argument=key) from fault
    return graph.with_self_loops()


def _split(masks: Mapping[str, np.ndarray], known: np.ndarray) -> Split:
    """A split of masks (or counts) over the nodes; a node is in one part, once."""
    total = np.sum([mask.astype(np.int64) for mask in masks.values()], axis=0)
    if (total > 1).any():
        raise InvalidInputError(
            argument="splits",
            expected="each node in one part, once",
            actual=f"node {int(np.argmax(total > 1))} repeated",
        )
    for key, mask in masks.items():
        if not mask.any():
            raise InvalidInputError(argument=key, expected="at least one node", actual="none")
        if mask[~known].any():
            raise InvalidInputError(argument=key, expected="labelled nodes", actual="a node without a label")
    return Split(*(torch.from_numpy(np.flatnonzero(mask)) for mask in masks.values()))


def _require_finite(key: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise InvalidInputError(argument=key, expected="finite numbers", actual="NaN or Inf")
