"""Molecular dynamics of small clusters of charged Lennard-Jones particles: the data to learn from.

Reduced units: lengths in sigma and energies in epsilon of the Lennard-Jones potential, masses in that of a particle;
so times are in sigma sqrt(mass / epsilon), temperatures in epsilon / k_B, and charges in sqrt(4 pi epsilon_0 sigma
epsilon). Everything is float64.

Axes: B clusters, N particles, T trajectories, S samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattention.geometry import random_orthogonal

__all__ = [
    "SEGMENT",
    "TIME_STEP",
    "Configurations",
    "Simulation",
    "State",
    "alternating_charges",
    "interactions",
    "kinetic_energy",
    "simulate",
    "verlet",
]

# Of a segment of constant energy (NVE), in time steps; and a time step.
SEGMENT, TIME_STEP = 200, 0.005
# The distance of nearest neighbours at the start, where the Lennard-Jones potential is lowest.
_SPACING = 2 ** (1 / 6)


class Configurations(NamedTuple):
    """Clusters of the same particles.

    Attributes:
        charges: `(N,)`.
        positions: `(B, N, 3)`.
        energies: potential energies, `(B,)`.
        forces: `(B, N, 3)`.
    """

    charges: Tensor
    positions: Tensor
    energies: Tensor
    forces: Tensor


class State(NamedTuple):
    """Positions and velocities, `(B, N, 3)` each."""

    positions: Tensor
    velocities: Tensor


class Simulation(NamedTuple):
    """What a simulation yields.

    Attributes:
        charges: `(N,)`.
        positions: `(T, S, N, 3)`.
        drift: by how much each segment between two draws of velocities changed the total energy, `(T, S)`.
    """

    charges: Tensor
    positions: Tensor
    drift: Tensor

    def configurations(self, chosen: Tensor) -> Configurations:
        """The samples of the trajectories chosen by a mask `(T,)`, one trajectory after the other."""
        positions = self.positions[chosen].flatten(0, 1)
        return Configurations(self.charges, positions, *interactions(positions, self.charges))


def interactions(positions: Tensor, charges: Tensor) -> tuple[Tensor, Tensor]:
    """Potential energies and forces of free clusters, over all pairs.

        energy = sum over pairs of 4 (1 / r^12 - 1 / r^6) + q_i q_j / r

    Args:
        positions: `(B, N, 3)`.
        charges: `(N,)`.

    Returns:
        Energies `(B,)` and forces `(B, N, 3)`, minus the energy's gradient.

    Cost: O(B x N^2) time and memory.
    """
    apart = positions[:, :, None] - positions[:, None]
    # A particle does not act on itself: infinitely far, it adds nothing.
    inverse = 1 / (apart.square().sum(-1) + torch.full_like(charges, torch.inf).diag())
    sixth = inverse**3
    coulomb = charges[:, None] * charges * inverse.sqrt()
    energies = (4 * (sixth.square() - sixth) + coulomb).sum((1, 2)) / 2
    pushes = (24 * (2 * sixth.square() - sixth) + coulomb) * inverse
    return energies, (pushes[..., None] * apart).sum(2)


def kinetic_energy(velocities: Tensor) -> Tensor:
    """`(B,)`, of velocities `(B, N, 3)`."""
    return velocities.square().sum((1, 2)) / 2


def verlet(state: State, charges: Tensor, time_step: float, steps: int) -> State:
    """Newton's equations by the velocity Verlet method: symplectic, reversible, of second order.

    Args:
        state: at the start.
        charges: `(N,)`.
        time_step: of each of the `steps`.
    """
    positions, velocities = state
    _, forces = interactions(positions, charges)
    for _ in range(steps):
        velocities = velocities + time_step / 2 * forces
        positions = positions + time_step * velocities
        _, forces = interactions(positions, charges)
        velocities = velocities + time_step / 2 * forces
    return State(positions, velocities)


def alternating_charges(particles: int) -> Tensor:
    """Charges 1 and -1 in turns, `(N,)`."""
    return 1.0 - 2.0 * (torch.arange(particles) % 2).double()


def simulate(
    particles: int,
    temperatures: Tensor,
    samples: int,
    *,
    equilibration: int = 10,
    segment: int = SEGMENT,
    time_step: float = TIME_STEP,
    seed: int = 0,
) -> Simulation:
    """Sample clusters at several temperatures, a trajectory of each.

    A trajectory is made of segments of constant energy. Before each one, velocities are drawn from Maxwell's
    distribution (all at once: Andersen's thermostat), without total momentum; the positions at its end are a sample.
    All clusters begin as a piece of a rock salt crystal, turned at random.

    Args:
        particles: in a cluster, with charges 1 and -1 in turns.
        temperatures: of the trajectories, `(T,)`.
        samples: of each trajectory.
        equilibration: segments before the first sample is taken.
        segment: time steps in a segment.
        time_step: in reduced units.
        seed: of turns and velocities; the same seed gives the same bits.

    Source: Andersen, 1980 (velocities drawn anew); Swope et al., 1982 (velocity Verlet).
    """
    generator = torch.Generator().manual_seed(seed)
    charges = alternating_charges(particles)
    shape = (len(temperatures), particles, 3)
    turns = random_orthogonal(len(temperatures), 3, generator=generator)
    positions = _crystal(charges) @ turns
    kept, drifts = [], []
    for number in range(equilibration + samples):
        velocities = torch.randn(shape, dtype=torch.float64, generator=generator)
        velocities = (velocities - velocities.mean(1, keepdim=True)) * temperatures.double().sqrt()[:, None, None]
        before = State(positions, velocities)
        after = verlet(before, charges, time_step, segment)
        positions = after.positions
        if number >= equilibration:
            kept.append(positions)
            drifts.append(_total_energy(after, charges) - _total_energy(before, charges))
    return Simulation(charges, torch.stack(kept, 1), torch.stack(drifts, 1))


def _total_energy(state: State, charges: Tensor) -> Tensor:
    return interactions(state.positions, charges)[0] + kinetic_energy(state.velocities)


def _crystal(charges: Tensor) -> Tensor:
    """The sites of a rock salt lattice nearest to the middle of one of its cubes, `(N, 3)`."""
    side = 2 + round(len(charges) ** (1 / 3))
    places = torch.cartesian_prod(*[torch.arange(-side, side + 2, dtype=torch.float64)] * 3)
    places = places[(places - 0.5).square().sum(1).argsort(stable=True)]
    is_even = places.sum(1) % 2 == 0
    sites = torch.empty(len(charges), 3, dtype=torch.float64)
    for is_positive in (True, False):
        own = (charges > 0) == is_positive
        sites[own] = places[is_even == is_positive][: int(own.sum())]
    return _SPACING * (sites - sites.mean(0))
