"""nodes.csv and edges.csv as a graph, beside networkx and pandas."""

import csv
import hashlib
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyattention.errors import InvalidInputError
from anyattention.training import ReadOptions, load_tables
from anyattention.training.splits import class_names_of, draw_split

IDS = ("007", "7", "a, b", 'say "x"', "名前", "naïve", "x;y", "NA", "null", "-1", "member 1", "0")


def write(folder: Path, nodes: list[list[Any]], edges: list[list[Any]], **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in (("nodes.csv", nodes), ("edges.csv", edges)):
        with open(folder / name, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
            csv.writer(file, **options).writerows(rows)
    return folder


def labelled(count: int = 12, **columns: list[Any]) -> list[list[Any]]:
    """A table of nodes of two classes."""
    ids = [IDS[row] if row < len(IDS) else f"n{row}" for row in range(count)]
    rows = [
        [name, "odd" if row % 2 else "even", *(own[row] for own in columns.values())] for row, name in enumerate(ids)
    ]
    return [["id", "label", *columns], *rows]


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_graph_is_that_of_networkx(seed: int, directed: bool, tmp_path: Path, require) -> None:
    networkx, pandas = require("networkx"), require("pandas")
    generator = random.Random(seed)
    nodes = labelled(12)
    ids = [row[0] for row in nodes[1:]]
    pairs = [(generator.choice(ids), generator.choice(ids)) for _ in range(generator.randrange(1, 30))]
    folder = write(
        tmp_path / "data", nodes, [["source", "target"], *pairs], lineterminator="\r\n" if seed % 2 else "\n"
    )
    data = load_tables(folder, ReadOptions(directed=directed))
    assert data.ids == tuple(ids)
    frame = pandas.read_csv(folder / "edges.csv", dtype=str, keep_default_na=False)
    kind = networkx.DiGraph if directed else networkx.Graph
    graph = networkx.from_pandas_edgelist(frame, "source", "target", create_using=kind)
    graph.add_nodes_from(ids)
    graph.add_edges_from((name, name) for name in ids)
    # An edge u -> v of networkx: v attends to u.
    expected = networkx.to_numpy_array(graph, nodelist=ids).T
    np.testing.assert_array_equal(data.graph.to_dense().numpy(), expected)
    assert data.graph.num_edges == expected.sum()
    repeated = len(pairs) - len({pair if directed else tuple(sorted(pair)) for pair in pairs})
    assert any(f"{repeated} edge{'s' * (repeated > 1)} listed again" in note for note in data.notes) == bool(repeated)


def test_features_of_edges_go_with_their_edges(tmp_path: Path) -> None:
    rows = [
        ["007", "7", "1", "friend"],
        ["a, b", "007", "3", "boss"],
        ["7", "007", "1", "friend"],
        ["7", "007", "2", ""],
    ]
    folder = write(tmp_path / "data", labelled(), [["source", "target", "weight", "kind"], *rows])
    data = load_tables(folder)
    assert data.edge_features is not None
    assert data.edge_dim == 3
    # The third line repeats the first, the other way round; mean and deviation are over the lines.
    mean, deviation = 7 / 4, np.std([1, 3, 1, 2])
    weight = {1: (1 - mean) / deviation, 2: (2 - mean) / deviation, 3: (3 - mean) / deviation}
    expected = {
        (0, 1): [(weight[1], 0, 1), (weight[2], 0, 0)],
        (1, 0): [(weight[1], 0, 1), (weight[2], 0, 0)],
        (0, 2): [(weight[3], 1, 0)],
        (2, 0): [(weight[3], 1, 0)],
    }
    found: dict[tuple[int, int], list[Any]] = {}
    for pair, features in zip(data.graph.edge_index.T.tolist(), data.edge_features.tolist(), strict=True):
        if pair[0] == pair[1]:
            assert features == [0, 0, 0]
        else:
            found.setdefault((pair[0], pair[1]), []).append(features)
    assert found.keys() == expected.keys()
    for pair, features in expected.items():
        np.testing.assert_allclose(sorted(found[pair]), sorted(features), rtol=1e-6)
    assert data.notes[-1].endswith("edges.csv: 1 edge listed again, either way round: each counts once.")


def test_numbers_words_and_structure(tmp_path: Path) -> None:
    numbers = load_tables(write(tmp_path / "numbers", labelled(age=list(range(12))), [["source", "target"]]))
    assert (numbers.look.kind, numbers.in_features, numbers.standardise) == ("numbers", 1, False)
    np.testing.assert_allclose(numbers.features.mean(0), 0, atol=1e-6)
    words = {f"word {place}": [int(row % 8 == place) * 2 for row in range(12)] for place in range(8)}
    sparse = load_tables(write(tmp_path / "words", labelled(**words), [["source", "target"]]))
    assert sparse.look.kind == "words"
    assert sparse.features.layout == torch.sparse_csr
    np.testing.assert_array_equal(sparse.features.to_dense().numpy(), np.eye(8)[np.arange(12) % 8])
    bare = load_tables(write(tmp_path / "bare", labelled(), [["source", "target"], ["007", "7"]]))
    assert (bare.look.kind, bare.look.reason, bare.in_features) == ("structure", "there are no features", 257)
    same = load_tables(write(tmp_path / "same", labelled(one=[1] * 12), [["source", "target"], ["007", "7"]]))
    assert torch.equal(same.features, bare.features)
    # Many categories beside numbers do not make words of them.
    mixed = labelled(age=list(range(1, 13)), town=[f"town {row % 9}" for row in range(12)])
    assert load_tables(write(tmp_path / "mixed", mixed, [["source", "target"]])).look.kind == "numbers"


def test_structure_depends_on_names_and_edges_alone(tmp_path: Path) -> None:
    """Against the formula, in dense matrices and float64; and in another order of rows."""
    nodes, edges = labelled(), [["007", "7"], ["7", "a, b"], ["NA", "null"], ["0", "007"]]
    data = load_tables(write(tmp_path / "data", nodes, [["source", "target"], *edges]))
    adjacency = data.graph.to_dense().double().numpy()
    adjacency += adjacency.T
    degrees = adjacency.sum(1)
    hashes = [hashlib.blake2b(row[0].encode(), digest_size=16).digest() for row in nodes[1:]]
    signs = np.array([[1 if each & 1 << 7 - bit else -1 for each in own for bit in range(8)] for own in hashes])
    for part, steps in ((slice(0, 128), 2), (slice(128, 256), 4)):
        ends = np.linalg.matrix_power(adjacency / degrees[:, None], steps) @ signs
        expected = ends / np.sqrt((ends**2).mean(1, keepdims=True))
        np.testing.assert_allclose(data.features[:, part], expected, atol=1e-5)
    np.testing.assert_allclose(data.features[:, 256], np.log1p(degrees) / 8, rtol=1e-6)
    order = np.random.default_rng(0).permutation(12)
    turned = [nodes[0], *(nodes[1:][row] for row in order)]
    rows = [["source", "target"], *(edge[::-1] for edge in edges[::-1])]
    other = load_tables(write(tmp_path / "turned", turned, rows))
    torch.testing.assert_close(other.features, data.features[torch.from_numpy(order)])


@pytest.mark.parametrize("seed", range(3))
def test_a_split_is_drawn_class_by_class(seed: int) -> None:
    labels = torch.tensor([0] * 10 + [1] * 25 + [2] + [-1] * 4 + [3] * 5)
    split = draw_split(labels, seed, "nodes.csv")
    counts = [labels[part].bincount(minlength=4).tolist() for part in split]
    assert counts[0] == [6, 15, 1, 3]
    assert [sum(each) for each in zip(*counts, strict=True)] == [10, 25, 1, 5]
    assert counts[1][:2] == [2, 5]
    whole = torch.cat(list(split))
    assert sorted(whole.tolist()) == [node for node in range(45) if labels[node] >= 0]
    again, other = draw_split(labels, seed, "nodes.csv"), draw_split(labels, seed + 1, "nodes.csv")
    assert torch.equal(split.train, again.train)
    assert not torch.equal(split.train, other.train)


def test_a_split_of_the_table(tmp_path: Path) -> None:
    words = ["train"] * 4 + ["val", "Validation", "valid", "test", "TEST", "", "test", ""]
    data = load_tables(write(tmp_path / "data", labelled(split=words), [["source", "target"]]))
    assert [part.tolist() for part in data.splits[0]] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 10]]
    assert "2 nodes with a label in no part: not used" in data.notes[-1]
    words = ["train"] * 8 + ["test"] * 4
    data = load_tables(write(tmp_path / "data", labelled(split=words), [["source", "target"]]))
    assert [len(part) for part in data.splits[0]] == [6, 2, 4]
    assert sorted(data.labels[data.splits[0].validation].tolist()) == [0, 1]
    assert "so 2 of the training nodes are, a quarter of each class, drawn by --seed" in data.notes[-1]


