"""numpy's numbers and arrays stand for Python's numbers and lists, and are kept as these."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from anyattention import (
    Additive,
    AttentionConfig,
    Blocks,
    Causal,
    Documents,
    Dot,
    Dynamic,
    Fixed,
    Global,
    Graph,
    GraphAttentionConfig,
    RandomBlocks,
    RelativeBias,
    Strided,
    TopK,
    Window,
    attend,
)
from anyattention.errors import AttentionError
from anyattention.geometry import gaussian_basis, principal_components
from anyattention.nn import DistanceAttention, GraphAttention, MultiHeadAttention
from anyattention.training import NodeClassifierConfig

three = np.int64(3)


def test_settings_are_kept_as_plain_numbers():
    module = MultiHeadAttention(np.int32(8), np.int64(4), dropout=np.float32(0.5), use_bias=np.bool_(False))
    config = module.config
    assert config == AttentionConfig(8, 4, dropout=0.5, use_bias=False)
    assert [type(value) for value in (config.d_model, config.num_heads, config.dropout, config.use_bias)] == [
        int,
        int,
        float,
        bool,
    ]
    assert json.loads(config.to_json())["num_heads"] == 4
    widths = GraphAttention(8, 4, in_features=np.array([3, 5])).config.in_features
    assert widths == (3, 5)
    assert all(type(width) is int for width in widths)
    scaled = GraphAttentionConfig(AttentionConfig(8, 4, scale=np.float64(0.5)))
    assert GraphAttentionConfig.from_json(scaled.to_json()) == scaled
    classifier = NodeClassifierConfig(three, num_classes=np.int64(2), dropout=np.float32(0.5), edge_dim=np.int64(1))
    assert NodeClassifierConfig.from_json(classifier.to_json()) == NodeClassifierConfig(3, 2, dropout=0.5, edge_dim=1)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (lambda: Window(three, 2), Window(3, 2)),
        (lambda: Strided(three, np.int32(1)), Strided(3, 1)),
        (lambda: Fixed(three, np.int64(1)), Fixed(3, 1)),
        (lambda: Global(np.int64(2)), Global(2)),
        (lambda: Global(np.array([5, 2])), Global((2, 5))),
        (lambda: Documents(np.array([3, 5])), Documents((3, 5))),
        (lambda: Documents([three, np.int64(5)]), Documents((3, 5))),
        (lambda: RandomBlocks(np.int64(1), np.int64(3), np.int64(2)), RandomBlocks(1, 3, 2)),
        (lambda: Causal() & TopK(three), Causal() & TopK(3)),
        (lambda: Additive(np.float32(0.5)), Additive(0.5)),
    ],
)
def test_patterns_and_scores_are_the_same(given: Callable[[], object], plain: object):
    assert given() == plain
    assert repr(given()) == repr(plain)


def test_blocks_and_biases():
    assert Blocks(torch.ones(2, 2, dtype=torch.bool), np.int64(2)).to_dense(4, 4).all()
    assert torch.equal(RelativeBias.alibi(np.int64(2), three).numbers, RelativeBias.alibi(2, 3).numbers)
    assert type(RelativeBias(torch.ones(1, 3), np.int64(-1)).first) is int


def test_settings_of_attend():
    x = torch.randn(1, 4, 2, 3)
    expected = attend(x, x, x, scale=0.5, softcap=2.0, dropout=0.0, return_logsumexp=True)
    weights = attend(x, x, x, return_weights=np.bool_(True)).weights
    assert torch.equal(weights, attend(x, x, x, return_weights=True).weights)
    given = attend(
        x, x, x, scale=np.float32(0.5), softcap=np.float32(2), dropout=np.float32(0), return_logsumexp=np.bool_(True)
    )
    assert torch.equal(given.output, expected.output)
    assert torch.equal(given.logsumexp, expected.logsumexp)
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 1]]), np.int64(4))
    vector = torch.randn(2, 3)
    one = attend(x[0], x[0], x[0], graph, score=Dynamic(vector, np.float32(0.5)), normalize=np.bool_(True))
    assert torch.equal(one.output, attend(x[0], x[0], x[0], graph, score=Dynamic(vector, 0.5)).output)


@pytest.mark.parametrize(
    "periodic", [np.array([True, False, True]), [np.bool_(True), np.bool_(False), np.bool_(True)]], ids=type
)
def test_points(periodic: object):
    pytest.importorskip("vesin")
    points, cell = torch.rand(6, 3), torch.eye(3)
    expected = Graph.radius(points, 0.5, cell=cell, periodic=(True, False, True))
    given = Graph.radius(points, np.float64(0.5), cell=cell, periodic=periodic, max_neighbours=np.int64(99))
    assert torch.equal(given.edge_index, expected.edge_index)
    assert torch.equal(given.shifts, expected.shifts)
    nearest = Graph.nearest(points, np.int64(2), cell=cell, periodic=periodic)
    assert torch.equal(nearest.edge_index, Graph.nearest(points, 2, cell=cell, periodic=[True, False, True]).edge_index)
    layer = DistanceAttention(8, 2, radius=np.float64(2.0), geometric_dim=three).eval()
    assert type(layer.config.radius) is float
    features = torch.randn(6, 8)
    output = layer.distance_attention(points, features, np.float32(0.5), cell=cell, periodic=periodic).output
    same = layer.distance_attention(points, features, 0.5, cell=cell, periodic=[True, False, True]).output
    assert torch.equal(output, same)


def test_numbers_of_geometry():
    distance = torch.rand(4)
    assert torch.equal(gaussian_basis(distance, np.float32(2), np.int64(4)), gaussian_basis(distance, 2.0, 4))
    points = torch.randn(5, 3)
    assert principal_components(points, np.int64(2)).coordinates.shape == (5, 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: AttentionConfig(8, np.bool_(True)),
        lambda: AttentionConfig(8, np.float64(2.0)),
        lambda: AttentionConfig(8, 2, use_bias=np.int64(1)),
        lambda: AttentionConfig(8, 2, dropout=np.bool_(False)),
        lambda: AttentionConfig(8, 2, dropout=np.float32("nan")),
        lambda: AttentionConfig(8, 2, scale=np.array([0.5])),
        lambda: Window(np.bool_(True), 1),
        lambda: Window(np.float64(1), 1),
        lambda: Documents(np.array([1.0, 2.0])),
        lambda: Documents(np.array([True, False])),
        lambda: TopK(np.int64(0)),
        lambda: Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), np.bool_(True)),
        lambda: attend(*[torch.ones(1, 2, 1, 2)] * 3, score=Dot(), return_logsumexp=np.int64(1)),
        lambda: Graph.radius(torch.rand(3, 3), 0.5, cell=torch.eye(3), periodic=np.array([1, 0, 1])),
    ],
)
def test_bools_are_no_ints_and_ints_no_bools(build):
    with pytest.raises(AttentionError):
        build()
