"""Searches on matter of any shape: right beside brute force, and never the end of the process."""

import itertools
import subprocess
import sys

import pytest
import torch

from anyattention import Graph
from anyattention.errors import InvalidInputError
from benchmarks.shapes import shapes
from neighbour_oracle import brute_force, first_k

NAMES = list(shapes(20))


def _check(points, r, k, cell=None, periodic=None, **settings):
    """Radius and nearest against brute force, which looks as far as the farthest that was found."""
    given = {"cell": cell, "periodic": periodic, **settings}
    for graph, chosen in ((Graph.radius(points, r, **given), None), (Graph.nearest(points, k, **given), k)):
        batch = settings.get("batch")
        far = graph.displacements(points, cell, queries=settings.get("queries"), batch=batch).norm(dim=1)
        reach = r if chosen is None else float(far.max()) * (1 + 1e-9) if far.numel() else 0.0
        names = {"batch": "key_cloud", "query_batch": "query_cloud", "queries": "queries"}
        arrays = {names[name]: value.numpy() for name, value in settings.items() if value is not None}
        rows = brute_force(
            points.numpy(), cell=None if cell is None else cell.numpy(), periodic=periodic, reach=reach, **arrays
        )
        rows = rows if chosen is None else first_k(rows, chosen)
        assert graph.query_index.tolist() == [row[0] for row in rows]
        assert graph.key_index.tolist() == [row[1] for row in rows]
        if cell is not None:
            assert graph.shifts.tolist() == [[int(step) for step in row[2]] for row in rows]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("r", [0.4, 1.68])
def test_every_shape_has_the_neighbours_of_brute_force(name, r):
    points, cell, periodic = shapes(20)[name]
    given = {} if cell is None else {"cell": cell, "periodic": periodic}
    _check(points, r, 3, **given)
    halves = torch.arange(2).repeat_interleave(10)
    if cell is not None:
        _check(points, r, 2, batch=halves, cell=torch.stack([cell, 1.25 * cell]), periodic=periodic)
    # Brute force cannot look as far from a cell as 1e6.
    _check(points[::2].contiguous(), r, 3, queries=points[1:-1:2].contiguous(), **given)


def _points(kind, dim, generator):
    points = torch.rand(9, dim, generator=generator, dtype=torch.float64)
    if kind == "far point":
        points[-1, 0] = 40.0
    elif kind == "two clusters":
        points[5:] += 25.0
    elif kind == "coincident":
        points = points[:3].repeat(3, 1)
    elif kind == "line":
        points[:, 1:] *= 1e-3
        points[:, 0] *= 10
    elif kind == "lattice":
        points = (4 * points).floor() / 4
    return points


def _cells(dim, generator):
    box = torch.diag(0.7 + torch.rand(dim, generator=generator, dtype=torch.float64))
    turns = torch.tril(torch.randn(dim, dim, generator=generator, dtype=torch.float64), -1)
    skewed = box + (3 * turns if dim < 3 else turns) @ box
    return [box, skewed]


@pytest.mark.parametrize("dim", [1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["cube", "far point", "two clusters", "coincident", "line", "lattice"])
def test_every_combination_of_periodic_axes(dim, kind):
    generator = torch.Generator().manual_seed(dim)
    points = _points(kind, dim, generator)
    others = torch.cat([points[:2], torch.rand(3, dim, generator=generator, dtype=torch.float64)])
    clouds, query_clouds = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 2])
    r = 0.6 if dim < 4 else 0.45
    for periodic in itertools.product((False, True), repeat=dim):
        box, skewed = _cells(dim, generator)
        repeated = torch.tensor(periodic)[:, None]
        # A vector along which nothing repeats may be anything.
        for cell in (box, torch.where(repeated, skewed, 0.0)):
            _check(points, r, 3, cell=cell, periodic=periodic)
            _check(points, r, 2, cell=cell, periodic=periodic, queries=others)
        cells = torch.stack([box, skewed, 1.5 * box])
        _check(points, r, 2, cell=cells, periodic=periodic, batch=clouds)
        _check(points, r, 2, cell=cells, periodic=periodic, batch=clouds, queries=others, query_batch=query_clouds)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2, 60, 200])