def test_classes_are_in_order() -> None:
    assert class_names_of(["10", "", "9", "010"]) == ("9", "010", "10")
    assert class_names_of(["b", "10", "a"]) == ("10", "a", "b")


def test_a_class_that_looks_like_none(tmp_path: Path) -> None:
    nodes = [[*row[:1], ["NA", "odd", "even"][number % 3]] for number, row in enumerate(labelled()[1:])]
    data = load_tables(write(tmp_path / "data", [["id", "label"], *nodes], [["source", "target"]]))
    assert data.class_names == ("NA", "even", "odd")
    assert data.notes[-1].endswith("'NA' is a class like others. Where a label is unknown, leave it empty.")


def nodes_of(*rows: str) -> str:
    return "\n".join(["id,label,split,age", *rows])


EDGES = "source,target\n"
GOOD = ["a,x,train,1", "b,y,train,2", "c,x,val,3", "d,y,test,4"]


@pytest.mark.parametrize(
    ("nodes", "edges", "told"),
    [
        (None, EDGES, "expected a folder with nodes.csv and edges.csv, got no nodes.csv"),
        (nodes_of(*GOOD), None, "expected a folder with nodes.csv and edges.csv, got no edges.csv"),
        (
            nodes_of(*GOOD),
            "source,target\na,b\na,z\n",
            "edges.csv, line 3, column 'target': expected an id of the nodes, got 'z'",
        ),
        (
            nodes_of(*GOOD),
            "source,target\n,b\n",
            "edges.csv, line 2, column 'source': expected an id of the nodes, got nothing",
        ),
        (nodes_of("1,x,train,1"), EDGES + "1.0,1\n", "got '1.0'. the nodes have '1': write the column as whole"),
        (nodes_of(*GOOD), "from,to\na,b\n", "edges.csv: expected a column 'source', got the columns 'from', 'to'"),
        (
            nodes_of(*GOOD, "a,x,,1"),
            EDGES,
            "line 6, column 'id': expected each id once; line 2 has it already, got 'a'",
        ),
        (nodes_of(*GOOD, ",x,,1"), EDGES, "nodes.csv, line 6, column 'id': expected an id, got nothing"),
        ("id,label", EDGES, "nodes.csv: expected at least one node, got none"),
        ("id,class\na,x", EDGES, "expected a column 'label', got the columns 'id', 'class'. it has the classes"),
        (
            nodes_of(*GOOD, "e,x,dev,1"),
            EDGES,
            "'split': expected train, validation (or val), test, or nothing, got 'dev'",
        ),
        (
            nodes_of(*GOOD, "e,,train,1"),
            EDGES,
            "line 6, column 'split': expected nothing for a node without a label, got 'train'",
        ),
        (
            nodes_of(*GOOD, "e,z,test,1"),
            EDGES,
            "line 6, column 'label': expected at least one training node of each class",
        ),
        (nodes_of(*GOOD[:3]), EDGES, "at least one node for test, got none. without the column"),
        (nodes_of(*GOOD[2:]), EDGES, "column 'split': expected at least one node for train, got none"),
        (nodes_of("a,x,train,1", "b,x,test,1"), EDGES, "column 'label': expected at least two classes, got 'x'"),
        ("id,label\na,x\nb,y\n", EDGES, "expected labels enough that some can be drawn for validation"),
        (nodes_of(*GOOD, "e,x,,old"), EDGES, "'age': expected a number, as in 4 other rows, got 'old'. --category age"),
        (nodes_of(*GOOD, "e,x,,1,2"), EDGES, "nodes.csv, line 6: expected 4 fields, as in the first line, got 5"),
        (
            nodes_of(*GOOD),
            "source,target,w\na,b,1\na,c,x\n",
            "edges.csv, line 3, column 'w': expected a number, as in 1 other row, got 'x'",
        ),
    ],
)
def test_mistakes_name_file_line_and_column(nodes, edges, told: str, tmp_path: Path) -> None:
    for name, content in (("nodes.csv", nodes), ("edges.csv", edges)):
        if content is not None:
            (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        load_tables(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (ReadOptions(categories=("town",)), "--category: expected a column of features: 'age', got 'town'"),
        (ReadOptions(ignored=("label",)), "--ignore: expected a column of features: 'age', got 'label'"),
    ],
)
def test_options_that_name_no_column(options: ReadOptions, told: str, tmp_path: Path) -> None:
    (tmp_path / "nodes.csv").write_text(nodes_of(*GOOD))
    (tmp_path / "edges.csv").write_text("source,target\n")
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        load_tables(tmp_path, options)


