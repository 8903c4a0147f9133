"""Graph attention: our layers and kernels beside PyTorch Geometric, DGL and the limit of reading each edge's row.

`python -m benchmarks.graph [case ...]` runs the named cases (all by default) and keeps each one's result as soon as it
is there, so that a run can be taken up again: layers drop_in operation kernels tolokers memory cora epoch skew growth
threads large.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyattention import Additive, Graph, attend, explain
from anyattention.nn import GraphAttention
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.graph.operators import (
    GraphAttention as GraphRecord,
)
from anyattention.ops.graph.operators import (
    GraphAttentionBackward,
    graph_attention,
    graph_attention_backward,
)
from anyattention.output import AttentionOutput
from anyattention.training import NodeClassifier, NodeData, load_npz, preset_for
from anyattention.training.fitting import run_epoch
from benchmarks.harness import RESULTS, Timing, measure, peak_memory, print_table, require_tests, write_result

NODES, EDGES, FEATURES, HEADS, WIDTH = 50_000, 800_000, 128, 8, 16
SCORES = {"GAT": "additive", "GATv2": "dynamic", "dot": "dot"}


def main(names: list[str]) -> None:
    cases = {
        "layers": layers,
        "drop_in": drop_in,
        "operation": operation,
        "kernels": kernel_limits,
        "tolokers": tolokers,
        "memory": memory,
        "cora": cora,
        "epoch": epoch,
        "skew": skew,
        "growth": growth,
        "threads": threads,
        "large": large,
    }
    require_tests("tests/ops", "-k", "test_graph_attention")
    path = RESULTS / "graph.json"
    results: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name in names or cases:
        print(f"\n== {name}: {(cases[name].__doc__ or '').splitlines()[0]}", flush=True)
        found = cases[name]()
        for title, timings in found.items():
            if all(isinstance(timing, Timing) for timing in timings.values()):
                print_table(title, timings)
            else:
                print(title, json.dumps(timings, indent=1))
        results[name] = found
        write_result("graph", results)


def random_graph(nodes: int, edges: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(nodes, (2, edges), generator=generator)


def gradients(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """A training step's forward and backward, with one cotangent for all."""
    cotangent = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, cotangent)


def dgl() -> Any:
    """DGL, without the part that looks for a library built for this PyTorch; None where it is not installed."""
    os.environ.setdefault("DGLBACKEND", "pytorch")
    sys.modules.setdefault("dgl.graphbolt", types.ModuleType("dgl.graphbolt"))
    try:
        import dgl
    except ImportError:
        return None
    return dgl


def our_layer(kind: str) -> GraphAttention:
    return GraphAttention(HEADS * WIDTH, HEADS, in_features=FEATURES, score=SCORES[kind], dropout=0.0)  # pyright: ignore[reportArgumentType]


def peer_layers(kind: str, edge_index: Tensor, nodes: int) -> dict[str, tuple[nn.Module, Callable[..., Tensor]]]:
    """Each peer's layer with the call that runs it."""
    from torch_geometric import nn as pyg

    peers: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {}
    if kind == "dot":
        layer = pyg.TransformerConv(FEATURES, WIDTH, HEADS, root_weight=False)
    else:
        layer = {"GAT": pyg.GATConv, "GATv2": pyg.GATv2Conv}[kind](FEATURES, WIDTH, HEADS, add_self_loops=False)
    peers["PyTorch Geometric"] = (layer, lambda x: layer(x, edge_index))
    library = dgl()
    if library is not None:
        graph = library.graph((edge_index[0], edge_index[1]), num_nodes=nodes)
        graph.create_formats_()
        make = {"GAT": library.nn.GATConv, "GATv2": library.nn.GATv2Conv, "dot": library.nn.DotGatConv}[kind]
        theirs = make(FEATURES, WIDTH, HEADS, allow_zero_in_degree=True)
        peers["DGL"] = (theirs, lambda x: theirs(graph, x))
    return peers


