"""PyTorch Geometric's data as safetensors: round trips, and what is refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError
from anyattention.training import (
    HeterogeneousNodeClassifier,
    Reading,
    ReadOptions,
    load_saved,
    predict_logits,
    save_data,
)
from anyattention.training.saved_data import read_saved

NODES = torch.arange(15)


def small(**changed: Any) -> SimpleNamespace:
    """A graph of two classes, told by x."""
    torch.manual_seed(0)
    y = torch.arange(15) % 2
    parts = torch.arange(15) % 3
    given = {
        "x": torch.randn(15, 3) + y[:, None],
        "y": y,
        "edge_index": torch.stack([torch.arange(15), (torch.arange(15) + 1) % 15]),
        "edge_attr": torch.rand(15, 2),
        "train_mask": parts == 0,
        "val_mask": parts == 1,
        "test_mask": parts == 2,
        "num_nodes": 15,
    }
    return SimpleNamespace(**{key: value for key, value in {**given, **changed}.items() if value is not None})


def test_data_of_one_type(tmp_path: Path, require) -> None:
    data = require("torch_geometric.data").Data(**vars(small()))
    save_data(data, tmp_path / "small.safetensors", ids=[f"n{row}" for row in range(15)], class_names=["even", "odd"])
    found = load_saved(tmp_path / "small.safetensors")
    assert torch.equal(found.features, data.x)
    assert found.standardise
    assert found.labels.tolist() == data.y.tolist()
    assert (found.class_names, found.ids[3], found.look.kind) == (("even", "odd"), "n3", "numbers")
    assert [part.tolist() for part in found.splits[0]] == [list(range(start, 15, 3)) for start in range(3)]
    assert torch.equal(found.graph.edge_index[:, :15], data.edge_index)
    assert found.graph.num_edges == 30
    wide = data.edge_attr.double()
    expected = (wide - wide.mean(0)) / wide.std(0, correction=0)
    torch.testing.assert_close(found.edge_features[:15].double(), expected, rtol=1e-5, atol=1e-5)
    # Another file is read in the same way: no labels, and other edges.
    bare = {"y": None, "train_mask": None, "val_mask": None, "test_mask": None, "num_nodes": 5, "x": data.x[:5]}
    new_edges = {"edge_index": torch.tensor([[0], [1]]), "edge_attr": data.edge_attr[7:8]}
    save_data(small(**bare, **new_edges), tmp_path / "new.safetensors")
    new = load_saved(tmp_path / "new.safetensors", reading=found.reading, to_train=False)
    assert torch.equal(new.features, data.x[:5])
    torch.testing.assert_close(new.edge_features[:1], found.edge_features[7:8])
    assert (new.labels.tolist(), new.ids, new.splits) == ([-1] * 5, ("0", "1", "2", "3", "4"), ())


def test_several_splits_words_and_structure(tmp_path: Path) -> None:
    masks = torch.stack([torch.arange(15) % 3, torch.arange(15) // 5], 1)
    several = small(train_mask=masks == 0, val_mask=masks == 1, test_mask=masks == 2)
    save_data(several, tmp_path / "a.safetensors")
    assert [split.test.tolist() for split in load_saved(tmp_path / "a.safetensors").splits] == [
        [2, 5, 8, 11, 14],
        [10, 11, 12, 13, 14],
    ]
    save_data(small(x=torch.eye(15).to_sparse()), tmp_path / "a.safetensors")
    words = load_saved(tmp_path / "a.safetensors")
    assert words.look.kind == "words"
    assert torch.equal(words.features.to_dense(), torch.eye(15))
    save_data(small(x=None, train_mask=None, val_mask=None, test_mask=None), tmp_path / "a.safetensors")
    bare = load_saved(tmp_path / "a.safetensors", ReadOptions(seed=3))
    assert (bare.look.kind, bare.in_features, len(bare.splits)) == ("structure", 257, 1)
    save_data(small(y=torch.arange(15) % 2 * 3 + 4), tmp_path / "a.safetensors")
    assert load_saved(tmp_path / "a.safetensors").class_names == ("4", "7")


def several_types(require) -> Any:
    data = require("torch_geometric.data").HeteroData()
    torch.manual_seed(0)
    data["paper"].x, data["paper"].y = torch.randn(12, 4), torch.arange(12) % 3
    data["author"].num_nodes = 5
    data["author", "writes", "paper"].edge_index = torch.stack([torch.arange(12) % 5, torch.arange(12)])
    data["author", "writes", "paper"].edge_attr = torch.rand(12)
    data["paper", "cites", "paper"].edge_index = torch.tensor([[0, 1], [2, 2]])
    return data


@pytest.mark.parametrize("directed", [False, True])
def test_data_of_several_types(directed: bool, tmp_path: Path, require) -> None:
    data = several_types(require)
    save_data(data, tmp_path / "a.safetensors", ids={"author": ["a", "b", "c", "d", "e"]}, class_names=["x", "y", "z"])
    found = load_saved(tmp_path / "a.safetensors", ReadOptions(directed=directed))
    writes, cites = data.edge_types
    reverse = ("paper", "rev_writes", "author")
    assert found.graph.relations == ((writes, cites) if directed else (writes, cites, reverse))
    for relation in (writes, cites):
        assert torch.equal(found.graph.edge_index[relation], data[relation].edge_index)
    np.testing.assert_allclose(found.features["paper"].std(0, correction=0), 1, rtol=1e-5)
    assert found.features["author"].shape == (5, 257)
    assert (found.target, found.labels.tolist(), found.class_names) == ("paper", list(range(3)) * 4, ("x", "y", "z"))
    assert found.edge_features[writes].shape == (12, 1)
    again = load_saved(tmp_path / "a.safetensors", reading=found.reading, to_train=False)
    assert torch.equal(again.features["paper"], found.features["paper"])
    assert again.graph.relations == found.graph.relations


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"y": None}, "expected a y of one type of nodes, got none"),
        ({"y": torch.zeros(15)}, "'node', y: expected (15,) int64, got torch.float32 (15,)"),
        ({"y": torch.zeros(14, dtype=torch.int64)}, "'node', y: expected (15,) int64, got torch.int64 (14,)"),
        ({"y": torch.full((15,), -2)}, "class numbers from 0, or -1 where unknown, got -2"),
        ({"y": torch.zeros(15, dtype=torch.int64)}, "'node', y: expected at least two classes, got '0'"),
        ({"x": torch.full((15, 2), float("nan"))}, "'node', x: expected finite numbers of 32 bits, got NaN or Inf"),
        ({"x": torch.full((15, 2), 1e300, dtype=torch.float64)}, "expected finite numbers of 32 bits"),
        ({"x": torch.zeros(14, 2)}, "'node', x: expected (15, features) of numbers, got torch.float32 (14, 2)"),
        ({"x": torch.zeros(15, 2, dtype=torch.complex64)}, "expected (15, features) of numbers, got torch.complex64"),
        ({"edge_index": torch.zeros(3, 4, dtype=torch.int64)}, "expected (2, edges) int64, got torch.int64 (3, 4)"),
        ({"edge_index": torch.zeros(2, 15)}, "edge_index: expected (2, edges) int64, got torch.float32"),
        ({"edge_attr": torch.zeros(14, 2)}, "edge_attr: expected (15, edge_dim) of numbers, got torch.float32 (14, 2)"),
        ({"val_mask": None}, "val_mask: expected the masks of all three parts, or of none, got none"),
        ({"val_mask": torch.zeros(15)}, "val_mask: expected (15,) or (15, splits), boolean, got torch.float32 (15,)"),
        ({"val_mask": torch.zeros(15, 2, dtype=torch.bool)}, "val_mask: expected (15,), as train_mask, got (15, 2)"),
        ({"val_mask": torch.ones(15, dtype=torch.bool)}, "expected each node in one part, once"),
        ({"test_mask": torch.zeros(15, dtype=torch.bool)}, "test_mask: expected at least one node, got none"),
        ({"y": torch.where(NODES == 1, 2, NODES % 2)}, "train_mask: expected a node of each class, got none of '2'"),
        ({"y": torch.where(NODES == 0, -1, NODES % 2)}, "train_mask: expected labelled nodes"),
    ],
)
def test_what_is_wrong_in_a_file(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    save_data(small(**changed), tmp_path / "a.safetensors")
    with pytest.raises((InvalidInputError, DimensionMismatchError), match=re.escape(told)) as caught:
        load_saved(tmp_path / "a.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "a.safetensors")), "an error names the file"


def test_an_edge_to_a_node_that_is_not_there(tmp_path: Path, require) -> None:
    save_data(small(edge_index=torch.full((2, 15), 15)), tmp_path / "a.safetensors")
    with pytest.raises(GraphStructureError, match=r"a.safetensors: .*15"):
        load_saved(tmp_path / "a.safetensors")
    data = several_types(require)
    data["paper", "cites", "paper"].edge_index = torch.tensor([[0], [12]])
    save_data(data, tmp_path / "a.safetensors")
    with pytest.raises(GraphStructureError, match=r"a.safetensors: .*12"):
        load_saved(tmp_path / "a.safetensors")


def test_targets_and_readings_that_do_not_fit(tmp_path: Path, require) -> None:
    data = several_types(require)
    data["author"].y = torch.arange(5) % 2
    path = tmp_path / "a.safetensors"
    save_data(data, path)
    with pytest.raises(
        InvalidInputError, match=r"a y of one type of nodes, got one of 'paper', 'author'. --target TYPE"
    ):
        load_saved(path)
    with pytest.raises(InvalidInputError, match="--target: expected a type of nodes: 'paper', 'author', got 'shop'"):
        load_saved(path, ReadOptions(target="shop"))
    found = load_saved(path, ReadOptions(target="paper"))
    save_data(small(), tmp_path / "b.safetensors", class_names=["x", "y"])
    with pytest.raises(InvalidInputError, match="expected nodes of 'paper', 'author', as in the training, got 'node'"):
        load_saved(tmp_path / "b.safetensors", reading=found.reading, to_train=False)
    one = load_saved(tmp_path / "b.safetensors")
    save_data(small(x=None), tmp_path / "c.safetensors")
    with pytest.raises(InvalidInputError, match="x: expected features, as in the training, got none"):
        load_saved(tmp_path / "c.safetensors", reading=one.reading, to_train=False)
    save_data(small(edge_attr=None), tmp_path / "c.safetensors")
    with pytest.raises(
        InvalidInputError, match="edge_attr: expected features of the edges, as in the training, got none"
    ):
        load_saved(tmp_path / "c.safetensors", reading=one.reading, to_train=False)
    save_data(small(edge_attr=torch.rand(15)), tmp_path / "c.safetensors")
    with pytest.raises(InvalidInputError, match="expected 2 features, as in the training, got 1"):
        load_saved(tmp_path / "c.safetensors", reading=one.reading, to_train=False)
    save_data(small(y=torch.arange(15) % 3), tmp_path / "c.safetensors", class_names=["x", "y"])
    with pytest.raises(InvalidInputError, match="y: expected class numbers below 2, the number of class names, got 2"):
        load_saved(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("data", "more", "told"),
    [
        ([1], {}, "data: expected a Data or HeteroData with an edge_index, got list"),
        (small(edge_index=None), {}, "data: expected a Data or HeteroData with an edge_index"),
        (small(x=np.ones((15, 2))), {}, "data, 'node', x: expected a torch.Tensor, got ndarray"),
        (small(test_mask=[True] * 15), {}, "data, 'node', test_mask: expected a torch.Tensor, got list"),
        (small(edge_index=np.zeros((2, 3), dtype=int)), {}, "'edge', 'node'\\), edge_index: expected a torch.Tensor"),
        (small(), {"ids": ["a"]}, "ids of 'node': expected 15 different names"),
        (small(), {"ids": ["a"] * 15}, "ids of 'node': expected 15 different names"),
        (small(), {"ids": {"paper": ["a"]}}, r"ids: expected types among \['node'\], got \['paper'\]"),
        (small(), {"class_names": ["a", ""]}, "class_names: expected different names"),
    ],
)
def test_what_is_not_saved(data: Any, more: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=told):
        save_data(data, tmp_path / "a.safetensors", **more)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda numbers: list(torch.tensor(numbers))])
def test_names_may_be_numbers_of_any_kind(kind, tmp_path: Path) -> None:
    save_data(small(), tmp_path / "a.safetensors", ids=kind(list(range(20, 35))), class_names=kind([7, 8]))
    found = load_saved(tmp_path / "a.safetensors")
    assert (found.ids, found.class_names) == (tuple(map(str, range(20, 35))), ("7", "8"))


def test_several_types_that_are_not_saved(tmp_path: Path, require) -> None:
    data = several_types(require)
    del data["author"].num_nodes
    with (
        pytest.warns(UserWarning, match="num_nodes"),
        pytest.raises(InvalidInputError, match=r"data\['author'\].num_nodes: expected a number, where there is no x"),
    ):
        save_data(data, tmp_path / "a.safetensors")
    alone = require("torch_geometric.data").HeteroData()
    alone["paper"].x, alone["paper"].y = data["paper"].x, data["paper"].y
    with pytest.raises(InvalidInputError, match="data: expected at least one relation, got none"):
        save_data(alone, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_types_and_relations_that_the_training_had_not_or_had(tmp_path: Path, require) -> None:
    data, path = several_types(require), tmp_path / "a.safetensors"
    data["paper", "by", "author"].edge_index = torch.tensor([[0, 1], [2, 3]])
    save_data(data, path)
    trained = load_saved(path)
    assert trained.notes == ()
    model = HeterogeneousNodeClassifier(**trained.sizes, hidden=4, heads=2)
    assert predict_logits(model, trained).shape == (12, 3)
    # Without `by` nothing would join papers to authors, and the reverse of `writes` would stand in for it.
    del data["paper", "by", "author"]
    data["shop"].x = torch.zeros(2, 1)
    data["shop", "sells", "paper"].edge_index = torch.tensor([[0], [2]])
    save_data(data, path)
    found = load_saved(path, reading=trained.reading, to_train=False)
    assert found.graph.relations == trained.graph.relations
    assert found.graph.edge_index["paper", "by", "author"].shape == (2, 0)
    assert predict_logits(model, found).shape == (12, 3)
    assert found.notes == (
        f"{path}: not used, since the training had no such: 'shop', ('shop', 'sells', 'paper').",
        f"{path}: no ('paper', 'by', 'author'), which the training had: there are no such edges.",
    )
    del data["author", "writes", "paper"]  # its edges had features
    save_data(data, path)
    found = load_saved(path, reading=trained.reading, to_train=False)
    assert found.edge_features["author", "writes", "paper"].shape == (0, 1)
    assert predict_logits(model, found).shape == (12, 3)
    data["paper"].x = torch.zeros(12, 5)
    save_data(data, path)
    with pytest.raises(InvalidInputError, match=r"'paper', x: expected 4 features, as in the training, got 5"):
        load_saved(path, reading=trained.reading, to_train=False)
    data["paper"].x = None
    data["paper"].num_nodes = 12
    save_data(data, path)
    with pytest.raises(InvalidInputError, match=r"'paper', x: expected features, as in the training, got none"):
        load_saved(path, reading=trained.reading, to_train=False)


def test_features_that_the_training_did_not_use_are_told(tmp_path: Path, require) -> None:
    path = tmp_path / "a.safetensors"
    save_data(small(x=None, edge_attr=None), path)
    trained = load_saved(path)
    assert load_saved(path, reading=trained.reading, to_train=False).notes == ()
    save_data(small(), path)
    found = load_saved(path, reading=trained.reading, to_train=False)
    assert torch.equal(found.features, trained.features)
    assert found.edge_features is None
    assert found.notes == (
        f"{path}, 'node', x: not used, since the training did not use any.",
        f"{path}, ('node', 'edge', 'node'), edge_attr: not used, since the training did not use any.",
    )
    data = several_types(require)
    save_data(data, path)
    trained = load_saved(path)
    data["author"].x = torch.rand(5, 2)
    data["paper", "cites", "paper"].edge_attr = torch.rand(2)
    save_data(data, path)
    assert set(load_saved(path, reading=trained.reading, to_train=False).notes) == {
        f"{path}, 'author', x: not used, since the training did not use any.",
        f"{path}, ('paper', 'cites', 'paper'), edge_attr: not used, since the training did not use any.",
    }


def test_no_nodes_to_predict(tmp_path: Path) -> None:
    save_data(small(), tmp_path / "a.safetensors")
    reading = load_saved(tmp_path / "a.safetensors").reading
    nothing: dict[str, Any] = dict.fromkeys(("y", "train_mask", "val_mask", "test_mask", "edge_attr"))
    edges = torch.zeros(2, 0, dtype=torch.int64)
    save_data(small(x=torch.zeros(0, 3), num_nodes=0, edge_index=edges, **nothing), tmp_path / "b.safetensors")
    with pytest.raises(InvalidInputError, match="'node', num_nodes: expected at least one node, got none"):
        load_saved(tmp_path / "b.safetensors", reading=reading, to_train=False)


GOOD = {"nodes": [{"type": "node", "num_nodes": 2, "ids": None}], "edges": [["node", "edge", "node"]], "classes": None}


@pytest.mark.parametrize(
    ("about", "told"),
    [
        (None, "got tensors without their description"),
        ("no json", "got a description that is no JSON"),
        ("[]", "got another description"),
        (GOOD | {"more": 1}, "got another description"),
        (GOOD | {"nodes": 1}, "got 1"),
        (GOOD | {"nodes": []}, "got the relation"),
        (GOOD | {"edges": []}, "got no nodes or no edges"),
        (GOOD | {"nodes": [1]}, "got nodes 1"),
        (GOOD | {"nodes": [{"type": "node", "num_nodes": -1, "ids": None}]}, "the type of nodes 'node' with -1 nodes"),
        (GOOD | {"nodes": [{"type": "node", "num_nodes": 2, "ids": ["a"]}]}, r"got names \['a'\]"),
        (GOOD | {"edges": [["node", "edge"]]}, "edges: expected relations"),
        (GOOD | {"edges": GOOD["edges"] * 2}, "got the relation"),
        (GOOD | {"classes": ["a", "a"]}, r"got names \['a', 'a'\]"),
    ],
)
def test_another_description(about: Any, told: str, tmp_path: Path) -> None:
    metadata = None if about is None else {"anyattention.data": about if isinstance(about, str) else json.dumps(about)}
    tensors = {"edges.0.edge_index": torch.zeros(2, 0, dtype=torch.int64)}
    (tmp_path / "a.safetensors").write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(InvalidInputError, match=told):
        read_saved(tmp_path / "a.safetensors")


def test_no_file_and_no_edges(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="expected a readable safetensors file, got No such file"):
        read_saved(tmp_path / "none.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InvalidInputError, match="expected a readable safetensors file"):
        read_saved(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(safetensors.torch.save({}, {"anyattention.data": json.dumps(GOOD)}))
    with pytest.raises(InvalidInputError, match="got no edge_index of"):
        read_saved(tmp_path / "a.safetensors")


def test_nodes_of_which_the_file_has_nothing_are_bounded_by_it(tmp_path: Path, require) -> None:
    data = require("torch_geometric.data").HeteroData()
    data["paper"].y, data["paper"].num_nodes = torch.arange(12) % 2, 12
    data["author"].num_nodes, data["shop"].num_nodes = 3_000_000, 5
    data["author", "writes", "paper"].edge_index = torch.tensor([[0, 1], [2, 2]])
    data["shop", "sells", "paper"].edge_index = torch.tensor([[0], [2]])
    save_data(data, tmp_path / "a.safetensors")
    with pytest.raises(
        InvalidInputError, match=r"a.safetensors, 'author', num_nodes: expected at most \d\d,\d{3} nodes"
    ):
        load_saved(tmp_path / "a.safetensors")
    # A tensor without numbers bounds nothing.
    data["author"].x, data["author"].num_nodes = torch.empty(3_000_000, 0), 3_000_000
    save_data(data, tmp_path / "a.safetensors")
    with pytest.raises(InvalidInputError, match="nodes without x, y and ids, for the file's size, got 3,000,000"):
        load_saved(tmp_path / "a.safetensors")
    del data["author"].x
    data["author"].num_nodes = 1000
    save_data(data, tmp_path / "a.safetensors")
    assert load_saved(tmp_path / "a.safetensors").features["author"].shape == (1000, 257)


def wide(count: int, start: int = 0) -> torch.Tensor:
    """Times of which float32 would keep nothing."""
    return 1.7e9 + torch.arange(start, start + count, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("kind", ["float64", "int64"])
def test_wide_numbers_are_standardised_before_they_are_rounded(kind: str, tmp_path: Path, require) -> None:
    dtype = getattr(torch, kind)
    x = wide(15)
    expected = (x - x.mean(0)) / x.std(0, correction=0)
    save_data(small(x=x.to(dtype), edge_attr=x.to(dtype)), tmp_path / "a.safetensors")
    found = load_saved(tmp_path / "a.safetensors")
    torch.testing.assert_close(found.features.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.edge_features[:15].double(), expected, rtol=1e-6, atol=1e-6)
    assert not found.standardise
    more = {"num_nodes": 5, "y": None, "train_mask": None, "val_mask": None, "test_mask": None}
    edges = {"edge_index": torch.zeros(2, 1, dtype=torch.int64), "edge_attr": wide(1).to(dtype)}
    save_data(small(x=wide(5, 3).to(dtype), **edges, **more), tmp_path / "b.safetensors")
    new = load_saved(tmp_path / "b.safetensors", reading=found.reading, to_train=False)
    torch.testing.assert_close(new.features, found.features[3:8])
    data = several_types(require)
    data["paper"].x = wide(12).to(dtype)
    save_data(data, tmp_path / "a.safetensors")
    features = load_saved(tmp_path / "a.safetensors").features["paper"].double()
    expected = (wide(12) - wide(12).mean(0)) / wide(12).std(0, correction=0)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)


def test_a_constant_column_becomes_zero_whatever_it_is_later(tmp_path: Path, require) -> None:
    data = several_types(require)
    data["paper"].x[:, 1] = 0.1
    data["author", "writes", "paper"].edge_attr = torch.stack([torch.full((12,), 7.0), torch.rand(12)], 1)
    path = tmp_path / "a.safetensors"
    save_data(data, path)
    found = load_saved(path)
    assert found.notes == ()
    assert not found.features["paper"][:, 1].any()
    data["paper"].x[3, 1] = 1e6
    data["author", "writes", "paper"].edge_attr[0, 0] = 8
    save_data(data, path)
    reading = Reading.from_json(found.reading.to_json())
    assert reading == found.reading
    new = load_saved(path, reading=reading, to_train=False)
    assert torch.equal(new.features["paper"], found.features["paper"])
    writes = ("author", "writes", "paper")
    assert torch.equal(new.edge_features[writes], found.edge_features[writes])
    assert new.notes == (
        f"{path}, {writes}, edge_attr: not used, since the training had the same number everywhere: column 0.",
        f"{path}, 'paper', x: not used, since the training had the same number everywhere: column 1.",
    )


def test_labels_that_are_no_class_of_the_training_are_told(tmp_path: Path) -> None:
    save_data(small(), tmp_path / "a.safetensors", class_names=["x", "y"])
    reading = load_saved(tmp_path / "a.safetensors").reading
    y = torch.tensor([0, 1, 2, 2, -1] * 3)
    save_data(small(y=y), tmp_path / "b.safetensors", class_names=["x", "y", "new"])
    found = load_saved(tmp_path / "b.safetensors", reading=reading, to_train=False)
    assert found.labels.tolist() == [0, 1, -1, -1, -1] * 3
    assert found.notes == (
        f"{tmp_path / 'b.safetensors'}, 'node', y: 'new' in 6 rows is no class of the training; these labels are not "
        "compared.",
    )
