"""Calls and settings of nn.GraphTransformerLayer that do not fit: typed errors that name the argument."""

from typing import Any

import pytest
import torch

from anyattention import AttentionConfig, ExpanderGraph, Graph, GraphTransformerConfig
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    NumericalInstabilityError,
    UnsupportedError,
)
from anyattention.nn import GraphTransformerLayer

GRAPH = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 3]]), num_nodes=5)
X = torch.ones(5, 8)
EXPANDER = ExpanderGraph.from_graph(GRAPH, 2)
DISTANCES = torch.zeros(5, 5, dtype=torch.int64)


def layer(attention: Any = "graph", **settings: Any) -> GraphTransformerLayer:
    return GraphTransformerLayer(8, 2, attention=attention, **settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"attention": "both"}, "attention: expected one of 'graph', 'all', 'expander', 'graph \\+ all', got 'both'"),
        ({"activation": "tanh"}, "activation: expected one of 'gelu', 'relu'"),
        ({"score": "cosine"}, "score: expected one of"),
        ({"hidden_features": 0}, "hidden_features: expected an int of at least 1"),
        ({"feature_dropout": 1.0}, "feature_dropout: expected a finite number at least 0 and below 1"),
        ({"edge_dim": 0}, "edge_dim: expected an int of at least 1"),
        ({"max_distance": 0, "attention": "all"}, "max_distance: expected an int of at least 1"),
        ({"max_distance": 2}, "max_distance: expected its default None here.*does not go over all nodes"),
        ({"attention": "all", "edge_dim": 3}, "edge_dim: expected its default None here.*goes over no edges"),
        ({"attention": "all", "score": "additive"}, "score: expected its default 'dot' here"),
        ({"base": AttentionConfig(causal=True)}, "causal: expected its default False here"),
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        GraphTransformerConfig(**settings)


def test_config_of_another_kind() -> None:
    with pytest.raises(InvalidConfigError, match="config: expected GraphTransformerConfig, got AttentionConfig"):
        GraphTransformerLayer.from_config(AttentionConfig())  # pyright: ignore[reportArgumentType]


def test_settings_are_kept() -> None:
    settings: dict[str, Any] = {"attention": "graph + all", "score": "dynamic", "edge_dim": 3, "max_distance": 4}
    settings |= {"hidden_features": 5, "activation": "relu", "feature_dropout": 0.3}
    config = GraphTransformerConfig(AttentionConfig(8, 2, dropout=0.2), **settings)
    made = GraphTransformerLayer(8, 2, dropout=0.2, **settings)
    assert made.config == config == GraphTransformerLayer.from_config(config).config
    assert GraphTransformerConfig.from_json(config.to_json()) == config
    assert made.distance_bias.shape == (2, 6)
    assert made.feed_forward[0].out_features == 5
    assert (made.d_model, made.num_graph_heads, made.supports_edge_features) == (8, 2, True)
    assert "attention='graph + all'" in repr(made)
    assert GraphTransformerConfig(AttentionConfig(8, 2)).get_hidden_features() == 16


