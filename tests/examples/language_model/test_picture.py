import io
import sys

import pytest
import torch

from anyattention import Window
from anyattention.errors import InvalidInputError, MissingExtraError
from examples.language_model import picture
from examples.language_model.model import LanguageModel, Settings
from examples.language_model.picture import Reference, draw
from examples.language_model.train import Fit

SMALL = Settings(steps=3, length=64, window=9, width=8, heads=2, blocks=2)
PASSAGE = torch.arange(64) * 5 % 256


def fit_of(pattern) -> Fit:
    torch.manual_seed(0)
    return Fit(LanguageModel(SMALL, pattern).eval(), [6.0, 5.0, 4.5], 1.0, False)


@pytest.mark.parametrize("length", [3, 64])
def test_a_picture(length: int, require) -> None:
    content = draw(fit_of(SMALL.pattern), PASSAGE[:length], [Reference("counted", 4.2)])
    image = require("matplotlib.image").imread(io.BytesIO(content))
    height, width, _ = image.shape
    assert (height, width) == (1050, 1500)
    quarters = [image[:, : width // 2], image[:, width // 2 :], image[: height // 2], image[height // 2 :]]
    assert all((quarter[..., :3] < 0.5).any() for quarter in quarters)


def test_the_head_that_is_shown_looks_elsewhere() -> None:
    graph = Window(9, 0).to_graph(64, 64)
    decided = ((graph.query_index - graph.key_index) == 3).float()
    itself = (graph.query_index == graph.key_index).float()
    even = 1 / graph.query_offsets.diff()[graph.query_index]
    weights = [torch.stack([even, itself], 1), torch.stack([even, decided], 1)]
    head = picture._choose_head(weights, graph.query_index, graph.key_index, 64)
    assert (head.block, head.head) == (1, 1)
    assert tuple(head.weights.shape) == (24, 56)
    rows = torch.arange(24)
    assert torch.equal(head.weights.nonzero(), torch.stack([rows, rows + 56 - 24 - 3], 1))


def test_a_model_without_pattern_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="fit: expected a model with a pattern, got none"):
        draw(fit_of(None), PASSAGE, [])


def test_matplotlib_is_named_when_it_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="the picture of the attention needs matplotlib"):
        draw(fit_of(SMALL.pattern), PASSAGE, [])
