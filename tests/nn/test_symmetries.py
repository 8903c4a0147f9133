"""What geometric modules claim of symmetry holds: over all pairs and graphs, with every basis, in 1 to 5 dimensions."""

import pytest
import torch

from anyattention.nn import DistanceAttention, EquivariantAttention
from anyattention.testing import assert_equivariant
from cases import random_graph

_SETTINGS = {
    "all pairs": {},
    "radius": {"radius": 2.0},
    "bessel": {"radius": 2.0, "radial_basis": "bessel", "num_radial": 5},
    "range": {"radial_range": 3.0, "num_radial": 7, "scale": 0.3, "use_bias": False},
}


def _randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module.eval()


def _inputs(module, points=11):
    dtype = module.distance_decay.dtype
    x, positions = torch.randn(points, 12, dtype=dtype), torch.randn(points, module.geometric_dim, dtype=dtype)
    return x, positions


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("settings", _SETTINGS)
def test_distance_attention_is_invariant(settings, dim, dtype):
    module = _randomized(DistanceAttention(12, 3, geometric_dim=dim, dtype=dtype, **_SETTINGS[settings]))
    assert module.is_rotation_equivariant
    assert module.is_translation_invariant
    kinds = {"takes": ["scalar", "position"], "returns": ["scalar"]}
    inputs = _inputs(module)
    draws = 100 if dim == 3 else 15
    assert_equivariant(lambda x, p: module(x, p).output, inputs, draws=draws, **kinds)
    assert_equivariant(lambda x, p: module.distance_attention(p, x, 1.5).output, inputs, draws=10, **kinds)
    assert_equivariant(lambda x, p: module.geometric_forward(p, p, x).output, inputs, draws=10, **kinds)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("settings", _SETTINGS)
def test_equivariant_attention_is_equivariant(settings, dim, dtype):
    module = EquivariantAttention(12, 3, geometric_dim=dim, vector_channels=6, dtype=dtype, **_SETTINGS[settings])
    module = _randomized(module)
    assert module.is_rotation_equivariant
    assert module.is_translation_invariant
    inputs = (*_inputs(module), torch.randn(11, 6, dim, dtype=dtype))
    kinds = {"takes": ["scalar", "position", "vector"], "returns": ["scalar", "position", "vector"]}
    draws = 100 if dim == 3 else 15
    assert_equivariant(lambda *inputs: module.equivariant_forward(*inputs)[:3], inputs, draws=draws, **kinds)
    kinds = {"takes": ["scalar", "position"], "returns": ["scalar"]}
    assert_equivariant(lambda x, p: module.distance_attention(p, x, 1.5).output, inputs[:2], draws=10, **kinds)
    assert_equivariant(lambda x, p: module.geometric_forward(p, p, x).output, inputs[:2], draws=10, **kinds)


@pytest.mark.parametrize("kind", [DistanceAttention, EquivariantAttention])
@pytest.mark.parametrize("settings", _SETTINGS)
def test_over_a_graph(kind, settings):
    module = _randomized(kind(12, 3, dtype=torch.float64, **_SETTINGS[settings]))
    graph = random_graph(11, 11, 40)

    def call(x, p):
        result = getattr(module, "equivariant_forward", module)(x, p, graph=graph)
        return result[:3] if kind is EquivariantAttention else result.output

    returns = ["scalar", "position", "vector"] if kind is EquivariantAttention else ["scalar"]
    symmetries = ["rotation", "reflection", "translation"]
    settings = {"takes": ["scalar", "position"], "returns": returns, "symmetries": symmetries}
    assert_equivariant(call, _inputs(module), **settings)


def test_forces_turn_with_the_points():
    module = _randomized(EquivariantAttention(12, 3, radius=2.5, dtype=torch.float64))

    def forces(x, positions):
        positions = positions.requires_grad_()
        energy = module(x, positions).output.sin().sum()
        return energy.detach(), -torch.autograd.grad(energy, positions)[0]

    x, positions = _inputs(module)
    kinds = {"takes": ["scalar", "position"], "returns": ["total", "vector"]}
    assert_equivariant(lambda x, p: forces(x, p.detach()), [x, positions], draws=10, **kinds)


@pytest.mark.parametrize("kind", [DistanceAttention, EquivariantAttention])
def test_a_planted_fault_is_caught(kind, monkeypatch):
    module = _randomized(kind(12, 3, dtype=torch.float64, radius=2.5))
    home = __import__(kind.__module__, fromlist=["displacements"])
    whole = home.displacements

    def skewed(*arguments):
        return whole(*arguments) * torch.tensor([1.0, 1.0, 1.0 + 1e-7], dtype=torch.float64)

    monkeypatch.setattr(home, "displacements", skewed)
    kinds = {"takes": ["scalar", "position"], "returns": ["scalar"]}
    with pytest.raises(AssertionError, match="rotation: result 0"):
        assert_equivariant(lambda x, p: module(x, p).output, _inputs(module), **kinds)
