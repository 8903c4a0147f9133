"""Data for a training from what `save_data` wrote: labels, splits and features that are arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyattention._checks import Relation
from anyattention.ambient import lasting
from anyattention.errors import GraphStructureError, InvalidInputError
from anyattention.files import faults_of_file
from anyattention.patterns import Graph, HeterogeneousGraph
from anyattention.training.array_features import ArrayFeatures, read_array_features
from anyattention.training.columns import Column, deviates
from anyattention.training.data import AnyData, HeterogeneousNodeData, NodeData
from anyattention.training.delimited import listed
from anyattention.training.edges import ListedEdges, looped_graph
from anyattention.training.features import Look, look_at, rows_normalised, to_sparse
from anyattention.training.heterogeneous_tables import structure_by_type, with_missing_reverses
from anyattention.training.model import mean_and_deviation
from anyattention.training.reading import (
    HOMOGENEOUS_RELATION,
    HOMOGENEOUS_TYPE,
    NodeReading,
    Reading,
    ReadOptions,
)
from anyattention.training.saved_data import SavedGraph, fault_of_array, read_saved
from anyattention.training.saved_labels import read_labels
from anyattention.training.splits import ReadLabels

__all__ = ["load_saved"]


def load_saved(
    path: str | os.PathLike[str],
    options: ReadOptions | None = None,
    reading: Reading | None = None,
    *,
    to_train: bool = True,
) -> AnyData:
    """The data of a file that `save_data` wrote.

    Edges are taken as they are listed, as PyTorch Geometric does, with self-loops where there is one type of nodes.
    With several, a relation gets its reverse where no relation joins its types the other way round, unless
    options.directed.

    Args:
        path: of the file.
        options: the seed of a split that is drawn, `directed`, and the `target` among several types with a y.
        reading: how the data of the training were read, to read these in the same way.
        to_train: whether labels must be there, and splits are read or drawn.

    Raises:
        InvalidInputError: no such file, or a part of it has another shape, dtype or value than it needs.
        GraphStructureError: an edge names a node that is not there.
    """
    with lasting(), faults_of_file(Path(path)):
        return _load(Path(path), options or ReadOptions(), reading, to_train)


def _load(path: Path, options: ReadOptions, reading: Reading | None, to_train: bool) -> AnyData:
    saved = read_saved(path)
    is_homogeneous = set(saved.edges) == {HOMOGENEOUS_RELATION} and set(saved.nodes) == {HOMOGENEOUS_TYPE}
    if reading is not None:
        _require_same(path, saved, reading, is_homogeneous)
    target = _target(path, saved, options) if reading is None else reading.target
    if not saved.num_nodes[target]:
        raise fault_of_array(path, target, "num_nodes", "at least one node", "none")
    labels = read_labels(path, saved, target, options, reading, to_train)
    return (_homogeneous if is_homogeneous else _heterogeneous)(path, saved, target, labels, options, reading)


def _require_same(path: Path, saved: SavedGraph, reading: Reading, is_homogeneous: bool) -> None:
    missing = [name for name in reading.nodes if name not in saved.nodes]
    if missing or is_homogeneous != reading.is_homogeneous:
        raise InvalidInputError(
            argument=str(path),
            expected=f"nodes of {listed(reading.nodes)}, as in the training",
            actual=listed(saved.nodes),
        )
    names = [column.name for own in reading.nodes.values() for column in own.columns]
    if any(not name.isdigit() for name in names):
        raise InvalidInputError(
            argument=str(path), expected="tables with the columns of the training", actual="arrays, which have no names"
        )


def _target(path: Path, saved: SavedGraph, options: ReadOptions) -> str:
    if options.target is not None and options.target not in saved.nodes:
        raise InvalidInputError(
            argument="--target", expected=f"a type of nodes: {listed(saved.nodes)}", actual=repr(options.target)
        )
    labelled = [name for name, own in saved.nodes.items() if "y" in own and options.target in (None, name)]
    if len(labelled) != 1:
        raise InvalidInputError(
            argument=str(path),
            expected=f"a y of {options.target!r}" if options.target else "a y of one type of nodes",
            actual=f"one of {listed(labelled)}" if labelled else "none",
            hint="--target TYPE says which is meant" if labelled else None,
        )
    return labelled[0]


def _homogeneous(
    path: Path, saved: SavedGraph, target: str, labels: ReadLabels, options: ReadOptions, reading: Reading | None
) -> NodeData:
    count = saved.num_nodes[target]
    names = saved.ids.get(target, tuple(map(str, range(count))))
    own = None if reading is None else reading.edges[HOMOGENEOUS_RELATION]
    edges, columns, notes = _read_edges(path, saved, HOMOGENEOUS_RELATION, own)
    graph, edge_features = looped_graph(edges, count, str(path))
    known = None if reading is None else reading.nodes[target]
    found, own_reading, more = _read_array(path, _read_x(path, saved, target), known, graph, names)
    return NodeData(
        name=path.stem,
        features=found.features,
        graph=graph,
        labels=labels.labels,
        num_classes=len(labels.class_names),
        splits=labels.splits,
        standardise=found.standardise,
        edge_features=edge_features,
        notes=(*labels.notes, *more, *notes),
        ids=names,
        look=found.look,
        reading=Reading(
            labels.class_names,
            directed=True,
            nodes={HOMOGENEOUS_TYPE: own_reading},
            edges={HOMOGENEOUS_RELATION: columns},
        ),
        facts=(f"{count:,} nodes and {edges.ends.shape[1]:,} edges, from source to target only.", *labels.facts),
    )


def _read_array(
    path: Path, x: Tensor | None, known: NodeReading | None, graph: Graph, names: Sequence[str]
) -> tuple[ArrayFeatures, NodeReading, tuple[str, ...]]:
    """The features where there is one type of nodes, how they were read, and what is to be told.

    The network standardises those that 32 bits hold. Of wider ones they would keep too little, so these are
    standardised here.
    """
    kind = None if known is None else known.kind
    if x is None:
        if kind in ("words", "numbers"):
            raise fault_of_array(path, HOMOGENEOUS_TYPE, "x", "features, as in the training", "none")
        nothing = torch.zeros(len(names), 1, dtype=torch.float32, device="cpu")
        found = read_array_features(nothing, kind, graph, names)
        return found._replace(look=Look("structure", "there are no features")), NodeReading("structure"), ()
    if known is None:
        is_wide = x.dtype == torch.float64 and not torch.equal(x, x.float().double())
        look = look_at(x.numpy()) if is_wide else None
        columns = _measured(x) if look is not None and look.kind == "numbers" else ()
    else:
        look, columns = Look(known.kind, "those of the training are"), known.columns
    if look is None or not columns:
        found = read_array_features(x.float(), kind, graph, names)
        told = (_told_unused(path, HOMOGENEOUS_TYPE, "x"),) if kind == "structure" else ()
        return found, NodeReading(found.look.kind), told
    features = _standardised(path, HOMOGENEOUS_TYPE, "x", x, columns)
    told = _told_constant(path, HOMOGENEOUS_TYPE, "x", x, columns)
    return ArrayFeatures(features, look, False), NodeReading("numbers", columns), told


def _heterogeneous(
    path: Path, saved: SavedGraph, target: str, labels: ReadLabels, options: ReadOptions, reading: Reading | None
) -> HeterogeneousNodeData:
    directed = options.directed if reading is None else reading.directed
    types = list(saved.nodes) if reading is None else list(reading.nodes)
    relations = list(saved.edges) if reading is None else list(reading.edges)
    edge_index, edge_features, columns = {}, {}, {}
    notes = [*labels.notes, *_told_others(path, saved, reading)]
    for relation in relations:
        own = None if reading is None else reading.edges[relation]
        edges, columns[relation], more = _read_edges(path, saved, relation, own)
        notes += more
        edge_index[relation] = torch.from_numpy(edges.ends)
        if edges.features is not None:
            edge_features[relation] = torch.from_numpy(edges.features)
    try:
        graph = HeterogeneousGraph.from_edge_index(edge_index, {name: saved.num_nodes[name] for name in types})
    except GraphStructureError as fault:
        raise GraphStructureError(f"{path}: {fault}", argument=str(path)) from fault
    if not directed:
        graph, edge_features = with_missing_reverses(graph, edge_features, all_of_them=False)
    found = {
        name: _read_features(_read_x(path, saved, name), None if reading is None else reading.nodes[name], path, name)
        for name in types
    }
    notes += [note for *_, more in found.values() for note in more]
    places: dict[str, Tensor] = {}
    if any(features is None for features, *_ in found.values()):
        names = {name: list(saved.ids.get(name, map(str, range(saved.num_nodes[name])))) for name in types}
        places = structure_by_type(graph, names)
    return HeterogeneousNodeData(
        name=path.stem,
        features={name: places[name] if features is None else features for name, (features, *_) in found.items()},
        graph=graph,
        target=target,
        labels=labels.labels,
        num_classes=len(labels.class_names),
        splits=labels.splits,
        reading=Reading(
            labels.class_names, directed, target, {name: own for name, (_, own, _) in found.items()}, columns
        ),
        edge_features=edge_features,
        notes=tuple(notes),
        ids=saved.ids.get(target, tuple(map(str, range(saved.num_nodes[target])))),
        facts=(
            "Nodes: " + ", ".join(f"{saved.num_nodes[name]:,} {name} ({found[name][1].kind})" for name in types) + ".",
            "Edges: " + ", ".join(f"{each.shape[1]:,} {'-'.join(key)}" for key, each in graph.edge_index.items()) + ".",
            f"To learn: the classes of {target}. {labels.facts[0]}" if labels.facts else "",
            *labels.facts[1:],
        ),
    )


def _told_unused(path: Path, name: object, key: str) -> str:
    return f"{path}, {name!r}, {key}: not used, since the training did not use any."


def _told_others(path: Path, saved: SavedGraph, reading: Reading | None) -> list[str]:
    """What is to be told of types and relations that the training had not, and of relations that it had."""
    if reading is None:
        return []
    others = [each for each in (*saved.nodes, *saved.edges) if each not in reading.nodes and each not in reading.edges]
    missing = [each for each in reading.edges if each not in saved.edges]
    notes = [f"{path}: not used, since the training had no such: {listed(others)}."] if others else []
    if missing:
        notes.append(f"{path}: no {listed(missing)}, which the training had: there are no such edges.")
    return notes


def _read_x(path: Path, saved: SavedGraph, name: str) -> Tensor | None:
    """The features of one type; None where there are none."""
    x, count = saved.nodes[name].get("x"), saved.num_nodes[name]
    if x is None:
        return None
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2 or x.shape[0] != count or x.is_complex():
        raise fault_of_array(path, name, "x", f"({count}, features) of numbers", f"{x.dtype} {tuple(x.shape)}")
    return _finite(path, name, "x", x) if x.shape[1] else None


def _finite(path: Path, name: object, key: str, x: Tensor) -> Tensor:
    """Features as float64 where the file has wider numbers than float32, else as float32.

    What is large and differs little, such as times, would be one number in float32.
    """
    narrow = x.to(torch.float32)
    if not bool(narrow.isfinite().all()):
        raise fault_of_array(path, name, key, "finite numbers of 32 bits", "NaN or Inf")
    return x.to(torch.float64) if x.dtype in (torch.float64, torch.int64, torch.int32) else narrow


def _read_features(
    x: Tensor | None, own: NodeReading | None, path: Path, name: str
) -> tuple[Tensor | None, NodeReading, tuple[str, ...]]:
    """The features of one type, ready for a network, None where it is the structure; how they were read, and what is
    to be told.
    """
    kind = own.kind if own is not None else "structure" if x is None else look_at(x.numpy()).kind
    if kind == "structure":
        told = () if own is None or x is None else (_told_unused(path, name, "x"),)
        return None, NodeReading("structure"), told
    if x is None:
        raise fault_of_array(path, name, "x", "features, as in the training", "none")
    if kind == "words":
        return rows_normalised(to_sparse(x.numpy())), NodeReading("words"), ()
    columns = own.columns if own is not None else _measured(x)
    features = _standardised(path, name, "x", x, columns)
    return features, NodeReading("numbers", columns), _told_constant(path, name, "x", x, columns)


def _measured(x: Tensor) -> tuple[Column, ...]:
    mean, deviation = mean_and_deviation(x.double())
    return tuple(
        Column(str(place), "number", *each)
        for place, each in enumerate(zip(mean.tolist(), deviation.tolist(), strict=True))
    )


def _standardised(path: Path, name: object, key: str, x: Tensor, columns: tuple[Column, ...]) -> Tensor:
    if len(columns) != x.shape[1]:
        raise fault_of_array(path, name, key, f"{len(columns)} features, as in the training", x.shape[1])
    mean = torch.tensor([column.mean for column in columns], dtype=torch.float64, device="cpu")
    deviation = torch.tensor([column.deviation for column in columns], dtype=torch.float64, device="cpu")
    return ((x.double() - mean) / deviation).float()


def _told_constant(path: Path, name: object, key: str, x: Tensor, columns: tuple[Column, ...]) -> tuple[str, ...]:
    """What is to be told of columns that were the same in all rows of the training and are others now."""
    changed = [
        place
        for place, column in enumerate(columns)
        if len(x)
        and math.isinf(column.deviation)
        and deviates(float((x[:, place].double() - column.mean).abs().max()), abs(column.mean))
    ]
    told = f"{path}, {name!r}, {key}: not used, since the training had the same number everywhere: column "
    return (f"{told}{listed(changed)}.",) if changed else ()


def _read_edges(
    path: Path, saved: SavedGraph, relation: Relation, own: tuple[Column, ...] | None
) -> tuple[ListedEdges, tuple[Column, ...], tuple[str, ...]]:
    """The edges of a relation, how their features were read, and what is to be told; own: as in the training."""
    if own is not None and relation not in saved.edges:
        features = np.zeros((0, len(own)), dtype=np.float32) if own else None
        return ListedEdges(np.zeros((2, 0), dtype=np.int64), features), own, ()
    parts = saved.edges[relation]
    ends, features = parts["edge_index"], parts.get("edge_attr")
    if ends.ndim != 2 or ends.shape[0] != 2 or ends.dtype not in (torch.int64, torch.int32):
        raise fault_of_array(path, relation, "edge_index", "(2, edges) int64", f"{ends.dtype} {tuple(ends.shape)}")
    found = ListedEdges(np.ascontiguousarray(ends.to(torch.int64).numpy()))
    if own == () or (own is None and features is None):
        return found, (), () if features is None else (_told_unused(path, relation, "edge_attr"),)
    if features is None:
        raise fault_of_array(path, relation, "edge_attr", "features of the edges, as in the training", "none")
    features = features[:, None] if features.ndim == 1 else features
    if features.ndim != 2 or features.shape[0] != ends.shape[1] or features.is_complex() or not features.shape[1]:
        expected = f"({ends.shape[1]}, edge_dim) of numbers"
        raise fault_of_array(path, relation, "edge_attr", expected, f"{features.dtype} {tuple(features.shape)}")
    features = _finite(path, relation, "edge_attr", features)
    columns = _measured(features) if own is None else own
    told = _told_constant(path, relation, "edge_attr", features, columns)
    return found._replace(features=_standardised(path, relation, "edge_attr", features, columns).numpy()), columns, told
