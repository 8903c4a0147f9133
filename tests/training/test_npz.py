import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyattention.errors import AttentionError, GraphStructureError, InvalidInputError, SparseMatrixError
from anyattention.training import load_npz

Arrays = dict[str, Any]


def test_sparse_features_are_row_normalised_and_stay_sparse(data_files, tmp_path: Path, require) -> None:
    arrays = data_files.sparse_arrays()
    data = load_npz(data_files.write(tmp_path / "made_up.npz", arrays))
    parts = (arrays["x_data"], arrays["x_indices"], arrays["x_indptr"])
    whole = require("scipy.sparse").csr_matrix(parts, shape=arrays["x_shape"]).toarray()
    assert data.features.layout == torch.sparse_csr
    np.testing.assert_allclose(data.features.to_dense().numpy(), whole / whole.sum(1, keepdims=True), rtol=1e-6)
    assert (data.name, data.metric, data.num_nodes, data.in_features, data.num_classes) == (
        "made_up", "accuracy", 13, 20, 2
    )  # fmt: skip
    assert data.labels.tolist() == arrays["y"].tolist()
    assert [part.tolist() for part in data.splits[0]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11, 12]]


def test_a_row_without_features_stays_zero(data_files, tmp_path: Path) -> None:
    arrays = data_files.sparse_arrays()
    row = slice(arrays["x_indptr"][2], arrays["x_indptr"][3])
    arrays["x_data"][row] = 0
    data = load_npz(data_files.write(tmp_path / "zeros.npz", arrays))
    sums = data.features.to_dense().sum(1)
    expected = torch.ones(13)
    expected[2] = 0
    torch.testing.assert_close(sums, expected)


def test_listed_edges_are_taken_as_they_are_with_self_loops(data_files, tmp_path: Path) -> None:
    arrays = data_files.sparse_arrays()
    arrays["edge_index"] = np.array([[0, 3, 3], [1, 3, 2]])
    graph = load_npz(data_files.write(tmp_path / "directed.npz", arrays)).graph
    expected = torch.eye(13, dtype=torch.bool)
    # Row 0 is the source, which is the key: the target attends to it.
    expected[1, 0] = expected[2, 3] = True
    assert torch.equal(graph.to_dense(), expected)
    assert graph.num_edges == 15


def test_dense_features_are_to_be_standardised(data_files, tmp_path: Path) -> None:
    arrays = data_files.dense_arrays()
    data = load_npz(data_files.write(tmp_path / "made_up.npz", arrays))
    np.testing.assert_array_equal(data.features.numpy(), arrays["node_features"])
    assert data.standardise
    assert (data.metric, data.num_classes, len(data.splits)) == ("roc_auc", 2, 2)


def test_features_that_cancel_do_not_overflow(data_files, tmp_path: Path) -> None:
    arrays = data_files.sparse_arrays()
    arrays["x_data"] = (arrays["x_data"] * (-1.0) ** np.arange(len(arrays["x_data"]))).astype(np.float32)
    features = load_npz(data_files.write(tmp_path / "signed.npz", arrays)).features.to_dense()
    torch.testing.assert_close(features.abs().sum(1), torch.ones(13))


