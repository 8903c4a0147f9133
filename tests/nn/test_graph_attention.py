"""nn.GraphAttention: its forms of input, each setting's effect, its parameters and its refusals."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from anyattention.config import AttentionConfig, GraphAttentionConfig
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    NumericalInstabilityError,
)
from anyattention.nn import GraphAttention
from anyattention.patterns import Graph

_SCORES = ("additive", "dynamic", "dot")
# Self-loops, a duplicate, and node 4 alone.
_EDGES = torch.tensor([[0, 1, 2, 3, 3, 0, 2, 2], [0, 0, 0, 1, 2, 2, 3, 0]])


@pytest.fixture(autouse=True)
def _sparse_csr_is_not_warned_about() -> Iterator[None]:
    # PyTorch warns once per process that its CSR and CSC tensors are in beta, which is no fault of the code here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CS[RC] tensor support is in beta", category=UserWarning)
        yield


def make_layer(score: str = "dynamic", *, width: int = 3, **settings: Any) -> GraphAttention:
    """Heads of width 3, two of them, in float64; no parameter is left at zero."""
    given: dict[str, Any] = {"in_features": width, "dropout": 0.0, "dtype": torch.float64} | settings
    layer = GraphAttention(6, 2, score=score, **given)  # pyright: ignore[reportArgumentType]
    layer.set_parameters(torch.randn(layer.parameter_count(), dtype=torch.float64))
    return layer


def nodes(*lead: int, count: int = 5, width: int = 3) -> Tensor:
    return torch.randn(*lead, count, width, dtype=torch.float64)


def assert_same_training(layer: GraphAttention, first: Any, second: Any, graph: Any) -> None:
    """Equal outputs, and equal gradients of the parameters."""
    outputs = [layer(x, graph).output for x in (first, second)]
    torch.testing.assert_close(outputs[0], outputs[1])
    cotangent = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, list(layer.parameters()), cotangent) for output in outputs]
    torch.testing.assert_close(gradients[0], gradients[1])


class TestInputs:
    @pytest.mark.parametrize("score", _SCORES)
    def test_an_edge_index_is_a_graph(self, score: str) -> None:
        layer, x = make_layer(score), nodes()
        by_graph = layer(x, Graph.from_edge_index(_EDGES, num_nodes=5), return_weights="heads")
        by_edges = layer(x, _EDGES, return_weights="heads")
        assert torch.equal(by_graph.output, by_edges.output)
        assert torch.equal(by_graph.weights, by_edges.weights)
        assert layer(x, _EDGES).weights is None
        torch.testing.assert_close(layer(x, _EDGES, return_weights=True).weights, by_edges.weights.mean(-1))

    @pytest.mark.parametrize("score", _SCORES)
    def test_graph_forward_returns_the_weights_of_each_edge_and_head(self, score: str) -> None:
        layer, x, edge_attr = make_layer(score, edge_dim=2), nodes(), torch.randn(8, 2, dtype=torch.float64)
        output, weights = layer.graph_forward(x, _EDGES, edge_attr)
        expected = layer(x, _EDGES, edge_attr, return_weights="heads")
        assert torch.equal(output, expected.output)
        assert weights is not None
        assert weights.shape == (8, 2)
        sums = torch.zeros(5, 2, dtype=torch.float64).index_add(0, _EDGES[1], weights)
        torch.testing.assert_close(sums, torch.tensor([1.0, 1, 1, 1, 0]).double()[:, None].expand(5, 2))

    @pytest.mark.parametrize("score", _SCORES)
    def test_sparse_forward_lets_rows_attend_to_columns(self, score: str) -> None:
        pairs = torch.zeros(5, 5, dtype=torch.float64)
        pairs[_EDGES[1], _EDGES[0]] = torch.rand(8, dtype=torch.float64) + 0.5
        layer, x = make_layer(score), nodes()
        query, key = pairs.nonzero(as_tuple=True)
        expected = layer.graph_forward(x, torch.stack([key, query]))
        matrices = [pairs, pairs.to_sparse_coo(), pairs.to_sparse_csr(), pairs.to_sparse_csc(), pairs.numpy()]
        matrices += [getattr(scipy.sparse, f"{layout}_array")(pairs.numpy()) for layout in ("csr", "csc", "coo", "lil")]
        for matrix in matrices:
            output, weights = layer.sparse_forward(x, matrix)
            torch.testing.assert_close(output, expected.output)
            assert weights is not None
            graph = Graph.from_adjacency(matrix)
            placed = torch.zeros(5, 5, 2, dtype=torch.float64)
            placed[graph.query_index, graph.key_index] = weights
            torch.testing.assert_close(placed[query, key], expected.weights)

    def test_sparse_forward_takes_edge_features_in_the_graphs_order(self) -> None:
        adjacency = scipy.sparse.csr_array(np.array([[0.0, 2.0, 0.0], [3.0, 0.0, 5.0], [0.0, 0.0, 0.0]]))
        layer, x = make_layer(edge_dim=1), nodes(count=3)
        values = torch.tensor([[2.0], [3.0], [5.0]], dtype=torch.float64)
        expected = layer(x, torch.tensor([[1, 0, 2], [0, 1, 1]]), values)
        torch.testing.assert_close(layer.sparse_forward(x, adjacency, values).output, expected.output)

    @pytest.mark.parametrize("use_bias", [True, False])
    @pytest.mark.parametrize("score", _SCORES)
    def test_sparse_features_equal_dense_ones(self, score: str, use_bias: bool) -> None:
        x = nodes() * (torch.rand(5, 3) < 0.5)
        layer = make_layer(score, residual=True, use_bias=use_bias)
        assert_same_training(layer, x, x.to_sparse_csr(), _EDGES)
        source, target = nodes(count=7) * (torch.rand(7, 3) < 0.5), nodes(width=2)
        pair = make_layer(score, in_features=(3, 2), residual=True, use_bias=use_bias)
        edges = torch.tensor([[6, 0, 5], [4, 4, 0]])
        assert_same_training(pair, (source, target), (source.to_sparse_csr(), target), edges)
        assert_same_training(pair, (source, target), (source, target.to_sparse_csr()), edges)

    @pytest.mark.parametrize("score", _SCORES)
    def test_the_gradient_of_sparse_features_is_that_of_the_dense_ones(self, score: str) -> None:
        layer = make_layer(score)
        dense = (nodes() * (torch.rand(5, 3) < 0.5)).requires_grad_()
        sparse = dense.detach().to_sparse_csr().requires_grad_()
        cotangent = torch.randn(5, 6, dtype=torch.float64)
        (expected,) = torch.autograd.grad(layer(dense, _EDGES).output, dense, cotangent)
        (actual,) = torch.autograd.grad(layer(sparse, _EDGES).output, sparse, cotangent)
        stored = dense != 0
        torch.testing.assert_close(actual.to_dense()[stored], expected[stored])

    @pytest.mark.parametrize("score", _SCORES)
    def test_a_batch_of_features_over_one_graph(self, score: str) -> None:
        layer, x = make_layer(score, residual=True, edge_dim=2), nodes(3)
        edge_attr = torch.randn(8, 2, dtype=torch.float64)
        output, weights = layer(x, _EDGES, edge_attr, return_weights="heads")
        assert output.shape == (3, 5, 6)
        assert weights.shape == (3, 8, 2)
        for each in range(3):
            alone = layer(x[each], _EDGES, edge_attr, return_weights="heads")
            torch.testing.assert_close(output[each], alone.output)
            torch.testing.assert_close(weights[each], alone.weights)

    @pytest.mark.parametrize("score", _SCORES)
    def test_a_mask_leaves_edges_out(self, score: str) -> None:
        layer, x = make_layer(score), nodes()
        mask = torch.tensor([True, False, True, True, True, False, True, True])
        torch.testing.assert_close(layer(x, _EDGES, mask=mask).output, layer(x, _EDGES[:, mask]).output)

    @pytest.mark.parametrize("score", _SCORES)
    def test_a_graph_without_edges_or_nodes(self, score: str) -> None:
        layer = make_layer(score, residual=True)
        none = torch.empty(2, 0, dtype=torch.int64)
        x = nodes()
        expected = x @ layer.residual_projection.weight.T + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(x, none).output, expected)
        output, weights = layer.graph_forward(nodes(count=0), none)
        assert output.shape == (0, 6)
        assert weights is not None
        assert weights.shape == (0, 2)


class TestSettings:
    """The same weights give another output; where a formula is short, the right one."""

    @pytest.mark.parametrize("score", _SCORES)
    @pytest.mark.parametrize(
        "change",
        [
            {"aggregation": "mean"},
            {"aggregation": "max"},
            {"normalize": False},
            {"scale": 3.0},
            {"negative_slope": 0.6},
            {"dropout": 0.5},
        ],
        ids=str,
    )
    def test_each_changes_the_output(self, change: dict[str, Any], score: str) -> None:
        if score == "dot" and "negative_slope" in change:
            with pytest.raises(InvalidConfigError, match=r"negative_slope: .*the dot product has no LeakyReLU"):
                make_layer(score, **change)
            return
        plain, changed, x = make_layer(score), make_layer(score, **change), nodes()
        changed.load_state_dict(plain.state_dict())
        difference = (plain(x, _EDGES).output - changed(x, _EDGES).output).abs()
        assert difference[0].max() > 1e-3
        assert difference[4].max() == 0.0

    @pytest.mark.parametrize("score", _SCORES)
    def test_dropout_acts_in_training_only(self, score: str) -> None:
        layer, x = make_layer(score, dropout=0.5), nodes()
        first, second = layer(x, _EDGES).output, layer(x, _EDGES).output
        assert not torch.equal(first, second)
        torch.manual_seed(7)
        first = layer(x, _EDGES).output
        torch.manual_seed(7)
        assert torch.equal(layer(x, _EDGES).output, first)
        plain = make_layer(score)
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(layer.eval()(x, _EDGES).output, plain(x, _EDGES).output)

    @pytest.mark.parametrize("score", _SCORES)
    def test_the_mean_is_the_sum_over_the_number_of_edges(self, score: str) -> None:
        plain, mean, x = (
            make_layer(score, use_bias=False),
            make_layer(score, use_bias=False, aggregation="mean"),
            nodes(),
        )
        mean.load_state_dict(plain.state_dict())
        degree = torch.tensor([4.0, 1, 2, 1, 1], dtype=torch.float64)
        torch.testing.assert_close(mean(x, _EDGES).output, plain(x, _EDGES).output / degree[:, None])

    @pytest.mark.parametrize("score", _SCORES)
    def test_the_default_scale_is_the_scores_own(self, score: str) -> None:
        scale = 1 / math.sqrt(3) if score == "dot" else 1.0
        plain, scaled, x = make_layer(score), make_layer(score, scale=scale), nodes()
        scaled.load_state_dict(plain.state_dict())
        assert plain.config.base.scale is None
        torch.testing.assert_close(plain(x, _EDGES).output, scaled(x, _EDGES).output)

    @pytest.mark.parametrize("score", _SCORES)
    def test_heads_are_joined_or_averaged(self, score: str) -> None:
        joined, averaged, x = (
            make_layer(score, use_bias=False),
            make_layer(score, use_bias=False, concat=False),
            nodes(),
        )
        averaged.load_state_dict(joined.state_dict())
        by_head = joined(x, _EDGES).output.unflatten(-1, (2, 3))
        assert not torch.allclose(by_head[:, 0], by_head[:, 1])
        torch.testing.assert_close(averaged(x, _EDGES).output, by_head.mean(1))

    @pytest.mark.parametrize("concat", [True, False])
    @pytest.mark.parametrize("score", _SCORES)
    def test_the_residual_is_a_linear_map_of_the_target(self, score: str, concat: bool) -> None:
        layer = make_layer(score, in_features=(3, 2), residual=True, concat=concat)
        plain = make_layer(score, in_features=(3, 2), concat=concat)
        plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
        x, edges = (nodes(count=4), nodes(width=2)), torch.tensor([[3, 0], [4, 1]])
        added = x[1] @ layer.residual_projection.weight.T
        torch.testing.assert_close(layer(x, edges).output, plain(x, edges).output + added)

    @pytest.mark.parametrize("score", _SCORES)
    def test_use_bias_governs_every_bias(self, score: str) -> None:
        names = {name for name, _ in make_layer(score, residual=True).named_parameters() if "bias" in name}
        projections = {f"{part}_projection.bias" for part in ("query", "key", "value")}
        expected = {
            "additive": {"bias"},
            "dynamic": {"bias"} | projections - {"value_projection.bias"},
            "dot": projections,
        }
        assert names == expected[score]
        assert not any("bias" in name for name, _ in make_layer(score, use_bias=False).named_parameters())
        layer, x = make_layer(score), nodes()
        before = layer(x, _EDGES).output
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "bias" in name:
                    parameter.zero_()
        assert not torch.allclose(layer(x, _EDGES).output, before)

    @pytest.mark.parametrize("score", _SCORES)
    def test_check_finite_raises_where_plain_layers_return_nan(self, score: str) -> None:
        x = nodes()
        x[2, 1] = math.nan
        assert make_layer(score)(x, _EDGES).output[0].isnan().all()
        with pytest.raises(
            NumericalInstabilityError, match=r"GraphAttention output: expected finite numbers .* NaN or"
        ):
            make_layer(score, check_finite=True)(x, _EDGES)
        assert make_layer(score, check_finite=True)(nodes(), _EDGES).output.isfinite().all()

    @pytest.mark.parametrize("score", _SCORES)
    def test_nan_in_a_node_that_no_edge_names_stays_there(self, score: str) -> None:
        layer, x = make_layer(score), nodes()
        expected = layer(x, _EDGES).output
        x[4] = math.nan
        assert torch.equal(layer(x, _EDGES).output, expected)

    def test_a_config_makes_the_same_layer(self) -> None:
        base = AttentionConfig(d_model=6, num_heads=2, dropout=0.25, use_bias=False, scale=0.5, check_finite=True)
        config = GraphAttentionConfig(
            base,
            edge_dim=2,
            aggregation="max",
            normalize=False,
            negative_slope=0.3,
            score="additive",
            in_features=(3, 2),
            concat=False,
            residual=True,
        )
        layer = GraphAttention.from_config(config, dtype=torch.float64)
        assert layer.config == config
        assert layer.config.use_edge_features
        assert (layer.d_model, layer.num_graph_heads, layer.name) == (6, 2, "GraphAttention")
        assert layer.supports_edge_features
        assert not layer.supports_heterogeneous
        assert "additive" in repr(layer)
        assert not make_layer().supports_edge_features


class TestParameters:
    @pytest.mark.parametrize("score", _SCORES)
    def test_their_names_shapes_and_order_are_fixed(self, score: str) -> None:
        layer = make_layer(score, edge_dim=2, residual=True, in_features=(3, 2))
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        linear = {"weight": (6, 3), "bias": (6,)}
        key = {f"key_projection.{part}": shape for part, shape in linear.items()}
        query = {"query_projection.weight": (6, 2), "query_projection.bias": (6,)}
        value = {f"value_projection.{part}": shape for part, shape in linear.items()}
        residual = {"residual_projection.weight": (6, 2)}
        expected: dict[str, dict[str, tuple[int, ...]]] = {
            "additive": {"query_vector": (2, 3), "key_vector": (2, 3), "edge_weight": (2, 1, 2), "bias": (6,)}
            | {"value_projection.weight": (6, 3), "query_projection.weight": (6, 2)}
            | residual,
            "dynamic": {"score_vector": (2, 3), "edge_weight": (2, 3, 2), "bias": (6,)} | query | key | residual,
            "dot": {"edge_weight": (2, 3, 2)} | query | key | value | residual,
        }
        assert list(shapes.items()) == list(expected[score].items())

    @pytest.mark.parametrize("score", _SCORES)
    def test_reset_parameters_draws_anew_within_xaviers_bounds(self, score: str) -> None:
        layer = make_layer(score, edge_dim=2, residual=True)
        layer.reset_parameters()
        drawn = layer.get_parameters()
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif parameter.ndim == 2:
                bound = math.sqrt(6 / sum(parameter.shape))
                assert 0 < parameter.abs().max() <= bound, name
            else:
                assert parameter.any(), name
        layer.reset_parameters()
        assert not torch.equal(layer.get_parameters(), drawn)
        torch.manual_seed(3)
        layer.reset_parameters()
        again = layer.get_parameters()
        torch.manual_seed(3)
        layer.reset_parameters()
        assert torch.equal(layer.get_parameters(), again)

    @pytest.mark.parametrize("score", _SCORES)
    def test_every_parameter_has_a_gradient(self, score: str) -> None:
        layer = make_layer(score, edge_dim=2, residual=True, in_features=(3, 2))
        x, edges = (nodes(count=4), nodes(width=2)), torch.tensor([[3, 0, 1, 1], [4, 1, 1, 4]])
        output = layer(x, edges, torch.randn(4, 2, dtype=torch.float64)).output
        output.backward(torch.randn_like(output))
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # Each query's softmax is blind to a shift of all its keys.
            if (score, name) != ("dot", "key_projection.bias"):
                assert parameter.grad.abs().max() > 1e-9, name


_WIDE = make_layer(edge_dim=2)
_PLAIN = make_layer()
_X = torch.ones(5, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("layer", "given", "error", "match"),
    [
        (_PLAIN, (_X[:, :2], _EDGES), DimensionMismatchError, r"x: .*3\), got \(5, 2\). .*is 3 in the module"),
        (_PLAIN, (_X[0], _EDGES), DimensionMismatchError, r"x: .*got \(3,\)"),
        (_PLAIN, (_X[None, None], _EDGES), DimensionMismatchError, r"x: .*got \(1, 1, 5, 3\)"),
        (_PLAIN, (_X.tolist(), _EDGES), InvalidInputError, "x: expected a tensor or a pair .*, got 5 items"),
        (_PLAIN, ((_X, _X, _X), _EDGES), InvalidInputError, "x: expected a tensor or a pair .*, got 3 items"),
        (_PLAIN, ("nodes", _EDGES), InvalidInputError, r"x: expected a torch\.Tensor, got str"),
        (_PLAIN, ((_X, None), _EDGES), InvalidInputError, r"x\[1\]: expected a torch\.Tensor, got NoneType"),
        (_PLAIN, (_X.long(), _EDGES), InvalidInputError, "x: expected a floating-point dtype.*, got torch.int64"),
        (_PLAIN, (_X.float(), _EDGES), InvalidInputError, r"x: expected torch\.float64.*got torch\.float32"),
        (_PLAIN, (_X.to_sparse_coo(), _EDGES), InvalidInputError, "x: expected a dense tensor or a sparse CSR matrix"),
        (_PLAIN, (_X, _EDGES.T), DimensionMismatchError, r"edge_index: expected \(2, edges\), got \(8, 2\)"),
        (_PLAIN, (_X, _EDGES.int()), InvalidInputError, r"edge_index: expected torch\.int64, got torch\.int32"),
        (_PLAIN, (_X, _EDGES + 2), GraphStructureError, r"source \(key\): .*\(5 nodes\), got 5 at edge 3"),
        (_PLAIN, (_X, _EDGES.tolist()), InvalidInputError, "graph: expected a Graph or an edge_index, got list"),
        (
            _PLAIN,
            (_X, Graph.from_edge_index(_EDGES, num_nodes=6)),
            DimensionMismatchError,
            "graph: expected 5 keys and 5 queries, the nodes of x, got 6 keys and 6 queries",
        ),
        (_PLAIN, (_X, _EDGES, torch.ones(8, 2)), InvalidInputError, "edge_attr: expected None: .*without edge_dim"),
        (_WIDE, (_X, _EDGES), InvalidInputError, r"edge_attr: expected \(edges, edge_dim=2\), got None"),
        (
            _WIDE,
            (_X, _EDGES, torch.ones(8, 3, dtype=torch.float64)),
            DimensionMismatchError,
            r"edge_attr: expected \(edges=8, edge_dim=2\), got \(8, 3\). edge_dim is 2 in the module",
        ),
        (_WIDE, (_X, _EDGES, torch.ones(7, 2, dtype=torch.float64)), DimensionMismatchError, "edges is 8 in the graph"),
        (_WIDE, (_X, _EDGES, torch.ones(8, dtype=torch.float64)), DimensionMismatchError, r"edge_attr: .*got \(8,\)"),
        (_WIDE, (_X, _EDGES, torch.ones(8, 2).long()), InvalidInputError, "edge_attr: expected a floating-point dtype"),
        (_WIDE, (_X, _EDGES, torch.ones(8, 2)), InvalidInputError, r"edge_attr: expected torch\.float64"),
    ],
)
def test_a_call_refuses(layer: GraphAttention, given: tuple[Any, ...], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        layer(*given)


def test_a_mask_must_be_boolean() -> None:
    with pytest.raises(InvalidMaskError, match=r"mask: .*got torch\.int64"):
        _PLAIN(_X, _EDGES, mask=torch.ones(8).long())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"edge_dim": 0}, "edge_dim"),
        ({"use_edge_features": True}, "edge_dim: expected a width, got None. use_edge_features is True"),
        ({"use_edge_features": False, "edge_dim": 2}, "edge_dim: expected None, got 2"),
        ({"score": "cosine"}, "score: .*'cosine'"),
        ({"aggregation": "min"}, "aggregation: .*'min'"),
        ({"in_features": (3, 2, 1)}, "in_features: expected an int, a pair"),
        ({"in_features": 0}, "in_features"),
        ({"negative_slope": math.nan}, "negative_slope: expected a finite number, got nan"),
        ({"num_heads": 4}, "num_heads: expected a divisor of d_model=6, got 4"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_the_constructor_refuses(settings: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"d_model": 6, "num_heads": 2} | settings
    with pytest.raises(InvalidConfigError, match=match):
        GraphAttention(**given)
