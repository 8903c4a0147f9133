"""Broken and hostile files: each is read, or refused by a typed error, in memory that the file's size bounds."""

import io
import json
import random
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from anyattention import load, save
from anyattention.cli import main
from anyattention.errors import AttentionError, InvalidInputError
from anyattention.nn import MultiHeadAttention
from anyattention.training import (
    Reading,
    load_graphml,
    load_heterogeneous_tables,
    load_npz,
    load_saved,
    load_tables,
    save_data,
)


def member(shape: object, dtype: str = "<i8", content: bytes = bytes(64)) -> bytes:
    """A member of an archive with this header."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def archive(
    path: Path, arrays: dict[str, Any], changed: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """The arrays as a file, in which some members are these bytes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for key, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            if f"{key}.npy" not in changed:
                file.writestr(f"{key}.npy", content.getvalue())
        for name, held in changed.items():
            file.writestr(name, held)
    return path


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (member("(4398046511104,)"), "y of the size that it declares, got 64 bytes for the 35,184,372,088,832"),
        (member(f"({10**30},)"), "y of the size that it declares"),
        (member("(2**40,)"), "expected a readable"),
        (member("(-8,)"), r"y: numbers, got int64 of shape \(-8,\)"),
        (member("(8.0,)"), "expected"),
        (member("('8',)"), "expected"),
        (member("(True,)"), "expected"),
        (member("(8,)", "|O"), "y holds pickled objects, which are never loaded"),
        (member("(8,)", "<U2"), "y: numbers, got <U2"),
        (member("(7,)"), "y of the size that it declares, got 64 bytes for the 56"),
        (member("(9,)"), "y of the size that it declares, got 64 bytes for the 72"),
        (b"", "expected a readable"),
        (b"no array", "expected a readable"),
        (b"\x93NUMPY\x09\x00", "expected a readable"),
    ],
)
def test_a_header_that_is_not_true(held: bytes, told: str, tmp_path: Path, data_files: ModuleType, capsys) -> None:
    path = archive(tmp_path / "bad.npz", data_files.sparse_arrays(), {"y.npy": held})
    with pytest.raises(InvalidInputError, match=told):
        load_npz(path)
    assert main(["train", "--data", str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("anyattention: error: ")


def test_what_is_no_array_is_not_read(tmp_path: Path, data_files: ModuleType) -> None:
    arrays = data_files.sparse_arrays()
    data = load_npz(
        archive(tmp_path / "more.npz", arrays, {"y": b"no array", "readme.txt": bytes(10), "big.npy": b"x"})
    )
    assert data.labels.tolist() == arrays["y"].tolist()
    assert data.notes == ("Not used, since the format has no such key: readme.txt, big.",)
    twice = archive(tmp_path / "twice.npz", arrays, {})
    with zipfile.ZipFile(twice, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("y.npy", member("(13,)", content=bytes(104)))
    with pytest.raises(InvalidInputError, match="two arrays y"):
        load_npz(twice)


def test_a_compressed_file_is_read_and_an_encrypted_one_is_not(tmp_path: Path, data_files: ModuleType) -> None:
    arrays = data_files.dense_arrays()
    path = archive(tmp_path / "packed.npz", arrays, {}, zipfile.ZIP_DEFLATED)
    assert load_npz(path).labels.tolist() == arrays["node_labels"].tolist()
    held = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = held.find(signature)
        while place >= 0:
            held[place + flags] |= 1
            place = held.find(signature, place + 1)
    path.write_bytes(held)
    with pytest.raises(InvalidInputError, match="is encrypted"):
        load_npz(path)


def test_memory_is_bounded_by_the_file(tmp_path: Path, data_files: ModuleType) -> None:
    """A GiB of zeros, in a file of a MB."""
    arrays = data_files.dense_arrays()
    del arrays["edges"]
    path = archive(tmp_path / "bomb.npz", arrays, {}, zipfile.ZIP_DEFLATED)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file,
        file.open("edges.npy", "w", force_zip64=True) as content,
    ):
        content.write(member(f"({1 << 26}, 2)", content=b""))
        for _ in range(1 << 10):
            content.write(bytes(1 << 20))
    assert path.stat().st_size < 2_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidInputError, match=r"expected arrays of at most .* bytes for its size"):
        load_npz(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def mutations(held: bytes, seed: int) -> Iterator[bytes]:
    """The bytes with some of them changed, cut out, put twice, or cut off."""
    generator = random.Random(seed)
    while True:
        changed = bytearray(held)
        for _ in range(generator.choice((1, 1, 1, 2, 4, 16))):
            if not changed:
                break
            place = generator.randrange(len(changed))
            kind = generator.randrange(6)
            if kind < 3:
                changed[place] = generator.randrange(256)
            elif kind == 3:
                changed[place] ^= 1 << generator.randrange(8)
            elif kind == 4:
                length = generator.randrange(1, 64)
                changed[place : place + length] = generator.choice((b"", changed[place : place + length] * 2))
            else:
                changed = changed[: max(place, 1)]
        yield bytes(changed)


def survive(read: Callable[[], object], what: str) -> bool:
    """Whether a file was read; any error but a typed one fails."""
    try:
        read()
    except AttentionError:
        return False
    except Exception as fault:
        pytest.fail(f"{what}: {type(fault).__name__}: {fault}")
    return True


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", ["sparse_arrays", "dense_arrays"])
def test_mutated_data(kind: str, compression: int, tmp_path: Path, data_files: ModuleType) -> None:
    path = archive(tmp_path / "data.npz", getattr(data_files, kind)(), {}, compression)
    held, read = path.read_bytes(), 0
    for number, changed in zip(range(1000), mutations(held, 0), strict=False):
        path.write_bytes(changed)
        read += survive(lambda: load_npz(path), f"mutation {number}")
    assert 0 < read < 1000


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse_arrays", "dense_arrays"])
def test_mutated_headers(kind: str, tmp_path: Path, data_files: ModuleType) -> None:
    """Whole archives whose members have mutated headers, which no checksum finds."""
    arrays = getattr(data_files, kind)()
    generator = random.Random(1)
    changed_headers = {}
    for key, array in arrays.items():
        content = io.BytesIO()
        np.save(content, array)
        changed_headers[key] = mutations(content.getvalue(), len(changed_headers))
    for number in range(1000):
        key = generator.choice(list(arrays))
        path = archive(tmp_path / "data.npz", arrays, {f"{key}.npy": next(changed_headers[key])})
        survive(lambda path=path: load_npz(path), f"mutation {number}")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_mutated_models(name: str, tmp_path: Path) -> None:
    module = MultiHeadAttention(4, 2, positions="sinusoidal", max_seq_len=5)
    settings = {"module": "MultiHeadAttention", "config": module.config.to_dict()}
    save(module, tmp_path)
    if name == "config.json":
        # As folders were before the weights had the settings.
        safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / name).write_text(json.dumps(settings))
    held, read = (tmp_path / name).read_bytes(), 0
    for number, changed in zip(range(1000), mutations(held, 2), strict=False):
        (tmp_path / name).write_bytes(changed)
        read += survive(lambda: load(tmp_path)(torch.zeros(1, 3, 4)), f"mutation {number}")
    assert 0 < read < 1000


NODES = "id,label,split,age,town\n" + "".join(
    f'"n, {row}",{"ab"[row % 2]},{("train", "val", "test")[row // 2 % 3]},{row * 1.5},{("Rom", "", "Bonn")[row % 3]}\n'
    for row in range(12)
)
EDGES = "source,target,weight\n" + "".join(f'"n, {row}","n, {row * 5 % 12}",{row}\n' for row in range(12))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nodes.csv", "edges.csv"])
def test_mutated_tables(name: str, tmp_path: Path) -> None:
    held, read = {"nodes.csv": NODES, "edges.csv": EDGES}[name].encode(), 0
    (tmp_path / "nodes.csv").write_text(NODES)
    (tmp_path / "edges.csv").write_text(EDGES)
    kept = load_tables(tmp_path).reading
    for number, changed in zip(range(200), mutations(held, 3), strict=False):
        (tmp_path / name).write_bytes(changed)
        read += survive(lambda: load_tables(tmp_path), f"mutation {number}")
        survive(lambda: load_tables(tmp_path, reading=kept), f"mutation {number}, to predict")
    assert 0 < read < 200


@pytest.mark.filterwarnings("ignore")
def test_mutated_tables_of_several_types(tmp_path: Path) -> None:
    (tmp_path / "nodes-a.csv").write_text(NODES)
    (tmp_path / "nodes-b.csv").write_text("id\nx\ny\n")
    (tmp_path / "edges-b-of-a.csv").write_text('source,target\nx,"n, 1"\ny,"n, 2"\n')
    read = 0
    for number, changed in zip(range(200), mutations(NODES.encode(), 4), strict=False):
        (tmp_path / "nodes-a.csv").write_bytes(changed)
        read += survive(lambda: load_heterogeneous_tables(tmp_path), f"mutation {number}")
    assert 0 < read < 200


@pytest.mark.filterwarnings("ignore")
def test_mutated_graphml(tmp_path: Path, require: Callable[[str], ModuleType]) -> None:
    networkx = require("networkx")
    graph, path = networkx.cycle_graph(12), tmp_path / "graph.graphml"
    for node in graph:
        graph.nodes[node].update(label=str(node % 2), age=node / 3)
    networkx.set_edge_attributes(graph, 1.5, "weight")
    networkx.write_graphml(graph, path)
    held, read = path.read_bytes(), 0
    for number, changed in zip(range(200), mutations(held, 5), strict=False):
        path.write_bytes(changed)
        read += survive(lambda: load_graphml(path), f"mutation {number}")
    assert 0 < read < 200


@pytest.mark.filterwarnings("ignore")
def test_mutated_saved_data(tmp_path: Path, require: Callable[[str], ModuleType]) -> None:
    data, path = require("torch_geometric.data").HeteroData(), tmp_path / "graph.safetensors"
    data["paper"].x, data["paper"].y = torch.rand(12, 2), torch.arange(12) % 2
    data["author"].num_nodes = 3
    data["author", "writes", "paper"].edge_index = torch.stack([torch.arange(12) % 3, torch.arange(12)])
    save_data(data, path, ids={"author": ["a", "b", "c"]}, class_names=["x", "y"])
    held, read = path.read_bytes(), 0
    for number, changed in zip(range(200), mutations(held, 6), strict=False):
        path.write_bytes(changed)
        read += survive(lambda: load_saved(path), f"mutation {number}")
    assert 0 < read < 200


def test_mutated_readings(tmp_path: Path) -> None:
    (tmp_path / "nodes.csv").write_text(NODES)
    (tmp_path / "edges.csv").write_text(EDGES)
    held, read = load_tables(tmp_path).reading.to_json().encode(), 0
    for number, changed in zip(range(200), mutations(held, 7), strict=False):
        text = changed.decode("utf-8", "replace")
        read += survive(lambda text=text: load_tables(tmp_path, reading=Reading.from_json(text)), f"mutation {number}")
    assert 0 < read < 200