def test_undirected_edges_go_both_ways_once(data_files, tmp_path: Path) -> None:
    arrays = data_files.dense_arrays()
    arrays["edges"] = np.array([[0, 1], [2, 2], [5, 3]])
    graph = load_npz(data_files.write(tmp_path / "undirected.npz", arrays)).graph
    expected = torch.eye(17, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = expected[5, 3] = expected[3, 5] = True
    assert torch.equal(graph.to_dense(), expected)
    assert graph.num_edges == 17 + 4


def test_three_classes_are_judged_by_accuracy(data_files, tmp_path: Path) -> None:
    arrays = data_files.dense_arrays()
    arrays["node_labels"] = np.arange(17) % 3
    data = load_npz(data_files.write(tmp_path / "three.npz", arrays))
    assert (data.metric, data.num_classes) == ("accuracy", 3)


def test_unlabelled_nodes_stay_in_the_graph(data_files, tmp_path: Path) -> None:
    arrays = data_files.sparse_arrays()
    arrays["labelled"][12] = False
    arrays["y"][12] = -1
    arrays["test"] = np.arange(8, 12)
    data = load_npz(data_files.write(tmp_path / "partly.npz", arrays))
    assert (data.num_nodes, data.num_classes) == (13, 2)
    assert data.labels[12] == -1


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_class_without_a_training_node_is_told(kind: str, data_files, tmp_path: Path) -> None:
    arrays = getattr(data_files, f"{kind}_arrays")()
    if kind == "sparse":
        arrays["train"] = arrays["train"][arrays["y"][arrays["train"]] == 0]
        expected = "train has no node of class 1: it cannot be learnt."
    else:
        arrays["train_masks"][1] &= arrays["node_labels"] == 1
        expected = "train_masks has no node of class 0 in split 1: it cannot be learnt."
    assert load_npz(data_files.write(tmp_path / "a.npz", arrays)).notes == (expected,)
    assert load_npz(tmp_path / "a.npz", to_train=False).notes == ()


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_numbers_of_which_32_bits_keep_little_are_told(dtype, data_files, tmp_path: Path) -> None:
    arrays = data_files.dense_arrays()
    values = 1000 * arrays["node_features"].astype(np.float64)
    arrays["node_features"] = values.astype(dtype)
    assert load_npz(data_files.write(tmp_path / "small.npz", arrays)).notes == ()
    values[:, 1] = 1.7e9 + np.arange(17)
    values[:, 2] = 5.1  # what is the same everywhere has nothing to lose
    arrays["node_features"] = values.astype(dtype)
    (told,) = load_npz(data_files.write(tmp_path / "times.npz", arrays)).notes
    assert told == "node_features: 32 bits keep little of how the numbers of column 1 differ. Subtract a mean."


@pytest.mark.parametrize(("kind", "key"), [("sparse", "y"), ("dense", "node_labels")])
def test_minus_one_is_unlabelled(kind: str, key: str, data_files, tmp_path: Path) -> None:
    arrays = getattr(data_files, f"{kind}_arrays")()
    arrays[key] = np.append(arrays[key][:-1], -1)
    if kind == "sparse":
        arrays["test"] = arrays["test"][:-1]
    for part in ("train", "val", "test") if kind == "dense" else ():
        arrays[f"{part}_masks"][:, -1] = False
    data = load_npz(data_files.write(tmp_path / "partly.npz", arrays))
    assert data.labels.tolist() == arrays[key].tolist()
    assert data.num_classes == 2


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_predicting_needs_no_labels_and_no_splits(kind: str, data_files, tmp_path: Path) -> None:
    arrays = getattr(data_files, f"{kind}_arrays")()
    whole = load_npz(data_files.write(tmp_path / "whole.npz", arrays))
    nodes = ("x_indptr", "x_indices", "x_data", "x_shape", "edge_index", "node_features", "edges")
    bare = {key: array for key, array in arrays.items() if key in nodes}
    data = load_npz(data_files.write(tmp_path / "bare.npz", bare), to_train=False)
    assert torch.equal(data.features.to_dense(), whole.features.to_dense())
    assert torch.equal(data.graph.edge_index, whole.graph.edge_index)
    assert (data.labels == -1).all()
    assert (data.num_classes, data.splits, data.notes) == (0, (), ())
    with pytest.raises(InvalidInputError, match=r"got no (y, train, val, test|node_labels, train_masks)"):
        load_npz(tmp_path / "bare.npz")


def test_labels_to_score_a_prediction_need_not_have_every_class(data_files, tmp_path: Path) -> None:
    arrays = data_files.dense_arrays()
    arrays["node_labels"] = np.where(np.arange(17) < 5, 3, -1)
    arrays["train_masks"] = "no masks"
    data = load_npz(data_files.write(tmp_path / "few.npz", arrays), to_train=False)
    assert data.labels.tolist() == [3] * 5 + [-1] * 12
    assert data.num_classes == 4
    arrays["node_labels"][0] = -2
    with pytest.raises(InvalidInputError, match="node_labels: expected class numbers from 0"):
        load_npz(data_files.write(tmp_path / "negative.npz", arrays), to_train=False)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_keys_that_are_not_used_are_named(kind: str, data_files, tmp_path: Path) -> None:
    arrays = getattr(data_files, f"{kind}_arrays")()
    path = tmp_path / "more.npz"
    assert load_npz(data_files.write(path, arrays)).notes == ()
    arrays |= {"edge_weight": np.ones(26), "names": np.arange(3)}
    (note,) = load_npz(data_files.write(path, arrays)).notes
    assert note == "Not used, since the format has no such key: edge_weight, names."


def test_undirected_edges_given_again_count_once(data_files, tmp_path: Path) -> None:
    """As torch_geometric.utils.to_undirected has it."""
    arrays = data_files.dense_arrays()
    once = load_npz(data_files.write(tmp_path / "once.npz", arrays))
    arrays["edges"] = np.concatenate([arrays["edges"], arrays["edges"][:, ::-1], arrays["edges"][:2], [[3, 3]] * 2])
    twice = load_npz(data_files.write(tmp_path / "twice.npz", arrays))
    assert once.notes == ()
    assert torch.equal(twice.graph.to_dense(), once.graph.to_dense())
    assert twice.graph.num_edges == once.graph.num_edges == 17 + 2 * 17
    assert twice.notes == ("edges lists 20 edges again, either way round; each counts once, in both directions.",)


def test_directed_edges_listed_again_count_again_and_are_told(data_files, tmp_path: Path) -> None:
    arrays = data_files.sparse_arrays()
    assert load_npz(data_files.write(tmp_path / "once.npz", arrays)).notes == ()
    arrays["edge_index"] = np.array([[0, 3, 0, 1], [1, 2, 1, 0]])
    data = load_npz(data_files.write(tmp_path / "again.npz", arrays))
    assert data.notes == ("edge_index lists 1 edges again, and each counts as often as it is listed.",)
    assert data.graph.num_edges == 4 + 13


def change(key: str, value: Callable[[Any], Any]) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        arrays[key] = value(arrays[key])

    return apply


def put(position: Any, value: Any) -> Callable[[Any], Any]:
    def apply(array: Any) -> Any:
        array = np.array(array)
        array[position] = value
        return array

    return apply


BAD_SPARSE = {
    "x_shape is not two sizes": (change("x_shape", lambda x: x[:1]), InvalidInputError, "x_shape: expected the shape"),
    "x_shape is negative": (change("x_shape", lambda x: -x), InvalidInputError, "x_shape: expected two sizes of at"),
    "x_indptr is short": (change("x_indptr", lambda x: x[:-1]), InvalidInputError, "x_indptr: expected the shape (14)"),
    "x_indptr falls": (change("x_indptr", put(3, 99)), SparseMatrixError, "falling 1 times"),
    "x_indptr ends early": (change("x_indptr", put(-1, 30)), SparseMatrixError, "x_indptr: expected offsets that rise"),
    "x_indices too large": (change("x_indices", put(2, 20)), SparseMatrixError, "columns from 0 to 19, got 0 to 20"),
    "x_indices negative": (change("x_indices", put(2, -1)), SparseMatrixError, "columns from 0 to 19, got -1 to"),
    "x_indices twice": (change("x_indices", put(1, 0)), SparseMatrixError, "each column once a row"),
    "x_indices floating": (change("x_indices", np.float32), InvalidInputError, "signed or unsigned numbers"),
    "x_data of another size": (change("x_data", lambda x: x[1:]), InvalidInputError, "x_data: expected the shape"),
    "more columns than it could fill": (
        change("x_shape", put(1, 1 << 60)),
        InvalidInputError,
        "x_shape: expected at most 1,048,576 columns",
    ),
    "x_data not finite": (change("x_data", put(0, np.nan)), InvalidInputError, "x_data: expected finite numbers"),
    "x_data is text": (change("x_data", lambda x: x.astype(str)), InvalidInputError, "x_data: numbers, got <U32"),
    "edges out of range": (change("edge_index", put((0, 0), 13)), GraphStructureError, "edge_index: source (key)"),
    "edges negative": (change("edge_index", put((1, 0), -1)), GraphStructureError, "got -1 at edge 0"),
    "edges transposed": (change("edge_index", np.transpose), InvalidInputError, "expected the shape (2, any)"),
    "edges flat": (change("edge_index", np.ravel), InvalidInputError, "expected the shape (2, any), got (52,)"),
    "y leaves a class out": (change("y", lambda y: 2 * y), InvalidInputError, "none left out, got 2 classes from 0"),
    "y is of one class": (change("y", lambda y: 0 * y), InvalidInputError, "y: expected class numbers from 0"),
    "y is negative": (change("y", lambda y: y - 1), InvalidInputError, "y: expected class numbers from 0"),
    "y is short": (change("y", lambda y: y[1:]), InvalidInputError, "y: expected the shape (13), got (12,)"),
    "labelled is not boolean": (change("labelled", np.int64), InvalidInputError, "labelled: expected boolean"),
    "nobody labelled": (change("labelled", np.zeros_like), InvalidInputError, "got 0 classes"),
    "a test node is unlabelled": (change("labelled", put(9, False)), InvalidInputError, "a node without a label"),
    "train out of range": (change("train", put(0, 13)), InvalidInputError, "train: expected node numbers from 0 to 12"),
    "train negative": (change("train", put(0, -1)), InvalidInputError, "got -1 to 3"),
    "train empty": (change("train", lambda x: x[:0]), InvalidInputError, "train: expected at least one node"),
    "train is a mask": (change("train", lambda x: x > 0), InvalidInputError, "train: expected signed or unsigned"),
    "train overlaps test": (change("train", put(0, 9)), InvalidInputError, "each node in one part, once, got node 9"),
    "train repeats a node": (change("train", put(0, 1)), InvalidInputError, "got node 1 repeated"),
    "a key is missing": (lambda arrays: arrays.pop("val"), InvalidInputError, "got no val. docs/data.md"),
}

BAD_DENSE = {
    "features flat": (change("node_features", np.ravel), InvalidInputError, "expected the shape (any, any)"),
    "no features": (change("node_features", lambda x: x[:, :0]), InvalidInputError, "expected nodes and features"),
    "features not finite": (change("node_features", put((1, 1), np.inf)), InvalidInputError, "expected finite numbers"),
    "features too large": (change("node_features", lambda x: x * np.float64(1e300)), InvalidInputError, "of 32 bits"),
    "labels too many": (change("node_labels", lambda y: np.r_[y, 0]), InvalidInputError, "node_labels: expected the"),
    "labels floating": (change("node_labels", np.float64), InvalidInputError, "got float64"),
    "edges transposed": (change("edges", np.transpose), InvalidInputError, "edges: expected the shape (any, 2)"),
    "edges out of range": (
        change("edges", put((0, 1), 17)),
        GraphStructureError,
        "edges: source (key): expected indices from 0 to 16",
    ),
    "masks of numbers": (change("val_masks", np.int64), InvalidInputError, "val_masks: expected boolean numbers"),
    "masks of another size": (change("val_masks", lambda x: x[:, 1:]), InvalidInputError, "the shape (any, 17)"),
    "another number of splits": (change("val_masks", lambda x: x[1:]), InvalidInputError, "as many splits in each"),
    "masks overlap": (change("val_masks", np.ones_like), InvalidInputError, "each node in one part, once"),
    "a validation of one class": (
        lambda arrays: np.logical_and(
            arrays["val_masks"], arrays["node_labels"] == 1, out=arrays["val_masks"], where=[[False], [True]]
        ),
        InvalidInputError,
        "val_masks: expected nodes of both classes, for the area under the ROC curve, got none of class 0 in split 1",
    ),
    "a test of one class": (
        lambda arrays: np.logical_and(arrays["test_masks"], arrays["node_labels"] == 0, out=arrays["test_masks"]),
        InvalidInputError,
        "test_masks: expected nodes of both classes, for the area under the ROC curve, got none of class 1 in split 0",
    ),
    "an empty mask": (change("val_masks", np.zeros_like), InvalidInputError, "val_masks: expected at least one node"),
    "a key is missing": (lambda arrays: arrays.pop("edges"), InvalidInputError, "got no edges"),
}


@pytest.mark.parametrize("case", BAD_SPARSE)
def test_bad_sparse_files(case: str, data_files, tmp_path: Path) -> None:
    check(data_files, tmp_path, data_files.sparse_arrays(), BAD_SPARSE[case])


@pytest.mark.parametrize("case", BAD_DENSE)
def test_bad_dense_files(case: str, data_files, tmp_path: Path) -> None:
    check(data_files, tmp_path, data_files.dense_arrays(), BAD_DENSE[case])


def check(data_files, folder: Path, arrays: Arrays, case: tuple[Any, type[AttentionError], str]) -> None:
    spoil, error, text = case
    spoil(arrays)
    path = data_files.write(folder / "bad.npz", arrays)
    with pytest.raises(error, match=re.escape(text)) as caught:
        load_npz(path)
    assert str(caught.value).startswith(str(path)), "an error names the file"
    assert caught.value.argument.startswith(str(path))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a file was unpickled",)


def test_pickled_objects_are_refused(data_files, tmp_path: Path) -> None:
    arrays = data_files.sparse_arrays()
    arrays["y"] = np.array([Bomb()] * 13, dtype=object)
    path = data_files.write(tmp_path / "bomb.npz", arrays)
    with pytest.raises(InvalidInputError, match="y holds pickled objects, which are never loaded"):
        load_npz(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_files(share: float, data_files, tmp_path: Path) -> None:
    whole = data_files.write(tmp_path / "whole.npz", data_files.sparse_arrays()).read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InvalidInputError, match=r"cut\.npz: expected a readable \.npz file"):
        load_npz(path)


def test_a_damaged_member(data_files, tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, **data_files.sparse_arrays())
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(bytes(content))
    with pytest.raises(InvalidInputError, match=r"damaged\.npz: expected a readable \.npz file"):
        load_npz(path)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    path.write_text("node,class\n0,1\n")
    with pytest.raises(InvalidInputError, match=r"text\.npz: expected a readable \.npz file"):
        load_npz(path)
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(InvalidInputError, match=r"got a single array"):
        load_npz(tmp_path / "one.npz")
    with pytest.raises(InvalidInputError, match="No such file"):
        load_npz(tmp_path / "absent.npz")
    with pytest.raises(InvalidInputError, match="not a file"):
        load_npz(tmp_path)
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(InvalidInputError, match="got no x_indptr"):
        load_npz(tmp_path / "other.npz")


def test_the_shared_files(data_folder: Path) -> None:
    cora, tolokers = load_npz(data_folder / "cora.npz"), load_npz(data_folder / "tolokers.npz")
    assert (cora.num_nodes, cora.in_features, cora.num_classes) == (2708, 1433, 7)
    assert [len(part) for part in cora.splits[0]] == [140, 500, 1000]
    assert cora.notes == tolokers.notes == ()
    assert cora.graph.num_edges == 10556 + 2708
    assert (tolokers.num_nodes, tolokers.in_features, tolokers.num_classes) == (11758, 10, 2)
    assert (len(tolokers.splits), tolokers.metric) == (10, "roc_auc")
    assert tolokers.graph.num_edges == 2 * 519_000 + 11758
