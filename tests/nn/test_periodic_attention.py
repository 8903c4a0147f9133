"""Attention between points in periodic cells: against explicit images; forces, stress, lattice vectors, bad input."""

import math

import pytest
import torch

from anyattention import Graph
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError, MatrixOperationError
from anyattention.nn import DistanceAttention, EquivariantAttention

_KINDS = [DistanceAttention, EquivariantAttention]
_SETTINGS = {
    "radius": {"radius": 1.4, "num_radial": 3},
    "range": {"radial_range": 2.0, "radial_basis": "bessel", "num_radial": 3},
    "neither": {},
}
_F64 = torch.float64
_RADIUS = 1.4
# Skewed, and shorter than the radius along one vector, so that a point sees images of itself.
_CELL = torch.tensor([[2.1, 0.0, 0.0], [0.4, 1.9, 0.0], [-0.3, 0.5, 1.2]], dtype=_F64)


def _module(kind, **settings):
    settings.setdefault("dtype", _F64)
    module = kind(6, 2, dropout=0.0, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def _points(count=5, dtype=_F64):
    return torch.randn(count, 6, dtype=dtype), torch.rand(count, 3, dtype=dtype) @ _CELL.to(dtype)


def _graph(positions, cell=_CELL, **settings):
    return Graph.radius(positions.detach(), _RADIUS, cell=cell.detach(), **settings).with_self_loops()


def _call(module, x, positions, graph, cell=None, **settings):
    """Every result but the weights."""
    if isinstance(module, EquivariantAttention):
        return module.equivariant_forward(x, positions, graph=graph, cell=cell, **settings)[:3]
    return (module(x, positions, graph, cell=cell, **settings).output,)


def _energy(module, x, positions, graph, cell):
    """Of two layers, the second on what comes out of the first."""
    if isinstance(module, EquivariantAttention):
        x, positions, vectors, _ = module.equivariant_forward(x, positions, graph=graph, cell=cell)
        x = module(x, positions, vectors, graph, cell=cell).output
    else:
        x = x + module(x, positions, graph, cell=cell).output
        x = module(x, positions, graph, cell=cell).output
    return x.sin().sum()


def _close(results, others, **settings):
    for one, other in zip(results, others, strict=True):
        torch.testing.assert_close(one, other, **settings)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("periodic", [(True, True, True), (True, False, True)], ids=str)
def test_images_are_points_of_a_supercell(kind, settings, periodic):
    module = _module(kind, **_SETTINGS[settings])
    x, p = _points()
    graph = _graph(p, periodic=periodic)
    results = _call(module, x, p, graph, _CELL)
    # Every point in the middle of copies that reach further than the radius, and nothing periodic.
    reach = [range(-2, 3) if repeats else range(1) for repeats in periodic]
    shifts = torch.cartesian_prod(*[torch.tensor(list(each)) for each in reach]).to(_F64)
    middle = int((shifts == 0).all(1).nonzero())
    copies = (p + (shifts @ _CELL)[:, None]).flatten(0, 1)
    apart = (copies[:, None] - copies).norm(dim=-1)
    own = torch.arange(5) + 5 * middle
    pairs = (apart[own] <= _RADIUS).nonzero()
    explicit = Graph.from_edge_index(torch.stack([pairs[:, 1], own[pairs[:, 0]]]), num_nodes=len(copies))
    assert explicit.num_edges == graph.num_edges > 5 * 5
    expected = _call(module, x.repeat(len(shifts), 1), copies, explicit)
    _close(results, [each[own] for each in expected])


@pytest.mark.parametrize("kind", _KINDS)
def test_the_radius_finds_the_images_itself(kind):
    module = _module(kind, radius=_RADIUS)
    x, p = _points()
    output, weights = module.distance_attention(p, x, _RADIUS, cell=_CELL)
    expected = module(x, p, graph=_graph(p), cell=_CELL, return_weights=True)
    torch.testing.assert_close(output, expected.output)
    summed = torch.zeros(5, 5, dtype=_F64).index_put(
        tuple(_graph(p).edge_index.flip(0)), expected.weights, accumulate=True
    )
    assert weights.is_coalesced()
    torch.testing.assert_close(weights.to_dense(), summed)
    # Two clouds with a cell of their own, as a batch and as one graph.
    cells = torch.stack([_CELL, 1.3 * _CELL])
    both = module.distance_attention(p.expand(2, -1, -1), x.expand(2, -1, -1), _RADIUS, cell=cells)
    torch.testing.assert_close(both.output[0], output)
    torch.testing.assert_close(both.output[1], module.distance_attention(p, x, _RADIUS, cell=cells[1]).output)
    joined = Graph.batch([_graph(p, cell) for cell in cells])
    batch = torch.arange(2).repeat_interleave(5)
    flat = module(x.repeat(2, 1), p.repeat(2, 1), graph=joined, cell=cells, batch=batch).output
    torch.testing.assert_close(flat, both.output.flatten(0, 1))
    slab = (True, True, False)
    output = module.distance_attention(p, x, _RADIUS, cell=_CELL, periodic=slab).output
    torch.testing.assert_close(output, module(x, p, graph=_graph(p, periodic=slab), cell=_CELL).output)


@pytest.mark.parametrize("kind", _KINDS)
def test_many_positions_over_one_graph(kind):
    module = _module(kind, radius=_RADIUS)
    x, p = _points()
    graph = _graph(p)
    x, p = torch.stack([x, x.flip(0)]), torch.stack([p, p + 0.1 * torch.randn_like(p)])
    whole = _call(module, x, p, graph, _CELL)
    parts = [_call(module, x[n], p[n], graph, _CELL) for n in range(2)]
    _close(whole, [torch.stack(each) for each in zip(*parts, strict=True)])


@pytest.mark.parametrize("kind", _KINDS)
def test_lattice_vectors_change_nothing(kind):
    module = _module(kind, radius=_RADIUS)
    x, p = _points()
    results = _call(module, x, p, _graph(p), _CELL)
    wrapped = p + 0.7
    fractions = wrapped @ torch.linalg.inv(_CELL)
    inside = (fractions - fractions.floor()) @ _CELL
    moved = p + torch.randint(-3, 4, (5, 3)).to(_F64) @ _CELL
    for places in (inside, moved):
        others = _call(module, x, places, _graph(places), _CELL)
        torch.testing.assert_close(others[0], results[0])
        if kind is EquivariantAttention:
            torch.testing.assert_close(others[1] - places, results[1] - p)
            torch.testing.assert_close(others[2], results[2])
    # Another cell of the same lattice.
    sheared = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, -2.0, 1.0]], dtype=_F64) @ _CELL
    _close(_call(module, x, p, _graph(p, sheared), sheared), results)


