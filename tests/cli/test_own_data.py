"""The commands on people's own data, from the files to the predictions."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anyattention
from anyattention.cli import main
from anyattention.saving import read_metadata
from anyattention.training import NodeClassifier, Reading, load_tables, predict_logits, save_data

FILES = {"model.safetensors", "config.json", "metrics.json", "attention.png", "reading.json"}


def write(path: Path, rows: list[list[Any]], delimiter: str = ",") -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def karate(require, folder: Path, parts: list[str] | None = None) -> Path:
    """The karate club as tables; parts: of the split of each member."""
    graph = require("networkx").karate_club_graph()
    labels = [graph.nodes[node]["club"] for node in graph]
    nodes = [[f"member {node}", label, *([parts[node]] if parts else [])] for node, label in enumerate(labels)]
    write(folder / "nodes.csv", [["id", "label", *(["split"] if parts else [])], *nodes])
    write(folder / "edges.csv", [["source", "target"], *([f"member {s}", f"member {t}"] for s, t in graph.edges)])
    return folder


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_karate_club_from_tables(tmp_path: Path, capsys, require) -> None:
    data, run = karate(require, tmp_path / "karate"), tmp_path / "run"
    right = []
    for seed in range(3):
        assert main(["train", "--data", str(data), "--seed", str(seed), "--out", str(run)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[:5] == [
            "34 nodes and 78 edges, which count in both directions.",
            "Features: none.",
            "2 classes: Mr. Hi (17), Officer (17).",
            "20 labels are for the training, 7 for the validation and 7 for the test, drawn by --seed "
            f"{seed}, 60%, 20% and 20% of each class.",
            "Network: GAT with much dropout, for the structure of the graph, since there are no features.",
        ]
        assert {path.name for path in run.iterdir()} == FILES
        assert main(["predict", "--model", str(run), "--data", str(data), "--output", str(tmp_path / "out.csv")]) == 0
        told = capsys.readouterr().out
        rows = rows_of(tmp_path / "out.csv")
        assert rows[0] == ["id", "class", "probability"]
        labels = {row[0]: row[1] for row in rows_of(data / "nodes.csv")[1:]}
        assert [row[0] for row in rows[1:]] == list(labels)
        assert all(0.5 <= float(row[2]) <= 1 for row in rows[1:])
        count = sum(labels[row[0]] == row[1] for row in rows[1:])
        assert f"for {count} of the 34 labelled nodes" in told
        right.append(count / 34)
    assert np.mean(right) >= 0.9


def test_predictions_do_not_replace_the_data(tmp_path: Path, capsys, require) -> None:
    data, run = karate(require, tmp_path / "karate"), tmp_path / "run"
    require("networkx").write_graphml(require("networkx").path_graph(3), tmp_path / "a.graphml")
    (tmp_path / "linked.csv").symlink_to(data / "edges.csv")
    (tmp_path / "linked.npz").symlink_to(tmp_path / "a.graphml")
    before = (data / "nodes.csv").read_bytes(), (data / "edges.csv").read_bytes()
    for source, out in (
        (data, data / "nodes.csv"),
        (data, data / "edges.csv"),
        (data, tmp_path / "linked.csv"),
        (data, run / ".." / "karate" / "nodes-found.csv"),
        (tmp_path / "a.graphml", tmp_path / "linked.npz"),
    ):
        assert main(["predict", "--model", str(run), "--data", str(source), "--output", str(out)]) == 2
        told = f"--out: expected another file than those of --data, which it would replace, got {str(out)!r}"
        assert told in capsys.readouterr().err
    assert before == ((data / "nodes.csv").read_bytes(), (data / "edges.csv").read_bytes())


def test_karate_club_is_learnt_alike_from_every_format(tmp_path: Path, capsys, require) -> None:
    """The same members told apart by a column each, with the same split, in five formats."""
    networkx = require("networkx")
    graph = networkx.karate_club_graph()
    y = np.array([int(graph.nodes[node]["club"] != "Mr. Hi") for node in graph])
    words = ["train", "val", "test"]
    order = np.random.default_rng(0).permutation(34)
    parts = np.empty(34, dtype=int)
    parts[order] = np.arange(34) % 3
    ends = np.array(list(graph.edges)).T
    both = np.concatenate([ends, ends[::-1]], 1)
    karate(require, tmp_path / "tables", [words[part] for part in parts])
    split = {name: np.flatnonzero(parts == part) for part, name in enumerate(words)}
    eye = {"x_indptr": np.arange(35), "x_indices": np.arange(34), "x_data": np.ones(34), "x_shape": np.array([34, 34])}
    np.savez(tmp_path / "sparse.npz", edge_index=both, y=y, **eye, **split)
    masks = {f"{name}_masks": (parts == part)[None] for part, name in enumerate(words)}
    np.savez(tmp_path / "dense.npz", node_features=np.eye(34), node_labels=y, edges=ends.T, **masks)
    named = networkx.Graph()
    for node in graph:
        named.add_node(f"member {node}", label=str(y[node]), split=words[parts[node]])
    named.add_edges_from((f"member {source}", f"member {target}") for source, target in graph.edges)
    networkx.write_graphml(named, tmp_path / "club.graphml")
    masks = {f"{name}_mask": torch.from_numpy(parts == part) for part, name in enumerate(words)}
    Data = require("torch_geometric.data").Data
    edge_index, labels = torch.from_numpy(np.ascontiguousarray(both)), torch.from_numpy(y)
    save_data(Data(x=torch.eye(34), y=labels, edge_index=edge_index, **masks), tmp_path / "club.safetensors")
    found = {}
    for name in ("tables", "sparse.npz", "dense.npz", "club.graphml", "club.safetensors"):
        run = tmp_path / "run"
        assert main(["train", "--data", str(tmp_path / name), "--out", str(run)]) == 0
        assert "Network: GAT with much dropout" in capsys.readouterr().out
        found[name] = json.loads((run / "metrics.json").read_text())["test_accuracy"]
    assert min(found.values()) >= 0.9, found
    assert max(found.values()) - min(found.values()) <= 0.1, found


def shop(folder: Path, delimiter: str = ",") -> Path:
    """Customers of three kinds, told by what they pay and by whom they know."""
    generator, names = random.Random(0), ["naïve", "frugal", "a, b"]
    rows = [
        [
            f"{row:03}",
            names[row % 3] if row % 4 else "",
            10 * (row % 3) + generator.random(),
            ("Rom", "", "Bonn")[row % 3],
        ]
        for row in range(60)
    ]
    write(folder / "nodes.csv", [["id", "label", "paid", "town"], *rows], delimiter)
    edges = [[f"{row:03}", f"{(row + 3 * generator.randrange(1, 9)) % 60:03}", generator.random()] for row in range(60)]
    write(folder / "edges.csv", [["source", "target", "weight"], *edges], delimiter)
    return folder


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_in_another_order_give_the_same(delimiter: str, tmp_path: Path, capsys) -> None:
    data, run = shop(tmp_path / "shop", delimiter), tmp_path / "run"
    assert main(["train", "--data", str(data), "--epochs", "40", "--out", str(run)]) == 0
    printed = capsys.readouterr()
    assert "Features, numbers: 'paid'; categories: 'town' (2 of them)." in printed.out
    assert "Features of the edges, numbers: 'weight'." in printed.out
    assert "Network: attention by dot products with residual connections, for numbers, since " in printed.out
    assert f"{data / 'nodes.csv'}: missing in column 'town' (20), of 60 rows" in printed.err
    assert ("separate the fields" in printed.err) == (delimiter != ",")
    # Folders keep what is needed to read new tables, in the file that decides, and to read in JSON.
    kept = read_metadata(run, "anyattention.reading")
    assert kept is not None
    assert kept == (run / "reading.json").read_text()
    assert Reading.from_json(kept) == load_tables(data).reading
    whole = tmp_path / "whole.csv"
    assert main(["predict", "--model", str(run), "--data", str(data), "--out", str(whole)]) == 0
    rows = rows_of(whole)
    assert {row[1] for row in rows[1:]} == {"naïve", "frugal", "a, b"}
    # Without labels, in another order of columns and rows, and with other columns.
    new = tmp_path / "new"
    nodes, edges = (rows_of(shop(tmp_path / "again") / name) for name in ("nodes.csv", "edges.csv"))
    order = np.random.default_rng(0).permutation(60) + 1
    write(
        new / "nodes.csv",
        [["town", "note", "paid", "id"], *([nodes[r][3], "x", nodes[r][2], nodes[r][0]] for r in order)],
    )
    write(new / "edges.csv", [["weight", "target", "source"], *(row[::-1] for row in edges[1:])])
    capsys.readouterr()
    assert main(["predict", "--model", str(run), "--data", str(new)]) == 0
    assert f"{new / 'nodes.csv'}: not used, since the training did not: column 'note'." in capsys.readouterr().err
    turned = rows_of(run / "predictions.csv")
    assert [row[:2] for row in turned[1:]] == [rows[r][:2] for r in order]
    np.testing.assert_allclose([float(r[2]) for r in turned[1:]], [float(rows[r][2]) for r in order], atol=1e-5)
    # The same from Python.
    model, found = anyattention.load(run), load_tables(new, reading=Reading.from_json(kept))
    assert isinstance(model, NodeClassifier)
    best = predict_logits(model, found).softmax(1).max(1).values
    np.testing.assert_allclose(best.numpy(), [float(row[2]) for row in turned[1:]], rtol=1e-6)
    assert main(["predict", "--model", str(run), "--data", str(new), "--out", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as file:
        assert set(file.files) == {"classes", "probabilities", "ids", "class_names"}
        assert file["ids"].tolist() == [row[0] for row in turned[1:]]
        assert file["class_names"][file["classes"]].tolist() == [row[1] for row in turned[1:]]


def test_several_types_end_to_end(tmp_path: Path, capsys, require) -> None:
    generator, folder = random.Random(0), tmp_path / "library"
    write(folder / "nodes-author.csv", [["id"], *([f"a{row}"] for row in range(15))])
    papers = [[f"p{row}", ("db", "ml", "")[row % 3], row % 3 + generator.random()] for row in range(60)]
    write(folder / "nodes-paper.csv", [["id", "label", "year"], *papers])
    edges = [[f"a{3 * generator.randrange(5) + row % 3}", f"p{row}"] for row in range(60)]
    write(folder / "edges-author-writes-paper.csv", [["source", "target"], *edges])
    run, out = tmp_path / "run", tmp_path / "out.csv"
    assert main(["train", "--data", str(folder), "--hidden", "16", "--epochs", "30", "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "15 author. No features: the structure of the graph stands in for them, since there are no features.",
        "60 paper. Features, numbers: 'year'.",
        "60 edges author-writes-paper.",
        "Edges count in both directions.",
        "To learn: the classes of paper. 2 classes: db (20), ml (20); 20 nodes without a label.",
        "Network: attention over relations (HGT), since there are several types of nodes or edges.",
    ):
        assert line in printed.splitlines()
    assert {path.name for path in run.iterdir()} == FILES - {"attention.png"}
    assert main(["predict", "--model", str(run), "--data", str(folder), "--out", str(out)]) == 0
    assert [row[0] for row in rows_of(out)[1:]] == [f"p{row}" for row in range(60)]
    assert main(["train", "--data", str(folder), "--residual", "--out", str(run)]) == 2
    assert "--residual: expected data of one type, got several types of nodes" in capsys.readouterr().err
    one = shop(tmp_path / "shop")
    assert main(["predict", "--model", str(run), "--data", str(one)]) == 2
    assert "expected several types of nodes, as in the training, got one" in capsys.readouterr().err
    data = require("torch_geometric.data").HeteroData()
    data["a"].x, data["a"].y = torch.randn(30, 2), torch.arange(30) % 2
    data["a", "to", "a"].edge_index = torch.randint(0, 30, (2, 50))
    save_data(data, tmp_path / "graph.safetensors", ids={"a": [f"node {row}" for row in range(30)]})
    command = ["--data", str(tmp_path / "graph.safetensors")]
    assert main(["train", *command, "--epochs", "2", "--hidden", "8", "--heads", "2", "--out", str(run)]) == 0
    assert main(["predict", *command, "--model", str(run), "--out", str(out)]) == 0
    assert rows_of(out)[1][0] == "node 0"
    batches = ["--batch-size", "7", "--fanout", "-1,4"]
    assert main(["train", *command, *batches, "--epochs", "2", "--hidden", "8", "--heads", "2", "--out", str(run)]) == 0
    assert json.loads((run / "metrics.json").read_text())["training"]["fanout"] == [-1, 4]
    assert main(["predict", "--model", str(run)]) == 2
    assert "--data: expected data of several types, as in the training, got digits" in capsys.readouterr().err


def test_options_of_tables(tmp_path: Path, capsys) -> None:
    data, run = shop(tmp_path / "shop"), tmp_path / "run"
    command = ["train", "--data", str(data), "--epochs", "2", "--out", str(run)]
    assert main([*command, "--directed", "--category", "paid", "--ignore", "town", "--ignore", "weight"]) == 0
    printed = capsys.readouterr().out
    assert "60 nodes and 60 edges, from source to target only." in printed
    assert "Features, categories: 'paid' (60 of them)." in printed
    assert "Network: GAT with much dropout, for words, since only 1.67% of the features are not 0" in printed
    assert Reading.from_json((run / "reading.json").read_text()).directed


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        (
            "none",
            [],
            "--data: expected digits, a folder with tables, or a file that ends in .graphml, .npz or .safetensors",
        ),
        ("shop/nodes.csv", [], "got 'shop/nodes.csv'. give the folder that has nodes.csv"),
        ("empty", [], "empty: expected a folder with nodes.csv and edges.csv, got no nodes.csv"),
        (
            "shop",
            ["--category", "age"],
            "--category: expected a column of features: 'paid', 'town', 'weight', got 'age'",
        ),
        ("shop", ["--target", "paper"], "--target: expected several types of nodes, got one"),
        ("data.npz", ["--directed"], "--directed: expected tables or GraphML, got data.npz"),
        ("none.graphml", [], "none.graphml: expected a readable GraphML file, got No such file or directory"),
        (
            "none.safetensors",
            [],
            "none.safetensors: expected a readable safetensors file, got No such file or directory",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(
    name: str, arguments: list[str], told: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shop(tmp_path / "shop")
    (tmp_path / "empty").mkdir()
    assert main(["train", "--data", name, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("anyattention: error: ")
    assert told in line
    assert not (tmp_path / "runs").exists()


def test_models_and_data_of_different_kinds(data_files, tmp_path: Path, capsys) -> None:
    dense, run = data_files.write(tmp_path / "dense.npz", data_files.dense_arrays()), tmp_path / "run"
    data = shop(tmp_path / "shop")
    assert main(["train", "--data", str(dense), "--epochs", "2", "--split", "0", "--out", str(run)]) == 0
    assert main(["predict", "--model", str(run), "--data", str(data)]) == 2
    assert "nodes.csv: expected arrays of features, as in the training, got a table" in capsys.readouterr().err
    anyattention.save(NodeClassifier(2, 2, hidden=4, heads=2), tmp_path / "old")
    assert main(["predict", "--model", str(tmp_path / "old"), "--data", str(data)]) == 2
    assert (
        "--model: expected a folder that was trained on tables, got one that keeps no columns"
        in capsys.readouterr().err
    )
    assert main(["train", "--data", str(data), "--epochs", "2", "--out", str(run)]) == 0
    assert main(["predict", "--model", str(run), "--data", str(dense)]) == 2
    told = "dense.npz: expected tables with the columns that the network was trained on, got a file with arrays"
    assert told in capsys.readouterr().err


def test_features_too_far_from_the_training_get_no_class(tmp_path: Path, capsys) -> None:
    nodes = [[f"n{i}", "ab"[i % 2], i % 2 + i / 100] for i in range(40)]
    edges = [["source", "target"], *([f"n{i}", f"n{(i + 2) % 40}"] for i in range(40))]
    run, out = tmp_path / "run", tmp_path / "out.csv"
    write(tmp_path / "data/nodes.csv", [["id", "label", "x"], *nodes])
    write(tmp_path / "data/edges.csv", edges)
    assert main(["train", "--data", str(tmp_path / "data"), "--out", str(run), "--epochs", "2"]) == 0
    nodes[3][2] = "1e30"
    write(tmp_path / "new/nodes.csv", [["id", "label", "x"], *nodes])
    write(tmp_path / "new/edges.csv", edges)
    capsys.readouterr()
    assert main(["predict", "--model", str(run), "--data", str(tmp_path / "new"), "--output", str(out)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "new, class scores: expected finite numbers, got NaN or Inf for" in told
    assert not out.exists()


ODD = ['say "hi"', "a,b", "a;b", "two\nlines", "a\rreturn", "crlf\r\nin it", "007", "1e5"]
ODD += ["NaN", "None", "naïve", "🙂", "'", "#x"]


@pytest.mark.parametrize("odd", [ODD, [name for name in ODD if "\r" not in name]], ids=["all", "no returns"])
def test_ids_and_classes_come_back_as_they_were(odd: list[str], tmp_path: Path, capsys, require) -> None:
    ids = [*odd, *map(str, range(40 - len(odd)))]
    classes = [odd[4], odd[0]]
    run, out = tmp_path / "run", tmp_path / "out.csv"
    (tmp_path / "data").mkdir()
    for name, rows in {
        "nodes.csv": [["id", "label", "x"], *([name, classes[i % 2], i % 2] for i, name in enumerate(ids))],
        "edges.csv": [["source", "target"], *([name, ids[i - 2]] for i, name in enumerate(ids))],
    }.items():
        with open(tmp_path / "data" / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    assert main(["train", "--data", str(tmp_path / "data"), "--out", str(run), "--epochs", "3"]) == 0
    assert main(["predict", "--model", str(run), "--data", str(tmp_path / "data"), "--output", str(out)]) == 0
    rows = rows_of(out)
    assert [row[0] for row in rows] == ["id", *ids]
    assert {row[1] for row in rows[1:]} <= set(classes)
    frame = require("pandas").read_csv(out, dtype=str, keep_default_na=False)
    assert list(frame["id"]) == ids
