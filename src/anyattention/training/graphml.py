"""Reads GraphML through networkx, after a look that refuses what could grow in memory or reach for other files."""

from __future__ import annotations

import io
import os
import warnings
import xml.parsers.expat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from anyattention.ambient import lasting
from anyattention.errors import InvalidInputError, MissingExtraError
from anyattention.files import most_memory, require_file
from anyattention.training.data import NodeData
from anyattention.training.delimited import Table, listed
from anyattention.training.reading import Reading, ReadOptions
from anyattention.training.tables import data_of_tables

__all__ = ["load_graphml"]

_BOOLEANS = {"true": "True", "1": "True", "false": "False", "0": "False"}

# GraphML nests a data element in a node in a graph in a document; an XML tree is freed by recursion.
_DEEPEST = 100


@dataclass
class _Scanned:
    """What a look at the XML found.

    Attributes:
        ids: of the nodes.
        num_edges: elements that are edges.
        declared: names of the attributes, by what they are for: "node" or "edge".
        defaults: of the attributes that have one, in the same way, as networkx would give them in the elements.
    """

    ids: set[str] = field(default_factory=set)
    num_edges: int = 0
    declared: dict[str, set[str]] = field(default_factory=lambda: {"node": set(), "edge": set()})
    defaults: dict[str, dict[str, str]] = field(default_factory=lambda: {"node": {}, "edge": {}})


