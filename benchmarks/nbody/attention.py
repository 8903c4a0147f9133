"""Our contestant: where particles will be, from their charges, positions and velocities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyattention.nn import EquivariantAttention

__all__ = ["AttentionDynamics"]


class AttentionDynamics(nn.Module):
    """A stack of `EquivariantAttention`, each layer followed by a network of two layers on the features."""

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
        features = self.embedding(torch.stack([charges, velocities.norm(dim=-1)], -1))
        vectors = velocities[..., None, :] * self.velocity_factor[:, None]
        for attention, feedforward in zip(self.attention, self.feedforward, strict=True):
            features, positions, vectors, _ = attention.equivariant_forward(features, positions, vectors)
            features = features + feedforward(features)
        return positions + (self.step(features)[..., None] * vectors).sum(-2)