@pytest.mark.parametrize("kind", _KINDS)
def test_turned_with_the_cell_nothing_changes(kind):
    module = _module(kind, radius=_RADIUS)
    x, p = _points()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=_F64))[0]
    results = _call(module, x, p, _graph(p), _CELL)
    turned = _call(module, x, p @ turn, _graph(p @ turn, _CELL @ turn), _CELL @ turn)
    torch.testing.assert_close(turned[0], results[0])
    for one, other in zip(turned[1:], results[1:], strict=True):
        torch.testing.assert_close(one, other @ turn)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
def test_first_and_second_derivatives_of_positions_and_cell(kind, settings):
    module = _module(kind, **_SETTINGS[settings])
    x, p = _points(3)
    graph = _graph(p)
    inputs = [t.clone().requires_grad_() for t in (x, p, _CELL)]
    assert torch.autograd.gradcheck(lambda x, p, cell: _call(module, x, p, graph, cell), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, p, cell: _call(module, x, p, graph, cell), inputs, fast_mode=True)


@pytest.mark.parametrize("kind", _KINDS)
def test_forces_and_stress_are_finite_differences_of_the_energy(kind):
    module = _module(kind, radius=_RADIUS)
    x, p = _points()
    graph = _graph(p)
    strain = torch.zeros(3, 3, dtype=_F64, requires_grad=True)
    places = p.clone().requires_grad_()

    def strained(strain, places):
        stretch = torch.eye(3, dtype=_F64) + strain
        return _energy(module, x, places @ stretch, graph, _CELL @ stretch)

    by_strain, by_places = torch.autograd.grad(strained(strain, places), [strain, places])
    step = 2e-6
    for gradient, which in ((by_strain, 0), (by_places, 1)):
        for row in range(len(gradient)):
            for column in range(3):
                away = torch.zeros_like(gradient)
                away[row, column] = step
                moves = [(strain + s * away, p) if which == 0 else (strain, p + s * away) for s in (1, -1)]
                with torch.no_grad():
                    ahead, behind = (strained(*each) for each in moves)
                assert abs((ahead - behind) / (2 * step) - gradient[row, column]) < 1e-6
    # Turning positions and cell costs nothing, so the stress is symmetric; no force comes from outside.
    torch.testing.assert_close(by_strain, by_strain.T)
    assert by_places.sum(0).abs().max() < 1e-11


