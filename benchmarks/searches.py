"""Graph.radius and Graph.nearest on twenty shapes, beside the libraries that find the pairs.

`python -m benchmarks.searches [shape ...]` measures the named shapes (all by default) and keeps each one's result as
soon as it is there.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import vesin
from scipy.spatial import cKDTree
from torch import Tensor

from anyattention import Graph
from benchmarks.harness import RESULTS, measure, print_table, require_tests, write_result
from benchmarks.shapes import RADIUS, Shape, shapes

POINTS, NEIGHBOURS = 20_000, 20
# vesin is asked in a process of its own first, which some shapes end.
VESIN_SECONDS = 20
_ASKED = "--vesin"


def main(names: list[str]) -> None:
    every = shapes(POINTS)
    if names[:1] == [_ASKED]:
        by_vesin(every[names[1]])
        return
    require_tests("tests/geometry/test_search_work.py")
    path = RESULTS / "searches.json"
    results: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {"radius": {}, "nearest": {}}
    results |= {"points": POINTS, "seconds that vesin has": VESIN_SECONDS}
    for name in names or every:
        shape = every[name]
        for search, contestants in (("radius", radius(name, shape)), ("nearest", nearest(shape))):
            results[search][name] = measure("anyattention", contestants, rounds=5)
            print_table(f"{search}, {name}", results[search][name])
        write_result("searches", results)


def radius(name: str, shape: Shape) -> dict[str, Callable[[], object]]:
    contestants: dict[str, Callable[[], object]] = {
        "anyattention": lambda: Graph.radius(shape.points, RADIUS, **cell_of(shape)),
        "scipy's tree": lambda: pairs_by_tree(shape),
    }
    if vesin_survives(name):
        contestants["vesin"] = lambda: by_vesin(shape)
    return contestants


def nearest(shape: Shape) -> dict[str, Callable[[], object]]:
    return {
        "anyattention": lambda: Graph.nearest(shape.points, NEIGHBOURS, **cell_of(shape)),
        "scipy's tree": lambda: nearest_by_tree(shape),
    }


def cell_of(shape: Shape) -> dict[str, Any]:
    return {} if shape.cell is None else {"cell": shape.cell, "periodic": shape.periodic}


def vesin_survives(name: str) -> bool:
    """Whether vesin finds the pairs of a shape in time, without an end of its process."""
    command = [sys.executable, "-m", "benchmarks.searches", _ASKED, name]
    try:
        return subprocess.run(command, check=False, timeout=VESIN_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def by_vesin(shape: Shape) -> object:
    """Each pair once, with distances and shifts."""
    search = vesin.NeighborList(cutoff=RADIUS, full_list=False, n_threads=torch.get_num_threads())
    box = torch.eye(3, dtype=torch.float64) if shape.cell is None else shape.cell
    wanted = "PdS" if any(shape.periodic) else "Pd"
    return search.compute(shape.points.numpy(), box.numpy(), shape.periodic, wanted, copy=False)


def pairs_by_tree(shape: Shape) -> object:
    """Each pair of points, or of a point and an image, once or twice."""
    points, images = with_images(shape, RADIUS)
    if not len(images):
        return cKDTree(points.numpy()).query_pairs(RADIUS, output_type="ndarray")
    everything = cKDTree(torch.cat([points, images]).numpy())
    return cKDTree(points.numpy()).sparse_distance_matrix(everything, RADIUS, output_type="ndarray")


def nearest_by_tree(shape: Shape) -> object:
    """The nearest points and images, the point itself among them."""
    points, images = with_images(shape, 2 * RADIUS)
    everything = cKDTree(torch.cat([points, images]).numpy())
    return everything.query(points.numpy(), k=NEIGHBOURS + 1, workers=torch.get_num_threads())


def with_images(shape: Shape, reach: float) -> tuple[Tensor, Tensor]:
    """The points inside the cell, and their images within reach of it."""
    if shape.cell is None:
        return shape.points, shape.points[:0]
    repeats = torch.tensor(shape.periodic)
    cell = torch.where(repeats[:, None], shape.cell, torch.eye(3, dtype=torch.float64))
    inverse = torch.linalg.inv(cell)
    fractions = shape.points @ inverse
    fractions = torch.where(repeats, fractions - fractions.floor(), fractions)
    width = reach * inverse.norm(dim=0)
    steps = [
        range(-int(w.ceil()), int(w.ceil()) + 1) if flag else range(1) for w, flag in zip(width, repeats, strict=True)
    ]
    images = []
    for step in itertools.product(*steps):
        if any(step):
            moved = fractions + torch.tensor(step, dtype=torch.float64)
            images.append(moved[(((moved > -width) & (moved < 1 + width)) | ~repeats).all(1)])
    return fractions @ cell, torch.cat(images) @ cell


if __name__ == "__main__":
    main(sys.argv[1:])
