"""A layer over a graph of communities whose nodes are numbered at random, beside the same in each order of `reorder`.

The features are several times as large as the last cache, so that a row comes from memory unless a neighbour was just
read. Needs pymetis.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import torch
from torch import Tensor

from anyattention import Graph, attend
from anyattention.nn import GraphAttention
from benchmarks.harness import Timing, keep_freed_memory, measure, print_table, require_tests, write_result

NODES, COMMUNITY, INSIDE = 262_144, 512, 0.95
DEGREES = (16, 32)
WIDTH, HEADS = 128, 8
METHODS = ("metis", "rcm", "degree")
OURS = "anyattention"
CASES = {"GAT layer": "additive", "dot layer": "dot", "dot product alone": None}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="run no tests, and write no result")
    options = parser.parse_args(arguments)
    importlib.import_module("pymetis")
    if not options.dry:
        require_tests("tests/patterns/test_reorder.py")
    keep_freed_memory()
    layers: dict[str, dict[str, Timing]] = {}
    cost: dict[str, dict[str, float | None]] = {}
    for degree in DEGREES:
        graphs, seconds = orders(degree)
        for name, score in CASES.items():
            contestants = {each: step(graph, score) for each, graph in graphs.items()}
            title = f"{name}, {degree} edges a node"
            layers[title] = measure(OURS, contestants, rounds=options.rounds)
            print_table(title, layers[title])
        layer = layers[f"dot layer, {degree} edges a node"]
        cost |= {f"{method}, {degree} edges a node": cost_of(method, seconds[method], layer) for method in METHODS}
        print(cost)
    if not options.dry:
        write_result("reorder", {"graph": {"size": size()}, "layers": layers, "cost": cost})


def communities(degree: int) -> Tensor:
    """The edges both ways, `(2, edges)`; the nodes of a community stand one after the other."""
    generator = torch.Generator().manual_seed(0)
    count = NODES * degree // 2
    source = torch.randint(NODES, (count,), generator=generator)
    near = source // COMMUNITY * COMMUNITY + torch.randint(COMMUNITY, (count,), generator=generator)
    far = torch.randint(NODES, (count,), generator=generator)
    target = torch.where(torch.rand(count, generator=generator) < INSIDE, near, far)
    return torch.cat([torch.stack([source, target]), torch.stack([target, source])], dim=1)


def orders(degree: int) -> tuple[dict[str, Graph], dict[str, float]]:
    """The graph in each order by the contestants' names, and the seconds that each method took."""
    edge_index = communities(degree)
    number = torch.randperm(NODES, generator=torch.Generator().manual_seed(1))
    shuffled = Graph.from_edge_index(number[edge_index], num_nodes=NODES)
    graphs, seconds = {}, {}
    for method in METHODS:
        started = time.perf_counter()
        graphs[method], _ = shuffled.reorder(method)
        seconds[method] = time.perf_counter() - started
    ordered = Graph.from_edge_index(edge_index, num_nodes=NODES)
    ours = graphs.pop("metis")
    return {OURS: ours, "shuffled": shuffled, **graphs, "limit: communities in order": ordered}, seconds


def step(graph: Graph, score: Any) -> Any:
    """A training step of a layer over the graph, or of `attend` alone."""
    torch.manual_seed(0)
    if score is None:
        heads = [torch.randn(NODES, HEADS, WIDTH // HEADS).requires_grad_() for _ in range(3)]
        cotangent = torch.randn(NODES, HEADS, WIDTH // HEADS)
        return lambda: torch.autograd.grad(attend(*heads, graph).output, heads, cotangent)
    layer = GraphAttention(WIDTH, HEADS, score=score, dropout=0.0)
    x, cotangent = torch.randn(NODES, WIDTH).requires_grad_(), torch.randn(NODES, WIDTH)
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x, graph).output, leaves, cotangent)


def cost_of(method: str, seconds: float, layer: dict[str, Timing]) -> dict[str, float | None]:
    """Seconds to find an order, and how many steps it takes until they are saved."""
    saved = layer["shuffled"].median - layer[OURS if method == "metis" else method].median
    return {"seconds": seconds, "steps until it pays": round(seconds / saved, 1) if saved > 0 else None}


def size() -> dict[str, float]:
    return {
        "nodes": NODES,
        "nodes of a community": COMMUNITY,
        "edges inside": INSIDE,
        "features in MiB": NODES * WIDTH * 4 // 2**20,
    }


if __name__ == "__main__":
    main()
