"""Charged particles that move freely: the n-body task of the EGNN paper, made anew with its generator's settings.

Source: vgsatorras/egnn, n_body_system, `nbody_small`: 5 particles with charges of either sign, normally distributed
positions, velocities of norm 0.5, forces q_i q_j (x_i - x_j) / |x_i - x_j|^3 of at most 100 a coordinate, steps of
0.001, a frame every 100 steps. Given a system at frame 30, the task is to say where its particles are at frame 40.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Systems", "simulate"]

PARTICLES, SPEED, TIME_STEP, LARGEST_FORCE = 5, 0.5, 1e-3, 100.0
# The first frame is taken after the first 100 steps.
STEPS_TO_INPUT, STEPS_TO_TARGET = 3100, 1000


class Systems(NamedTuple):
    """Systems of particles: at the input frame, and where they are at the target frame.

    Attributes:
        charges: `(systems, particles)`, 1 or -1.
        positions, velocities: `(systems, particles, 3)`, at the input frame.
        targets: positions at the target frame.
    """

    charges: Tensor
    positions: Tensor
    velocities: Tensor
    targets: Tensor

    def select(self, index: Tensor | slice) -> Systems:
        """Some of the systems."""
        return Systems(*(x[index] for x in self))


def simulate(count: int, seed: int) -> Systems:
    """`count` systems, computed in float64 and given in float32; the same seed gives the same systems."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(count, PARTICLES, 3, dtype=torch.float64, generator=generator)

    signs = torch.randint(2, (count, PARTICLES), generator=generator)
    charges = 2.0 * signs.double() - 1.0
    positions, velocities = normal(), normal()
    velocities = SPEED * velocities / velocities.norm(dim=-1, keepdim=True)
    products = charges[:, :, None] * charges[:, None, :]

    def kick(positions: Tensor, velocities: Tensor) -> Tensor:
        return velocities + TIME_STEP * forces(positions, products).clamp(-LARGEST_FORCE, LARGEST_FORCE)

    def run(steps: int, positions: Tensor, velocities: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(steps):
            positions = positions + TIME_STEP * velocities
            velocities = kick(positions, velocities)
        return positions, velocities

    # A frame shows the positions after a step, and the velocities before their kick there.
    before, velocities = run(STEPS_TO_INPUT - 1, positions, kick(positions, velocities))
    start = before + TIME_STEP * velocities
    targets, _ = run(STEPS_TO_TARGET, start, kick(start, velocities))
    return Systems(*(x.float() for x in (charges, start, velocities, targets)))


def forces(positions: Tensor, products: Tensor) -> Tensor:
    """On each particle, `(systems, particles, 3)`, for products of charges `(systems, particles, particles)`."""
    apart = positions[:, :, None] - positions[:, None, :]
    cubed = apart.square().sum(-1) ** 1.5
    strength = torch.where(cubed > 0, products / cubed, 0.0)
    return (strength[..., None] * apart).sum(2)