def layers() -> dict[str, dict[str, Timing]]:
    """One layer, 50,000 nodes, 800,000 random edges, 128 inputs, 8 heads x 16: forward and backward."""
    edge_index = random_graph(NODES, EDGES)
    graph = Graph.from_edge_index(edge_index, NODES)
    x = torch.randn(NODES, FEATURES, requires_grad=True)
    found = {}
    for kind in SCORES:
        ours = our_layer(kind)
        contestants = {
            "anyattention": gradients(lambda layer=ours: layer(x, graph).output, [x, *ours.parameters()]),
            "anyattention, Graph built anew": gradients(
                lambda layer=ours: layer(x, Graph.from_edge_index(edge_index, NODES)).output, [x, *ours.parameters()]
            ),
        }
        for name, (layer, call) in peer_layers(kind, edge_index, NODES).items():
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            leaves = used_leaves(call(x), leaves)
            contestants[name] = gradients(lambda call=call: call(x), leaves)
        found[f"{kind} layer, forward+backward"] = measure("anyattention", contestants, rounds=7)
    return found


def drop_in() -> dict[str, dict[str, Timing]]:
    """GAT as `interop.pyg.GATConv` in PyTorch Geometric's place: the layer above, and two of them, compiled."""
    from torch_geometric.nn import GATConv as PeerConv

    from anyattention.interop.pyg import GATConv

    edge_index = random_graph(NODES, EDGES)
    x = torch.randn(NODES, FEATURES, requires_grad=True)
    ours, theirs = (kind(FEATURES, WIDTH, HEADS, add_self_loops=False) for kind in (GATConv, PeerConv))
    assert ours.explain_forward(x, edge_index).implementation == "cpu"
    layer = {
        name: gradients(lambda conv=conv: conv(x, edge_index), [x, *conv.parameters()])
        for name, conv in (("anyattention", ours), ("PyTorch Geometric", theirs))
    }
    layer["limit: three products and the rows read each way"] = layer_limit(Graph.from_edge_index(edge_index, NODES))
    models = {name: ConvModel(kind) for name, kind in (("ours", GATConv), ("theirs", PeerConv))}
    calls: dict[str, Any] = {
        "anyattention": torch.compile(models["ours"], fullgraph=True),
        "anyattention, not compiled": models["ours"],
        "PyTorch Geometric": models["theirs"],
    }
    leaves = {name: list(models["theirs" if name == "PyTorch Geometric" else "ours"].parameters()) for name in calls}
    steps = {
        name: gradients(lambda call=call: call(x.detach(), edge_index), leaves[name]) for name, call in calls.items()
    }
    return {
        "GATConv, forward+backward": measure("anyattention", layer, rounds=9),
        "two GATConv, compiled whole, forward+backward": measure("anyattention", steps, rounds=7),
    }


class ConvModel(nn.Module):
    """Two layers of a kind of GATConv, as a user of PyTorch Geometric writes them."""

    def __init__(self, conv: type) -> None:
        super().__init__()
        self.first = conv(FEATURES, WIDTH, HEADS, add_self_loops=False)
        self.second = conv(HEADS * WIDTH, WIDTH, HEADS, add_self_loops=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x, edge_index)), edge_index)


def layer_limit(graph: Graph) -> Callable[[], object]:
    """A GAT layer's three products, and reading each edge's row of values forward and of gradients backward."""
    x, grad = torch.randn(graph.num_keys, FEATURES), torch.randn(graph.num_keys, HEADS * WIDTH)
    weight = torch.randn(HEADS * WIDTH, FEATURES)
    forward, backward = gather_limit(graph, 1), gather_limit(graph, 1, columns=graph.queries_by_key)

    def run() -> None:
        x @ weight.T
        forward()
        backward()
        grad.T @ x
        grad @ weight

    return run


