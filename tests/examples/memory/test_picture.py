import io
import sys
from pathlib import Path

import pytest
import torch

from anyattention.errors import MissingExtraError
from examples.memory import picture
from examples.memory.images import CLASSES, Data, load_data
from examples.memory.model import Encoder, Settings
from examples.memory.picture import draw
from examples.memory.recall import Pixels, Recalled, recall
from examples.memory.train import Fit, Trained

SMALL = Settings(k=5, key_dim=7, channels=2, batch=11)


@pytest.fixture(scope="module")
def data(data_folder: Path) -> Data:
    train, test = load_data(data_folder / "fashion_small.npz")
    return Data(train.chosen(torch.arange(700)), test.chosen(torch.arange(200)))


def fit_of(steps: int) -> Fit:
    torch.manual_seed(0)
    losses = [2.0 / step for step in range(1, steps + 1)]
    return Fit(*[Trained(Encoder(SMALL).eval(), losses, 1.0) for _ in range(2)], interrupted=False)


def picture_of(data: Data, done: Fit, told: Recalled) -> bytes:
    return draw(done, data, told, Pixels(data.test.labels, data.test.labels), SMALL)


@pytest.mark.parametrize("steps", [1, 30])
def test_a_picture(steps: int, data: Data, require) -> None:
    done = fit_of(steps)
    content = picture_of(data, done, recall(done, data, SMALL))
    assert len(content) < 150_000
    image = require("matplotlib.image").imread(io.BytesIO(content))
    height, width, _ = image.shape
    assert (height, width) == (1050, 1500)
    for row, columns in enumerate((2, 4)):
        for column in range(columns):
            part = image[row * height // 2 :, column * width // columns :][: height // 2, : width // columns, :3]
            assert (part < 0.5).any()


def test_the_queries_are_right_wrong_and_of_the_class_held_out(data: Data) -> None:
    told, labels = recall(fit_of(1), data, SMALL), data.test.labels
    right, also_right, wrong, also_wrong, *held_out = picture._choose_queries(data, told, SMALL)
    for queries, is_right in (((right, also_right), True), ((wrong, also_wrong), False)):
        numbers = [query.number for query in queries]
        assert numbers == sorted(numbers)
        assert labels[numbers[0]] != labels[numbers[1]]
        assert [bool(told.answers.labels[number] == labels[number]) for number in numbers] == [is_right] * 2
    assert len(held_out) == 2
    for query in held_out:
        assert int(labels[query.number]) == SMALL.held_out == int(told.after.labels[query.number])
        assert query.answers is told.after
        assert CLASSES[SMALL.held_out] in query.about


def test_answers_that_are_all_right_leave_no_wrong_one_to_draw(data: Data) -> None:
    done = fit_of(1)
    told = recall(done, data, SMALL)
    exact = torch.nn.functional.one_hot(data.test.labels, len(CLASSES)).float()
    told = told._replace(answers=told.answers._replace(probabilities=exact))
    assert len(picture._choose_queries(data, told, SMALL)) == 4
    assert picture_of(data, done, told).startswith(b"\x89PNG")


def test_matplotlib_is_named_when_it_is_missing(data: Data, monkeypatch) -> None:
    done = fit_of(1)
    told = recall(done, data, SMALL)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="the picture of the attention needs matplotlib"):
        picture_of(data, done, told)
