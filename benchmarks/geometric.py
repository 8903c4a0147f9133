"""Points: Graph.radius beside the library that finds the pairs, and the geometric layers beside what limits them.

`python -m benchmarks.geometric [case ...]` runs the named cases (all by default) and keeps each one's result as soon as
it is there: neighbours all_pairs attention forces.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import vesin
from torch import Tensor

from anyattention import Graph, attend, explain
from anyattention.nn import EquivariantAttention
from benchmarks.graph import gather_limit, gradients
from benchmarks.harness import RESULTS, Timing, measure, print_table, require_tests, write_result

RADIUS, NEIGHBOURS = 0.1, 20
POINTS = (100_000, 300_000, 1_000_000)
WIDTH, HEADS = 64, 4
FUSED = "PyTorch's fused attention"
PARTICLES = (2_500, 5_000, 10_000, 20_000)


def main(names: list[str]) -> None:
    cases = {"neighbours": neighbours, "all_pairs": all_pairs, "attention": attention, "forces": forces}
    require_tests("tests/geometry", "tests/test_sorting.py", "tests/nn/test_geometric_attention.py")
    path = RESULTS / "geometric.json"
    results: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name in names or cases:
        print(f"\n== {name}: {(cases[name].__doc__ or '').splitlines()[0]}", flush=True)
        results[name] = cases[name]()
        write_result("geometric", results)


def uniform_points(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """Points in a cube, in random order, of about 20 neighbours each within the radius; and the side of the cube."""
    side = (count * 4 / 3 * math.pi * RADIUS**3 / NEIGHBOURS) ** (1 / 3)
    return side * torch.rand(count, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)), side


def neighbours() -> dict[str, Any]:
    """Uniform points in a cube, about 20 neighbours each, float64: the whole Graph, and the library's list alone."""
    found: dict[str, Any] = {}
    per_point = {}
    for count in POINTS:
        points, side = uniform_points(count, torch.float64)
        contestants: dict[str, Callable[[], object]] = {
            "anyattention": lambda points=points: Graph.radius(points, RADIUS),
            "anyattention, periodic": lambda points=points, side=side: Graph.radius(
                points, RADIUS, cell=side * torch.eye(3, dtype=torch.float64)
            ),
            "vesin, pairs alone": lambda points=points: bare(points),
            "vesin, pairs by query": lambda points=points: bare(points, is_sorted=True),
            "vesin, periodic, by query": lambda points=points, side=side: bare(points, side, is_sorted=True),
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


def bare(points: Tensor, side: float | None = None, is_sorted: bool = False) -> object:
    """The library's list of all pairs, both ways round; with a side, of a periodic box, and its shifts."""
    search = vesin.NeighborList(cutoff=RADIUS, full_list=True, sorted=is_sorted, n_threads=torch.get_num_threads())
    box = (side or 0.0) * torch.eye(3, dtype=torch.float64)
    wanted = "P" if side is None else "PS"
    return search.compute(points.numpy(), box.numpy(), side is not None, wanted, copy=False)


def radius_graph() -> Callable[..., Tensor] | None:
    """PyTorch Geometric's radius graph; None without its compiled helper."""
    try:
        from torch_cluster import radius_graph
    except ImportError:
        return None
    return radius_graph


def all_pairs(points: int = 1024) -> dict[str, Any]:
    """EquivariantAttention over all pairs of 1,024 points, width 64: forward and backward beside dense attention's."""
    found: dict[str, Any] = {}
    contestants: dict[str, Callable[[], object]] = {}
    for heads in (8, HEADS):
        layer = EquivariantAttention(WIDTH, heads, dropout=0.0)
        x, positions = torch.randn(points, WIDTH, requires_grad=True), torch.randn(points, 3, requires_grad=True)
        query, key, value = (torch.randn(1, heads, points, WIDTH // heads, requires_grad=True) for _ in range(3))
        contestants = {
            "anyattention": gradients(
                lambda layer=layer, x=x, positions=positions: all_outputs(layer, x, positions),
                [x, positions, *layer.parameters()],
            ),
            FUSED: gradients(
                lambda query=query, key=key, value=value: F.scaled_dot_product_attention(query, key, value),
                [query, key, value],
            ),
        }
        title = f"all pairs, {points} points, {heads} heads, forward+backward"
        found[title] = measure("anyattention", contestants)
        print_table(title, found[title])
        print(f"  over PyTorch's fused attention (target 4): {1 / found[title][FUSED].ratio:.2f}")
    peer = egnn(points)
    if peer is not None:
        title = f"all pairs, {points} points, {HEADS} heads, forward+backward, beside an MLP for each pair"
        # The last ones above.
        found[title] = measure(
            "anyattention", {"anyattention": contestants["anyattention"], "egnn-pytorch": peer}, rounds=2
        )
        print_table(title, found[title])
    return found


def all_outputs(layer: EquivariantAttention, x: Tensor, positions: Tensor, graph: Graph | None = None) -> Tensor:
    """Features, positions and vectors that come out, in one row."""
    return torch.cat([part.flatten() for part in layer.equivariant_forward(x, positions, graph=graph)[:3]])


def egnn(points: int) -> Callable[[], object] | None:
    """A step of egnn-pytorch's layer, which runs a small network for each pair; None where it is not installed."""
    try:
        from egnn_pytorch import EGNN
    except ImportError:
        return None
    layer = EGNN(dim=WIDTH)
    x, positions = torch.randn(points, WIDTH, requires_grad=True), torch.randn(points, 3, requires_grad=True)

    def forward() -> Tensor:
        features, places = layer(x[None], positions[None])
        return torch.cat([features.flatten(), places.flatten()])

    return gradients(forward, [x, positions, *layer.parameters()])


def attention() -> dict[str, Any]:
    """Attention over a radius graph, 20 neighbours: beside reading the rows it must, and beside its arithmetic."""
    found: dict[str, Any] = {}
    for count, steps, rounds in ((100_000, ("attend", "layer"), 3), (1_000_000, ("attend",), 2)):
        points, _ = uniform_points(count)
        ordered = orders(points)
        graphs = {order: Graph.radius(places, RADIUS).with_self_loops() for order, places in ordered.items()}
        for step in steps:
            # Rows of 64 numbers. Forward, keys and values; backward, these, and the gradient and the query by key.
            # The products: two forward, four backward; a layer's radial functions, three times 2 x 16 x 8.
            rows, operations = 6, 12 * WIDTH + (768 if step == "layer" else 0)
            contestants: dict[str, Callable[[], object]] = {}
            for order, graph in graphs.items():
                call = dot_step(graph) if step == "attend" else layer_step(ordered[order], graph)
                contestants["anyattention" if order == "random" else f"anyattention, {order}"] = call
                contestants[f"reading {rows} x 256 bytes, {order}"] = gather_limit(graph, rows, WIDTH)
            edges = graphs["random"].num_edges
            contestants["its arithmetic"] = arithmetic(edges * operations)
            title = f"{step}, {count} points, {edges} edges, forward+backward"
            found[title] = measure("anyattention", contestants, rounds=rounds)
            print_table(title, found[title])
            found[f"{title}, over the larger limit"] = over = over_limits(found[title], list(graphs))
            print("  over the larger limit (target 3):", over)
    return found


def orders(points: Tensor) -> dict[str, Tensor]:
    """The points as they come, and cell by cell of the size of the radius."""
    cells = (points / RADIUS).floor().long()
    number = (cells * torch.tensor([1 << 40, 1 << 20, 1])).sum(1)
    return {"random": points, "sorted": points[number.argsort()]}


def over_limits(timings: dict[str, Timing], names: list[str]) -> dict[str, float]:
    """Each order's time over the larger of reading its rows and its arithmetic."""
    found = {}
    for name in names:
        ours = timings["anyattention" if name == "random" else f"anyattention, {name}"].median
        reading = next(t.median for title, t in timings.items() if title.startswith("reading") and title.endswith(name))
        found[name] = round(ours / max(reading, timings["its arithmetic"].median), 2)
    return found


def dot_step(graph: Graph) -> Callable[[], object]:
    inputs = [torch.randn(graph.num_keys, HEADS, WIDTH // HEADS, requires_grad=True) for _ in range(3)]
    assert explain(*inputs, graph).implementation == "cpu"
    return gradients(lambda: attend(*inputs, graph).output, inputs)


def layer_step(points: Tensor, graph: Graph) -> Callable[[], object]:
    layer = EquivariantAttention(WIDTH, HEADS, radius=RADIUS, dropout=0.0)
    x, positions = torch.randn(len(points), WIDTH, requires_grad=True), points.clone().requires_grad_()
    return gradients(lambda: all_outputs(layer, x, positions, graph), [x, positions, *layer.parameters()])


def arithmetic(operations: int) -> Callable[[], object]:
    """So many multiplications and additions as PyTorch's matrix product of the layer's width."""
    rows, matrix = torch.randn(1 << 14, WIDTH), torch.randn(WIDTH, WIDTH)
    times = max(1, operations // (2 * rows.numel() * WIDTH))
    result = torch.empty_like(rows)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(rows, matrix, out=result)

    return multiply


def forces() -> dict[str, Any]:
    """A step of training on forces, 20 neighbours: energy, forces and their gradient; time and memory per edge."""
    contestants, edges = {}, {}
    for count in PARTICLES:
        points, _ = uniform_points(count)
        graph = Graph.radius(points, RADIUS).with_self_loops()
        edges[str(count)] = graph.num_edges
        contestants[str(count)] = forces_step(points, graph)
    timings = measure(str(PARTICLES[0]), contestants, rounds=5)
    print_table("energy, forces and their backward, by the number of particles", timings)
    found: dict[str, Any] = {"energy, forces and their backward": timings}
    # Memory of points x points would double per edge with the points; a chunk of edges takes the same for any number.
    found["per edge"] = {
        count: {
            "edges": edges[count],
            "microseconds": round(timing.median / edges[count] * 1e6, 3),
            "bytes": None if timing.peak_bytes is None else round(timing.peak_bytes / edges[count]),
            "bytes of points x points": round(4 * int(count) ** 2 / edges[count]),
        }
        for count, timing in timings.items()
    }
    print(json.dumps(found["per edge"], indent=1))
    return found


def forces_step(points: Tensor, graph: Graph) -> Callable[[], object]:
    layer = EquivariantAttention(WIDTH, HEADS, radius=RADIUS, dropout=0.0)
    x, positions = torch.randn(len(points), WIDTH), points.clone().requires_grad_()

    def step() -> None:
        energy = layer(x, positions, graph=graph).output.square().sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
        # Of one layer's vectors no energy is read.
        torch.autograd.grad(gradient.square().sum(), list(layer.parameters()), allow_unused=True)

    return step


if __name__ == "__main__":
    main(sys.argv[1:])
