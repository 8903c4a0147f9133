"""Neighbour lists against brute force, on random points, cells and settings."""

import dataclasses

import numpy as np
import pytest
import torch

from anyattention import Graph
from anyattention.geometry.neighbours import radius_neighbours
from neighbour_oracle import brute_force, first_k


def _layout(random, kind, count, dim):
    """Points in about a unit box."""
    if kind == "random":
        return random.random((count, dim))
    if kind == "lattice":  # many ties, many distances exactly r, some points twice
        return random.integers(0, 4, (count, dim)) * 0.25
    if kind == "coincident":
        return np.repeat(random.random((1, dim)), count, axis=0)
    if kind == "clustered":
        return np.repeat(random.random((1, dim)), count, axis=0) + random.normal(0, 1e-3, (count, dim))
    return random.normal(0, 3 if dim < 3 else 1, (count, dim))  # far outside of the cell


def _cell(random, kind, dim):
    if kind == "box":
        return np.diag(random.choice([0.5, 1.0, 1.5], dim))
    if kind == "triclinic":
        return np.tril(random.uniform(-0.6, 0.6, (dim, dim)), -1) + np.diag(random.uniform(0.6, 1.4, dim))
    # Any orientation, either handedness, strongly skewed.
    while True:
        cell = random.normal(0, 0.7, (dim, dim))
        if np.linalg.cond(cell) < 30:
            return cell


@dataclasses.dataclass
class Case:
    positions: torch.Tensor
    settings: dict
    r: float
    k: int

    def oracle(self, reach):
        settings = self.settings
        return brute_force(
            self.positions.double().numpy(),
            None if settings["queries"] is None else settings["queries"].double().numpy(),
            key_cloud=settings["batch"],
            query_cloud=settings["query_batch"],
            cell=None if settings["cell"] is None else settings["cell"].double().numpy(),
            periodic=settings["periodic"],
            reach=reach,
        )


def _case(seed):
    random = np.random.default_rng(seed)
    dim = int(random.choice([1, 2, 3, 3, 3, 4]))
    dtype = torch.float32 if random.random() < 0.3 else torch.float64
    has_cell = random.random() < 0.6
    kind = str(random.choice(["random", "lattice", "coincident", "clustered", "spread"]))
    counts = [int(random.integers(0, 9)) for _ in range(int(random.choice([1, 1, 2, 4])))]
    has_batch = len(counts) > 1 or random.random() < 0.2
    if not has_batch:
        counts = [int(random.choice([0, 1, 2, 5, 13, 24]))]
    if has_cell and dim > 2:
        counts = [min(count, 7) for count in counts]

    def points(sizes):
        parts = [_layout(random, kind, size, dim) for size in sizes]
        cloud = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        return torch.tensor(np.concatenate(parts), dtype=dtype), cloud if has_batch else None

    positions, batch = points(counts)
    queries = query_batch = None
    if random.random() < 0.35:
        queries, query_batch = points([int(random.integers(0, 6)) for _ in counts])
        if len(queries) and len(positions) and random.random() < 0.5:
            queries[0] = positions[0]
    cell = periodic = None
    if has_cell:
        shape = str(random.choice(["box", "triclinic", "any"]))
        if has_batch and random.random() < 0.6:
            cell = np.stack([_cell(random, shape, dim) for _ in counts])
        else:
            cell = _cell(random, shape, dim)
        cell = torch.tensor(cell, dtype=dtype)
        if random.random() < 0.5:
            periodic = tuple(bool(flag) for flag in random.random(dim) < 0.6)
    top = (1.2 if dim < 3 else 0.7) if has_cell else 1.0
    r = float(random.choice([0.25, 0.5, 0.75, top, random.random() + 0.01]))
    if has_cell and dim < 3 and random.random() < 0.3:
        r *= 4  # several boxes
    settings = {"batch": batch, "cell": cell, "periodic": periodic, "queries": queries, "query_batch": query_batch}
    return Case(positions, settings, r, int(random.choice([1, 2, 3, 7, 30])) if dim < 3 else int(random.integers(1, 6)))


def _rows(graph):
    shifts = graph.shifts
    shifts = [None] * graph.num_edges if shifts is None else [tuple(shift) for shift in shifts.tolist()]
    return list(zip(graph.query_index.tolist(), graph.key_index.tolist(), shifts, strict=True))


def _expected(rows, has_shifts):
    return [(int(q), int(k), tuple(int(s) for s in shift) if has_shifts else None) for q, k, shift, _ in rows]


