"""Energies and forces of clusters of particles, learnt from a simulation: data, training, errors and checks.

Energies are in epsilon and lengths in sigma (`examples.particles.simulation`).

Axes: B clusters, N particles.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anyattention.geometry import random_orthogonal
from anyattention.training.steps import require_finite_loss
from examples.particles.model import (
    TEST_EVERY,
    EnergyModel,
    EquivariantBody,
    PlainBody,
    Prediction,
    Settings,
    predict,
)
from examples.particles.simulation import Configurations, simulate
from examples.schedule import rate_factor

__all__ = [
    "Data",
    "Errors",
    "Fit",
    "Step",
    "Trained",
    "constant_errors",
    "finite_difference_error",
    "fit",
    "model_errors",
    "predict_all",
    "rotation_error",
    "simulate_data",
]

_COLDEST, _HOTTEST = 0.1, 0.4


class Data(NamedTuple):
    """What a simulation is for.

    Attributes:
        train, test: from different trajectories.
        drift: the root mean square of the change of a particle's total energy over a segment of the simulation.
    """

    train: Configurations
    test: Configurations
    drift: float


class Errors(NamedTuple):
    """Mean absolute errors and roots of mean square errors: of the energy of a particle, of a force's component."""

    energy_mae: float
    energy_rmse: float
    force_mae: float
    force_rmse: float


def simulate_data(settings: Settings) -> Data:
    """Simulate trajectories at temperatures from low to high, and set every fifth, and with it its samples, apart."""
    temperatures = torch.linspace(_COLDEST, _HOTTEST, settings.trajectories)
    simulation = simulate(settings.particles, temperatures, settings.samples, seed=settings.seed)
    is_test = torch.arange(settings.trajectories) % TEST_EVERY == TEST_EVERY // 2
    drift = float(simulation.drift.square().mean().sqrt()) / settings.particles
    return Data(simulation.configurations(~is_test), simulation.configurations(is_test), drift)


class Step(NamedTuple):
    """What a finished step reports: its number from 1, and the loss of each model."""

    number: int
    equivariant: float
    plain: float


class Trained(NamedTuple):
    """A trained model in evaluation mode, the loss of each step, and the seconds that the steps took."""

    model: EnergyModel
    losses: list[float]
    seconds: float


class Fit(NamedTuple):
    """Both models, trained on the same batches, and whether Ctrl-C ended that."""

    equivariant: Trained
    plain: Trained
    interrupted: bool


def fit(train: Configurations, settings: Settings, on_step: Callable[[Step], None] | None = None) -> Fit:
    """Train the equivariant and the plain model side by side, on energies and forces of the same batches.

        loss = mean over force components of (error / their root mean square)^2
             + mean over clusters of (error of the energy / the energies' standard deviation)^2

    Each cluster is turned at random whenever it is drawn, which only the plain model can notice. Ctrl-C
    (KeyboardInterrupt) ends the training early and keeps the weights of that moment; before the first step has finished
    it is passed on.

    Args:
        train: what to learn from.
        settings: of the models and the training.
        on_step: called after each step of both.

    Raises:
        NumericalInstabilityError: a loss is NaN or infinite.

    Cost: a forward and backward pass over `batch` clusters, and through the forces a second backward pass, for each
    model and step. The same arguments give the same weights; PyTorch's own random state is left as it was.
    """
    steps: list[Step] = []
    interrupted = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        equivariant_model = EnergyModel(EquivariantBody(settings), settings.width, train)
        equivariant = _Trainer(equivariant_model, settings.steps, settings.learning_rate)
        plain_model = EnergyModel(PlainBody(settings), settings.plain_width, train)
        plain = _Trainer(plain_model, settings.steps, settings.plain_learning_rate)
        try:
            for number in range(1, settings.steps + 1):
                batch = _draw_batch(train, settings.batch)
                steps.append(Step(number, equivariant.step(batch, number), plain.step(batch, number)))
                if on_step is not None:
                    on_step(steps[-1])
        except KeyboardInterrupt:
            if not steps:
                raise
            interrupted = True
    return Fit(
        Trained(equivariant.model.eval(), [step.equivariant for step in steps], equivariant.seconds),
        Trained(plain.model.eval(), [step.plain for step in steps], plain.seconds),
        interrupted,
    )


