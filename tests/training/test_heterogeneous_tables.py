"""Tables of several types as one graph, and the classifier over it."""

import csv
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import anyattention
from anyattention.errors import InvalidConfigError, InvalidInputError
from anyattention.training import (
    FitSettings,
    HeterogeneousNodeClassifier,
    HeterogeneousNodeClassifierConfig,
    NodeClassifierConfig,
    Reading,
    ReadOptions,
    accuracy,
    fit,
    load_heterogeneous_tables,
    predict_logits,
)


def write(folder: Path, tables: dict[str, list[list[Any]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in tables.items():
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return folder


def library(seed: int = 0) -> dict[str, list[list[Any]]]:
    """Papers of three classes, told by their years and by who wrote them."""
    generator = random.Random(seed)
    papers = [[f"p{row}", ("db", "ml", "sys")[row % 3], 2000 + 5 * (row % 3) + generator.random()] for row in range(60)]
    writes = [[f"a{3 * generator.randrange(5) + row % 3}", f"p{row}", generator.random()] for row in range(60)]
    cites = [[f"p{row}", f"p{3 * generator.randrange(20) + row % 3}"] for row in range(40)]
    return {
        "nodes-author.csv": [["id"], *([f"a{row}"] for row in range(15))],
        "nodes-paper.csv": [["id", "label", "year"], *papers],
        "edges-author-writes-paper.csv": [["source", "target", "share"], *writes],
        "edges-paper-cites-paper.csv": [["source", "target"], *cites],
    }


def test_labels_and_splits_of_other_types_are_told(tmp_path: Path) -> None:
    tables = library()
    tables["nodes-author.csv"] = [["id", "label", "split"], *([f"a{row}", "x", ""] for row in range(15))]
    folder = write(tmp_path / "library", tables)
    told = f"{folder / 'nodes-author.csv'}: not used, since the classes of paper are learnt: column 'label', 'split'."
    data = load_heterogeneous_tables(folder, ReadOptions(target="paper"))
    assert told in data.notes
    assert told in load_heterogeneous_tables(folder, reading=data.reading).notes


@pytest.mark.parametrize("directed", [False, True])
def test_the_tables_make_one_graph(directed: bool, tmp_path: Path) -> None:
    tables = library()
    data = load_heterogeneous_tables(write(tmp_path / "library", tables), ReadOptions(directed=directed))
    writes, cites = ("author", "writes", "paper"), ("paper", "cites", "paper")
    reverse = (("paper", "rev_writes", "author"), ("paper", "rev_cites", "paper"))
    assert data.graph.relations == ((writes, cites) if directed else (writes, cites, *reverse))
    assert dict(data.graph.num_nodes) == {"author": 15, "paper": 60}
    rows = tables["edges-author-writes-paper.csv"][1:]
    listed = [[int(row[0][1:]), int(row[1][1:])] for row in rows]
    assert data.graph.edge_index[writes].T.tolist() == listed
    shares = np.array([row[2] for row in rows])
    expected = torch.tensor((shares - shares.mean()) / shares.std())[:, None]
    torch.testing.assert_close(data.edge_features[writes], expected, check_dtype=False)
    if not directed:
        assert data.graph.edge_index[reverse[0]].flip(0).T.tolist() == listed
        assert torch.equal(data.edge_features[reverse[0]], data.edge_features[writes])
    years = np.array([row[2] for row in tables["nodes-paper.csv"][1:]])
    np.testing.assert_allclose(data.features["paper"][:, 0], (years - years.mean()) / years.std(), rtol=1e-4)
    assert data.features["author"].shape == (15, 257)
    assert (data.target, data.class_names, data.ids) == (
        "paper",
        ("db", "ml", "sys"),
        tuple(f"p{i}" for i in range(60)),
    )
    assert Reading.from_json(data.reading.to_json()) == data.reading


def test_it_learns_and_reads_new_tables_in_the_same_way(tmp_path: Path) -> None:
    tables = library()
    data = load_heterogeneous_tables(write(tmp_path / "library", tables))
    config = HeterogeneousNodeClassifierConfig(**data.sizes, hidden=16, heads=2, dropout=0.1)
    done = fit(data, data.splits[0], config, FitSettings(epochs=60, patience=60, weight_decay=0.0))
    logits, test = predict_logits(done.model, data), data.splits[0].test
    assert accuracy(logits[test], data.labels[test]) >= 0.9
    anyattention.save(done.model, tmp_path / "model")
    again = anyattention.load(tmp_path / "model")
    assert torch.equal(predict_logits(again, data), logits)
    # Columns and rows in another order, without labels.
    papers = tables["nodes-paper.csv"]
    order = np.random.default_rng(0).permutation(60)
    tables["nodes-paper.csv"] = [["year", "id"], *([papers[1 + row][2], papers[1 + row][0]] for row in order)]
    new = load_heterogeneous_tables(write(tmp_path / "new", tables), reading=data.reading)
    assert new.labels.tolist() == [-1] * 60
    torch.testing.assert_close(predict_logits(again, new), logits[torch.from_numpy(order)], rtol=1e-4, atol=1e-4)
    # A relation may be missing, a type may not.
    (tmp_path / "new/edges-paper-cites-paper.csv").unlink()
    more = {"nodes-shop.csv": [["id"], ["s"]], "edges-shop-sells-paper.csv": [["source", "target"], ["s", "p1"]]}
    part = load_heterogeneous_tables(write(tmp_path / "new", more), reading=data.reading)
    assert predict_logits(again, part).shape == (60, 3)
    unused = f"'{tmp_path / 'new/nodes-shop.csv'}', '{tmp_path / 'new/edges-shop-sells-paper.csv'}'"
    assert part.notes[:2] == (
        f"{tmp_path / 'new'}: not used, since the training had no such table: {unused}.",
        f"{tmp_path / 'new'}: no table 'edges-paper-cites-paper.csv', which the training had: there are no such edges.",
    )
    (tmp_path / "new/nodes-author.csv").unlink()
    with pytest.raises(InvalidInputError, match=r"expected nodes-author.csv, as in the training, got 'paper', 'shop'"):
        load_heterogeneous_tables(tmp_path / "new", reading=data.reading)


def test_the_classifier_is_what_its_formula_says(tmp_path: Path) -> None:
    data = load_heterogeneous_tables(write(tmp_path / "library", library()), ReadOptions(directed=True))
    model = HeterogeneousNodeClassifier(**data.sizes, hidden=8, heads=2).eval()
    first = model.first_layer(data.features, data.graph, data.edge_features).output
    bare = F.linear(data.features["author"], model.input_maps[0].weight, model.input_maps[0].bias)
    hidden = {
        "author": F.gelu(model.norms[0](bare)),
        "paper": F.gelu(model.norms[1](first["paper"])),
    }
    second = model.second_layer(hidden, data.graph, data.edge_features).output["paper"]
    expected = model.output_map(F.gelu(model.output_norm(second)))
    found = model(data.features, data.graph, data.edge_features, return_weights=True)
    torch.testing.assert_close(found.output, expected)
    assert found.weights is not None
    assert found.weights["author", "writes", "paper"].shape == (60,)
    expected.sum().backward()
    assert all(each.grad is not None for each in model.parameters())
    drops = model.train()(data.features, data.graph, data.edge_features).output
    assert not torch.equal(drops, expected)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_classes": 1}, "num_classes: expected an int of at least 2, got 1"),
        ({"heads": 3}, "heads: expected a divisor of hidden=64, got 3"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"target": "author"}, "target: expected a type that a relation ends in: 'paper', got 'author'"),
        ({"relations": [("author", "writes", "book")]}, "relations: expected types of in_features"),
        ({"score": "cosine"}, "score: expected"),
    ],
)
def test_settings_that_do_not_fit(changed: dict[str, Any], told: str) -> None:
    sizes = {"in_features": {"author": 3, "paper": 5}, "relations": [("author", "writes", "paper")]}
    with pytest.raises(InvalidConfigError, match=re.escape(told)):
        HeterogeneousNodeClassifierConfig(**{**sizes, "target": "paper", "num_classes": 2, **changed})


