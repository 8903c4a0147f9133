"""The models of energies and forces: they learn, keep to physics, end when told to."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from anyattention import Graph
from anyattention.errors import InvalidConfigError, NumericalInstabilityError
from anyattention.testing import assert_equivariant
from examples.particles import train
from examples.particles.model import EnergyModel, EquivariantBody, PlainBody, Prediction, Settings, predict
from examples.particles.simulation import interactions, simulate
from examples.particles.train import (
    Data,
    constant_errors,
    finite_difference_error,
    fit,
    model_errors,
    predict_all,
    rotation_error,
    simulate_data,
)

SMALL = Settings(
    steps=60,
    batch=4,
    particles=6,
    trajectories=10,
    samples=3,
    radius=2.5,
    num_radial=16,
    width=8,
    plain_width=12,
    heads=2,
    blocks=2,
    learning_rate=2e-2,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> Data:
    return simulate_data(SMALL)


def model_of(data: Data, *, plain: bool = False) -> EnergyModel:
    torch.manual_seed(0)
    body = PlainBody(SMALL) if plain else EquivariantBody(SMALL)
    return EnergyModel(body, SMALL.plain_width if plain else SMALL.width, data.train).double().eval()


def test_training_and_test_are_of_different_trajectories(data: Data) -> None:
    assert (len(data.train.energies), len(data.test.energies)) == (24, 6)
    temperatures = torch.linspace(0.1, 0.4, SMALL.trajectories)
    positions = simulate(SMALL.particles, temperatures, SMALL.samples, seed=SMALL.seed).positions
    is_test = torch.tensor([number % 5 == 2 for number in range(SMALL.trajectories)])
    assert torch.equal(data.test.positions, positions[is_test].flatten(0, 1))
    assert torch.equal(data.train.positions, positions[~is_test].flatten(0, 1))
    assert 0 < data.drift < 1e-3
    for part in (data.train, data.test):
        torch.testing.assert_close((part.energies, part.forces), interactions(part.positions, part.charges))


def test_the_equivariant_model_learns_forces(data: Data) -> None:
    done = fit(data.train, SMALL)
    own, plain, constant = (
        model_errors(predict_all(done.equivariant.model, data.test.positions, 4), data.test),
        model_errors(predict_all(done.plain.model, data.test.positions, 4), data.test),
        constant_errors(data.train, data.test),
    )
    assert own.force_mae < 0.75 * min(plain.force_mae, constant.force_mae)
    assert own.force_rmse < 0.75 * min(plain.force_rmse, constant.force_rmse)
    for trained in (done.equivariant, done.plain):
        assert (len(trained.losses), trained.model.training) == (60, False)
        assert trained.seconds > 0
    assert done.interrupted is False


def test_both_models_have_about_as_many_parameters(data: Data) -> None:
    settings = Settings()
    own, plain = (
        sum(parameter.numel() for parameter in model.parameters())
        for model in (
            EnergyModel(EquivariantBody(settings), settings.width, data.train),
            EnergyModel(PlainBody(settings), settings.plain_width, data.train),
        )
    )
    assert abs(own - plain) < 0.05 * own


def test_the_same_settings_give_the_same_weights_and_leave_the_random_state(data: Data) -> None:
    settings = dataclasses.replace(SMALL, steps=2)
    state = torch.get_rng_state()
    first, second = fit(data.train, settings), fit(data.train, settings)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in ((first.equivariant, second.equivariant), (first.plain, second.plain)):
        assert one.losses == other.losses
        for name, weight in one.model.state_dict().items():
            assert torch.equal(weight, other.model.state_dict()[name])


@pytest.mark.parametrize("plain", [False, True])
def test_forces_are_finite_differences(plain: bool, data: Data) -> None:
    model = model_of(data, plain=plain)
    assert finite_difference_error(model, data.test.positions[0]) < 1e-6


def test_finite_differences_see_forces_that_are_wrong(data: Data, monkeypatch) -> None:
    model = model_of(data)
    monkeypatch.setattr(train, "predict", lambda *a: predict(*a)._replace(forces=1.01 * predict(*a).forces))
    assert finite_difference_error(model, data.test.positions[0]) > 1e-4


def test_only_the_equivariant_model_turns_forces_with_the_cluster(data: Data) -> None:
    model, positions = model_of(data), data.test.positions[0]
    assert rotation_error(model, positions) < 1e-9
    assert rotation_error(model_of(data, plain=True), positions) > 1e-3

    def energy_and_forces(x):
        predicted = predict(model, x[None])
        return predicted.energies, predicted.forces[0]

    assert_equivariant(
        energy_and_forces,
        [positions],
        takes=["position"],
        returns=["total", "vector"],
        # A number is a charge here.
        symmetries=["rotation", "reflection", "translation"],
        draws=5,
    )


def test_a_batch_is_its_clusters_one_by_one(data: Data) -> None:
    model, positions = model_of(data), data.test.positions
    together = predict_all(model, positions, 4)
    alone = [predict(model, cluster[None]) for cluster in positions]
    torch.testing.assert_close(together.energies, torch.cat([part.energies for part in alone]))
    torch.testing.assert_close(together.forces, torch.cat([part.forces for part in alone]))


def test_the_graph_is_that_of_the_clusters(data: Data) -> None:
    graph = EquivariantBody(SMALL).graph(data.test.positions[:2])
    assert isinstance(graph, Graph)
    assert (graph.num_queries, graph.num_keys) == (12, 12)
    pairs = {(int(query), int(key)) for key, query in graph.edge_index.T}
    distances = torch.block_diag(*torch.cdist(data.test.positions[:2], data.test.positions[:2]))
    same = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)) > 0
    assert pairs == {tuple(pair) for pair in (same & (distances <= 2.5)).nonzero().tolist()}


def test_weights_are_those_of_the_pairs(data: Data) -> None:
    model, positions = model_of(data), data.test.positions[:2]
    body = model.body
    assert isinstance(body, EquivariantBody)
    graph = body.graph(positions)
    weights = body.weights(model.features(positions), positions, graph)
    assert [tuple(block.shape) for block in weights] == [(graph.num_edges, 2)] * 2
    sums = torch.zeros(12, 2, dtype=torch.float64).index_add_(0, graph.query_index, weights[1])
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_forces_have_no_jump_where_a_neighbour_leaves(data: Data) -> None:
    model, positions = model_of(data), data.test.positions[0].clone()
    positions[0] = positions[1:].mean(0)
    nearest = int((positions[1:, 0]).argmax()) + 1
    outside = positions.clone()
    forces = []
    for distance in (2.5 - 1e-7, 2.5 + 1e-7):
        outside[0] = positions[nearest] + torch.tensor([distance, 0.0, 0.0], dtype=torch.float64)
        forces.append(predict(model, outside[None]).forces)
    torch.testing.assert_close(*forces, atol=1e-5, rtol=0)


def test_errors_are_what_their_names_say(data: Data) -> None:
    test = data.test
    shifted = Prediction(test.energies + 3.0, test.forces.clone())
    shifted.forces[0, 0, 0] += 2.0
    errors = model_errors(shifted, test)
    assert errors.energy_mae == pytest.approx(3 / 6)
    assert errors.energy_rmse == pytest.approx(3 / 6)
    assert errors.force_mae == pytest.approx(2 / test.forces.numel())
    assert errors.force_rmse == pytest.approx((4 / test.forces.numel()) ** 0.5)
    assert constant_errors(data.train, test).force_mae == pytest.approx(float(test.forces.abs().mean()))


def test_an_interrupt_keeps_what_there_is(data: Data) -> None:
    def stop(step) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    done = fit(data.train, SMALL, stop)
    assert (len(done.equivariant.losses), len(done.plain.losses), done.interrupted) == (3, 3, True)
    assert done.equivariant.model.training is False


def test_an_interrupt_before_the_first_step_is_passed_on(data: Data, monkeypatch) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(data.train, SMALL)


def test_a_loss_that_is_not_finite_is_named(data: Data, monkeypatch) -> None:
    monkeypatch.setattr(train, "_loss", lambda model, batch: torch.tensor(torch.nan))
    with pytest.raises(NumericalInstabilityError, match="loss of step 1: expected a finite number, got nan"):
        fit(data.train, SMALL)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps: expected an int of at least 1, got 0"),
        ({"particles": 1}, "particles: expected an int of at least 2, got 1"),
        ({"particles": 33}, "particles: expected at most 32: the simulation goes over all pairs, got 33"),
        ({"trajectories": 4}, "trajectories: expected an int of at least 5, got 4"),
        ({"batch": True}, "batch: expected an int of at least 1, got True"),
        ({"width": 16, "heads": 3}, "heads: expected a divisor of width=16, got 3"),
        ({"plain_width": 34}, "heads: expected a divisor of plain_width=34, got 4"),
        ({"seed": -1}, "seed: expected an int of at least 0, got -1"),
        ({"radius": 0.0}, "radius: expected a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number above 0"),
    ],
)
def test_settings_are_checked(settings, text: str) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        Settings(**settings)
