import pytest
import torch
import torch.nn.functional as F

import anyattention
from anyattention import Graph
from anyattention.errors import InvalidConfigError
from anyattention.training import NodeClassifier, NodeClassifierConfig
from anyattention.training.model import mean_and_deviation

# PyTorch says this once in a process, at the first sparse CSR tensor that a test makes by itself.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def graph_of(nodes: int = 7, edges: int = 19) -> Graph:
    return Graph.from_edge_index(torch.randint(nodes, (2, edges)), nodes).with_self_loops()


def dense_oracle(model: NodeClassifier, x: torch.Tensor, graph: Graph) -> torch.Tensor:
    """The whole network written out with matrices, for the additive score and one edge a pair."""
    adjacency = graph.to_dense()

    def layer(module, x: torch.Tensor, concat: bool) -> torch.Tensor:
        heads, d_k = module.query_vector.shape
        h = (x @ module.value_projection.weight.T).reshape(len(x), heads, d_k)
        own, other = (h * module.query_vector).sum(-1), (h * module.key_vector).sum(-1)
        scores = F.leaky_relu(own[:, None] + other[None], 0.2).masked_fill(~adjacency[..., None], -torch.inf)
        output = torch.einsum("ijh,jhc->ihc", scores.softmax(1), h)
        output = output.flatten(1) if concat else output.mean(1)
        if module.config.residual:
            output = output + x @ module.residual_projection.weight.T
        return output + module.bias

    hidden = layer(model.first_layer, x, True)
    if model.norm is not None:
        centred = hidden - hidden.mean(1, keepdim=True)
        spread = (hidden.var(1, keepdim=True, unbiased=False) + model.norm.eps).sqrt()
        hidden = centred / spread * model.norm.weight + model.norm.bias
    return layer(model.second_layer, F.elu(hidden), False)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_agrees_with_the_network_written_out(residual: bool, layer_norm: bool) -> None:
    pairs = torch.rand(7, 7) < 0.4
    graph = Graph.from_adjacency(pairs | torch.eye(7, dtype=torch.bool))
    model = NodeClassifier(5, 3, hidden=6, heads=2, output_heads=2, residual=residual, layer_norm=layer_norm)
    model = model.double().eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x, graph).output, dense_oracle(model, x, graph), atol=1e-10, rtol=0)


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_sparse_features_agree_with_dense_ones(score) -> None:
    model = NodeClassifier(5, 3, score=score, hidden=6, heads=2, residual=True).eval()
    x = torch.randn(7, 5) * (torch.rand(7, 5) < 0.5)
    graph, cotangent = graph_of(), torch.randn(7, 3)
    found = []
    for features in (x, x.to_sparse_csr()):
        model.zero_grad()
        output = model(features, graph).output
        (output * cotangent).sum().backward()
        found.append((output.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_dropout_of_sparse_features_touches_stored_values_only(monkeypatch) -> None:
    model = NodeClassifier(50, 3, hidden=6, heads=2, dropout=0.5)
    x = (torch.rand(40, 50) < 0.3).float().to_sparse_csr()
    seen, forward = [], model.first_layer.forward

    def watch(x: torch.Tensor, graph: Graph, edge_features: None) -> anyattention.AttentionOutput:
        seen.append(x)
        return forward(x, graph)

    monkeypatch.setattr(model.first_layer, "forward", watch)
    model(x, graph_of(40))
    (dropped,) = seen
    assert dropped.layout == torch.sparse_csr
    assert torch.equal(dropped.crow_indices(), x.crow_indices())
    assert torch.equal(dropped.col_indices(), x.col_indices())
    assert set(dropped.values().tolist()) == {0.0, 2.0}
    share = float((dropped.values() == 0).double().mean())
    assert abs(share - 0.5) < 0.1
    assert torch.equal(x.values(), torch.ones_like(x.values()))


@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_dropout_acts_in_training_only(layout: str) -> None:
    model = NodeClassifier(5, 3, hidden=6, heads=2, dropout=0.5)
    x = torch.randn(7, 5)
    x = x.to_sparse_csr() if layout == "sparse" else x
    graph = graph_of()
    assert not torch.equal(model(x, graph).output, model(x, graph).output)
    model.eval()
    assert torch.equal(model(x, graph).output, model(x, graph).output)


def test_attention_dropout_is_a_setting_of_its_own() -> None:
    configs = NodeClassifierConfig(5, 3, dropout=0.3, attention_dropout=0.0).layer_configs()
    assert [config.base.dropout for config in configs] == [0.0, 0.0]
    configs = NodeClassifierConfig(5, 3, dropout=0.3).layer_configs()
    assert [config.base.dropout for config in configs] == [0.3, 0.3]
    model = NodeClassifier(5, 3, hidden=6, heads=2, dropout=0.0, attention_dropout=0.5)
    x, graph = torch.randn(7, 5), graph_of()
    assert not torch.equal(model(x, graph).output, model(x, graph).output)


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_equal_weights_are_equal_and_train_the_rest(score) -> None:
    graph, x = graph_of(), torch.randn(7, 5)
    model = NodeClassifier(5, 3, score=score, hidden=6, heads=2, dropout=0.0, equal_weights=True)
    output, weights = model(x, graph, return_weights=True)
    assert torch.equal(weights, 1 / graph.query_offsets.diff()[graph.query_index])
    attentive = NodeClassifier(5, 3, score=score, hidden=6, heads=2, dropout=0.0)
    attentive.load_state_dict(model.state_dict())
    assert not torch.equal(attentive(x, graph).output, output)
    (output * torch.randn(7, 3)).sum().backward()
    names = {"additive": "value_projection", "dynamic": "key_projection", "dot": "value_projection"}
    for layer in (model.first_layer, model.second_layer):
        assert (getattr(layer, names[score]).weight.grad != 0).any()


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_edge_features_reach_both_layers(score) -> None:
    graph, x = graph_of(), torch.randn(7, 5)
    model = NodeClassifier(5, 3, score=score, hidden=6, heads=2, edge_dim=2).eval()
    edges = torch.randn(graph.num_edges, 2)
    hidden = model.first_layer(x, graph, edges).output
    expected = model.second_layer(F.elu(hidden), graph, edges).output
    assert torch.equal(model(x, graph, edges).output, expected)
    assert not torch.equal(model(x, graph, torch.zeros_like(edges)).output, expected)


def test_features_are_standardised_by_those_that_were_measured(tmp_path) -> None:
    plain = NodeClassifier(5, 3, hidden=6, heads=2).eval()
    model = NodeClassifier(5, 3, hidden=6, heads=2, standardise=True).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    x, graph = 1000 + 7 * torch.randn(7, 5), graph_of()
    x[:, 1] = 3.3
    assert torch.equal(model(x, graph).output, plain(x, graph).output), "nothing is measured yet"
    model.measure_features(x)
    wide = x.double()
    deviation = wide.std(0, correction=0)
    deviation[1] = 1
    expected = ((wide - wide.mean(0)) / deviation).float()
    torch.testing.assert_close(model(x, graph).output, plain(expected, graph).output, atol=1e-4, rtol=1e-4)
    # One node alone is standardised as it is in its graph.
    alone = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), 1).with_self_loops()
    torch.testing.assert_close(model(x[:1], alone).output, plain(expected[:1], alone).output, atol=1e-4, rtol=1e-4)
    anyattention.save(model, tmp_path)
    assert torch.equal(anyattention.load(tmp_path)(x, graph).output, model(x, graph).output)