def test_a_config_of_the_other_kind(tmp_path: Path) -> None:
    data = load_heterogeneous_tables(write(tmp_path / "library", library()))
    with pytest.raises(InvalidConfigError, match="config: expected HeterogeneousNodeClassifierConfig for such data"):
        fit(data, data.splits[0], NodeClassifierConfig(1, 3), FitSettings(epochs=1))


@pytest.mark.parametrize(
    ("changed", "options", "told"),
    [
        ({"nodes.csv": [["id"]]}, {}, "expected nodes.csv or tables nodes-TYPE.csv, got both: which is meant?"),
        (
            {"edges-author-paper.csv": [["source", "target"]]},
            {},
            "edges-author-paper.csv: expected a name edges-SOURCE",
        ),
        (
            {"edges-author-at-shop.csv": [["source", "target"]]},
            {},
            "with the types 'author', 'paper', got a name that says",
        ),
        ({"nodes-author.csv": [["id", "label"], ["a1", "x"]]}, {}, "got one in 'author', 'paper'. --target TYPE says"),
        ({"nodes-paper.csv": [["id"], ["p1"]]}, {}, "expected a column 'label' in one table of nodes, got none"),
        ({}, {"target": "shop"}, "--target: expected a type of nodes: 'author', 'paper', got 'shop'"),
        ({}, {"target": "author"}, "nodes-author.csv: expected a column 'label'"),
        (
            {"edges-author-writes-paper.csv": [["source", "target"], ["p1", "p1"]]},
            {},
            "line 2, column 'source': expected an id",
        ),
    ],
)
def test_mistakes(changed: dict[str, Any], options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        load_heterogeneous_tables(write(tmp_path / "library", library() | changed), ReadOptions(**options))


def test_without_edges_and_names_with_hyphens(tmp_path: Path) -> None:
    tables = library()
    nodes = {"nodes-co-author.csv": tables["nodes-author.csv"], "nodes-paper.csv": tables["nodes-paper.csv"]}
    with pytest.raises(InvalidInputError, match=r"expected tables edges-SOURCE-RELATION-TARGET\.csv, got none"):
        load_heterogeneous_tables(write(tmp_path / "bare", nodes))
    edges = {"edges-co-author-wrote-with-joy-paper.csv": tables["edges-author-writes-paper.csv"]}
    data = load_heterogeneous_tables(write(tmp_path / "library", nodes | edges))
    assert data.graph.relations[0] == ("co-author", "wrote-with-joy", "paper")


def test_a_table_of_the_reverse_and_a_table_of_no_type(tmp_path: Path) -> None:
    tables = library()
    turned = [[target, source] for source, target, _ in tables["edges-author-writes-paper.csv"][1:]]
    tables["edges-paper-rev_writes-author.csv"] = [["source", "target"], *turned]
    folder = write(tmp_path / "library", tables)
    told = (
        "edges-paper-rev_writes-author.csv: expected another name, since it is that of the reverse that "
        f"{folder / 'edges-author-writes-paper.csv'} gets, got 'rev_writes'. leave the table out where it has the same "
        "edges; with --directed no relation gets a reverse"
    )
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        load_heterogeneous_tables(folder)
    assert len(load_heterogeneous_tables(folder, ReadOptions(directed=True)).graph.relations) == 3
    (folder / "edges-paper-rev_writes-author.csv").rename(folder / "edges.csv")
    assert load_heterogeneous_tables(folder).notes == (
        f"{folder / 'edges.csv'}: not used, since there are several types of nodes.",
    )
