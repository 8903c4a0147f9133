"""The n-body benchmark: its simulation, its network, and that a training goes on where it was left."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(_ROOT)


def _module(name):
    return importlib.import_module(f"benchmarks.nbody.{name}")


def _draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_forces_are_the_slope_of_the_coulomb_energy():
    positions = _draw(3, 5, 3).requires_grad_()
    charges = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64).expand(3, 5)
    products = charges[:, :, None] * charges[:, None, :]
    first, second = torch.triu_indices(5, 5, 1)
    apart = (positions[:, first] - positions[:, second]).norm(dim=-1)
    (slope,) = torch.autograd.grad((products[:, first, second] / apart).sum(), positions)
    torch.testing.assert_close(_module("data").forces(positions.detach(), products), -slope)


def test_particles_at_one_place_do_not_push_each_other():
    pushed = _module("data").forces(torch.zeros(1, 5, 3), torch.ones(1, 5, 5))
    assert torch.equal(pushed, torch.zeros(1, 5, 3))


def test_the_simulation_is_newtons_motion():
    systems = _module("data").simulate(12, seed=4)
    errors = []
    for charges, positions, velocities, targets in zip(*(x.double().numpy() for x in systems), strict=True):

        def motion(_time, state, charges=charges):
            places, speeds = state.reshape(2, 5, 3)
            apart = places[:, None] - places[None]
            distance = np.linalg.norm(apart, axis=-1) + np.eye(5)
            pull = (charges[:, None] * charges[None] * (1 - np.eye(5)) / distance**3)[..., None] * apart
            return np.concatenate([speeds.ravel(), pull.sum(1).ravel()])

        start = np.concatenate([positions.ravel(), velocities.ravel()])
        end = solve_ivp(motion, (0.0, 1.0), start, method="DOP853", rtol=1e-8, atol=1e-8).y[:15, -1]
        errors.append(np.abs(end - targets.ravel()).max())
    # Steps of a thousandth, of first order; a close encounter may go astray.
    assert np.median(errors) < 2e-3
    speeds = systems.velocities.norm(dim=-1)
    assert speeds.min() > 0
    assert speeds.max() < 20
    assert set(systems.charges.unique().tolist()) == {-1.0, 1.0}
    again = _module("data").simulate(12, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(systems, again, strict=True))


@pytest.mark.parametrize("name", ["anyattention", "egnn-pytorch"])
def test_a_prediction_turns_and_moves_with_the_system(name, require):
    if name == "egnn-pytorch":
        require("egnn_pytorch")
    torch.manual_seed(0)
    model = _module("__main__").build_model(_module("__main__").Setting(name, 32, 1e-3)).double()
    if name == "anyattention":
        torch.nn.init.normal_(model.step.weight)
    charges = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    positions, velocities = _draw(1, 5, 3, seed=1), _draw(1, 5, 3, seed=2)
    turn, _ = torch.linalg.qr(_draw(3, 3, seed=3))
    shift = _draw(3, seed=4)
    with torch.no_grad():
        plain = model(charges, positions, velocities)
        turned = model(charges, positions @ turn + shift, velocities @ turn)
    torch.testing.assert_close(turned, plain @ turn + shift, rtol=1e-9, atol=1e-9)
    assert (plain - positions).abs().max() > 0.01


def test_a_training_goes_on_where_it_was_left(tmp_path):
    systems = _module("data").Systems(torch.ones(120, 5), *(_draw(120, 5, 3, seed=n).float() for n in range(3)))
    data = _module("training").Data(systems, systems.select(slice(0, 20)), systems.select(slice(20, 40)))

    def new():
        torch.manual_seed(0)
        return _module("training").Training(_module("attention").AttentionDynamics(layers=1), 1e-3, seed=5)

    whole, first, second = new(), new(), new()
    for _ in range(5):
        whole.step(systems)
    for _ in range(2):
        first.step(systems)
    first.seconds = 31.0
    first.examine(data)
    assert [mark.mark for mark in first.marks] == [15, 30]
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    assert second.marks == first.marks
    for _ in range(3):
        second.step(systems)
    assert second.steps == whole.steps == 5
    for kind in ("model", "average"):
        pairs = zip(getattr(whole, kind).parameters(), getattr(second, kind).parameters(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_an_interrupted_training_keeps_its_steps(tmp_path):
    systems = _module("data").Systems(torch.ones(120, 5), *(_draw(120, 5, 3, seed=n).float() for n in range(3)))
    data = _module("training").Data(systems, systems, systems)
    training = _module("training").Training(_module("attention").AttentionDynamics(layers=1), 1e-3, seed=5)

    def interrupt(_seconds):
        if training.steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.run(data, 1e9, tmp_path / "state.safetensors", interrupt)
    fresh = _module("training").Training(_module("attention").AttentionDynamics(layers=1), 1e-3, seed=6)
    fresh.load(tmp_path / "state.safetensors")
    assert (fresh.steps, fresh.seconds) == (3, training.seconds)


def test_what_is_reported_was_chosen_by_the_validation_systems():
    mark, marks = _module("training").Mark, _module("training").MARKS
    errors = [(0.3, 0.1), (0.2, 0.5), (0.4, 0.01)]
    found = [mark(at, at + 0.1, 7, *both) for at, both in zip(marks, errors, strict=False)]
    best = _module("__main__").best_by_time(found)
    assert {at: examined.test for at, examined in best.items()} == {marks[0]: 0.1, marks[1]: 0.5, marks[2]: 0.5}


def test_the_peer_starts_where_the_particles_are(require):
    require("egnn_pytorch")
    torch.manual_seed(0)
    model = _module("egnn").EgnnDynamics().double()
    charges = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    positions, still = _draw(1, 5, 3, seed=1), torch.zeros(1, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        assert (model(charges, positions, still) - positions).abs().max() < 1e-2
