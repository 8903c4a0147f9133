"""Reads GraphML through networkx, after a look that refuses what could grow in memory or reach for other files."""

from __future__ import annotations

import io
import os
import warnings
import xml.parsers.expat
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from anyattention.errors import InvalidInputError, MissingExtraError
from anyattention.files import require_file
from anyattention.training.data import NodeData
from anyattention.training.delimited import Table
from anyattention.training.reading import Reading, ReadOptions
from anyattention.training.tables import data_of_tables

__all__ = ["load_graphml"]

# GraphML nests a data element in a node in a graph in a document; an XML tree is freed by recursion.
_DEEPEST = 100


def load_graphml(
    path: str | os.PathLike[str], options: ReadOptions | None = None, reading: Reading | None = None
) -> NodeData:
    """The graph of a GraphML file: its nodes' and edges' attributes are read as `load_tables` reads columns.

    The attribute "label" has the classes. Edges count in both directions unless options.directed, whatever the file's
    edgedefault is.

    Args:
        path: of the file. One with a DOCTYPE is refused: it may define entities, which grow, or are other files.
        options: what a user says of it; None is the defaults.
        reading: how the data of the training were read, to read these in the same way. None to train.

    Raises:
        MissingExtraError: networkx is not installed.
        InvalidInputError: no such file, no GraphML, a DOCTYPE, a node without an id or with that of another, an edge
            whose end is no node; and as `load_tables`.
    """
    try:
        networkx = import_module("networkx")
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            "GraphML needs networkx", argument="networkx", hint="Install it with: pip install 'anyattention[viz]'"
        ) from missing
    path = Path(path)
    try:
        size = require_file(path)
        content = path.read_bytes()
    except OSError as fault:
        raise _wrong(path, fault.strerror or str(fault)) from fault
    ids = _node_ids(path, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = networkx.read_graphml(io.BytesIO(content))
    # A file that is XML and no GraphML fails in networkx in ways of its own.
    except Exception as fault:
        raise _wrong(path, f"{type(fault).__name__}: {fault}" if str(fault) else type(fault).__name__) from fault
    unknown = [node for node in graph if node not in ids]
    if unknown:
        raise InvalidInputError(argument=str(path), expected="edges between nodes of the file", actual=repr(unknown[0]))
    nodes = _table(path, "node", list(graph), {"id": list(graph)}, [data for _, data in graph.nodes(data=True)], size)
    ends = list(graph.edges())
    named = [f"{source!r} to {target!r}" for source, target in ends]
    fixed = {"source": [source for source, _ in ends], "target": [target for _, target in ends]}
    # networkx keeps an edge's own id beside its attributes.
    edges = _table(path, "edge", named, {**fixed, "id": []}, [data for _, _, data in graph.edges(data=True)], size)
    del edges.columns["id"]
    return data_of_tables(path.stem, nodes, edges, options or ReadOptions(), reading)


def _node_ids(path: Path, content: bytes) -> set[str]:
    """The ids of the nodes; raises where it is no XML, has a DOCTYPE, is too deep, or an id is missing or twice."""
    parser = xml.parsers.expat.ParserCreate()
    ids: set[str] = set()
    depth = 0

    def refuse(*_: object) -> None:
        raise _wrong(path, f"a DOCTYPE in line {parser.CurrentLineNumber}: it may define entities that grow")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise _wrong(path, f"elements over {_DEEPEST} deep in line {parser.CurrentLineNumber}")
        if name.rpartition(":")[2] == "node":
            own = attributes.get("id", "")
            if not own or own in ids:
                actual = f"{own!r} twice" if own else "a node without one"
                raise InvalidInputError(
                    argument=f"{path}, line {parser.CurrentLineNumber}", expected="each node's id once", actual=actual
                )
            ids.add(own)

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    try:
        parser.Parse(content, True)
    except (xml.parsers.expat.ExpatError, ValueError, LookupError) as fault:
        if isinstance(fault, InvalidInputError):
            raise
        raise _wrong(path, f"no XML: {fault}") from fault
    return ids


def _table(
    path: Path,
    row_word: str,
    rows: list[str],
    fixed: Mapping[str, list[str]],
    attributes: Iterable[Mapping[str, Any]],
    size: int,
) -> Table:
    """A table of attributes, in the order in which they come; an attribute of a fixed name is not used."""
    attributes = list(attributes)
    names = dict.fromkeys(str(name) for each in attributes for name in each if str(name) not in fixed)
    columns = {name: [str(each.get(name, "")).strip() for each in attributes] for name in names}
    return Table(
        source=str(path),
        columns={**{name: [each.strip() for each in own] for name, own in fixed.items()}, **columns},
        rows=[repr(row) if row_word == "node" else row for row in rows],
        size=size,
        row_word=row_word,
        column_word="attribute",
    )


def _wrong(path: Path, actual: str) -> InvalidInputError:
    return InvalidInputError(argument=str(path), expected="a readable GraphML file", actual=actual)