def test_every_shape_with_more_points(name, count):
    points, cell, periodic = shapes(count)[name]
    given = {} if cell is None else {"cell": cell, "periodic": periodic}
    _check(points, 1.68, min(12, count - 1), **given)
    _check(points[: count // 2], 2.5, 1, queries=points[count // 2 : -1], **given)


@pytest.mark.parametrize("turn", [1.0, 37.0, 12345.0])
def test_other_vectors_of_the_same_lattice_have_the_same_neighbours(turn):
    generator = torch.Generator().manual_seed(0)
    points = 3 * torch.rand(30, 3, generator=generator, dtype=torch.float64)
    cell = torch.tensor([[3.0, 0, 0], [0.5, 3, 0], [0, 0.25, 3]], dtype=torch.float64)
    change = torch.tensor([[1.0, 0, 0], [turn, 1, 0], [-turn, 3, 1]], dtype=torch.float64)
    for search in (lambda cell: Graph.radius(points, 1.2, cell=cell), lambda cell: Graph.nearest(points, 7, cell=cell)):
        plain, skewed = search(cell), search(change @ cell)
        rows = [
            sorted(zip(graph.query_index.tolist(), graph.key_index.tolist(), steps.tolist(), strict=True))
            for graph, steps in ((plain, plain.shifts), (skewed, (skewed.shifts.double() @ change).long()))
        ]
        assert rows[0] == rows[1]


def test_clouds_may_have_any_numbers():
    points = torch.rand(12, 3, dtype=torch.float64)
    plain = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    far = torch.tensor([3, 10**12, 2**62])[plain]
    cell = torch.eye(3, dtype=torch.float64)
    for given in ({}, {"cell": cell}):
        for search, reach in ((Graph.radius, 0.6), (Graph.nearest, 3)):
            numbered, sparse = search(points, reach, plain, **given), search(points, reach, far, **given)
            assert torch.equal(numbered.edge_index, sparse.edge_index)


@pytest.mark.parametrize("r", [1e-7, 1e-9, 1e7])
def test_the_unit_of_length_does_not_matter(r):
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = 2.0 ** round(torch.tensor(r).log2().item())
    plain, scaled = Graph.radius(points, 0.3), Graph.radius(points * scale, 0.3 * scale)
    assert torch.equal(plain.edge_index, scaled.edge_index)
    cell = torch.eye(3, dtype=torch.float64)
    plain, scaled = Graph.radius(points, 0.3, cell=cell), Graph.radius(points * scale, 0.3 * scale, cell=cell * scale)
    assert torch.equal(plain.shifts, scaled.shifts)


def test_a_point_too_many_cells_away_is_named():
    points = torch.tensor([[0.0, 0, 0], [1e140, 0, 0]], dtype=torch.float64)
    for search in (Graph.radius, Graph.nearest):
        with pytest.raises(InvalidInputError, match=r"at most 2\*\*53 cells away"):
            search(points, 1, cell=torch.eye(3, dtype=torch.float64))


_HOSTILE = """
import itertools, torch
from anyattention import Graph
from benchmarks.shapes import RADIUS, shapes

def search(points, r, **given):
    edges = Graph.radius(points, r, **given).num_edges, Graph.nearest(points, 4, **given).num_edges
    assert edges[0] >= 0 and edges[1] > 0

for shape in shapes(3000).values():
    given = {} if shape.cell is None else {"cell": shape.cell, "periodic": shape.periodic}
    search(shape.points, RADIUS, **given)
generator = torch.Generator().manual_seed(0)
combinations = list(itertools.product((False, True), repeat=3))
for number in range(160):
    sides = 10.0 ** (9 * torch.rand(3, generator=generator, dtype=torch.float64) - 2)
    count = int(10 ** (1 + 2 * torch.rand((), generator=generator)))
    points = sides * torch.rand(count, 3, generator=generator, dtype=torch.float64)
    points[0] *= 1000.0
    cell = torch.diag(sides.clamp_min(0.1))
    search(points, 1.0, cell=cell, periodic=combinations[number % 8])
    search(points, 1e-8)
# As many points as numbered cells need, in a layer one cell thin.
sheet = torch.rand(40_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([400.0, 400, 0.5]).double()
for given in ({}, {"cell": torch.diag(torch.tensor([400.0, 400, 0.5])).double(), "periodic": (True, True, False)}):
    assert Graph.radius(sheet, 1.0, **given).num_edges > 0
print("survived")
"""


def test_no_shape_ends_the_process():
    done = subprocess.run([sys.executable, "-c", _HOSTILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout == "survived\n"
