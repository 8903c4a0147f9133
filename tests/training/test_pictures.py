import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anyattention.errors import MissingExtraError
from anyattention.training import NodeClassifier, draw_attention, load_digits, load_npz, load_tables, pictures


def pixels(content: bytes, require) -> np.ndarray:
    return require("matplotlib.image").imread(io.BytesIO(content))


@pytest.fixture(params=["digits", "dense", "sparse"])
def data(request, data_files, tmp_path):
    if request.param == "digits":
        return load_digits()
    arrays = getattr(data_files, f"{request.param}_arrays")()
    return load_npz(data_files.write(tmp_path / "made_up.npz", arrays))


def test_a_picture_of_any_data(data, require) -> None:
    model = NodeClassifier(data.in_features, data.num_classes, hidden=8, heads=2)
    image = pixels(draw_attention(model, data, data.splits[0]), require)
    height, width, _ = image.shape
    assert height > 800
    assert width > 1200
    # Something is drawn in each quarter, and most of the page stays white.
    quarters = [image[:, : width // 2], image[:, width // 2 :], image[: height // 2], image[height // 2 :]]
    assert all((quarter[..., :3] < 0.5).any() for quarter in quarters)
    assert (image[..., :3] == 1).mean() > 0.5


def test_the_same_model_gives_the_same_picture() -> None:
    data = load_digits()
    model = NodeClassifier(data.in_features, 10, hidden=8, heads=2)
    assert draw_attention(model, data, data.splits[0]) == draw_attention(model, data, data.splits[0])


def test_matplotlib_s_global_state_is_not_touched() -> None:
    data = load_digits()
    model = NodeClassifier(data.in_features, 10, hidden=8, heads=2)

    def figures() -> list[int]:
        helpers = sys.modules.get("matplotlib._pylab_helpers")
        return [] if helpers is None else list(helpers.Gcf.figs)

    # Another test may have drawn some.
    before = figures()
    draw_attention(model, data, data.splits[0])
    assert figures() == before


def test_neighbours_come_by_falling_weight() -> None:
    data = load_digits()
    weights = torch.rand(data.graph.num_edges)
    row = pictures._attended(data, weights, 17, 3)
    expected = {}
    for edge in (data.graph.query_index == 17).nonzero().flatten().tolist():
        expected[int(data.graph.key_index[edge])] = float(weights[edge])
    assert dict(zip(row.neighbours, row.weights, strict=True)) == expected
    assert row.weights == sorted(row.weights, reverse=True)
    assert (row.node, row.predicted) == (17, 3)
    assert 17 in row.neighbours


def test_unlabelled_nodes_are_drawn_as_such(data_files, tmp_path, require, monkeypatch) -> None:
    """Grey, and named in the legend; not in the colour of a class."""
    drawn, names = [], []
    axes, lines = require("matplotlib.axes").Axes, require("matplotlib.lines").Line2D
    scatter, line = axes.scatter, lines.__init__
    monkeypatch.setattr(axes, "scatter", lambda *args, **kw: (drawn.append(kw["color"]), scatter(*args, **kw))[1])
    monkeypatch.setattr(lines, "__init__", lambda *args, **kw: (names.append(kw.get("label")), line(*args, **kw))[1])
    arrays = data_files.dense_arrays(splits=1)
    for labels in (arrays["node_labels"], np.where(arrays["test_masks"][0], arrays["node_labels"], -1)):
        data = load_npz(data_files.write(tmp_path / "whole.npz", arrays))
        data = dataclasses.replace(data, labels=torch.from_numpy(labels))
        drawn.clear(), names.clear()
        draw_attention(NodeClassifier(3, 2, hidden=8, heads=2), data, data.splits[0])
        is_partly = bool((labels < 0).any())
        assert ([pictures._UNLABELLED] in drawn) == is_partly
        assert ("unlabelled" in names) == is_partly


@pytest.mark.parametrize(("mistakes", "wrong"), [(0, 0), (1, 1), (400, 2), (1597, 8)])
def test_two_of_eight_are_mistakes_where_there_are_any(mistakes: int, wrong: int) -> None:
    data = load_digits()
    test = data.splits[0].test
    predicted = data.labels.clone()
    predicted[test[:mistakes]] = (predicted[test[:mistakes]] + 1) % 10
    nodes = pictures._choose_nodes(data, test, predicted, 8)
    assert len(set(nodes)) == 8
    assert set(nodes) <= set(test.tolist())
    assert int((predicted[nodes] != data.labels[nodes]).sum()) == wrong
    # The last ones: a reader sees first how it goes when it goes well.
    assert (predicted[nodes[: 8 - wrong]] == data.labels[nodes[: 8 - wrong]]).all()


def test_matplotlib_is_named_when_it_is_missing(monkeypatch) -> None:
    data = load_digits()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="the picture of the attention needs matplotlib"):
        draw_attention(NodeClassifier(32, 10), data, data.splits[0])


def test_names_of_files_are_drawn_as_they_are(tmp_path: Path, require) -> None:
    """Names that matplotlib would take for formulas or hidden, or has no letters for."""
    require("matplotlib")
    folder = tmp_path / "a$x^$b_{"
    folder.mkdir()
    names = ["$x^", "_hidden", "名前 of a class that has a long name"]
    (folder / "nodes.csv").write_text("id,label\n" + "".join(f"{row},{names[row % 3]}\n" for row in range(30)))
    (folder / "edges.csv").write_text("source,target\n" + "".join(f"{row},{(row + 1) % 30}\n" for row in range(30)))
    data = load_tables(folder)
    model = NodeClassifier(**data.sizes, hidden=8, heads=2)
    assert draw_attention(model, data, data.splits[0]).startswith(b"\x89PNG")
