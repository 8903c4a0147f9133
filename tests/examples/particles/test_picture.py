import io
import sys

import pytest
import torch

from anyattention.errors import InvalidInputError, MissingExtraError
from examples.particles import picture
from examples.particles.model import EnergyModel, EquivariantBody, PlainBody, Settings
from examples.particles.picture import draw
from examples.particles.train import Data, Fit, Trained, predict_all, simulate_data

SMALL = Settings(particles=5, trajectories=5, samples=1, num_radial=4, width=4, plain_width=4, heads=2, blocks=2)


@pytest.fixture(scope="module")
def data() -> Data:
    return simulate_data(SMALL)


def fit_of(data: Data, steps: int = 30) -> Fit:
    torch.manual_seed(0)
    own = EnergyModel(EquivariantBody(SMALL), SMALL.width, data.train).eval()
    plain = EnergyModel(PlainBody(SMALL), SMALL.plain_width, data.train).eval()
    losses = [2.0 / step for step in range(1, steps + 1)]
    return Fit(Trained(own, losses, 1.0), Trained(plain, losses, 1.0), interrupted=False)


def picture_of(fit: Fit, data: Data) -> bytes:
    return draw(fit, data.test, *(predict_all(part.model, data.test.positions, 2) for part in fit[:2]))


@pytest.mark.parametrize("steps", [1, 30])
def test_a_picture(steps: int, data: Data, require) -> None:
    content = picture_of(fit_of(data, steps), data)
    image = require("matplotlib.image").imread(io.BytesIO(content))
    height, width, _ = image.shape
    assert (height, width) == (1050, 1500)
    for row in range(2):
        for column in range(3):
            part = image[row * height // 2 :, column * width // 3 :][: height // 2, : width // 3, :3]
            assert (part < 0.5).any()


def test_the_cluster_that_is_drawn_is_the_first_one_turned(data: Data) -> None:
    fit = fit_of(data)
    cluster = picture._read_cluster(fit, data.test)
    original = data.test.positions[0]
    torch.testing.assert_close(torch.cdist(cluster.places, cluster.places), torch.cdist(original, original))
    spread = cluster.places.square().sum(0)
    assert spread[0] >= spread[1] >= spread[2]
    distances = (cluster.places[cluster.query] - cluster.places[cluster.key]).norm(dim=1)
    torch.testing.assert_close(cluster.distance, distances)
    torch.testing.assert_close(cluster.true @ cluster.true.T, data.test.forces[0] @ data.test.forces[0].T)
    # The prediction turns with the cluster, so it is that of the turned one.
    predicted = predict_all(fit.equivariant.model, cluster.places[None], 1).forces[0]
    torch.testing.assert_close(cluster.predicted.float(), predicted, atol=1e-4, rtol=1e-4)
    sums = torch.zeros(5).index_add_(0, cluster.query, cluster.weights)
    torch.testing.assert_close(sums, torch.ones(5))


def test_a_model_without_equivariant_attention_is_refused(data: Data) -> None:
    fit = fit_of(data)
    with pytest.raises(InvalidInputError, match="fit: expected an equivariant model, got PlainBody"):
        picture_of(fit._replace(equivariant=fit.plain), data)


def test_matplotlib_is_named_when_it_is_missing(data: Data, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="the picture of the attention needs matplotlib"):
        picture_of(fit_of(data), data)