class _Trainer:
    """A model's training and the time it takes."""

    def __init__(self, model: EnergyModel, steps: int, learning_rate: float) -> None:
        self.model, self.steps, self.learning_rate, self.seconds = model, steps, learning_rate, 0.0
        radial = [weight for name, weight in model.named_parameters() if name.endswith("radial_weight")]
        others = [weight for name, weight in model.named_parameters() if not name.endswith("radial_weight")]
        # Weights of the radial basis begin small, and have far to go: repulsion is steep.
        groups = [{"params": others, "factor": 1.0}, {"params": radial, "factor": 10.0}]
        self.optimizer = torch.optim.Adam(groups, lr=learning_rate, betas=(0.9, 0.98))

    def step(self, batch: _Batch, number: int) -> float:
        """One step; the loss before it."""
        started = time.monotonic()
        rate = self.learning_rate * rate_factor(number, self.steps, 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        loss = _loss(self.model, batch)
        require_finite_loss(loss.item(), f"step {number}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.seconds += time.monotonic() - started
        return loss.item()


class _Batch(NamedTuple):
    """Clusters `(B, N, 3)`, their energies and forces, and the spread of energies among all."""

    positions: Tensor
    energies: Tensor
    forces: Tensor
    energy_scale: Tensor


def _draw_batch(train: Configurations, size: int) -> _Batch:
    chosen = torch.randint(len(train.energies), (size,))
    turns = random_orthogonal(size, 3)
    parts = (train.positions[chosen] @ turns, train.energies[chosen], train.forces[chosen] @ turns)
    return _Batch(*[part.float() for part in (*parts, train.energies.std(correction=0).clamp(min=1e-3))])


def _loss(model: EnergyModel, batch: _Batch) -> Tensor:
    predicted = predict(model, batch.positions, create_graph=True)
    force = (predicted.forces - batch.forces) / model.scale
    energy = (predicted.energies - batch.energies) / batch.energy_scale
    return force.square().mean() + energy.square().mean()


def predict_all(model: EnergyModel, positions: Tensor, batch: int) -> Prediction:
    """Energies and forces of clusters at `(B, N, 3)`, so many clusters at a time, in the model's dtype."""
    parts = [predict(model, some) for some in positions.to(model.scale.dtype).split(batch)]
    return Prediction(torch.cat([part.energies for part in parts]), torch.cat([part.forces for part in parts]))


def model_errors(predicted: Prediction, true: Configurations) -> Errors:
    """How far predictions are from the truth."""
    energy = (predicted.energies - true.energies) / len(true.charges)
    force = predicted.forces - true.forces
    parts = (energy.abs().mean(), energy.square().mean().sqrt(), force.abs().mean(), force.square().mean().sqrt())
    return Errors(*map(float, parts))


def constant_errors(train: Configurations, test: Configurations) -> Errors:
    """The errors of predicting the training's mean energy and, as for any constant energy, no forces."""
    constant = Prediction(train.energies.mean().expand_as(test.energies), torch.zeros_like(test.forces))
    return model_errors(constant, test)


def finite_difference_error(model: EnergyModel, positions: Tensor, *, step: float = 1e-5) -> float:
    """The most by which a force of a cluster `(N, 3)` differs from the energy's central differences, in float64."""
    model, positions = copy.deepcopy(model).double(), positions.double()
    moves = step * torch.eye(positions.numel(), dtype=torch.float64).view(-1, *positions.shape)
    with torch.no_grad():
        ahead, behind = model(torch.cat([positions + moves, positions - moves])).chunk(2)
    differences = ((behind - ahead) / (2 * step)).view_as(positions)
    return float((predict(model, positions[None]).forces[0] - differences).abs().max())


def rotation_error(model: EnergyModel, positions: Tensor, *, seed: int = 0) -> float:
    """The most by which a force on a turned cluster `(N, 3)` differs from the turned force, in float64."""
    model, positions = copy.deepcopy(model).double(), positions.double()
    turn = random_orthogonal(1, 3, generator=torch.Generator().manual_seed(seed))[0]
    upright, turned = predict(model, torch.stack([positions, positions @ turn])).forces
    return float((turned - upright @ turn).abs().max())
