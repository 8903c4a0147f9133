"""What a folder keeps of how its data were read."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

import anyattention
from anyattention.errors import InvalidConfigError, InvalidInputError
from anyattention.saving import read_metadata
from anyattention.training import NodeClassifier, Reading, load_npz, load_saved, load_tables, save_data
from anyattention.training.array_features import reading_of_arrays
from anyattention.training.columns import Column
from anyattention.training.reading import NodeReading

RELATION = ("author", "writes", "paper")
COLUMNS = (Column("ä", "number", 1.5, 1e-9), Column("town", "category", categories=("", "a, b", '"')))
READING = Reading(
    ("x", "y"),
    True,
    "paper",
    {"author": NodeReading("structure"), "paper": NodeReading("numbers", COLUMNS)},
    {RELATION: COLUMNS[:1]},
)


def test_a_reading_to_json_and_back() -> None:
    assert Reading.from_json(READING.to_json()) == READING
    assert not READING.is_homogeneous
    assert reading_of_arrays((), "words").is_homogeneous


def changed(**values: Any) -> str:
    return json.dumps(json.loads(READING.to_json()) | values)


NODES = json.loads(READING.to_json())["nodes"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "reading: expected JSON"),
        ("[" * 100_000, "reading: expected JSON"),
        ("[]", "reading: expected the keys ['classes', 'directed', 'edges', 'nodes', 'target'], got []"),
        (changed(more=1), "reading: expected the keys"),
        (changed(classes=["x", "x"]), "reading: expected classes by name, directed and a target"),
        (changed(classes="xy"), "reading: expected classes by name"),
        (changed(directed=1), "reading: expected classes by name"),
        (changed(target=None), "reading: expected classes by name"),
        (changed(target="shop"), "reading: expected each type of nodes and each relation once"),
        (changed(nodes=NODES[:1]), "reading: expected each type of nodes and each relation once"),
        (changed(nodes=NODES + NODES[:1]), "reading: expected each type of nodes and each relation once"),
        (changed(nodes={}), "reading: expected a list with the keys ['columns', 'features', 'type'], got {}"),
        (changed(edges=[{"relation": RELATION}]), "reading: expected a list with the keys ['columns', 'relation']"),
        (changed(edges=[{"relation": "abc", "columns": []}]), "edges: expected relations"),
        (
            changed(nodes=[NODES[0], {**NODES[1], "features": "pictures"}]),
            "nodes: expected a type and features of words",
        ),
        (changed(nodes=[NODES[0], {**NODES[1], "columns": [1]}]), "columns: expected a name with a number"),
    ],
)
def test_json_that_is_no_reading(text: str, told: str) -> None:
    with pytest.raises(InvalidConfigError, match=re.escape(told)):
        Reading.from_json(text)


def test_a_folder_without_a_reading(tmp_path) -> None:
    anyattention.save(NodeClassifier(2, 2, hidden=4, heads=2), tmp_path)
    assert read_metadata(tmp_path, "anyattention.reading") is None
    with pytest.raises(InvalidInputError, match="expected a readable safetensors file, got No such file"):
        read_metadata(tmp_path / "none", "anyattention.reading")


def test_a_sparse_file_read_as_numbers(data_files, tmp_path) -> None:
    """A file whose zeros would fill memory if they were stored."""
    arrays = data_files.sparse_arrays()
    path = data_files.write(tmp_path / "wide.npz", arrays)
    numbers = reading_of_arrays((), "numbers")
    whole = load_npz(path, to_train=False, reading=numbers)
    dense = np.zeros((13, 20), dtype=np.float32)
    rows = np.repeat(np.arange(13), np.diff(arrays["x_indptr"]))
    dense[rows, arrays["x_indices"]] = arrays["x_data"]
    assert whole.standardise
    np.testing.assert_array_equal(whole.features.numpy(), dense)
    arrays["x_shape"] = np.array([13, 1 << 20])
    arrays["x_indptr"] = np.append(arrays["x_indptr"], [arrays["x_indptr"][-1]] * 1000)
    arrays["x_shape"][0] = 1013
    arrays["y"], arrays["labelled"] = np.zeros(1013, dtype=int), np.zeros(1013, dtype=bool)
    path = data_files.write(tmp_path / "wide.npz", arrays)
    with pytest.raises(InvalidInputError, match="features: expected numbers, as in the training, got few numbers in a"):
        load_npz(path, to_train=False, reading=numbers)


def test_arrays_where_the_training_had_tables(tmp_path, require) -> None:
    data = require("torch_geometric.data").HeteroData()
    data["author"].num_nodes, data["paper"].num_nodes = 2, 3
    data["paper"].y = torch.tensor([0, 1, 0])
    data[RELATION].edge_index = torch.tensor([[0, 1], [2, 2]])
    save_data(data, tmp_path / "a.safetensors")
    with pytest.raises(InvalidInputError, match="expected tables with the columns of the training, got arrays"):
        load_saved(tmp_path / "a.safetensors", reading=READING, to_train=False)
    arrays = Reading(
        ("0", "1"),
        target="paper",
        nodes={"author": NodeReading("structure"), "paper": NodeReading("words")},
        edges={RELATION: ()},
    )
    with pytest.raises(InvalidInputError, match="'paper', x: expected features, as in the training, got none"):
        load_saved(tmp_path / "a.safetensors", reading=arrays, to_train=False)
    (tmp_path / "nodes.csv").write_text("id\na\n")
    (tmp_path / "edges.csv").write_text("source,target\n")
    with pytest.raises(InvalidInputError, match="expected arrays of features, as in the training, got a table"):
        load_tables(tmp_path, reading=reading_of_arrays(("x", "y"), "words"))
