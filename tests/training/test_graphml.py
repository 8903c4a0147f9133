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
    kinds = (
        [networkx.DiGraph, networkx.MultiDiGraph]
        if directed
        else [networkx.Graph, networkx.DiGraph, networkx.MultiGraph]
    )
    kind = generator.choice(kinds)
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


def keyed(*keys: str, nodes: str = "", edges: str = "", edgedefault: str = "directed", more: str = "") -> str:
    labels = "".join(f'<node id="n{row}"><data key="label">{row % 2}</data></node>' for row in range(12))
    label = '<key id="label" for="node" attr.name="label" attr.type="string"/>'
    graph = f'<graph edgedefault="{edgedefault}">{labels}{nodes}{edges}</graph>'
    return f"{HEAD}{label}{''.join(keys)}{graph}{more}</graphml>"


def test_defaults_of_keys(tmp_path: Path, require) -> None:
    require("networkx")
    keys = [
        f'<key id="{name}" for="{kind}" attr.name="{name}" attr.type="{type_}"><default>{value}</default></key>'
        for name, kind, type_, value in (
            ("age", "node", "int", "40"),
            ("flag", "all", "boolean", "false"),
            ("hours", "edge", "double", "2"),
        )
    ]
    nodes = '<node id="x"><data key="age">20</data><data key="flag">true</data></node><node id="y"/>'
    edges = "".join(f'<edge source="n{row}" target="n{row + 1}"/>' for row in range(3))
    path = tmp_path / "graph.graphml"
    path.write_text(
        keyed(*keys, nodes=nodes, edges=edges + '<edge source="x" target="y"><data key="hours">4</data></edge>')
    )
    data = load_graphml(path, ReadOptions(directed=True))
    ages = np.array([40] * 12 + [20, 40])
    # Columns come as the file gives them: age, then flag's two categories.
    np.testing.assert_allclose(data.features[:, 0], (ages - ages.mean()) / ages.std(), rtol=1e-5)
    assert data.reading.nodes["node"].columns[-1].categories == ("False", "True")
    assert [(c.name, c.mean) for c in data.reading.edges["node", "edge", "node"]] == [("hours", 2.5)]
    path.write_text(keyed(keys[0].replace("40", "old")))
    with pytest.raises(InvalidInputError, match="the default 'old' of 'age', which is no int"):
        load_graphml(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (keyed(more='<graph edgedefault="directed"><node id="z"/></graph>'), "with all 13 nodes of the file"),
        (
            keyed(more='<graph edgedefault="directed"><edge source="n0" target="n1"/></graph>'),
            "with all 1 edges of the file",
        ),
        (keyed(nodes='<node id="y"><graph><node id="z"/></graph></node>'), "all 14 nodes of the file, each by its own"),
    ],
)
def test_more_than_one_graph(content: str, told: str, tmp_path: Path, require) -> None:
    require("networkx")
    (tmp_path / "graph.graphml").write_text(content)
    with pytest.raises(InvalidInputError, match=told):
        load_graphml(tmp_path / "graph.graphml")


def test_undirected_edges_have_no_direction(tmp_path: Path, require) -> None:
    require("networkx")
    path = tmp_path / "graph.graphml"
    path.write_text(keyed(edges='<edge source="n1" target="n0"/>'))
    reading = load_graphml(path, ReadOptions(directed=True)).reading
    path.write_text(keyed(edges='<edge source="n1" target="n0"/>', edgedefault="undirected"))
    for more in ({"options": ReadOptions(directed=True)}, {"reading": reading}):
        with pytest.raises(InvalidInputError, match=r'expected edgedefault="directed", .*, got "undirected"'):
            load_graphml(path, **more)
    assert load_graphml(path).graph.num_edges == 14


def test_attributes_named_as_what_elements_have(tmp_path: Path, require) -> None:
    require("networkx")
    keys = [
        f'<key id="{kind}{name}" for="{kind}" attr.name="{name}" attr.type="string"/>'
        for kind, name in (("node", "id"), ("node", "source"), ("edge", "source"), ("edge", "id"))
    ]
    path = tmp_path / "graph.graphml"
    path.write_text(keyed(*keys))
    assert load_graphml(path).notes == (
        f"{path}: not used, since each node has its own: node attribute 'id'.",
        f"{path}: not used, since each edge has its own: edge attribute 'source', 'id'.",
    )


def test_attributes_that_would_fill_the_memory(tmp_path: Path, require) -> None:
    require("networkx")
    keys = [f'<key id="k{place}" for="node" attr.name="k{place}" attr.type="int"/>' for place in range(1500)]
    own = "".join(f'<data key="k{place}">1</data>' for place in range(1500))
    nodes = f'<node id="a">{own}</node>' + "".join(f'<node id="m{row}"/>' for row in range(20_000))
    (tmp_path / "graph.graphml").write_text(keyed(*keys, nodes=nodes))
    with pytest.raises(
        InvalidInputError, match=r"expected attributes of at most .* got 1,501 attributes of 20,013 nodes"
    ):
        load_graphml(tmp_path / "graph.graphml")


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
