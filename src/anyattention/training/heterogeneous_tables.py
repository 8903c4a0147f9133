"""Reads a graph of several types from tables: nodes-TYPE.csv, and edges-SOURCE-RELATION-TARGET.csv."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyattention._checks import Relation
from anyattention.ambient import lasting
from anyattention.errors import InvalidInputError
from anyattention.patterns import Graph, HeterogeneousGraph
from anyattention.training.columns import described
from anyattention.training.data import HeterogeneousNodeData
from anyattention.training.delimited import Table, counted, listed, read_table
from anyattention.training.edge_tables import ENDS, edge_columns, read_edges, told_repeated
from anyattention.training.node_tables import NOT_FEATURES, ReadNodes, ids_of_table, read_nodes
from anyattention.training.reading import NodeReading, Reading, ReadOptions
from anyattention.training.splits import labels_of_table
from anyattention.training.structure import structure_features
from anyattention.training.tables import require_options

__all__ = ["are_heterogeneous_tables", "load_heterogeneous_tables", "structure_by_type", "with_missing_reverses"]


@dataclass(frozen=True, eq=False)
class _Tables:
    """The tables of a folder, by type of nodes and by relation."""

    nodes: Mapping[str, Table]
    edges: Mapping[Relation, Table]
    notes: tuple[str, ...] = ()


def are_heterogeneous_tables(folder: Path) -> bool:
    """Whether a folder has tables of several types."""
    return any(folder.glob("nodes-*.csv"))


def load_heterogeneous_tables(
    folder: str | os.PathLike[str], options: ReadOptions | None = None, reading: Reading | None = None
) -> HeterogeneousNodeData:
    """The graph of a folder's tables `nodes-TYPE.csv` and `edges-SOURCE-RELATION-TARGET.csv`; see docs/data.md.

    Each table is read as `load_tables` reads it. Unless they are directed, each relation gets its reverse, named with
    "rev_" before it.

    Args:
        folder: with the tables.
        options: what a user says of them; None is the defaults.
        reading: how those of the training were read, to read these in the same way. None to train.

    Raises:
        InvalidInputError: a file is missing, its name says no known types, or it is no such table; or no type, or
            several ones have labels and none is chosen.
    """
    with lasting():
        return _load(Path(folder), options or ReadOptions(), reading)


def _load(folder: Path, options: ReadOptions, reading: Reading | None) -> HeterogeneousNodeData:
    tables = _read_tables(folder, reading)
    require_options(options, (*tables.nodes.values(), *tables.edges.values()))
    target = _target(folder, tables, options) if reading is None else reading.target
    ids = {name: ids_of_table(table) for name, table in tables.nodes.items()}
    found = {
        name: read_nodes(table, options, None if reading is None else reading.nodes[name])
        for name, table in tables.nodes.items()
    }
    directed = options.directed if reading is None else reading.directed
    if not directed:
        _require_no_reverse(tables)
    edge_index, edge_features, columns, notes = _read_all_edges(tables, ids, options, reading)
    graph = HeterogeneousGraph.from_edge_index(edge_index, {name: len(own) for name, own in ids.items()})
    if not directed:
        graph, edge_features = with_missing_reverses(graph, edge_features, all_of_them=True)
    labels = labels_of_table(tables.nodes[target], options, None if reading is None else reading.classes)
    return HeterogeneousNodeData(
        name=folder.resolve().name,
        features=_all_features(found, graph, {name: list(own) for name, own in ids.items()}),
        graph=graph,
        target=target,
        labels=labels.labels,
        num_classes=len(labels.class_names),
        splits=labels.splits,
        reading=Reading(
            labels.class_names,
            directed,
            target,
            {name: NodeReading(own.look.kind, own.columns) for name, own in found.items()},
            columns,
        ),
        edge_features=edge_features,
        notes=(
            *tables.notes,
            *_told_other_labels(tables, target),
            *(note for each in found.values() for note in each.notes),
            *notes,
            *labels.notes,
        ),
        ids=tuple(ids[target]),
        facts=(
            *(f"{len(own):,} {name}. {_described(found[name])}" for name, own in ids.items()),
            *(f"{counted(each.shape[1], 'edge')} {'-'.join(relation)}." for relation, each in edge_index.items()),
            "Edges go from source to target only." if directed else "Edges count in both directions.",
            f"To learn: the classes of {target}. {labels.facts[0]}" if labels.facts else "",
            *labels.facts[1:],
        ),
    )


def _told_other_labels(tables: _Tables, target: str) -> list[str]:
    """What is to be told of labels and splits of other types than the target."""
    notes = []
    for name, table in tables.nodes.items():
        own = [column for column in NOT_FEATURES[1:] if column in table.columns]
        if own and name != target:
            notes.append(f"{table.source}: not used, since the classes of {target} are learnt: column {listed(own)}.")
    return notes


def _described(found: ReadNodes) -> str:
    if found.look.kind == "structure":
        return f"No features: the structure of the graph stands in for them, since {found.look.reason}."
    return described("Features", found.columns)


def _read_tables(folder: Path, reading: Reading | None) -> _Tables:
    if (folder / "nodes.csv").exists():
        raise InvalidInputError(
            argument=str(folder), expected="nodes.csv or tables nodes-TYPE.csv", actual="both: which is meant?"
        )
    paths = {path.name.removeprefix("nodes-").removesuffix(".csv"): path for path in sorted(folder.glob("nodes-*.csv"))}
    wanted = list(paths) if reading is None else list(reading.nodes)
    for name in wanted:
        if name not in paths:
            raise InvalidInputError(
                argument=str(folder), expected=f"nodes-{name}.csv, as in the training", actual=listed(paths)
            )
    nodes = {name: read_table(paths[name], ("id",)) for name in wanted}
    edges: dict[Relation, Table] = {}
    unused = [str(path) for name, path in paths.items() if name not in nodes]
    for path in sorted(folder.glob("edges-*.csv")):
        relation = _relation_of(path, list(paths))
        if reading is None or relation in reading.edges:
            edges[relation] = read_table(path, ENDS)
        else:
            unused.append(str(path))
    if not edges:
        raise InvalidInputError(
            argument=str(folder), expected="tables edges-SOURCE-RELATION-TARGET.csv", actual="none that is used"
        )
    missing = [] if reading is None else [f"edges-{'-'.join(each)}.csv" for each in reading.edges if each not in edges]
    notes = [note for table in (*nodes.values(), *edges.values()) for note in table.notes]
    if (folder / "edges.csv").exists():
        notes.append(f"{folder / 'edges.csv'}: not used, since there are several types of nodes.")
    if unused:
        notes.append(f"{folder}: not used, since the training had no such table: {listed(unused)}.")
    if missing:
        notes.append(f"{folder}: no table {listed(missing)}, which the training had: there are no such edges.")
    return _Tables(nodes, edges, tuple(notes))


def _relation_of(path: Path, types: list[str]) -> Relation:
    """The relation that the name of a file says: a type, a name and a type, in each of which there may be hyphens."""
    parts = path.name.removeprefix("edges-").removesuffix(".csv").split("-")
    found = [
        ("-".join(parts[:first]), "-".join(parts[first:last]), "-".join(parts[last:]))
        for first in range(1, len(parts))
        for last in range(first + 1, len(parts))
    ]
    known = [each for each in found if each[0] in types and each[2] in types]
    if len(known) != 1:
        raise InvalidInputError(
            argument=str(path),
            expected=f"a name edges-SOURCE-RELATION-TARGET.csv with the types {listed(types)}",
            actual="a name that says " + (f"{len(known)} relations: {listed(known)}" if known else "no such types"),
        )
    return known[0]


def _require_no_reverse(tables: _Tables) -> None:
    """Raise InvalidInputError where a table has the name of the reverse that another one gets."""
    for (source, name, target), table in tables.edges.items():
        reverse = tables.edges.get((target, f"rev_{name}", source))
        if reverse is not None:
            raise InvalidInputError(
                argument=reverse.source,
                expected=f"another name, since it is that of the reverse that {table.source} gets",
                actual=repr(f"rev_{name}"),
                hint="leave the table out where it has the same edges; with --directed no relation gets a reverse",
            )


def _target(folder: Path, tables: _Tables, options: ReadOptions) -> str:
    labelled = [name for name, table in tables.nodes.items() if "label" in table.columns]
    if options.target is not None:
        if options.target not in tables.nodes:
            raise InvalidInputError(
                argument="--target", expected=f"a type of nodes: {listed(tables.nodes)}", actual=repr(options.target)
            )
        return options.target
    if len(labelled) != 1:
        raise InvalidInputError(
            argument=str(folder),
            expected="a column 'label' in one table of nodes",
            actual=f"one in {listed(labelled)}" if labelled else "none",
            hint="--target TYPE says which is meant" if labelled else None,
        )
    return labelled[0]


def _read_all_edges(
    tables: _Tables, ids: Mapping[str, Mapping[str, int]], options: ReadOptions, reading: Reading | None
) -> tuple[dict[Relation, Tensor], dict[Relation, Tensor], dict[Relation, tuple], tuple[str, ...]]:
    """Edge lists, edge features and the columns that these come from, by relation; and what is to be told."""
    edge_index, features, columns, notes = {}, {}, {}, []
    for relation, table in tables.edges.items():
        own = None if reading is None else reading.edges[relation]
        columns[relation], more = edge_columns(table, options, own)
        edges, told = read_edges(table, ids[relation[0]], ids[relation[2]], columns[relation])
        kept, repeated = edges.once(directed=True)
        edge_index[relation] = torch.from_numpy(np.ascontiguousarray(kept.ends))
        if kept.features is not None:
            features[relation] = torch.from_numpy(kept.features)
        notes += [*more, *told, *told_repeated(table, repeated, True)]
    return edge_index, features, columns, tuple(notes)


def with_missing_reverses(
    graph: HeterogeneousGraph, edge_features: Mapping[Relation, Tensor], *, all_of_them: bool
) -> tuple[HeterogeneousGraph, dict[Relation, Tensor]]:
    """The graph and its edge features with the reverse of each relation; or of those between types that none joins
    the other way round.
    """
    joined = {(source, target) for source, _, target in graph.relations}
    turned = [each for each in graph.relations if all_of_them or (each[2], each[0]) not in joined]
    alone = HeterogeneousGraph(graph.num_nodes, {each: graph.edge_index[each] for each in turned}).with_reverse()
    features = dict(edge_features)
    for source, name, target in turned:
        if (source, name, target) in features:
            features[target, f"rev_{name}", source] = features[source, name, target]
    edges = {**graph.edge_index, **alone.edge_index}
    return HeterogeneousGraph.from_edge_index(edges, graph.num_nodes), features


def _all_features(
    found: Mapping[str, ReadNodes], graph: HeterogeneousGraph, names: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    bare = [name for name, own in found.items() if own.features is None]
    places = structure_by_type(graph, names) if bare else {}
    return {name: places[name] if own.features is None else own.features for name, own in found.items()}


def structure_by_type(graph: HeterogeneousGraph, names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """`structure_features` of the nodes of all types, in the one graph that all edges make."""
    starts, total = {}, 0
    for name, count in graph.num_nodes.items():
        starts[name], total = total, total + count
    loops = torch.arange(total, device="cpu")
    edges = [torch.stack([loops, loops])]
    for (source, _, target), each in graph.edge_index.items():
        edges.append(torch.stack([each[0] + starts[source], each[1] + starts[target]]))
    # A type and an id with a sign between them that no name of a file has.
    all_names = [f"{name}/{each}" for name in graph.num_nodes for each in names[name]]
    joined = Graph.from_edge_index(torch.cat(edges, 1), total)
    features = structure_features(joined, all_names)
    return {name: features[starts[name] : starts[name] + count] for name, count in graph.num_nodes.items()}
