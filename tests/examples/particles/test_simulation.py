"""Molecular dynamics of clusters: forces, conservation laws, the integrator's order, and what is sampled."""

import pytest
import torch
from torch import Tensor

from examples.particles.simulation import State, alternating_charges, interactions, kinetic_energy, simulate, verlet

CHARGES = alternating_charges(7)


def moving(clusters: int = 1) -> State:
    """Clusters as a simulation leaves them, with new velocities."""
    simulation = simulate(7, torch.full((clusters,), 0.2), 1, equilibration=1, seed=3)
    velocities = torch.randn(clusters, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return State(simulation.positions[:, 0], velocities / 2)


def total_energy(state: State) -> Tensor:
    return interactions(state.positions, CHARGES)[0] + kinetic_energy(state.velocities)


def test_the_energy_of_two_particles() -> None:
    positions = torch.tensor([[[0.0, 0, 0], [0, 1.5, 0]], [[2.0, 0, 0], [0, 0, 0]]], dtype=torch.float64)
    energies, forces = interactions(positions, torch.tensor([1.0, -2.0], dtype=torch.float64))
    for energy, distance in zip(energies.tolist(), (1.5, 2.0), strict=True):
        assert energy == pytest.approx(4 * (distance**-12 - distance**-6) - 2 / distance)
    # They attract each other.
    assert forces[0, 0, 1] > 0
    assert forces[1, 0, 0] < 0


def test_forces_are_minus_the_gradient_of_the_energy() -> None:
    positions = moving(2).positions
    _, forces = interactions(positions, CHARGES)
    step = 1e-6
    for particle in range(7):
        for axis in range(3):
            move = torch.zeros_like(positions)
            move[:, particle, axis] = step
            ahead, behind = (interactions(positions + sign * move, CHARGES)[0] for sign in (1, -1))
            torch.testing.assert_close(forces[:, particle, axis], (behind - ahead) / (2 * step), atol=1e-6, rtol=1e-6)


def test_what_is_conserved_is() -> None:
    before = moving(3)
    after = verlet(before, CHARGES, 0.002, 1_000)
    moved = (after.positions - before.positions).abs().amax((1, 2))
    assert (moved > 0.5).all()
    torch.testing.assert_close(total_energy(after), total_energy(before), atol=1e-3, rtol=0)
    torch.testing.assert_close(after.velocities.sum(1), before.velocities.sum(1), atol=1e-11, rtol=0)
    angular = [torch.linalg.cross(*state, dim=-1).sum(1) for state in (before, after)]
    torch.testing.assert_close(*angular, atol=1e-10, rtol=0)


def test_the_integrator_is_of_second_order() -> None:
    before = moving(3)
    drifts = [total_energy(verlet(before, CHARGES, 0.5 / steps, steps)) - total_energy(before) for steps in (500, 1000)]
    torch.testing.assert_close(drifts[0] / drifts[1], torch.full((3,), 4.0, dtype=torch.float64), atol=0, rtol=0.05)


def test_the_integrator_is_reversible() -> None:
    before = moving()
    after = verlet(before, CHARGES, 0.005, 50)
    back = verlet(State(after.positions, -after.velocities), CHARGES, 0.005, 50)
    torch.testing.assert_close(back, State(before.positions, -before.velocities), atol=1e-10, rtol=0)


def test_the_same_seed_gives_the_same_bits() -> None:
    state = torch.get_rng_state()
    first, again, other = (simulate(6, torch.tensor([0.1, 0.3]), 2, equilibration=1, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.positions, again.positions)
    assert torch.equal(first.drift, again.drift)
    assert not torch.allclose(first.positions, other.positions)


def test_what_a_simulation_yields() -> None:
    simulation = simulate(5, torch.tensor([0.1, 0.2, 0.3]), 4, equilibration=2)
    assert simulation.charges.tolist() == [1, -1, 1, -1, 1]
    assert tuple(simulation.positions.shape) == (3, 4, 5, 3)
    assert tuple(simulation.drift.shape) == (3, 4)
    assert 0 < float(simulation.drift.abs().max()) < 0.05
    chosen = simulation.configurations(torch.tensor([True, False, True]))
    assert torch.equal(chosen.positions, simulation.positions[[0, 2]].flatten(0, 1))
    energies, forces = interactions(chosen.positions, simulation.charges)
    assert torch.equal(chosen.energies, energies)
    assert torch.equal(chosen.forces, forces)


def test_samples_are_apart_and_hot_clusters_have_more_energy() -> None:
    simulation = simulate(8, torch.tensor([0.05, 0.25]), 20, seed=1)
    cold, hot = (simulation.configurations(torch.tensor(one)).energies for one in ([True, False], [False, True]))
    assert hot.mean() > cold.mean() + 1
    ahead, behind = simulation.positions[1, 1:], simulation.positions[1, :-1]
    assert ((ahead - behind).abs().amax((1, 2)) > 0.1).all()


@pytest.mark.parametrize("particles", [2, 8, 13, 64])
def test_clusters_begin_as_a_piece_of_rock_salt(particles: int) -> None:
    """A step later: every particle's nearest neighbour has the opposite charge, at the distance of a pair."""
    simulation = simulate(particles, torch.tensor([1e-4]), 1, equilibration=0, segment=1)
    positions = simulation.positions[0]
    distances = torch.cdist(positions, positions)[0] + 10 * torch.eye(particles)
    nearest = distances.min(1)
    assert (simulation.charges[nearest.indices] == -simulation.charges).all()
    torch.testing.assert_close(
        nearest.values.double(), torch.full_like(nearest.values, 2 ** (1 / 6)), atol=1e-3, rtol=0
    )
