"""Every attention module keeps the contract."""

import pytest
import torch

from anyattention import Graph, Window
from anyattention.nn import (
    DistanceAttention,
    EquivariantAttention,
    GraphAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
)
from anyattention.testing import check_attention


def features(*lengths, width=12, dtype=torch.float32):
    return [torch.randn(2, length, width, dtype=dtype) for length in lengths]


MASK = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0] * 7, [1] * 7, [0, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 1, 1, 0]]).bool()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_bias": False, "scale": 0.4},
        {"causal": True, "positions": "learned", "max_seq_len": 9},
        {"positions": "sinusoidal", "qk_norm": True, "eps": 1e-3, "check_finite": True},
        {"positions": "rope", "num_kv_heads": 1, "softcap": 2.0},
        {"positions": "alibi", "pattern": Window(2, 1)},
    ],
    ids=str,
)
def test_multi_head_attention(settings):
    check_attention(MultiHeadAttention(12, 3, **settings), *features(5, 5, 5))


def test_multi_head_attention_across_and_masked():
    check_attention(MultiHeadAttention(12, 3), *features(5, 7), mask=MASK, bias=torch.randn(2, 5, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", ["none", "sinusoidal"])
def test_multi_head_attention_of_other_dtypes(dtype, positions):
    module = MultiHeadAttention(12, 3, positions=positions, qk_norm=True, dtype=dtype)
    check_attention(module, *features(5, 7, dtype=dtype))


def test_multi_head_attention_after_a_frozen_part():
    module = MultiHeadAttention(12, 3)
    module.key_projection.requires_grad_(False)
    check_attention(module, *features(5, 7))


def test_scaled_dot_product_attention():
    check_attention(ScaledDotProductAttention(12, 3), *features(5, 7, 7), MASK)
    check_attention(ScaledDotProductAttention(12, 3, causal=True, scale=0.3), *features(5))
    check_attention(ScaledDotProductAttention(12, 3), *features(5, 7, 7, dtype=torch.float64), return_weights=False)


# A self-loop, a duplicate edge, an isolated node (4) and one that only sends (0).
EDGE_INDEX = torch.tensor([[0, 0, 1, 2, 2, 5, 0, 3], [1, 2, 2, 2, 3, 1, 1, 5]])


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"concat": False, "residual": True},
        {"normalize": False, "aggregation": "mean", "use_bias": False},
        {"aggregation": "max", "scale": 0.7, "check_finite": True},
    ],
    ids=str,
)
def test_graph_attention(score, edge_dim, settings):
    module = GraphAttention(12, 3, in_features=5, score=score, edge_dim=edge_dim, **settings)
    edge_attr = () if edge_dim is None else (torch.randn(8, edge_dim),)
    check_attention(module, torch.randn(6, 5), Graph.from_edge_index(EDGE_INDEX, num_nodes=6), *edge_attr)


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_graph_attention_over_an_edge_index_in_float64(score):
    module = GraphAttention(12, 3, score=score, edge_dim=2, dtype=torch.float64)
    x, edge_attr = torch.randn(2, 6, 12, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    check_attention(module, x, EDGE_INDEX, edge_attr, mask=torch.rand(8) < 0.8)


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_bipartite_graph_attention(score):
    module = GraphAttention(12, 3, in_features=(5, 7), score=score, edge_dim=2, residual=True)
    graph = Graph.from_edge_index(EDGE_INDEX, num_queries=6, num_keys=11)
    pair = torch.randn(11, 5), torch.randn(6, 7)
    check_attention(module, pair, graph, torch.randn(8, 2))
    check_attention(module, list(pair), graph, torch.randn(8, 2))


@pytest.mark.parametrize("kind", [DistanceAttention, EquivariantAttention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"radius": 1.5, "use_bias": False, "scale": 0.4},
        {"radial_range": 2.0, "radial_basis": "bessel", "num_radial": 5, "eps": 1e-3, "check_finite": True},
    ],
    ids=str,
)
def test_geometric_attention(kind, dtype, settings):
    module = kind(12, 3, geometric_dim=2, dtype=dtype, **settings)
    x, positions = torch.randn(2, 6, 12, dtype=dtype), torch.randn(2, 6, 2, dtype=dtype)
    mask = (torch.rand(2, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
    check_attention(module, x, positions)
    check_attention(module, x, positions, mask=mask)
    check_attention(module, x[0], positions[0])
    check_attention(module, x, positions, graph=Graph.from_edge_index(EDGE_INDEX, num_nodes=6))
    check_attention(module, x[0], positions[0], graph=EDGE_INDEX, mask=torch.rand(8) < 0.8)


def test_equivariant_attention_with_vectors():
    module = EquivariantAttention(12, 3, vector_channels=6, radius=1.5)
    graph = Graph.from_edge_index(EDGE_INDEX, num_nodes=6)
    check_attention(module, torch.randn(6, 12), torch.randn(6, 3), torch.randn(6, 6, 3), graph)


def test_a_cached_pair_has_a_gradient_for_each_half():
    module = GraphAttention(12, 3, in_features=(5, 7))
    graph = Graph.from_edge_index(EDGE_INDEX, num_queries=6, num_keys=11)
    for pair in ((torch.randn(11, 5), torch.randn(6, 7)), [torch.randn(11, 5), torch.randn(6, 7)]):
        assert list(module.cached_forward(pair, graph)[1].inputs) == ["x[0]", "x[1]"]


def test_a_cache_may_be_used_again_and_gradients_add_up():
    module = MultiHeadAttention(12, 3, dropout=0.0)
    output, cache = module.cached_forward(*features(5, 7))
    cotangent = torch.randn_like(output.output)
    first, second = module.backward(cotangent, cache), module.backward(2 * cotangent, cache)
    torch.testing.assert_close(second.parameters, 2 * first.parameters)
    torch.testing.assert_close(module.value_projection.weight.grad.flatten(), 3 * first.parameters[312:456])
    assert not output.output.requires_grad


def test_the_regularization_loss_of_float16_is_summed_in_float32():
    module = MultiHeadAttention(64, 2, dtype=torch.float16)
    module.set_parameters(torch.full((module.parameter_count(),), 4.0))
    assert module.regularization_loss(0.5).item() == 8.0 * module.parameter_count()
