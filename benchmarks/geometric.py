"""Neighbours of points: Graph.radius beside the bare call of the library that finds the pairs.

`python -m benchmarks.geometric [case ...]` runs the named cases (all by default) and keeps each one's result as soon as
it is there: neighbours.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import vesin
from torch import Tensor

from anyattention import Graph
from benchmarks.harness import RESULTS, measure, print_table, require_tests, write_result

RADIUS, NEIGHBOURS = 0.1, 20
POINTS = (100_000, 300_000, 1_000_000)


def main(names: list[str]) -> None:
    cases = {"neighbours": neighbours}
    require_tests("tests/geometry", "tests/test_sorting.py")
    path = RESULTS / "geometric.json"
    results: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name in names or cases:
        print(f"\n== {name}: {(cases[name].__doc__ or '').splitlines()[0]}", flush=True)
        results[name] = cases[name]()
        write_result("geometric", results)


def neighbours() -> dict[str, Any]:
    """Uniform points in a cube, about 20 neighbours each, float64: the whole Graph, and the library's list alone."""
    found: dict[str, Any] = {}
    per_point = {}
    for count in POINTS:
        side = (count * 4 / 3 * math.pi * RADIUS**3 / NEIGHBOURS) ** (1 / 3)
        points = side * torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        contestants: dict[str, Callable[[], object]] = {
            "anyattention": lambda points=points: Graph.radius(points, RADIUS),
            "anyattention, periodic": lambda points=points, side=side: Graph.radius(
                points, RADIUS, cell=side * torch.eye(3, dtype=torch.float64)
            ),
            "vesin, pairs alone": lambda points=points: bare(points),
            "vesin, pairs by query": lambda points=points: bare(points, is_sorted=True),
        }
        peer = radius_graph()
        if peer is not None:
            contestants["PyTorch Geometric"] = lambda points=points, peer=peer: peer(
                points, RADIUS, max_num_neighbors=200
            )
        edges = Graph.radius(points, RADIUS).num_edges
        title = f"radius graph, {count} points, {edges / count:.1f} neighbours"
        timings = measure("anyattention", contestants, rounds=7)
        print_table(title, timings)
        found[title] = timings
        per_point[str(count)] = timings["anyattention"].median / count
    smallest = per_point[str(POINTS[0])]
    found["time per point over that of the fewest"] = {count: time / smallest for count, time in per_point.items()}
    print("\nTime per point over that of the fewest:", found["time per point over that of the fewest"])
    return found


def bare(points: Tensor, is_sorted: bool = False) -> object:
    """The library's list of all pairs, both ways round."""
    search = vesin.NeighborList(cutoff=RADIUS, full_list=True, sorted=is_sorted, n_threads=torch.get_num_threads())
    return search.compute(points.numpy(), torch.zeros(3, 3, dtype=torch.float64).numpy(), False, "P", copy=False)


def radius_graph() -> Callable[..., Tensor] | None:
    """PyTorch Geometric's radius graph; None without its compiled helper."""
    try:
        from torch_cluster import radius_graph
    except ImportError:
        return None
    return radius_graph


if __name__ == "__main__":
    main(sys.argv[1:])
