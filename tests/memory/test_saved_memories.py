"""A memory's folder: the old memory or the new one, whatever cuts the write."""

import errno
import json
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from anyattention import load, save
from anyattention.errors import InvalidInputError, MissingExtraError
from anyattention.nn import MemoryAttention


def a_memory(kind: str, number: float) -> MemoryAttention:
    memory = MemoryAttention(6, 1, value_dim=3, key_dim=4, k=3, index=kind, use_bias=False)
    memory.append(torch.randn(50, 4), torch.full((50, 3), number))
    memory.delete([7])
    memory.search(torch.randn(1, 4))  # which builds the index
    return memory.eval()


@pytest.fixture(params=["exact", "clusters", "usearch", "faiss"])
def kind(request, require):
    if request.param in ("usearch", "faiss"):
        require("usearch.index" if request.param == "usearch" else "faiss")
    return request.param


def number_of(folder: Path) -> float:
    """That of the memory in a folder, whole."""
    memory = load(folder)
    (number,) = memory.values.unique().tolist()
    assert memory.num_memories == 49
    found = memory.search(memory.keys, 1)
    assert (found.ids[:, 0] != 7).all()
    return number


def test_a_memory_comes_back_with_its_index(kind, tmp_path):
    memory, x = a_memory(kind, 1.0), torch.randn(9, 6)
    save(memory, tmp_path)
    names = sorted(path.suffix for path in tmp_path.iterdir())
    assert names == sorted([".json", ".safetensors", *([] if kind == "exact" else [f".{kind}"])])
    loaded = load(tmp_path)
    for one, other in zip(memory.memory_forward(x), loaded.memory_forward(x), strict=True):
        assert torch.equal(one, other)
    if kind != "exact":
        assert loaded.index_content() is not None
        assert loaded._searched.of(loaded.keys) is not None
    assert loaded.append(torch.zeros(1, 4), torch.zeros(1, 3)).tolist() == [50]
    loaded.delete([3])
    save(loaded, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(names)
    assert load(tmp_path).num_memories == 49


class Cut(BaseException):
    """The end of the process."""


class Disk:
    """Counts what is done to files, and ends the process at some point of it; a write may be cut at any byte."""

    def __init__(self, monkeypatch, steps: float, share: float) -> None:
        self.left, self.share = steps, share
        for home, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
            monkeypatch.setattr(home, name, self.counted(getattr(home, name)))
        written = open

        def opening(path, mode="r", *args, **kwargs):
            file = written(path, mode, *args, **kwargs)
            if mode == "xb":
                write = file.write
                return Cutting(file, lambda content: self.cut_write(write, content))
            return file

        monkeypatch.setattr("builtins.open", opening)

    def step(self) -> bool:
        self.left -= 1
        return self.left < 0

    def counted(self, function):
        def call(*args, **kwargs):
            if self.step():
                raise Cut
            return function(*args, **kwargs)

        return call

    def cut_write(self, write, content: bytes) -> None:
        if self.step():
            write(content[: int(self.share * len(content))])
            raise Cut
        write(content)


class Cutting:
    def __init__(self, file, write) -> None:
        self.file, self.write = file, write

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *fault):
        return self.file.__exit__(*fault)

    def __getattr__(self, name):
        return getattr(self.file, name)


def steps_of(kind: str, folder: Path) -> int:
    """How many steps a write takes."""
    save(a_memory(kind, 1.0), folder)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, 10**6, 1.0)
        save(a_memory(kind, 2.0), folder)
    return int(10**6 - disk.left)


def cut_writes(kind: str, folder: Path, count: int) -> None:
    steps, choose = steps_of(kind, folder), random.Random(0)
    seen = set()
    for turn in range(count):
        before = number_of(folder)
        memory = a_memory(kind, 10.0 + turn)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, turn % (steps + 1), choose.random())
            with suppress(Cut):
                save(memory, folder)
        after = number_of(folder)
        assert after in (before, 10.0 + turn)
        seen.add(after == before)
    assert seen == {True, False}


@pytest.mark.filterwarnings("ignore:.*is not what .* was saved with")
def test_a_write_that_is_cut_leaves_the_old_memory_or_the_new_one(kind, tmp_path):
    cut_writes(kind, tmp_path, 20)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*is not what .* was saved with")