@pytest.mark.parametrize(
    ("made", "arguments", "given", "error", "text"),
    [
        (
            layer(),
            (torch.ones(5, 7), GRAPH),
            {},
            DimensionMismatchError,
            r"x: expected \(nodes=5, d_model=8\), got \(5, 7\)",
        ),
        (layer(), (torch.ones(8), GRAPH), {}, DimensionMismatchError, r"x: expected \(nodes, d_model=8\)"),
        (layer(), (X.double(), GRAPH), {}, InvalidInputError, "x: expected torch.float32, as the parameters"),
        (layer(), (X.long(), GRAPH), {}, InvalidInputError, "x: expected a floating-point"),
        (layer(), (X.to_sparse(), GRAPH), {}, InvalidInputError, "x: expected a dense tensor"),
        (layer(), (torch.ones(4, 8), GRAPH), {}, DimensionMismatchError, "graph: expected 4 keys and 4 queries"),
        (layer(), (X,), {}, InvalidInputError, "graph: expected a Graph or an edge_index, got NoneType"),
        (layer(), (X, [[0], [1]]), {}, InvalidInputError, "graph: expected a Graph or an edge_index"),
        (layer(), (X, torch.tensor([[0], [5]])), {}, GraphStructureError, "target"),
        (layer(), (X, EXPANDER), {}, InvalidInputError, "graph: expected a Graph.*attention='graph'"),
        (layer("expander"), (X, GRAPH), {}, InvalidInputError, "graph: expected an ExpanderGraph, got Graph"),
        (layer("expander"), (X, EXPANDER), {}, DimensionMismatchError, "graph: expected 5 keys"),
        (
            layer(),
            (X, GRAPH, torch.ones(3, 2)),
            {},
            InvalidInputError,
            "edge_attr: expected None: the module was built",
        ),
        (layer(edge_dim=2), (X, GRAPH), {}, InvalidInputError, r"edge_attr: expected \(edges, edge_dim=2\)"),
        (
            layer("all"),
            (X, GRAPH, torch.ones(3, 2)),
            {},
            InvalidInputError,
            "edge_attr: expected None: attention over all",
        ),
        (
            layer("expander", edge_dim=2),
            (torch.ones(6, 8), EXPANDER),
            {},
            InvalidInputError,
            r"edge_attr: expected \(edges=3, edge_dim=2\), got None",
        ),
        (
            layer("expander"),
            (torch.ones(6, 8), EXPANDER, torch.ones(3, 2)),
            {},
            InvalidInputError,
            "edge_attr: expected None: the module was built without edge_dim",
        ),
        (
            layer("expander", edge_dim=2),
            (torch.ones(6, 8), EXPANDER, torch.ones(3, 4)),
            {},
            DimensionMismatchError,
            r"edge_attr: expected \(edges=3, edge_dim=2\), got \(3, 4\)",
        ),
        (
            layer("expander", edge_dim=2),
            (torch.ones(6, 8), EXPANDER, torch.ones(4, 2)),
            {},
            DimensionMismatchError,
            r"edge_attr: expected \(edges=3, edge_dim\), got \(4, 2\)",
        ),
        (
            layer("expander", edge_dim=2),
            (torch.ones(6, 8), EXPANDER, torch.ones(3, 2, dtype=torch.int64)),
            {},
            InvalidInputError,
            "edge_attr: expected a floating-point",
        ),
        (
            layer(),
            (X, GRAPH),
            {"distances": DISTANCES},
            InvalidInputError,
            "distances: expected None without attention",
        ),
        (layer("all"), (X,), {"distances": DISTANCES}, InvalidInputError, "distances: expected None: the module"),
        (layer("all", max_distance=2), (X,), {}, InvalidInputError, r"distances: expected \(nodes, nodes\)"),
        (
            layer("all", max_distance=2),
            (X,),
            {"distances": DISTANCES[:4]},
            DimensionMismatchError,
            r"distances: expected \(nodes=5, nodes=5\), got \(4, 5\)",
        ),
        (
            layer("all", max_distance=2),
            (X,),
            {"distances": DISTANCES.float()},
            InvalidInputError,
            "distances: expected torch.int64",
        ),
        (layer("all"), (X,), {"sizes": [2, 2]}, DimensionMismatchError, "sizes: expected numbers that add up to the 5"),
        (
            layer("all"),
            (X,),
            {"sizes": [6, -1]},
            InvalidInputError,
            "sizes: expected the number of nodes of each graph",
        ),
        (layer("all"), (X,), {"sizes": 5}, InvalidInputError, "sizes: expected the number of nodes of each graph"),
        (layer("all"), (X,), {"batch": torch.zeros(4).long()}, DimensionMismatchError, r"batch: expected \(5,\)"),
        (layer("all"), (X,), {"batch": torch.zeros(5)}, InvalidInputError, "batch: expected torch.int64"),
        (layer("all"), (X,), {"batch": [0] * 5}, InvalidInputError, "batch: expected a torch.Tensor"),
        (
            layer("all"),
            (X,),
            {"batch": torch.tensor([0, 1, 0, 1, 1])},
            GraphStructureError,
            "batch: expected graph numbers from 0 that never fall",
        ),
        (
            layer("all"),
            (X,),
            {"batch": torch.zeros(5).long(), "sizes": [5]},
            InvalidInputError,
            "batch: expected None beside sizes",
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_calls(made: Any, arguments: Any, given: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        made(*arguments, **given)


def test_a_batch_that_is_mapped_cannot_be_read() -> None:
    made = layer("all")
    with pytest.raises(UnsupportedError, match="batch cannot be read here: give sizes"):
        torch.vmap(lambda batch: made(X, batch=batch).output)(torch.zeros(2, 5, dtype=torch.int64))


def test_check_finite() -> None:
    x = torch.full((5, 8), torch.nan)
    with pytest.raises(NumericalInstabilityError, match="GraphTransformerLayer output"):
        layer(check_finite=True)(x, GRAPH)
