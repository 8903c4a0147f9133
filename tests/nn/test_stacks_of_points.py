"""Layers one after the other on the same graph: the energy is smooth as a pair crosses the radius."""

import torch

from anyattention import Graph
from anyattention.nn import EquivariantAttention

RADIUS = 1.5


def energy(layers: list[EquivariantAttention], distance: float, handed_on: str) -> float:
    """Of a pair that a third point holds together."""
    positions = torch.tensor([[0.0, 0, 0], [0.7, 0.6, 0.3], [distance, 0, 0]], dtype=torch.float64)
    features = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8)
    graph = Graph.radius(positions, RADIUS).with_self_loops()
    place, vectors = positions, None
    for layer in layers:
        features, moved, vectors, _ = layer.equivariant_forward(features, place, vectors, graph=graph)
        place = moved if handed_on == "moved positions" else positions
    return float(features.square().sum())


def jump(seed: int, handed_on: str) -> float:
    torch.manual_seed(seed)
    layers = [EquivariantAttention(8, 2, radius=RADIUS, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        return abs(energy(layers, RADIUS - 1e-9, handed_on) - energy(layers, RADIUS + 1e-9, handed_on))


def test_an_energy_from_the_first_positions_does_not_jump() -> None:
    assert max(jump(seed, "first positions") for seed in range(5)) < 1e-6
    # The case tells the two apart.
    assert max(jump(seed, "moved positions") for seed in range(5)) > 1e-3
