"""Our contestant: where particles will be, from their charges, positions and velocities."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from anyattention import Graph
from anyattention.nn import EquivariantAttention

__all__ = ["AttentionDynamics"]


class AttentionDynamics(nn.Module):
    """A stack of `EquivariantAttention`, each layer followed by a network of two layers on the features.

    Every particle attends to all of its system, itself included; all systems are one graph.
    """

    def __init__(
        self, width: int = 32, heads: int = 4, channels: int = 8, layers: int = 4, radial_range: float = 4.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(2, width)
        self.velocity_factor = nn.Parameter(torch.randn(channels) / 2)
        self.attention = nn.ModuleList(
            EquivariantAttention(width, heads, radial_range=radial_range, vector_channels=channels, dropout=0.0)
            for _ in range(layers)
        )
        self.feedforward = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.step = nn.Linear(width, channels)
        nn.init.zeros_(self.step.weight)
        nn.init.zeros_(self.step.bias)

    def forward(self, charges: Tensor, positions: Tensor, velocities: Tensor) -> Tensor:
        """Positions `(systems, particles, 3)`, some time later."""
        systems, particles = charges.shape
        graph = graph_of_systems(systems, particles)
        charges, positions, velocities = (x.flatten(0, 1) for x in (charges, positions, velocities))
        features = self.embedding(torch.stack([charges, velocities.norm(dim=-1)], -1))
        vectors = velocities[..., None, :] * self.velocity_factor[:, None]
        for attention, feedforward in zip(self.attention, self.feedforward, strict=True):
            features, positions, vectors, _ = attention.equivariant_forward(features, positions, vectors, graph)
            features = features + feedforward(features)
        moved = positions + (self.step(features)[..., None] * vectors).sum(-2)
        return moved.unflatten(0, (systems, particles))


@lru_cache
def graph_of_systems(systems: int, particles: int) -> Graph:
    """All pairs of each system, the systems one after the other."""
    each = torch.arange(particles)
    pairs = Graph.from_edge_index(torch.cartesian_prod(each, each).T, particles)
    return Graph.batch([pairs] * systems)
