"""Fashion-MNIST read from its own files and from an .npz, and what is refused."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from anyattention.errors import InvalidInputError
from examples.memory.images import load_data, read_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = np.array([9, 0, 3, 3, 1], dtype=np.uint8)
NAMES = ("train_images", "train_labels", "test_images", "test_labels")


def idx_of(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx_of(array)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("t10k", 2)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", IMAGES[:count])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", LABELS[:count])
    return tmp_path


def write_npz(path: Path, **others: np.ndarray) -> Path:
    arrays = dict(zip(NAMES, (IMAGES, LABELS, IMAGES[:2], LABELS[:2]), strict=True))
    np.savez(path, **{**arrays, **others})
    return path


def test_the_four_files_of_a_folder(folder: Path) -> None:
    for part, count in zip(load_data(folder), (5, 2), strict=True):
        assert (part.pixels.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(part.pixels.numpy(), IMAGES[:count])
        assert part.labels.tolist() == LABELS[:count].tolist()


def test_an_npz_says_the_same(folder: Path, tmp_path: Path) -> None:
    for ours, theirs in zip(load_data(folder), load_data(write_npz(tmp_path / "images.npz")), strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(ours.labels, theirs.labels)


def test_the_small_data_set(data_folder: Path) -> None:
    train, test = load_data(data_folder / "fashion_small.npz")
    assert (tuple(train.pixels.shape), tuple(test.pixels.shape)) == ((3000, 28, 28), (1000, 28, 28))
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))


def test_a_missing_file_is_named_with_where_to_get_it(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"nothing\.npz: expected a whole .npz file, got No such file.*--data"):
        load_data(folder / "nothing.npz")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InvalidInputError, match=r"t10k-labels-idx1-ubyte\.gz: expected a whole gzip file, got No such"):
        load_data(folder)


def test_a_file_that_is_cut_anywhere_is_refused(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidInputError, match=r"train-labels-idx1-ubyte\.gz: expected"):
            load_data(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (idx_of(LABELS)[:-1], r"expected 5 bytes after the head, for sizes \(5,\), got 4"),
        (idx_of(LABELS) + b"\0", r"expected 5 bytes after the head, for sizes \(5,\), got 6"),
        (idx_of(LABELS)[:7], "expected an idx file of unsigned bytes with 1 axes"),
        (idx_of(IMAGES), "expected an idx file of unsigned bytes with 1 axes"),
        (b"\0\0\x0d\1" + idx_of(LABELS)[4:], "expected an idx file of unsigned bytes with 1 axes"),
    ],
)
def test_another_idx_file_is_refused(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InvalidInputError, match=text):
        read_idx(path, 1)


def test_a_file_that_is_not_compressed_or_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(idx_of(LABELS))
    with pytest.raises(InvalidInputError, match="expected a whole gzip file, got Not a gzipped file"):
        read_idx(path, 1)
    content = bytearray(gzip.compress(idx_of(LABELS)))
    content[12] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"labels\.gz: expected"):
        read_idx(path, 1)


def test_an_npz_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "images.npz")
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidInputError, match=r"images\.npz: expected a whole .npz file"):
            load_data(path)


@pytest.mark.parametrize(
    ("others", "text"),
    [
        (
            {"test_labels": LABELS[:1]},
            r"images\.npz, test: expected a label for each of 2 images, got an array of \(1,\)",
        ),
        ({"train_labels": LABELS + 1}, r"images\.npz, train: expected labels below 10, got 10"),
        ({"train_labels": LABELS.astype(np.int64)}, "expected train_labels of uint8, got int64"),
        ({"train_images": IMAGES[:, 1:]}, r"train: expected images of 28 x 28, got an array of \(5, 27, 28\)"),
        ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "test: expected images of 28 x 28"),
        ({"test_images": np.array([None])}, "expected a whole .npz file, got Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(others: dict[str, np.ndarray], text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=text):
        load_data(write_npz(tmp_path / "images.npz", **others))


def test_an_npz_without_an_array_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", train_images=IMAGES)
    with pytest.raises(InvalidInputError, match="got none named train_labels"):
        load_data(tmp_path / "images.npz")


def test_an_array_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    with pytest.raises(InvalidInputError, match=r"images\.npy: expected an .npz file"):
        load_data(tmp_path / "images.npy")