def _check_arrays(graph):
    """The compressed rows are those of the edge list."""
    again = Graph.from_edge_index(
        graph.edge_index, num_queries=graph.num_queries, num_keys=graph.num_keys, shifts=graph.shifts
    )
    again = dataclasses.replace(again, search_radius=graph.search_radius)
    for field in dataclasses.fields(graph):
        ours, theirs = getattr(graph, field.name), getattr(again, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, field.name


@pytest.mark.parametrize("k", [1, 4, 5, 11, 40])
@pytest.mark.parametrize("periodic", [None, (False, False), (True, False), (True, True)])
@pytest.mark.parametrize("others", [False, True])
def test_nearest_of_points_that_coincide(k, periodic, others):
    """Five at each place, some of them a vector of the cell away, in two clouds that have places in common."""
    random = np.random.default_rng(k)
    places = torch.tensor(random.integers(0, 8, (6, 2)) / 8)
    points = torch.cat([places.repeat(5, 1), places[:3].repeat(2, 1)])
    batch = torch.arange(len(points)) // 30
    cell = None if periodic is None else torch.tensor([[1.0, 0.0], [0.25, 1.0]], dtype=torch.float64)
    if periodic == (True, True):
        points[::7] += cell[0]
    queries = torch.cat([points[:20:2], points[:20:2], points[31:34]]) if others else None
    query_batch = torch.tensor([0] * 20 + [1] * 3) if others else None
    graph = Graph.nearest(points, k, batch, cell=cell, periodic=periodic, queries=queries, query_batch=query_batch)
    rows = brute_force(
        points,
        queries,
        key_cloud=batch,
        query_cloud=query_batch,
        cell=None if cell is None else cell.numpy(),
        periodic=(False, False) if periodic is None else periodic,
        reach=100.0 if not periodic or not any(periodic) else 6.0,
    )
    is_equal = _rows(graph) == _expected(first_k(rows, k), cell is not None)
    assert is_equal
    _check_arrays(graph)


def _check_radius(seed):
    case = _case(seed)
    graph = Graph.radius(case.positions, case.r, **case.settings)
    r = float(torch.tensor(case.r, dtype=case.positions.dtype))
    rows = case.oracle(r)
    is_equal = _rows(graph) == _expected(rows, case.settings["cell"] is not None)
    assert is_equal, f"seed {seed}"  # printing the difference of thousands of rows takes minutes
    _check_arrays(graph)
    if case.settings["queries"] is None:
        back = {(k, q, s and tuple(-x for x in s)) for q, k, s in _rows(graph)}
        is_symmetric = back == set(_rows(graph))
        assert is_symmetric, f"seed {seed}"
    return len(rows)


def _check_nearest(seed):
    case = _case(seed)
    graph = Graph.nearest(case.positions, case.k, **case.settings)
    reach = 1.0
    while True:  # until all have k, or all there are
        rows = case.oracle(reach)
        # A neighbour at the very reach may hide an equal one with a lower index only beyond rounding.
        counts = np.bincount([row[0] for row in rows], minlength=graph.num_queries)
        wanted = graph.query_offsets.diff().numpy()
        if (counts >= wanted).all() and reach >= 1.0:
            break
        reach *= 1.5
    assert _rows(graph) == _expected(first_k(rows, case.k), case.settings["cell"] is not None), f"seed {seed}"
    _check_arrays(graph)
    _check_counts(case, wanted)


def _check_counts(case, wanted):
    """k each, or all other points of the cloud where nothing repeats."""
    settings = case.settings
    batch = settings["batch"]
    clouds = torch.zeros(len(case.positions), dtype=torch.int64) if batch is None else batch
    own = settings["query_batch"] if settings["queries"] is not None else batch
    if own is None:
        own = torch.zeros(len(wanted), dtype=torch.int64)
    there = torch.tensor([int((clouds == cloud).sum()) for cloud in own])
    repeats = settings["cell"] is not None and (settings["periodic"] is None or any(settings["periodic"]))
    if repeats:
        expected = torch.where(there > 0, case.k, 0)
    else:
        expected = (there - int(settings["queries"] is None)).clamp(max=case.k)
    assert wanted.tolist() == expected.tolist()


@pytest.mark.parametrize("part", range(10))
def test_radius_is_brute_force(part):
    edges = sum(_check_radius(seed) for seed in range(70 * part, 70 * part + 70))
    assert edges > 1000


@pytest.mark.parametrize("part", range(10))
def test_nearest_is_brute_force(part):
    for seed in range(10_000 + 50 * part, 10_000 + 50 * part + 50):
        _check_nearest(seed)


@pytest.mark.parametrize("fault", ["boundary", "lost image", "self pair", "order"])
def test_brute_force_catches_a_planted_fault(monkeypatch, fault):

    def faulty(positions, r, *arguments):
        r = r * (1 - 1e-12) if fault == "boundary" else r
        found = radius_neighbours(positions, r, *arguments)
        edges = found.edge_index
        if fault == "lost image" and found.shifts is not None:
            found = found._replace(shifts=found.shifts.clamp(-1, 1))
        elif fault == "self pair" and edges.shape[1]:
            edges[0, 0] = edges[1, 0]
        elif fault == "order" and edges.shape[1] > 1:
            edges[0, :2] = edges[0, :2].flip(0)
        return found

    monkeypatch.setattr("anyattention.patterns.points.radius_neighbours", faulty)
    failures = 0
    for seed in range(40):
        try:
            _check_radius(seed)
        except AssertionError:
            failures += 1
    assert failures
