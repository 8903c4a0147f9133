import sys

import numpy as np
import pytest
import torch

from anyattention.errors import MissingExtraError
from anyattention.training import (
    FitSettings,
    NodeClassifierConfig,
    accuracy,
    attention_within_classes,
    fit,
    load_digits,
    predict_logits,
    preset_for,
)


def test_the_graph_is_that_of_the_shrunk_images(require) -> None:
    images = require("sklearn.datasets").load_digits().images / 16
    shrunk = images.reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, 4)
    data = load_digits()
    distances = np.linalg.norm(shrunk[:, None] - shrunk[None], axis=2)
    linked = data.graph.to_dense().numpy()
    assert (linked.sum(1) == 21).all()
    assert linked.diagonal().all()
    # The 21 nearest, itself included; images may be as near as each other.
    farthest = np.where(linked, distances, 0).max(1)
    np.testing.assert_allclose(farthest, np.sort(distances, axis=1)[:, 20], atol=1e-7)


def test_features_are_components_and_differences(require) -> None:
    pixels = require("sklearn.datasets").load_digits().data / 16
    data = load_digits()
    decomposition = require("sklearn.decomposition")
    coordinates = decomposition.PCA(n_components=data.in_features, svd_solver="full").fit_transform(pixels)
    scaled = coordinates / coordinates[:, 0].std(ddof=1)
    np.testing.assert_allclose(data.features.abs().numpy(), np.abs(scaled), atol=1e-5)
    assert data.edge_features is not None
    assert data.edge_features.shape == (data.graph.num_edges, data.edge_dim) == (21 * 1797, 1)
    for edge in torch.randint(data.graph.num_edges, (50,)).tolist():
        key, query = data.graph.edge_index[:, edge].tolist()
        expected = ((pixels[key] - pixels[query]) ** 2).sum()
        assert data.edge_features[edge, 0] == pytest.approx(expected, abs=1e-5)


def test_about_half_of_the_links_join_the_same_number() -> None:
    data = load_digits()
    query, key = data.graph.query_index, data.graph.key_index
    same = (data.labels[query] == data.labels[key])[query != key].double().mean()
    assert 0.4 < same < 0.6


def test_images_and_labels_are_the_digits(require) -> None:
    digits = require("sklearn.datasets").load_digits()
    data = load_digits()
    assert data.images is not None
    np.testing.assert_allclose(data.images.numpy(), digits.images / 16)
    np.testing.assert_array_equal(data.labels.numpy(), digits.target)
    assert (data.name, data.metric, data.num_classes) == ("digits", "accuracy", 10)


def test_the_split_has_ten_labels_of_each_class() -> None:
    data = load_digits(3)
    (split,) = data.splits
    for part in (split.train, split.validation):
        assert data.labels[part].bincount().tolist() == [10] * 10
    assert len(split.test) == 1597
    assert torch.cat(split).sort().values.tolist() == list(range(1797))


def test_the_seed_draws_the_labels_and_nothing_else() -> None:
    first, again, other = load_digits(1), load_digits(1), load_digits(2)
    assert torch.equal(torch.cat(first.splits[0]), torch.cat(again.splits[0]))
    assert not torch.equal(first.splits[0].train, other.splits[0].train)
    assert torch.equal(first.features, other.features)
    assert torch.equal(first.graph.edge_index, other.graph.edge_index)
    assert first.edge_features is not None
    assert other.edge_features is not None
    assert torch.equal(first.edge_features, other.edge_features)


@pytest.mark.exhaustive
def test_choosing_among_the_links_is_worth_something() -> None:
    data = load_digits(0)
    (split,) = data.splits
    preset = preset_for(data)
    found = []
    for equal in (False, True):
        config = NodeClassifierConfig(data.in_features, 10, edge_dim=1, equal_weights=equal, **preset.model)
        model = fit(data, split, config, FitSettings(**preset.fit)).model
        share = attention_within_classes(model, data, split.test)
        found.append((accuracy(predict_logits(model, data)[split.test], data.labels[split.test]), *share))
    (attentive, learnt, evenly), (off, learnt_off, _) = found
    assert attentive > off + 0.01
    assert learnt > evenly + 0.1
    assert learnt_off == pytest.approx(evenly, abs=1e-6)


def test_scikit_learn_is_named_when_it_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"needs scikit-learn\. .*pip install 'anyattention\[demo\]'"):
        load_digits()


def test_the_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    load_digits(5)
    assert torch.equal(torch.get_rng_state(), before)