@pytest.mark.parametrize(
    ("file", "name", "reserved"),
    [
        ("nodes", "Split", "split"),
        ("nodes", "Label", "label"),
        ("nodes", "ID", "id"),
        ("edges", "Source", "source"),
        ("edges", "TARGET", "target"),
    ],
)
def test_a_reserved_name_in_other_capitals(file: str, name: str, reserved: str, tmp_path: Path) -> None:
    nodes = [["id", "label", "age"], *([f"n{row}", row % 2, row] for row in range(12))]
    edges = [["source", "target", "hours"], *([f"n{row}", f"n{row + 1}", row] for row in range(11))]
    {"nodes": nodes, "edges": edges}[file][0][2] = name
    told = f"{file}.csv, line 1, column '{name}': expected '{reserved}' in small letters, or another name, got '{name}'"
    write(tmp_path, nodes, edges)
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        load_tables(tmp_path)
    data = load_tables(tmp_path, ReadOptions(ignored=(name,)))
    # What a training ignored is not used by a prediction either.
    assert any(repr(name) in note for note in load_tables(tmp_path, reading=data.reading).notes)


def test_other_tables_are_read_as_those_of_the_training(tmp_path: Path) -> None:
    town = ["Rom", "Bonn", "", "Rom"] * 3
    folder = write(
        tmp_path / "old",
        labelled(age=list(range(12)), town=town),
        [["source", "target", "w"], ["7", "007", 3], ["7", "0", 5]],
    )
    old = load_tables(folder)
    nodes = [["town", "extra", "age", "id"], ["Bonn", "1", "5", "u"], ["Kiel", "2", "", "v"]]
    new = load_tables(write(tmp_path / "new", nodes, [["w", "target", "source"], [4, "u", "v"]]), reading=old.reading)
    mean, deviation = 5.5, np.std(np.arange(12))
    np.testing.assert_allclose(new.features, [[(5 - mean) / deviation, 1, 0], [0, 0, 0]], rtol=1e-6)
    assert new.edge_features is not None
    assert new.edge_features.flatten().tolist() == [0, 0, 0, 0]
    assert (new.ids, new.labels.tolist(), new.splits, new.class_names) == (("u", "v"), [-1, -1], (), ("even", "odd"))
    told = "\n".join(new.notes)
    for part in (
        "not used, since the training did not: column 'extra'",
        "'Kiel' in 1 row: the training had no such",
        "missing in column 'age' (1)",
    ):
        assert part in told
    (tmp_path / "new/nodes.csv").write_text("id,age,label\nu,5,odd\nv,6,other\n")
    with pytest.raises(
        InvalidInputError, match=r"nodes.csv: expected a column 'town', got the columns 'id', 'age', 'label'"
    ):
        load_tables(tmp_path / "new", reading=old.reading)
    (tmp_path / "new/nodes.csv").write_text("id,age,town,label\nu,5,Rom,odd\nv,6,Rom,other\n")
    again = load_tables(tmp_path / "new", reading=old.reading)
    assert again.labels.tolist() == [1, -1]
    assert "'other' in 1 row is no class of the training; these labels are not compared" in again.notes[-1]