def load_graphml(
    path: str | os.PathLike[str], options: ReadOptions | None = None, reading: Reading | None = None
) -> NodeData:
    """The graph of a GraphML file: its nodes' and edges' attributes are read as `load_tables` reads columns.

    The attribute "label" has the classes. Edges count in both directions unless options.directed, which needs a file
    of directed edges. An attribute that a node or an edge lacks has the default of its key, if there is one.

    Args:
        path: of the file. One with a DOCTYPE is refused: it may define entities, which grow, or are other files.
        options: what a user says of it; None is the defaults.
        reading: how the data of the training were read, to read these in the same way. None to train.

    Raises:
        MissingExtraError: networkx is not installed.
        InvalidInputError: no such file, no GraphML, a DOCTYPE, a node without an id or with that of another, an edge
            whose end is no node, several graphs, undirected edges where directed ones are asked for, or attributes that
            would take far more memory than the file; and as `load_tables`.
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
    scanned = _scan(path, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = networkx.read_graphml(io.BytesIO(content))
    # A file that is XML and no GraphML fails in networkx in ways of its own.
    except Exception as fault:
        raise _wrong(path, f"{type(fault).__name__}: {fault}" if str(fault) else type(fault).__name__) from fault
    _require_whole(path, graph, scanned)
    if (options or ReadOptions()).directed if reading is None else reading.directed:
        _require_directed(path, graph)
    nodes = _table(
        path, "node", list(graph), {"id": list(graph)}, [data for _, data in graph.nodes(data=True)], size, scanned
    )
    ends = list(graph.edges())
    named = [f"{source!r} to {target!r}" for source, target in ends]
    fixed = {"source": [source for source, _ in ends], "target": [target for _, target in ends]}
    # networkx keeps an edge's own id beside its attributes.
    edges = _table(
        path, "edge", named, {**fixed, "id": []}, [data for _, _, data in graph.edges(data=True)], size, scanned
    )
    del edges.columns["id"]
    with lasting():
        return data_of_tables(path.stem, nodes, edges, options or ReadOptions(), reading)


def _require_whole(path: Path, graph: Any, scanned: _Scanned) -> None:
    """Raise InvalidInputError where networkx made up nodes, or left out nodes or edges of the file."""
    unknown = [node for node in graph if node not in scanned.ids]
    if unknown:
        raise InvalidInputError(argument=str(path), expected="edges between nodes of the file", actual=repr(unknown[0]))
    for what, read, there in (
        ("nodes", len(graph), len(scanned.ids)),
        ("edges", graph.number_of_edges(), scanned.num_edges),
    ):
        if read < there:
            raise InvalidInputError(
                argument=str(path),
                expected=f"one graph with all {there:,} {what} of the file, each by its own id",
                actual=f"one with {read:,}",
                hint="nested graphs and a second one are not read: write each to a file",
            )


def _require_directed(path: Path, graph: Any) -> None:
    if not graph.is_directed():
        raise InvalidInputError(
            argument=str(path),
            expected='edgedefault="directed", for edges that go from source to target only',
            actual='"undirected"',
            hint="an undirected file does not say which way round an edge goes",
        )


def _scan(path: Path, content: bytes) -> _Scanned:
    """What the XML has; raises where it is none, has a DOCTYPE, is too deep, or an id of a node is missing or twice."""
    parser = xml.parsers.expat.ParserCreate()
    scanned = _Scanned()
    depth = 0
    key: dict[str, str] = {}
    default: list[str] = []

    def refuse(*_: object) -> None:
        raise _wrong(path, f"a DOCTYPE in line {parser.CurrentLineNumber}: it may define entities that grow")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, key
        depth += 1
        if depth > _DEEPEST:
            raise _wrong(path, f"elements over {_DEEPEST} deep in line {parser.CurrentLineNumber}")
        local = name.rpartition(":")[2]
        scanned.num_edges += local == "edge"
        if local == "key":
            key = attributes
            for kind in _kinds(key):
                scanned.declared[kind].add(key.get("attr.name", ""))
        if local == "default":
            default.clear()
            parser.CharacterDataHandler = default.append
        if local == "node":
            own = attributes.get("id", "")
            if not own or own in scanned.ids:
                actual = f"{own!r} twice" if own else "a node without one"
                raise InvalidInputError(
                    argument=f"{path}, line {parser.CurrentLineNumber}", expected="each node's id once", actual=actual
                )
            scanned.ids.add(own)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        if name.rpartition(":")[2] == "default":
            parser.CharacterDataHandler = None
            for kind in _kinds(key):
                scanned.defaults[kind][key.get("attr.name", "")] = _default(path, key, "".join(default))

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    try:
        parser.Parse(content, True)
    except (xml.parsers.expat.ExpatError, ValueError, LookupError) as fault:
        if isinstance(fault, InvalidInputError):
            raise
        raise _wrong(path, f"no XML: {fault}") from fault
    return scanned


def _kinds(key: Mapping[str, str]) -> tuple[str, ...]:
    """What an attribute is for, of nodes and edges."""
    kind = key.get("for", "all")
    return ("node", "edge") if kind == "all" else (kind,) if kind in ("node", "edge") else ()


def _default(path: Path, key: Mapping[str, str], text: str) -> str:
    """A default as the text of what networkx makes of the same text in an element."""
    kind = key.get("attr.type", "string")
    try:
        if kind == "boolean":
            return _BOOLEANS[text.strip().lower()]
        return str(int(text) if kind in ("int", "long") else float(text) if kind in ("float", "double") else text)
    except (KeyError, ValueError) as fault:
        raise _wrong(path, f"the default {text!r} of {key.get('attr.name')!r}, which is no {kind}") from fault


def _table(
    path: Path,
    row_word: str,
    rows: list[str],
    fixed: Mapping[str, list[str]],
    attributes: Iterable[Mapping[str, Any]],
    size: int,
    scanned: _Scanned,
) -> Table:
    """A table of attributes, in the order in which they come; an attribute of a fixed name is not used."""
    attributes = list(attributes)
    defaults = scanned.defaults[row_word]
    given = dict.fromkeys(str(name) for each in attributes for name in each)
    names = [name for name in {**given, **defaults} if name not in fixed]
    # Each element has a field of each attribute, whether the file gives it or not; a reference takes 8 bytes.
    if 8 * len(names) * len(attributes) > most_memory(size):
        raise InvalidInputError(
            argument=str(path),
            expected=f"attributes of at most {most_memory(size):,} bytes for the file's size",
            actual=f"{len(names):,} attributes of {len(attributes):,} {row_word}s",
        )
    columns = {name: [str(each.get(name, defaults.get(name, ""))).strip() for each in attributes] for name in names}
    hidden = [name for name in fixed if name in scanned.declared[row_word]]
    told = f"{path}: not used, since each {row_word} has its own: {row_word} attribute {listed(hidden)}."
    return Table(
        source=str(path),
        columns={**{name: [each.strip() for each in own] for name, own in fixed.items()}, **columns},
        rows=[repr(row) if row_word == "node" else row for row in rows],
        size=size,
        row_word=row_word,
        column_word="attribute",
        notes=(told,) if hidden else (),
    )


def _wrong(path: Path, actual: str) -> InvalidInputError:
    return InvalidInputError(argument=str(path), expected="a readable GraphML file", actual=actual)
