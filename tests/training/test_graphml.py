"""GraphML beside networkx, and what is refused."""

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from anyattention.errors import InvalidInputError, MissingExtraError
from anyattention.training import ReadOptions, load_graphml, load_tables


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_graph_is_that_of_networkx(seed: int, directed: bool, tmp_path: Path, require) -> None:
    networkx, generator = require("networkx"), random.Random(seed)
    kind = generator.choice([networkx.Graph, networkx.DiGraph, networkx.MultiGraph])
    graph = kind()
    names = [*(f"n{row}" for row in range(10)), "a, b", 'say "x" & <y>']
    for row, name in enumerate(names):
        graph.add_node(name, label=("odd" if row % 2 else "even"), age=row + 0.5, flag=row > 5)
    for _ in range(20):
        graph.add_edge(generator.choice(names), generator.choice(names), weight=generator.randrange(3))
    path = tmp_path / "graph.graphml"
    networkx.write_graphml(graph, path)
    data = load_graphml(path, ReadOptions(directed=directed))
    assert data.ids == tuple(names)
    read = networkx.DiGraph() if directed else networkx.Graph()
    read.add_edges_from((name, name) for name in names)
    read.add_edges_from(networkx.read_graphml(path).edges())
    dense = data.graph.to_dense().numpy() > 0
    np.testing.assert_array_equal(dense, networkx.to_numpy_array(read, nodelist=names).T > 0)
    assert [column.name for column in data.reading.nodes["node"].columns] == ["age", "flag"]
    ages = np.arange(12) + 0.5
    np.testing.assert_allclose(data.features[:, 0], (ages - ages.mean()) / ages.std(), rtol=1e-5)
    assert data.edge_dim == 1
    assert data.class_names == ("even", "odd")


def test_the_same_graph_as_tables(tmp_path: Path, require) -> None:
    networkx = require("networkx")
    graph = networkx.karate_club_graph()
    named = networkx.Graph()
    named.add_nodes_from((f"m{node}", {"label": data["club"]}) for node, data in graph.nodes(data=True))
    named.add_edges_from((f"m{source}", f"m{target}") for source, target in graph.edges)
    networkx.write_graphml(named, tmp_path / "karate.graphml")
    nodes = "".join(f"{node},{data['label']}\n" for node, data in named.nodes(data=True))
    (tmp_path / "nodes.csv").write_text("id,label\n" + nodes)
    (tmp_path / "edges.csv").write_text("source,target\n" + "".join(f"{s},{t}\n" for s, t in named.edges))
    one, other = load_graphml(tmp_path / "karate.graphml"), load_tables(tmp_path)
    assert one.graph.edge_index.tolist() == other.graph.edge_index.tolist()
    assert one.features.equal(other.features)
    assert one.labels.equal(other.labels)
    assert one.reading == other.reading
    # What was trained on one is read from the other.
    assert load_tables(tmp_path, reading=one.reading).features.equal(one.features)


HEAD = '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">'
OPEN, CLOSE = f'{HEAD}<graph edgedefault="undirected">', "</graph></graphml>"
BOMB = '<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "expected a readable GraphML file, got no XML"),
        ("no xml", "got no XML: syntax error: line 1"),
        (f'<?xml version="1.0"?>\n{BOMB}{HEAD}&b;</graphml>', "got a DOCTYPE in line 2: it may define"),
        (f'<!DOCTYPE x SYSTEM "file:///etc/passwd">{HEAD}</graphml>', "got a DOCTYPE in line 1"),
        (f"{BOMB}{HEAD}</graphml>".encode("utf-16"), "got a DOCTYPE in line 1"),
        ("<a>" * 5000 + "</a>" * 5000, "got elements over 100 deep"),
        ("<html></html>", "expected a readable GraphML file, got"),
        (f"{HEAD}</graphml>", "expected a readable GraphML file, got"),
        (f'{OPEN}<node id="a"/><node id="a"/>{CLOSE}', "expected each node's id once, got 'a' twice"),
        (f"{OPEN}<node/>{CLOSE}", "line 1: expected each node's id once, got a node without one"),
        (
            f'{OPEN}<node id="a"/><edge source="a" target="z"/>{CLOSE}',
            "expected edges between nodes of the file, got 'z'",
        ),
        (f'{OPEN}<node id="a"/>{CLOSE}', "expected an attribute 'label', got the attributes 'id'"),
        (f'{OPEN}<node id="a"><data key="d9"/></node>{CLOSE}', "expected a readable GraphML file, got"),
        ('<?xml version="1.0" encoding="no-such"?><graphml/>', "got no XML: unknown encoding"),
    ],
)
def test_what_is_refused(content, told: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.graphml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        load_graphml(path)


def test_a_mistake_names_node_and_attribute(tmp_path: Path, require) -> None:
    networkx = require("networkx")
    graph = networkx.path_graph(4)
    for node in graph:
        graph.nodes[node].update(label=str(node % 2), age="old" if node == 2 else str(node))
    networkx.write_graphml(graph, tmp_path / "graph.graphml")
    with pytest.raises(InvalidInputError, match=r"graph.graphml, node '2', attribute 'age': expected a number"):
        load_graphml(tmp_path / "graph.graphml")
    data = load_graphml(tmp_path / "graph.graphml", ReadOptions(ignored=("age",), seed=1))
    assert data.look.kind == "structure"


def test_no_file_and_no_networkx(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InvalidInputError, match="expected a readable GraphML file, got No such file"):
        load_graphml(tmp_path / "none.graphml")
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(
        MissingExtraError, match=r"GraphML needs networkx. Install it with: pip install 'anyattention\[viz\]'"
    ):
        load_graphml(tmp_path / "none.graphml")