def test_a_feature_that_was_constant_becomes_zero() -> None:
    model = NodeClassifier(5, 3, hidden=6, heads=2, standardise=True).eval()
    x, graph = torch.randn(7, 5), graph_of()
    x[:, 1], x[:, 2] = 0.1, 0.0
    model.measure_features(x)
    before = model(x, graph).output
    x[:, 1], x[:, 2] = 1e6 * torch.rand(7), 5.0
    assert torch.equal(model(x, graph).output, before)
    # Twelve times 0.1 in float64 has a deviation of rounding.
    assert mean_and_deviation(torch.full((12, 1), 0.1, dtype=torch.float64))[1].isinf().all()
    assert [each.tolist() for each in mean_and_deviation(torch.empty(0, 1))] == [[0.0], [torch.inf]]


def test_large_features_do_not_overflow() -> None:
    x = torch.randn(7, 5)
    plain, large = (mean_and_deviation(factor * x) for factor in (1, 1e38))
    for one, other in zip(plain, large, strict=True):
        torch.testing.assert_close(other / 1e38, one, atol=1e-5, rtol=1e-5)


def test_weights_are_the_second_layer_s() -> None:
    graph = graph_of()
    model = NodeClassifier(5, 3, hidden=6, heads=2, output_heads=2).eval()
    output, weights = model(torch.randn(7, 5), graph, return_weights="heads")
    assert output.shape == (7, 3)
    assert weights.shape == (graph.num_edges, 2)
    sums = torch.zeros(7, 2).index_add(0, graph.query_index, weights)
    torch.testing.assert_close(sums, torch.ones(7, 2))


def test_saved_and_loaded(tmp_path) -> None:
    model = NodeClassifier(5, 3, score="dot", hidden=6, heads=3, attention_dropout=0.1, residual=True, layer_norm=True)
    anyattention.save(model, tmp_path)
    loaded = anyattention.load(tmp_path)
    assert loaded.config == model.config
    x, graph = torch.randn(7, 5), graph_of()
    assert torch.equal(loaded(x, graph).output, model.eval()(x, graph).output)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"heads": 5}, "heads: expected a divisor of hidden=64, got 5"),
        ({"hidden": 0}, "hidden: expected an int of at least 1, got 0"),
        ({"output_heads": True}, "output_heads: expected an int of at least 1, got True"),
        ({"num_classes": 1}, "num_classes: expected an int of at least 2, got 1"),
        ({"in_features": 0}, "in_features: expected an int of at least 1 and below"),
        ({"dropout": 1.0}, "dropout: expected a finite number at least 0 and below 1, got 1"),
        ({"attention_dropout": float("nan")}, "attention_dropout: expected a finite number at least 0"),
        ({"edge_dim": 0}, "edge_dim: expected an int of at least 1"),
        ({"equal_weights": 0}, "equal_weights: expected True or False, got 0"),
        ({"standardise": None}, "standardise: expected True or False, got None"),
        ({"residual": 1}, "residual: expected True or False, got 1"),
        ({"score": "loud"}, "score: expected one of 'additive', 'dynamic', 'dot', got 'loud'"),
    ],
)
def test_settings_are_checked(settings, text: str) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        NodeClassifierConfig(**{"in_features": 5, "num_classes": 3, **settings})


def test_a_config_without_its_sizes_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="num_classes: expected a value, in NodeClassifierConfig, got none"):
        NodeClassifierConfig.from_dict({"in_features": 3})
