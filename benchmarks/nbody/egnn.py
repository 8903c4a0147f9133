"""The peer: egnn-pytorch's layers, as vgsatorras/egnn sets them up for this task."""

from __future__ import annotations

import torch
from egnn_pytorch import EGNN
from torch import Tensor, nn

__all__ = ["EgnnDynamics"]


class EgnnDynamics(nn.Module):
    """Four layers, given what the attention is given; each also moves a particle by a learned factor of its velocity.

    Edges carry the product of the charges and the squared distance at the start, nodes the speed. Weights are drawn as
    in vgsatorras/egnn: by PyTorch's own rule, and a thousandth of Xavier's where differences of positions are weighed,
    without bias there at the start. The package draws all weights
    from a normal distribution of deviation 0.001.
    """

    def __init__(self, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, width)
        self.layers = nn.ModuleList(EGNN(dim=width, m_dim=width, edge_dim=2) for _ in range(layers))
        self.velocity_factor = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)) for _ in range(layers)
        )
        self.layers.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.coors_mlp[-1].weight, gain=0.001)
            nn.init.zeros_(layer.coors_mlp[-1].bias)

    def forward(self, charges: Tensor, positions: Tensor, velocities: Tensor) -> Tensor:
        """Positions `(systems, particles, 3)`, some time later."""
        squared = (positions[:, :, None] - positions[:, None, :]).square().sum(-1)
        edges = torch.stack([charges[:, :, None] * charges[:, None, :], squared], -1)
        features = self.embedding(velocities.norm(dim=-1, keepdim=True))
        for layer, factor in zip(self.layers, self.velocity_factor, strict=True):
            step = factor(features) * velocities
            features, positions = layer(features, positions, edges=edges)
            positions = positions + step
        return positions
