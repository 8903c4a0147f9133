"""Data are loaded once and trained on later, whatever mode or default is on at either time."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyattention.training import (
    FitSettings,
    HeterogeneousNodeClassifierConfig,
    HeterogeneousNodeData,
    NodeClassifierConfig,
    fit,
    load_digits,
    load_graphml,
    load_heterogeneous_tables,
    load_npz,
    load_saved,
    load_tables,
    predict_logits,
    save_data,
)

NODES = "id,label,x,town\n" + "".join(f"n{i},{'ab'[i % 2]},{i % 2 + i / 40},{'uvw'[i % 3]}\n" for i in range(40))
EDGES = "source,target,w\n" + "".join(f"n{i},n{(3 * i + 1) % 40},{i % 7}\n" for i in range(40))


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def tables(folder: Path, _: Any, __: Any) -> Any:
    (folder / "nodes.csv").write_text(NODES)
    (folder / "edges.csv").write_text(EDGES)
    return load_tables(folder)


def structure(folder: Path, _: Any, __: Any) -> Any:
    (folder / "nodes.csv").write_text("id,label\n" + "".join(f"n{i},{'ab'[i % 2]}\n" for i in range(40)))
    (folder / "edges.csv").write_text(EDGES)
    return load_tables(folder)


def typed_tables(folder: Path, _: Any, __: Any) -> Any:
    (folder / "nodes-paper.csv").write_text(NODES)
    (folder / "nodes-author.csv").write_text("id\n" + "".join(f"n{i}\n" for i in range(40)))
    (folder / "edges-author-writes-paper.csv").write_text(EDGES)
    return load_heterogeneous_tables(folder)


def graphml(folder: Path, require: Any, _: Any) -> Any:
    networkx = require("networkx")
    graph = networkx.cycle_graph(40)
    for node in graph:
        graph.nodes[node].update(label="ab"[node % 2], x=node % 2 + node / 40)
    networkx.write_graphml(graph, folder / "a.graphml")
    return load_graphml(folder / "a.graphml")


def saved(folder: Path, require: Any, _: Any) -> Any:
    numbers = np.arange(40)
    data = require("torch_geometric.data").Data(
        x=torch.from_numpy(np.stack([numbers % 2 + numbers / 40, numbers], 1)),
        y=torch.from_numpy(numbers % 2),
        edge_index=torch.from_numpy(np.stack([numbers, (3 * numbers + 1) % 40])),
    )
    save_data(data, folder / "a.safetensors")
    return load_saved(folder / "a.safetensors")


def npz(folder: Path, _: Any, data_files: Any) -> Any:
    return load_npz(data_files.write(folder / "a.npz", data_files.dense_arrays()))


def sparse_npz(folder: Path, _: Any, data_files: Any) -> Any:
    return load_npz(data_files.write(folder / "a.npz", data_files.sparse_arrays()))


def digits(_: Path, require: Any, __: Any) -> Any:
    require("sklearn")
    return load_digits()


def trained(data: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"hidden": 4, "heads": 2}
    is_typed = isinstance(data, HeterogeneousNodeData)
    config = (HeterogeneousNodeClassifierConfig if is_typed else NodeClassifierConfig)(**data.sizes, **settings)
    done = fit(data, data.splits[0], config, FitSettings(epochs=2))
    assert all(each.dtype is torch.float32 and each.is_cpu for each in done.model.state_dict().values())
    return predict_logits(done.model, data)


MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("load", [tables, structure, typed_tables, graphml, saved, npz, sparse_npz, digits])
def test_modes_and_defaults_do_not_matter(
    load: Callable[..., Any], mode: str, tmp_path: Path, require: Any, data_files: Any
) -> None:
    with torch.random.fork_rng(devices=[]):
        expected = trained(load(tmp_path, require, data_files))
    with MODES[mode]():
        data = load(tmp_path, require, data_files)
    assert torch.equal(trained(data), expected)
    with MODES[mode]():
        found = trained(data)
    # Another default dtype draws other initial weights.
    assert found.dtype is torch.float32
    assert mode == "default dtype" or torch.equal(found, expected)