def used_leaves(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The leaves that an output depends on."""
    grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    return [leaf for leaf, grad in zip(leaves, grads, strict=True) if grad is not None]


def operation() -> dict[str, dict[str, Timing]]:
    """The dot-product operation alone, on ready queries, keys and values, beside DGL's three calls for it."""
    edge_index = random_graph(NODES, EDGES)
    graph = Graph.from_edge_index(edge_index, NODES)
    query, key, value = (torch.randn(NODES, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    assert explain(query, key, value, graph).implementation == "cpu"
    leaves = [query, key, value]
    contestants = {"anyattention": gradients(lambda: attend(query, key, value, graph).output, leaves)}
    library = dgl()
    if library is not None:
        theirs = library.graph((edge_index[0], edge_index[1]), num_nodes=NODES)
        theirs.create_formats_()

        def dot_gat() -> Tensor:
            scores = library.ops.u_dot_v(theirs, key, query) / WIDTH**0.5
            return library.ops.u_mul_e_sum(theirs, value, library.ops.edge_softmax(theirs, scores))

        contestants["DGL"] = gradients(dot_gat, leaves)
    return {"dot operation, forward+backward": measure("anyattention", contestants, rounds=7)}


def kernel_limits() -> dict[str, dict[str, Timing]]:
    """Each kernel against reading the rows that it must, and against itself on rows that stay in the cache."""
    found: dict[str, dict[str, Timing]] = {}
    for nodes, edges in ((NODES, EDGES), (10 * NODES, 10 * EDGES)):
        graph = Graph.from_edge_index(random_graph(nodes, edges), nodes)
        degree = edges // nodes
        target = torch.arange(nodes).repeat_interleave(degree)
        near = (target + torch.arange(degree).repeat(nodes)) % nodes
        cached = Graph.from_edge_index(torch.stack([near, target]), nodes)
        for kind, forward_rows, backward_rows in (("GAT", 1, 1), ("GATv2", 1, 3), ("dot", 2, 3)):
            for backward, rows in ((False, forward_rows), (True, backward_rows)):
                contestants = {
                    "anyattention": kernel(kind, graph, backward),
                    f"reading {rows} x 512 bytes per edge": gather_limit(graph, rows),
                    "the same on cached rows": kernel(kind, cached, backward),
                }
                title = f"{kind} kernel, {nodes} nodes, {edges} edges, {'backward' if backward else 'forward'}"
                found[title] = measure("anyattention", contestants, rounds=7)
    return found


def kernel(kind: str, graph: Graph, backward: bool) -> Callable[[], object]:
    """The bare kernel, without autograd."""
    torch.manual_seed(0)
    score = {"GAT": "Additive", "GATv2": "Dynamic", "dot": "Dot"}[kind]
    head_dim = 1 if kind == "GAT" else WIDTH
    query = torch.randn(1, graph.num_queries, HEADS, head_dim)
    value = torch.randn(1, graph.num_keys, HEADS, WIDTH)
    key = value if kind == "GATv2" else torch.randn(1, graph.num_keys, HEADS, head_dim)
    vector = torch.randn(HEADS, WIDTH) if kind == "GATv2" else None
    record = GraphRecord(
        graph=arrays_of(graph),
        query=query,
        key=key,
        value=value,
        vector=vector,
        term=None,
        bias=None,
        seed=None,
        score=score,
        normalize=True,
        scale=0.25 if kind == "dot" else 1.0,
        softcap=0.0,
        negative_slope=0.2,
        dropout=0.0,
    )
    if not backward:
        return lambda: graph_attention(record)
    output, largest, log_sum = graph_attention(record)
    by_results = GraphAttentionBackward(record, output, largest, log_sum, torch.randn_like(output), None)
    return lambda: graph_attention_backward(by_results)


def gather_limit(
    graph: Graph, rows: int, width: int = HEADS * WIDTH, columns: Tensor | None = None
) -> Callable[[], object]:
    """Reads the row of `width` float32 numbers of each edge, `rows` times over different tables.

    `columns` are the rows in their order: of the edges' keys unless they are given.
    """
    library = read_rows_library()
    tables = [torch.randn(graph.num_keys, width) for _ in range(rows)]
    columns = graph.keys_by_query if columns is None else columns

    def read() -> None:
        for table in tables:
            library.read_rows(
                ctypes.c_void_p(table.data_ptr()),
                ctypes.c_int64(width),
                ctypes.c_void_p(columns.data_ptr()),
                ctypes.c_int64(graph.num_edges),
                ctypes.c_int64(torch.get_num_threads()),
            )

    return read


def read_rows_library() -> ctypes.CDLL:
    source = Path(__file__).with_name("gather_limit.cpp")
    folder = tempfile.mkdtemp()
    library = Path(folder) / "gather_limit.so"
    flags = ["-O3", "-march=native", "-fopenmp", "-ffast-math", "-shared", "-fPIC", "-nostartfiles"]
    # Compiled, not linked, with OpenMP: torch's own runtime serves, as for the kernels.
    subprocess.run(["g++", *flags, "-c", str(source), "-o", f"{library}.o"], check=True)
    subprocess.run(["g++", "-shared", f"{library}.o", "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def two_layers(in_features: int, hidden: int, heads: int, outputs: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """A two-layer GAT of ours and of PyTorch Geometric."""
    from torch_geometric.nn import GATConv

    ours = nn.ModuleList(
        [
            GraphAttention(hidden, heads, in_features=in_features, score="additive", dropout=0.0),
            GraphAttention(outputs, 1, in_features=hidden, score="additive", dropout=0.0),
        ]
    )
    theirs = nn.ModuleList(
        [
            GATConv(in_features, hidden // heads, heads, add_self_loops=False),
            GATConv(hidden, outputs, 1, add_self_loops=False),
        ]
    )
    return ours, theirs


def model_steps(
    x: Tensor, edge_index: Tensor, hidden: int, heads: int, outputs: int
) -> dict[str, Callable[[], object]]:
    graph = Graph.from_edge_index(edge_index, x.shape[0])
    ours, theirs = two_layers(x.shape[1], hidden, heads, outputs)

    def our_forward() -> Tensor:
        return ours[1](torch.relu(ours[0](x, graph).output), graph).output

    def their_forward() -> Tensor:
        return theirs[1](torch.relu(theirs[0](x, edge_index)), edge_index)

    return {
        "anyattention": gradients(our_forward, list(ours.parameters())),
        "PyTorch Geometric": gradients(their_forward, list(theirs.parameters())),
    }


def tolokers() -> dict[str, dict[str, Timing]]:
    """Tolokers, 1,038,000 directed edges: a two-layer GAT of 8 heads x 16, forward and backward."""
    with np.load(data_file("tolokers.npz"), allow_pickle=False) as file:
        x = torch.tensor(file["node_features"], dtype=torch.float32)
        edges = torch.tensor(file["edges"], dtype=torch.int64).T
    edge_index = torch.cat([edges, edges.flip(0)], dim=1)
    steps = model_steps(x, edge_index, HEADS * WIDTH, HEADS, 2)
    return {"two-layer GAT, forward+backward": measure("anyattention", steps, rounds=5)}


def cora() -> dict[str, dict[str, Timing]]:
    """Cora: the two attention layers of 8 heads x 8 and 7 outputs, and one call of the operation."""
    with np.load(data_file("cora.npz"), allow_pickle=False) as file:
        edge_index = torch.tensor(file["edge_index"], dtype=torch.int64)
        nodes = int(file["x_shape"][0])
    graph = Graph.from_edge_index(edge_index, nodes)
    steps = model_steps(torch.randn(nodes, 64), edge_index, 64, 8, 7)
    query, key = (torch.randn(nodes, 8, 1, requires_grad=True) for _ in range(2))
    value = torch.randn(nodes, 8, 8, requires_grad=True)
    call = gradients(lambda: attend(query, key, value, graph, score=Additive()).output, [query, key, value])
    return {
        "two attention layers, forward+backward": measure("anyattention", steps),
        "one call of the operation, forward+backward": measure("anyattention", {"anyattention": call}),
    }


class PeerClassifier(nn.Module):
    """PyTorch Geometric's layers in the place of `NodeClassifier`'s, for the network on citation graphs."""

    # What a training asks of a model: it takes no edge features.
    config = types.SimpleNamespace(edge_dim=None)

    def __init__(self, in_features: int, num_classes: int, dropout: float = 0.6) -> None:
        from torch_geometric.nn import GATConv

        super().__init__()
        self.dropout = dropout
        self.first_layer = GATConv(in_features, 8, 8, dropout=dropout, add_self_loops=False)
        self.second_layer = GATConv(64, num_classes, 1, dropout=dropout, add_self_loops=False)

    def forward(self, x: Tensor, graph: Graph, edges: None = None, return_weights: bool = False) -> AttentionOutput:
        x = torch.dropout(x, self.dropout, self.training)
        hidden = torch.dropout(nn.functional.elu(self.first_layer(x, graph.edge_index)), self.dropout, self.training)
        return AttentionOutput(self.second_layer(hidden, graph.edge_index))


def epoch() -> dict[str, dict[str, Timing]]:
    """Cora: one epoch of `anyattention train`, beside the same network in PyTorch Geometric on dense features."""
    data = load_npz(data_file("cora.npz"))
    ours = NodeClassifier(data.in_features, data.num_classes, **preset_for(data).model)
    theirs = PeerClassifier(data.in_features, data.num_classes)
    dense = replace(data, features=data.features.to_dense())

    def run(model: Any, data: NodeData) -> Callable[[], object]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=5e-4)
        return lambda: run_epoch(1, model, optimizer, data, data.splits[0])

    steps = {"anyattention": run(ours, data), "PyTorch Geometric, dense features": run(theirs, dense)}
    return {"one epoch, with its validation": measure("anyattention", steps, rounds=7)}


def data_file(name: str) -> Path:
    folder = Path(os.environ.get("ANYATTENTION_DATA") or Path(__file__).parents[1] / "../shared/data")
    if not (folder / name).exists():
        raise SystemExit(f"{folder / name} is missing; set ANYATTENTION_DATA to the folder of the data sets")
    return folder / name


def memory() -> dict[str, dict[str, Any]]:
    """Peak memory above the inputs of one training step, 200,000 nodes and 3.2 million edges, a process for each."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("GAT", "dot"):
        found[f"{kind}, peak MiB above the inputs"] = {
            name: in_a_process("peak_of_step", kind, name) for name in ("anyattention", "PyTorch Geometric", "DGL")
        }
    return found


def peak_of_step(kind: str, name: str) -> float | None:
    nodes, edges = 200_000, 3_200_000
    edge_index = random_graph(nodes, edges)
    x = torch.randn(nodes, FEATURES, requires_grad=True)
    if name == "anyattention":
        graph, layer = Graph.from_edge_index(edge_index, nodes), our_layer(kind)
        call: Callable[..., Tensor] = lambda x: layer(x, graph).output  # noqa: E731
        small = Graph.from_edge_index(edge_index[:, :8] % 4, 4)
        layer(x[:4], small).output.sum().backward()
    else:
        peers = peer_layers(kind, edge_index, nodes)
        if name not in peers:
            return None
        layer, call = peers[name]
    cotangent = torch.randn(nodes, HEADS * WIDTH)
    peak = peak_memory(lambda: call(x).reshape(nodes, -1).backward(cotangent))
    return None if peak is None else peak / 2**20


def in_a_process(function: str, *arguments: str) -> Any:
    """The JSON that one of this file's functions returns, run in a fresh process."""
    code = f"import json; from benchmarks import graph; print(json.dumps(graph.{function}(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def skew() -> dict[str, dict[str, Timing]]:
    """A power law with one node that has 10 % of the edges, beside the uniform graph of the same size."""
    torch.manual_seed(0)
    uniform = random_graph(NODES, EDGES)
    ranks = torch.rand(EDGES).pow(3).mul(NODES).long().clamp(max=NODES - 1)
    skewed = torch.stack([torch.randint(NODES, (EDGES,)), ranks])
    skewed[1, : EDGES // 10] = 7
    found = {}
    for kind in SCORES:
        steps = {}
        for name, edge_index in (("anyattention", uniform), ("anyattention, skewed degrees", skewed)):
            graph = Graph.from_edge_index(edge_index, NODES)
            forward, backward = kernel(kind, graph, False), kernel(kind, graph, True)
            steps[name] = lambda forward=forward, backward=backward: (forward(), backward())
        found[f"{kind} kernels, forward+backward"] = measure("anyattention", steps)
    return found


def growth() -> dict[str, dict[str, Any]]:
    """Nanoseconds per edge from 80,000 to 80 million edges at 16 edges a node, and the gather limit's."""
    found: dict[str, dict[str, Any]] = {}
    for edges in (80_000, 800_000, 8_000_000, 80_000_000):
        graph = Graph.from_edge_index(random_graph(edges // 16, edges), edges // 16)
        contestants = {"anyattention": kernel("GAT", graph, False), "limit": gather_limit(graph, 1)}
        timings = measure("anyattention", contestants, rounds=5)
        found[f"GAT forward, {edges} edges"] = {
            name: round(timing.median / edges * 1e9, 2) for name, timing in timings.items()
        }
    return found


def threads() -> dict[str, dict[str, Any]]:
    """How much faster two threads are than one: each kernel, and the gather limit."""
    before = torch.get_num_threads()
    graph = Graph.from_edge_index(random_graph(NODES, EDGES), NODES)
    found: dict[str, dict[str, Any]] = {}
    calls = {
        f"{kind} {'backward' if b else 'forward'}": kernel(kind, graph, b) for kind in SCORES for b in (False, True)
    }
    for name, call in {**calls, "limit": gather_limit(graph, 1)}.items():

        def on(count: int, call: Callable[[], object] = call) -> Callable[[], object]:
            def run() -> None:
                torch.set_num_threads(count)
                call()

            return run

        timings = measure("two", {"two": on(2), "one": on(1)})
        found[name] = {"one thread over two": round(timings["one"].ratio, 2)}
    torch.set_num_threads(before)
    return found


def large() -> dict[str, dict[str, Any]]:
    """One GAT layer, forward and backward, on 2.4 million nodes and 124 million edges: seconds and peak memory."""
    return {"ogbn-products size": in_a_process("large_step")}


def large_step() -> dict[str, float]:
    import resource
    import time

    nodes, edges = 2_400_000, 124_000_000
    torch.manual_seed(0)
    edge_index = torch.empty(2, edges, dtype=torch.int64)
    for row in edge_index:
        for part in row.split(4_000_000):
            part.copy_(torch.rand(part.shape).pow_(2).mul_(nodes).long().clamp_(max=nodes - 1))
    started = time.perf_counter()
    graph = Graph.from_edge_index(edge_index, nodes)
    del edge_index
    built = time.perf_counter()
    layer = GraphAttention(HEADS * WIDTH, HEADS, in_features=100, score="additive", dropout=0.0)
    x = torch.randn(nodes, 100)
    layer(x, graph).output.mean().backward()
    stepped = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds to build the Graph": round(built - started, 1),
        "seconds of the step": round(stepped - built, 1),
        "peak GiB of the process": round(peak / 2**30, 2),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