@pytest.mark.parametrize("kind", _KINDS)
def test_low_precision_autocast_and_compile(kind):
    module = _module(kind, radius=_RADIUS, dtype=torch.float32)
    x, p = _points(dtype=torch.float32)
    graph, cell = _graph(p, _CELL.float()), _CELL.float()
    expected = _call(module, x, p, graph, cell)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, p: _call(module, x, p, graph, cell), fullgraph=True, backend="eager")
    _close(compiled(x, p), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _close([each.float() for each in _call(module, x, p, graph, cell)], expected, rtol=0.1, atol=0.1)
    rounded = [each.bfloat16() for each in (x, p, cell)]
    low = _call(module.bfloat16(), *rounded[:2], graph, rounded[2])
    assert all(each.dtype == torch.bfloat16 for each in low)
    wide = [each.double() for each in rounded]
    _close([each.double() for each in low], _call(module.double(), *wide[:2], graph, wide[2]), rtol=0.02, atol=0.02)


def _bad(match, error, call):
    return pytest.param(match, error, call, id=match[:40])


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize(
    ("match", "error", "call"),
    [
        _bad("cell: expected the cell that the graph's shifts count, got None", InvalidInputError,
             lambda m, x, p: m(x, p, graph=_graph(p))),
        _bad("cell: expected None without a graph, whose shifts count it, got a tensor", InvalidInputError,
             lambda m, x, p: m(x, p, cell=_CELL)),
        _bad("cell: expected None, as the graph has no shifts, got a tensor", InvalidInputError,
             lambda m, x, p: m(x, p, graph=torch.zeros(2, 1).long(), cell=_CELL)),
        _bad(r"cell: expected \(3, 3\) or \(clouds, 3, 3\), got \(3\,\)", DimensionMismatchError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=_CELL[0])),
        _bad(r"cell: expected \(3, 3\) or \(clouds, 3, 3\), got \(2, 2\)", DimensionMismatchError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=_CELL[:2, :2])),
        _bad("cell: expected torch.float64, as the parameters, got torch.float32", InvalidInputError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=_CELL.float())),
        _bad("cell: expected a floating-point dtype", InvalidInputError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=_CELL.long())),
        _bad("cell: expected a torch.Tensor, got list", InvalidInputError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=_CELL.tolist())),
        _bad("cell: expected finite coordinates, got 9 NaN or Inf among 9", InvalidInputError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=_CELL * math.nan)),
        _bad("batch: expected None unless there is a cell for each cloud", InvalidInputError,
             lambda m, x, p: m(x, p, batch=torch.zeros(5).long())),
        _bad("it is the graph that keeps clouds apart, got a batch", InvalidInputError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=_CELL, batch=torch.zeros(5).long())),
        _bad("batch: expected the cloud of each of positions, as there is a cell for each", InvalidInputError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=torch.stack([_CELL, _CELL]))),
        _bad(r"batch: expected \(5,\), a cloud for each of positions, got \(4,\)", DimensionMismatchError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=torch.stack([_CELL] * 2), batch=torch.zeros(4).long())),
        _bad("batch: expected clouds from 0 to 1, as cell has", GraphStructureError,
             lambda m, x, p: m(x, p, graph=_graph(p), cell=torch.stack([_CELL] * 2), batch=torch.full((5,), 2))),
        _bad(r"positions: expected \(points, dim=2\), as the graph's shifts", DimensionMismatchError,
             lambda m, x, p: m(x, p, graph=_graph(p[:, :2], _CELL[:2, :2]), cell=_CELL)),
        _bad("cell: expected vectors that repeat to point in independent directions", MatrixOperationError,
             lambda m, x, p: m.distance_attention(p, x, 1.0, cell=torch.ones(3, 3, dtype=_F64))),
        _bad("cell: expected a cell, as periodic is given", InvalidInputError,
             lambda m, x, p: m.distance_attention(p, x, 1.0, periodic=True)),
        _bad(r"cell: expected \(3, 3\), one vector in each row, got \(3,\)", DimensionMismatchError,
             lambda m, x, p: m.distance_attention(p, x, 1.0, cell=_CELL[0])),
        _bad("cell: expected finite numbers, got NaN", InvalidInputError,
             lambda m, x, p: m.distance_attention(p, x, 1.0, cell=_CELL * math.nan)),
    ],
)  # fmt: skip
def test_bad_input(kind, match, error, call):
    with pytest.raises(error, match=match):
        call(_module(kind, radius=_RADIUS), *_points())
