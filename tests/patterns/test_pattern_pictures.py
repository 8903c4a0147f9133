"""draw(): the picture is the blocks, on the axes that were given or on new ones."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from anyattention.errors import MissingExtraError
from anyattention.patterns import Causal, Global, Graph, Pattern, Window


@pytest.fixture
def pyplot(require) -> Iterator[ModuleType]:
    """pyplot without a screen and without figures; those of a test are closed at its end."""
    matplotlib = require("matplotlib")
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    pyplot = require("matplotlib.pyplot")
    pyplot.close("all")
    yield pyplot
    pyplot.close("all")
    matplotlib.use(before)


@pytest.mark.parametrize("pattern", [Causal("top_left"), Window(1, 2, "bottom_right") | Global(1, "bottom_right")])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(7, 7), (5, 11), (1, 1)])
def test_a_square_stands_for_a_pair(pyplot: ModuleType, pattern: Pattern, num_queries: int, num_keys: int) -> None:
    axes = pattern.draw(num_queries, num_keys)
    (image,) = axes.images
    assert image.get_array().tolist() == pattern.to_dense(num_queries, num_keys).tolist()
    assert tuple(image.get_extent()) == (0, num_keys, num_queries, 0)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key", "query")
    assert axes.get_title() == f"{pattern}\n{pattern.density(num_queries, num_keys):.1%} of all pairs"
    assert len(pyplot.get_fignums()) == 1
    axes.figure.canvas.draw()


@pytest.mark.parametrize(("num_queries", "num_keys", "size"), [(512, 512, 1), (513, 513, 2), (40, 2000, 4)])
def test_a_square_stands_for_a_block_of_a_long_sequence(
    pyplot: ModuleType, num_queries: int, num_keys: int, size: int
) -> None:
    pattern = Window(9, 30, "bottom_right")
    (image,) = pattern.draw(num_queries, num_keys).images
    assert torch.equal(torch.from_numpy(image.get_array().data.copy()), pattern.to_blocks(size, num_queries, num_keys))


def test_given_axes_are_drawn_on(pyplot: ModuleType) -> None:
    _, (left, right) = pyplot.subplots(1, 2)
    assert Causal().draw(4, axes=right) is right
    assert (len(left.images), len(right.images)) == (0, 1)
    assert len(pyplot.get_fignums()) == 1


def test_a_graph_is_drawn_too(pyplot: ModuleType) -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 2, 2], [1, 0, 0]]), num_nodes=3)
    (image,) = graph.draw(3).images
    assert image.get_array().tolist() == graph.to_dense().tolist()


def test_matplotlib_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(MissingExtraError, match=r"drawing a pattern needs matplotlib: pip install anyattention\[viz\]"):
        Causal().draw(4)
