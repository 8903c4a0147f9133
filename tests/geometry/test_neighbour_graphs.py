"""What Graph.radius and Graph.nearest promise beside the pairs themselves: limits, displacements, order, errors."""

import itertools
import math
import sys

import pytest
import torch

from anyattention import Graph, attend
from anyattention.errors import MissingExtraError
from anyattention.native import load


def pairs(graph):
    return sorted(zip(graph.query_index.tolist(), graph.key_index.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("r", [0.1, 0.3, 1.7, 1e-3])
def test_a_distance_of_exactly_r_is_in_and_the_next_one_is_not(dtype, r):
    at = torch.tensor(r, dtype=dtype)
    beyond = torch.nextafter(at, torch.tensor(math.inf, dtype=dtype))
    for dim, has_batch in itertools.product((1, 2, 3, 4), (False, True)):
        points = torch.zeros(3, dim, dtype=dtype)
        points[1, -1], points[2, 0] = at, -beyond
        batch = torch.zeros(3, dtype=torch.int64) if has_batch else None
        assert pairs(Graph.radius(points, r, batch)) == [(0, 1), (1, 0)]


def test_a_lattice_has_all_its_neighbours_at_exactly_r():
    steps = torch.arange(8.0)
    points = torch.cartesian_prod(steps, steps, steps)
    graph = Graph.radius(points, 1.0, cell=8 * torch.eye(3))
    assert graph.query_offsets.diff().tolist() == [6] * 512
    lengths = graph.displacements(points, 8 * torch.eye(3)).norm(dim=1)
    assert torch.equal(lengths, torch.ones(512 * 6))


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_no_points_one_point_and_coincident_points(dim):
    for search in (lambda x, **more: Graph.radius(x, 1.0, **more), lambda x, **more: Graph.nearest(x, 2, **more)):
        assert search(torch.empty(0, dim)).edge_index.shape == (2, 0)
        assert search(torch.empty(0, dim), cell=torch.eye(dim)).shifts.shape == (0, dim)
        assert search(torch.ones(1, dim)).num_edges == 0
        assert search(torch.ones(3, dim), queries=torch.empty(0, dim)).num_queries == 0
        assert search(torch.empty(0, dim), queries=torch.ones(3, dim)).query_offsets.tolist() == [0] * 4
    same = torch.full((5, dim), 0.7)
    assert Graph.radius(same, 1e-3).num_edges == 20
    # Ties go to the lower index, and a point is not its own neighbour.
    assert pairs(Graph.nearest(same, 2)) == [
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 2),
        *[(q, k) for q in (2, 3, 4) for k in (0, 1)],
    ]


def test_many_coincident_points_do_not_take_all_pairs():
    points = torch.cat([torch.zeros(20_000, 3), torch.ones(3, 3)])
    graph = Graph.nearest(points, 4)
    assert graph.query_offsets.diff().tolist() == [4] * 20_003
    assert graph.key_index[-4:].tolist() == [0, 1, 20_000, 20_001]
    assert set(graph.key_index[: 4 * 20_000].tolist()) == set(range(5))


def test_more_neighbours_than_points():
    points = torch.rand(7, 3)
    assert Graph.nearest(points, 100).num_edges == 42
    batch = torch.tensor([0, 0, 0, 2, 2, 5, 7])
    assert Graph.nearest(points, 100, batch).query_offsets.diff().tolist() == [2, 2, 2, 1, 1, 0, 0]


def test_one_point_sees_its_own_images():
    graph = Graph.radius(torch.tensor([[0.3, 0.4]]), 1.0, cell=torch.eye(2))
    assert graph.shifts.tolist() == [[-1, 0], [0, -1], [0, 1], [1, 0]]
    assert pairs(graph) == [(0, 0)] * 4
    assert Graph.radius(torch.tensor([[0.3, 0.4]]), 1.0, cell=torch.eye(2), periodic=(False, True)).shifts.tolist() == [
        [0, -1],
        [0, 1],
    ]


def test_a_direction_that_does_not_repeat_needs_no_vector():
    cell = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    points = torch.tensor([[0.1, 0.0, 0.0], [1.9, 0.0, 50.0], [1.9, 0.0, 0.0]])
    graph = Graph.radius(points, 0.5, cell=cell, periodic=(True, True, False))
    assert graph.shifts.tolist() == [[-1, 0, 0], [1, 0, 0]]
    assert pairs(graph) == [(0, 2), (2, 0)]


def test_points_far_apart_and_far_from_the_origin():
    points = torch.tensor(
        [[0.0, 0, 0], [0.5, 0, 0], [1e12, 0, 0], [1e12 + 0.5, 0, 0], [1e140, 1e140, 0]], dtype=torch.float64
    )
    assert pairs(Graph.radius(points, 1.0)) == [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert pairs(Graph.radius(points[2:4] + 3e12, 0.5)) == [(0, 1), (1, 0)]
    assert pairs(Graph.nearest(points, 1))[:4] == [(0, 1), (1, 0), (2, 3), (3, 2)]
    moved = points[:2] + torch.tensor([[4000.0, 0, 0], [-3000.0, 0, 0]])
    graph = Graph.radius(moved, 0.6, cell=torch.eye(3).double() * 5)
    assert graph.shifts.tolist() == [[1400, 0, 0], [-1400, 0, 0]]


def test_the_cap_reports_and_cuts_nothing():
    points = torch.rand(50, 3)
    graph = Graph.radius(points, 0.5)
    most = int(graph.query_offsets.diff().max())
    assert torch.equal(Graph.radius(points, 0.5, max_neighbours=most).edge_index, graph.edge_index)
    with pytest.raises(ValueError, match=rf"at most {most - 1} neighbours for each query, got {most} for query"):
        Graph.radius(points, 0.5, max_neighbours=most - 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_missing_kernels_do_not_change_the_graph(monkeypatch, threads):
    points = torch.rand(30_000, 3)
    expected = Graph.radius(points, 0.05), Graph.nearest(points, 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(load, "library", lambda: None)
    for graph, again in zip(expected, (Graph.radius(points, 0.05), Graph.nearest(points, 5)), strict=True):
        assert torch.equal(graph.edge_index, again.edge_index)
        assert torch.equal(graph.edges_by_key, again.edges_by_key)


def test_displacements_reach_positions_and_cell():
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    cell = (torch.eye(3) + 0.2 * torch.rand(3, 3, generator=generator)).double().requires_grad_()
    graph = Graph.radius(points, 0.8, cell=cell)
    assert graph.num_edges > 20
    assert graph.shifts.abs().max() > 0

    def energy(points, cell):
        return (graph.displacements(points, cell).square().sum(1) + 0.1).log().sum()

    assert graph.displacements(points, cell).norm(dim=1).max() <= 0.8
    torch.autograd.gradcheck(energy, (points, cell))
    torch.autograd.gradgradcheck(energy, (points, cell))
    # Moving all points alike changes nothing: forces add up to zero.
    (forces,) = torch.autograd.grad(energy(points, cell), points)
    assert forces.sum(0).abs().max() < 1e-10


def test_stress_is_the_derivative_under_strain():
    points, cell = torch.rand(5, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    graph = Graph.radius(points, 0.9, cell=cell)

    def energy(strain):
        stretch = torch.eye(3, dtype=torch.float64) + strain
        return graph.displacements(points @ stretch, cell @ stretch).square().sum(1).add(0.1).log().sum()

    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    (stress,) = torch.autograd.grad(energy(strain), strain)
    for row, column in itertools.product(range(3), range(3)):
        step = torch.zeros(3, 3, dtype=torch.float64)
        step[row, column] = 1e-6
        assert math.isclose(float(energy(step) - energy(-step)) / 2e-6, float(stress[row, column]), abs_tol=1e-6)


def test_displacements_of_clouds_and_of_other_queries():
    points, queries = torch.rand(7, 2), torch.rand(4, 2)
    batch, query_batch = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    cell = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    graph = Graph.radius(points, 0.9, batch, cell=cell, queries=queries, query_batch=query_batch)
    found = graph.displacements(points, cell, queries=queries, batch=batch)
    number = query_batch[graph.query_index]
    for edge, (key, query) in enumerate(graph.edge_index.T.tolist()):
        expected = points[key] - queries[query] + graph.shifts[edge].float() @ cell[number[edge]]
        torch.testing.assert_close(found[edge], expected)
    assert found.norm(dim=1).max() <= 0.9 + 1e-6
    plain = Graph.nearest(points, 2, queries=queries)
    assert torch.equal(
        plain.displacements(points, queries=queries), points[plain.key_index] - queries[plain.query_index]
    )


def test_shifts_stay_with_their_edges():
    periodic = Graph.radius(torch.rand(4, 2), 0.7, cell=torch.eye(2))
    plain = Graph.radius(torch.rand(3, 2), 0.7)
    joined = Graph.batch([plain, periodic])
    assert torch.equal(joined.shifts[plain.num_edges :], periodic.shifts)
    assert not joined.shifts[: plain.num_edges].any()
    looped = periodic.with_self_loops()
    assert looped.num_edges == periodic.num_edges + 4
    assert torch.equal(looped.shifts, torch.cat([periodic.shifts, torch.zeros(4, 2, dtype=torch.int64)]))
    assert looped.with_self_loops().num_edges == looped.num_edges
    assert periodic.to("meta").shifts.device.type == "meta"


def test_attention_over_neighbours_is_that_over_their_edges():
    points = torch.rand(40, 3)
    graph = Graph.radius(points, 0.4)
    x = torch.randn(40, 2, 4)
    again = Graph.from_edge_index(graph.edge_index, 40)
    assert torch.equal(attend(x, x, x, graph).output, attend(x, x, x, again).output)


@pytest.mark.parametrize("library", ["vesin", "scipy.spatial"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    search = Graph.radius if library == "vesin" else Graph.nearest
    with pytest.raises(MissingExtraError, match=r"need vesin and scipy: pip install 'anyattention\[geometry\]'"):
        search(torch.rand(3, 3), 1)


def test_memory_is_asked_for_first():
    points, cell = torch.rand(2, 3), 1e-5 * torch.eye(3)
    with pytest.raises(MemoryError, match="periodic images would take"):
        Graph.radius(points, 1.0, queries=points, cell=cell)
    with pytest.raises(MemoryError, match="pairs of neighbours would take"):
        Graph.radius(points, 1.0, cell=cell)
