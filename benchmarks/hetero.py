"""Layers over nodes of several types beside PyTorch Geometric's, and beside their products and reads alone.

Three types of nodes, 100,000 in all, and five relations of 200,000 random edges; 128 inputs, 8 heads of 16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg

from anyattention import HeterogeneousGraph
from anyattention.interop import pyg as ours
from anyattention.nn import HeterogeneousGraphAttention
from benchmarks.graph import gather_limit
from benchmarks.harness import Timing, measure, print_table, require_tests, write_result

Contestants = dict[str, Callable[[], object]]

FEATURES, HEADS, WIDTH = 128, 8, 128
COUNTS = {"paper": 40_000, "author": 30_000, "word": 30_000}
RELATIONS = [
    ("paper", "by", "author"),
    ("author", "of", "paper"),
    ("paper", "cites", "paper"),
    ("word", "in", "paper"),
    ("author", "uses", "word"),
]
EDGES = 200_000


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="the cases whose title has this in it")
    parser.add_argument("--dry", action="store_true", help="run no tests, and write no result")
    options = parser.parse_args(arguments)
    if not options.dry:
        require_tests(
            "tests/interop/test_pyg_typed.py", "tests/nn/test_heterogeneous_attention.py", "-m", "not exhaustive"
        )
    cases: dict[str, dict[str, Timing]] = {}
    for title, contestants in CASES.items():
        if options.only in title:
            cases[title] = measure("anyattention", contestants(), rounds=options.rounds)
            print_table(title, cases[title])
    if not options.dry:
        write_result("hetero", cases)


def hgt() -> Contestants:
    layer = HeterogeneousGraphAttention(
        WIDTH, HEADS, in_features=dict.fromkeys(COUNTS, FEATURES), relations=RELATIONS, dropout=0.0
    )
    x, _, graph = inputs()
    assert layer.explain_forward(x, graph).implementation == "cpu"
    # Two rows of 512 bytes for each edge forward, key and value; three backward, key, value and the output's gradient.
    return {
        **both(ours.HGTConv, pyg.HGTConv),
        "anyattention, nn.HeterogeneousGraphAttention": step(layer, lambda: layer(x, graph).output, x),
        "limit: its products, and the rows of each edge read": limit(graph, 5),
    }


def han() -> Contestants:
    return both(ours.HANConv, pyg.HANConv)


def both(mine: type, theirs: type) -> Contestants:
    """A training step of our layer and of the parent's, with the same weights."""
    x, edges, _ = inputs()
    metadata = (list(COUNTS), RELATIONS)
    layer, other = mine(FEATURES, WIDTH, metadata, heads=HEADS), theirs(FEATURES, WIDTH, metadata, heads=HEADS)
    layer.load_state_dict(other.state_dict())
    assert layer.explain_forward(x, edges).implementation == "cpu"
    return {
        "anyattention": step(layer, lambda: layer(x, edges), x),
        "PyTorch Geometric": step(other, lambda: other(x, edges), x),
    }


def inputs() -> tuple[dict[str, Tensor], dict[Any, Tensor], HeterogeneousGraph]:
    generator = torch.Generator().manual_seed(0)
    x = {kind: torch.randn(count, FEATURES, generator=generator).requires_grad_() for kind, count in COUNTS.items()}
    edges = {
        (source, name, target): torch.stack(
            [torch.randint(COUNTS[kind], (EDGES,), generator=generator) for kind in (source, target)]
        )
        for source, name, target in RELATIONS
    }
    return x, edges, HeterogeneousGraph.from_edge_index(edges, COUNTS)


def step(layer: nn.Module, forward: Callable[[], dict[str, Tensor]], x: dict[str, Tensor]) -> Callable[[], object]:
    leaves = [*x.values(), *layer.parameters()]
    cotangents = [torch.randn_like(output) for output in forward().values()]
    return lambda: torch.autograd.grad(list(forward().values()), leaves, cotangents, allow_unused=True)


def limit(graph: HeterogeneousGraph, rows: int) -> Callable[[], object]:
    """The layer's own products, forward and both ways back, and so many rows of 512 bytes read for each edge."""
    shapes = []
    for kind, count in COUNTS.items():
        # Key and value of each relation, the query, and the projection of the output.
        for columns in (2 * WIDTH * len(graph.outgoing(kind)), WIDTH, WIDTH):
            shapes.append((torch.randn(count, FEATURES), torch.randn(columns, FEATURES), torch.randn(count, columns)))
    read = gather_limit(graph.joint(), rows, WIDTH)

    def run() -> None:
        for x, weight, grad in shapes:
            torch.mm(x, weight.T, out=grad)
            torch.mm(grad, weight, out=x)
            torch.mm(grad.T, x, out=weight)
        read()

    return run


CASES: dict[str, Callable[[], Contestants]] = {
    "HGT layer, 100,000 nodes, 5 relations, 1,000,000 edges, forward+backward": hgt,
    "HAN layer, 100,000 nodes, 5 relations, 1,000,000 edges, forward+backward": han,
}


if __name__ == "__main__":
    main()
