"""Energies and forces of clusters of particles, predicted: settings, an equivariant model and a plain one.

Energies are in epsilon and lengths in sigma (`examples.particles.simulation`).

Axes: B clusters, N particles, E edges, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from anyattention import Graph
from anyattention.errors import InvalidConfigError
from anyattention.nn import EquivariantAttention, MultiHeadAttention
from examples.particles.simulation import Configurations
from examples.settings import About, check_settings, require_divisor

__all__ = ["TEST_EVERY", "EnergyModel", "EquivariantBody", "PlainBody", "Prediction", "Settings", "predict"]

# One trajectory in so many is for the test.
TEST_EVERY = 5
_MOST_PARTICLES = 32


@dataclass(frozen=True)
class Settings:
    """The simulation, the models' size and how to train them.

    Raises:
        InvalidConfigError: a value is out of range.
    """

    steps: Annotated[int, About("steps of the training")] = 500
    batch: Annotated[int, About("clusters in a step")] = 16
    particles: Annotated[int, About("particles in a cluster, at most 32", least=2)] = 16
    trajectories: Annotated[int, About("trajectories, every fifth for the test", least=TEST_EVERY)] = 80
    samples: Annotated[int, About("samples of each trajectory")] = 16
    radius: Annotated[float, About("how far the equivariant model's particles attend to each other, in sigma")] = 3.0
    num_radial: Annotated[int, About("radial basis functions of the equivariant model", least=2)] = 32
    width: Annotated[int, About("features of the equivariant model")] = 32
    # Gives the plain model about as many parameters.
    plain_width: Annotated[int, About("features of the plain model")] = 36
    heads: Annotated[int, About("heads of the attention, a divisor of both widths")] = 4
    blocks: Annotated[int, About("blocks of attention and feed-forward")] = 3
    # The weights of the radial basis learn ten times as fast.
    learning_rate: Annotated[float, About("Adam's highest learning rate for the equivariant model")] = 1e-2
    plain_learning_rate: Annotated[float, About("Adam's highest learning rate for the plain model")] = 1e-3
    seed: Annotated[int, About("seed of the simulation, the initial weights and the batches", least=0)] = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.particles > _MOST_PARTICLES:
            expected = f"at most {_MOST_PARTICLES}: the simulation goes over all pairs"
            raise InvalidConfigError(argument="particles", expected=expected, actual=self.particles)
        require_divisor(self, "heads", of="width")
        require_divisor(self, "heads", of="plain_width")


class Prediction(NamedTuple):
    """Energies of clusters `(B,)` and forces `(B, N, 3)`."""

    energies: Tensor
    forces: Tensor


class EquivariantBody(nn.Module):
    """Blocks of equivariant attention and feed-forward, over the particles within a radius.

    All clusters are one graph of blocks along the diagonal. Every particle attends to itself too, so that energy and
    forces are continuous when a neighbour comes or goes.

    Args:
        settings: the size.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.radius = settings.radius
        self.blocks = nn.ModuleList(_EquivariantBlock(settings) for _ in range(settings.blocks))

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Features `(B, N, width)` of particles at `(B, N, 3)`."""
        return self._run(features, positions, self.graph(positions), return_weights=False)[0]

    def graph(self, positions: Tensor) -> Graph:
        """Who attends to whom, the clusters' particles numbered one after the other."""
        batch = torch.arange(len(positions)).repeat_interleave(positions.shape[1])
        return Graph.radius(positions.detach().flatten(0, 1), self.radius, batch).with_self_loops()

    def weights(self, features: Tensor, positions: Tensor, graph: Graph) -> list[Tensor]:
        """The weights of each block, `(E, H)`."""
        return self._run(features, positions, graph, return_weights="heads")[1]

    def _run(
        self, features: Tensor, positions: Tensor, graph: Graph, *, return_weights: bool | str
    ) -> tuple[Tensor, list[Tensor]]:
        x, places, vectors, found = features.flatten(0, 1), positions.flatten(0, 1), None, []
        for block in self.blocks:
            x, vectors, weights = block(x, places, vectors, graph, return_weights)
            found.append(weights)
        return x.view_as(features), found


class _EquivariantBlock(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.attention = EquivariantAttention(
            settings.width,
            settings.heads,
            radius=settings.radius,
            num_radial=settings.num_radial,
            vector_channels=2 * settings.heads,
            dropout=0.0,
        )
        self.feed_forward = _feed_forward(settings.width)

    def forward(
        self, x: Tensor, places: Tensor, vectors: Tensor | None, graph: Graph, return_weights: bool | str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # The moved positions are not used: the graph, with its smooth cut-off, belongs to those that came.
        x, _, vectors, weights = self.attention.equivariant_forward(
            x, places, vectors, graph, return_weights=return_weights
        )
        return x + self.feed_forward(x), vectors, weights


class PlainBody(nn.Module):
    """A transformer over all pairs that is given the coordinates as numbers, from the cluster's centre.

    Args:
        settings: the size.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.plain_width
        self.coordinates = nn.Linear(3, width)
        self.blocks = nn.ModuleList(_PlainBlock(settings) for _ in range(settings.blocks))

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Features `(B, N, plain_width)` of particles at `(B, N, 3)`."""
        x = features + self.coordinates(positions - positions.mean(1, keepdim=True))
        for block in self.blocks:
            x = block(x)
        return x


class _PlainBlock(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(settings.plain_width)
        self.attention = MultiHeadAttention(settings.plain_width, settings.heads, dropout=0.0)
        self.feed_forward = _feed_forward(settings.plain_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), return_weights=False).output
        return x + self.feed_forward(x)


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))


class EnergyModel(nn.Module):
    """The potential energy of a cluster: a sum over particles of a function of the features that a body gives them.

    Args:
        body: from features `(B, N, width)` and positions `(B, N, 3)` to features `(B, N, width)`.
        width: of the features.
        train: configurations, whose charges are the particles', and whose energies and forces set the scale.
    """

    def __init__(self, body: EquivariantBody | PlainBody, width: int, train: Configurations) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, width)
        self.body = body
        self.readout = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.is_negative: Tensor
        self.mean_energy: Tensor
        self.scale: Tensor
        self.register_buffer("is_negative", (train.charges < 0).long())
        self.register_buffer("mean_energy", train.energies.mean().float())
        self.register_buffer("scale", train.forces.square().mean().sqrt().float())

    def forward(self, positions: Tensor) -> Tensor:
        """Energies `(B,)` of clusters at `(B, N, 3)`."""
        features = self.body(self.features(positions), positions)
        return self.mean_energy + self.scale * self.readout(features).sum((1, 2))

    def features(self, positions: Tensor) -> Tensor:
        """What the body begins with, `(B, N, width)`: the particles' charges."""
        return self.embedding(self.is_negative).expand(len(positions), -1, -1)


def predict(model: EnergyModel, positions: Tensor, *, create_graph: bool = False) -> Prediction:
    """Energies of clusters at `(B, N, 3)`, and forces, minus their gradient.

    With `create_graph` both are differentiable by the parameters; without, both are plain numbers.
    """
    places = positions.detach().requires_grad_()
    energies = model(places)
    (gradient,) = torch.autograd.grad(energies.sum(), places, create_graph=create_graph)
    return Prediction(energies if create_graph else energies.detach(), -gradient)
