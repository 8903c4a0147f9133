"""Energies to forces to training on forces: derivatives against finite differences, and memory linear in the edges."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anyattention import Graph
from anyattention.nn import DistanceAttention, EquivariantAttention

_KINDS = [DistanceAttention, EquivariantAttention]
_SETTINGS = {"all pairs": {}, "radius": {"radius": 2.5}, "range": {"radial_range": 3.0, "radial_basis": "bessel"}}
_F64 = torch.float64


def _module(kind, **settings):
    module = kind(6, 2, dropout=0.0, dtype=_F64, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def _graph(points, radius=2.5):
    apart = (points[:, None] - points).norm(dim=-1)
    return Graph.from_adjacency((apart < radius).to(_F64))


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("over_graph", [False, True])
def test_first_and_second_derivatives(kind, settings, over_graph):
    module = _module(kind, **_SETTINGS[settings])
    x = torch.randn(5, 6, dtype=_F64, requires_grad=True)
    positions = torch.randn(5, 3, dtype=_F64, requires_grad=True)
    graph = _graph(positions.detach()) if over_graph else None

    def call(x, positions):
        if kind is EquivariantAttention:
            return module.equivariant_forward(x, positions, graph=graph)[:3]
        return module(x, positions, graph).output

    assert torch.autograd.gradcheck(call, (x, positions))
    assert torch.autograd.gradgradcheck(call, (x, positions))


@pytest.mark.parametrize("kind", _KINDS)
def test_derivatives_of_parameters_and_vectors(kind):
    module = _module(kind, radius=2.5, num_radial=3)
    x, positions = torch.randn(4, 6, dtype=_F64), torch.randn(4, 3, dtype=_F64, requires_grad=True)
    names, values = zip(*[(n, p.detach().clone().requires_grad_()) for n, p in module.named_parameters()], strict=True)
    extra = () if kind is DistanceAttention else (torch.randn(4, 2, 3, dtype=_F64, requires_grad=True),)
    graph = _graph(positions.detach())

    def call(positions, *values):
        vectors, weights = values[: len(extra)], values[len(extra) :]
        swapped = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(module, swapped, (x, positions, *vectors), {"graph": graph}).output

    assert torch.autograd.gradcheck(call, (positions, *extra, *values))
    assert torch.autograd.gradgradcheck(call, (positions, *extra, *values), fast_mode=True)


def _energy(layers, x, positions, graph):
    vectors = None
    for layer in layers:
        if isinstance(layer, EquivariantAttention):
            x, positions, vectors, _ = layer.equivariant_forward(x, positions, vectors, graph)
        else:
            x = x + layer(x, positions, graph).output
    return x.sin().sum()


@pytest.mark.parametrize("kind", _KINDS)
def test_forces_of_a_stack_are_finite_differences_of_its_energy(kind):
    layers = [_module(kind, radius=2.5) for _ in range(2)]
    x, positions = torch.randn(7, 6, dtype=_F64), torch.randn(7, 3, dtype=_F64, requires_grad=True)
    graph = _graph(positions.detach())
    (gradient,) = torch.autograd.grad(_energy(layers, x, positions, graph), positions)
    step = 1e-5
    for point in range(7):
        for axis in range(3):
            away = torch.zeros(7, 3, dtype=_F64)
            away[point, axis] = step
            with torch.no_grad():
                ahead, behind = (_energy(layers, x, positions + sign * away, graph) for sign in (1, -1))
            assert abs((ahead - behind) / (2 * step) - gradient[point, axis]) < 1e-6
    # No force from outside: they add up to 0, and so do their moments.
    assert gradient.sum(0).abs().max() < 1e-11
    assert torch.linalg.cross(positions.detach(), gradient).sum(0).abs().max() < 1e-11


@pytest.mark.parametrize("kind", _KINDS)
def test_training_on_forces_lowers_their_error(kind):
    torch.manual_seed(2)
    layers = torch.nn.ModuleList(kind(16, 4, radius=2.5, dropout=0.0) for _ in range(2))
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
    x, positions = torch.randn(9, 16), torch.randn(9, 3).requires_grad_()
    graph = _graph(positions.detach().to(_F64))
    apart = (positions[:, None] - positions).square().sum(-1)
    (target,) = torch.autograd.grad(torch.exp(-apart).sum(), positions)
    errors = []
    for _ in range(60):
        (gradient,) = torch.autograd.grad(_energy(layers, x, positions, graph), positions, create_graph=True)
        error = (gradient - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("order", ["first", "second"])
def test_no_edge_keeps_a_channel(kind, order):
    if sys.platform != "linux":
        pytest.skip("peak memory is read from /proc")
    script = Path(__file__).with_name("peak_of_forces.py")
    # The script imports benchmarks, which are not installed.
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    finished = subprocess.run(
        [sys.executable, script, kind.__name__, order], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    # In tensors of one number per edge and head: one of edges x heads x channels would be 128 of them.
    assert float(finished.stdout) < (32 if order == "first" else 64)