def test_two_hundred_writes_cut_at_random_bytes(kind, tmp_path):
    cut_writes(kind, tmp_path, 200)


def test_a_full_disk_leaves_the_old_memory(kind, tmp_path, monkeypatch):
    save(a_memory(kind, 1.0), tmp_path)
    names = sorted(tmp_path.iterdir())

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InvalidInputError, match="No space left on device"):
            save(a_memory(kind, 2.0), tmp_path)
    assert number_of(tmp_path) == 1.0
    assert sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize("change", ["gone", "cut", "changed", "of another memory"])
@pytest.mark.parametrize("kind", ["clusters", "usearch", "faiss"], indirect=True)
def test_a_folder_whose_index_does_not_fit_is_refused(kind, change, tmp_path):
    save(a_memory(kind, 1.0), tmp_path)
    (path,) = tmp_path.glob("index-*")
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif change == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        save(a_memory(kind, 2.0), tmp_path / "other")
        (other,) = (tmp_path / "other").glob("index-*")
        path.write_bytes(other.read_bytes())
    expected = "expected the memory's index, got No such file" if change == "gone" else "got other bytes"
    with pytest.raises(InvalidInputError, match=rf"index-[0-9a-f]+\.{kind}: .*{expected}"):
        load(tmp_path)


def with_metadata(folder: Path, **changes: str) -> None:
    path = folder / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    metadata["anyattention index"] = changes["index"]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)


@pytest.mark.parametrize(
    "named",
    [
        "no json",
        "[]",
        "{}",
        json.dumps({"../../etc/passwd": "0"}),
        json.dumps({"index-0.usearch": "0"}),
        json.dumps({"a": 1, "b": 2}),
    ],
)
def test_a_file_cannot_name_others(named, tmp_path):
    save(a_memory("exact", 1.0), tmp_path)
    with_metadata(tmp_path, index=named)
    with pytest.raises(InvalidInputError, match=r"model\.safetensors: expected the name of an index file"):
        load(tmp_path)


def test_an_index_beside_an_exact_memory_is_refused(tmp_path):
    import hashlib

    save(a_memory("exact", 1.0), tmp_path)
    name = f"index-{'0' * 32}.usearch"
    (tmp_path / name).write_bytes(b"x")
    with_metadata(tmp_path, index=json.dumps({name: hashlib.sha256(b"x").hexdigest()}))
    with pytest.raises(InvalidInputError, match=r"index: expected none: index='exact', got 1 bytes"):
        load(tmp_path)


def test_an_index_of_other_memories_is_refused(require):
    require("usearch.index")
    one, other = a_memory("usearch", 1.0), a_memory("usearch", 1.0)
    other.delete([8])
    with pytest.raises(InvalidInputError, match="index: expected the ids of the 49 memories, got 48 ids"):
        one.restore_index(other.index_content())


@pytest.mark.parametrize("length", [0, 9, 1000, -1])
def test_half_a_memory_is_refused(length, tmp_path):
    save(a_memory("exact", 1.0), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InvalidInputError, match=r"model\.safetensors: expected a readable safetensors file"):
        load(tmp_path)


def test_ids_that_contradict_the_keys_are_refused(tmp_path):
    save(a_memory("exact", 1.0), tmp_path)
    path = tmp_path / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = safetensors.torch.load_file(path)
    weights["ids"] = weights["ids"].flip(0)
    safetensors.torch.save_file(weights, path, metadata)
    with pytest.raises(InvalidInputError, match="ids: they do not ascend from 0 to below next_id"):
        load(tmp_path)


def test_the_library_of_an_index_is_named_where_it_is_missing(tmp_path, require, monkeypatch):
    require("usearch.index")
    save(a_memory("usearch", 1.0), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(MissingExtraError, match="index='usearch' needs usearch"):
        load(tmp_path)


def test_saving_leaves_index_files_of_others(tmp_path):
    own = tmp_path / "index-of-mine.faiss"
    own.write_bytes(b"mine")
    save(MemoryAttention(8, 2), tmp_path)
    assert own.read_bytes() == b"mine"
