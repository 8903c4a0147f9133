"""Reads a graph from two tables: nodes.csv and edges.csv in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from anyattention.ambient import lasting
from anyattention.errors import InvalidInputError
from anyattention.training.columns import described
from anyattention.training.data import NodeData
from anyattention.training.delimited import Table, counted, listed, read_table
from anyattention.training.edge_tables import ENDS, edge_columns, read_edges, told_repeated
from anyattention.training.edges import looped_graph
from anyattention.training.node_tables import NOT_FEATURES, ids_of_table, read_nodes
from anyattention.training.reading import HOMOGENEOUS_RELATION, HOMOGENEOUS_TYPE, NodeReading, Reading, ReadOptions
from anyattention.training.splits import labels_of_table
from anyattention.training.structure import structure_features

__all__ = ["data_of_tables", "load_tables", "require_options"]


def load_tables(
    folder: str | os.PathLike[str], options: ReadOptions | None = None, reading: Reading | None = None
) -> NodeData:
    """The graph of a folder's `nodes.csv` and `edges.csv`, as docs/data.md describes them.

    Args:
        folder: with both.
        options: what a user says of them; None is the defaults.
        reading: how those of the training were read, to read these in the same way: labels and splits need not be there
            then. None to train.

    Raises:
        InvalidInputError: a file is missing or is no table; an id, a label, a split or a number is wrong. File, line
            and column are named.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nodes, edges = Path(folder, "nodes.csv"), Path(folder, "edges.csv")
        ...     nodes.write_text("id,label\\n" + "".join(f"{i},{i % 2}\\n" for i in range(10))) > 0
        ...     edges.write_text("source,target\\n0,1\\n1,2\\n") > 0
        ...     load_tables(folder).graph
        True
        True
        Graph(num_queries=10, num_keys=10, num_edges=14)
    """
    folder = Path(folder)
    for name in ("nodes.csv", "edges.csv"):
        if not (folder / name).exists():
            raise InvalidInputError(
                argument=str(folder), expected="a folder with nodes.csv and edges.csv", actual=f"no {name}"
            )
    nodes, edges = read_table(folder / "nodes.csv", ("id",)), read_table(folder / "edges.csv", ENDS)
    with lasting():
        return data_of_tables(folder.resolve().name, nodes, edges, options or ReadOptions(), reading)


def data_of_tables(name: str, nodes: Table, edges: Table, options: ReadOptions, reading: Reading | None) -> NodeData:
    """The data of a table of nodes and one of edges; see `load_tables`."""
    require_options(options, (nodes, edges))
    if reading is not None and not reading.is_homogeneous:
        raise InvalidInputError(argument=name, expected="several types of nodes, as in the training", actual="one")
    if options.target is not None:
        raise InvalidInputError(argument="--target", expected="several types of nodes", actual="one")
    own = None if reading is None else reading.nodes[HOMOGENEOUS_TYPE]
    ids = ids_of_table(nodes)
    found = read_nodes(nodes, options, own)
    directed = options.directed if reading is None else reading.directed
    columns, notes = edge_columns(edges, options, None if reading is None else reading.edges[HOMOGENEOUS_RELATION])
    listed_edges, more = read_edges(edges, ids, ids, columns)
    kept, repeated = listed_edges.once(directed=directed)
    notes += more + told_repeated(edges, repeated, directed)
    graph, edge_features = looped_graph(kept if directed else kept.both_ways(), len(ids), edges.source)
    labels = labels_of_table(nodes, options, None if reading is None else reading.classes)
    features = structure_features(graph, list(ids)) if found.features is None else found.features
    return NodeData(
        name=name,
        features=features,
        graph=graph,
        labels=labels.labels,
        num_classes=len(labels.class_names),
        splits=labels.splits,
        edge_features=edge_features,
        notes=(*nodes.notes, *edges.notes, *found.notes, *notes, *labels.notes),
        ids=tuple(ids),
        look=found.look,
        reading=Reading(
            labels.class_names,
            directed,
            nodes={HOMOGENEOUS_TYPE: NodeReading(found.look.kind, found.columns)},
            edges={HOMOGENEOUS_RELATION: columns},
        ),
        facts=(
            f"{counted(len(ids), 'node')} and {counted(kept.ends.shape[1], 'edge')}"
            + (", from source to target only." if directed else ", which count in both directions."),
            described("Features", found.columns),
            *([described("Features of the edges", columns)] if columns else []),
            *labels.facts,
        ),
    )


def require_options(options: ReadOptions, tables: Sequence[Table]) -> None:
    """Raise InvalidInputError where an option names a column that no table has, or one that has its own meaning."""
    known = {name for table in tables for name in table.columns}
    for option, names in (("--category", options.categories), ("--ignore", options.ignored)):
        for name in names:
            if name not in known or name in (*NOT_FEATURES, *ENDS):
                raise InvalidInputError(
                    argument=option,
                    expected=f"a column of features: {listed(sorted(known - {*NOT_FEATURES, *ENDS}))}",
                    actual=repr(name),
                )
