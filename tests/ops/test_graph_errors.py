"""What attend refuses over a Graph, and what it refuses of a Graph's settings without one."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from anyattention import EdgeFeatures, attend, explain
from anyattention.errors import (
    AttentionError,
    DimensionMismatchError,
    InvalidInputError,
    InvalidMaskError,
    UnsupportedError,
)
from anyattention.patterns import Causal, Full, Graph
from anyattention.scores import Additive, Dot, Dynamic

# 5 queries, 7 keys, 3 edges, 2 heads, head_dim 4, value_dim 3, edge_dim 2.
_GRAPH = Graph.from_edge_index(torch.tensor([[0, 6, 2], [4, 1, 0]]), num_queries=5, num_keys=7)
_FEATURES = EdgeFeatures(torch.ones(3, 2), torch.ones(2, 4, 2), torch.ones(2, 3, 2))


def arguments(**changes: Any) -> dict[str, Any]:
    given = {"query": torch.ones(5, 2, 4), "key": torch.ones(7, 2, 4), "value": torch.ones(7, 2, 3), "pattern": _GRAPH}
    return given | changes


def batched(**changes: Any) -> dict[str, Any]:
    shapes = {"query": (11, 5, 2, 4), "key": (11, 7, 2, 4), "value": (11, 7, 2, 3)}
    return arguments(**{name: torch.ones(*shape) for name, shape in shapes.items()}) | changes


_CALLS = [
    (arguments(query=torch.ones(6, 2, 4)), DimensionMismatchError, r"query: expected \(queries=5, .* 5 in the graph"),
    (arguments(key=torch.ones(6, 2, 4)), DimensionMismatchError, r"key: .*keys=7.*got \(6, 2, 4\)"),
    (arguments(value=torch.ones(6, 2, 3)), DimensionMismatchError, r"value: .*keys=7.*got \(6, 2, 3\)"),
    (arguments(key=torch.ones(7, 3, 4)), DimensionMismatchError, r"key: .*heads=2.*got \(7, 3, 4\).*in query"),
    (arguments(key=torch.ones(7, 2, 5)), DimensionMismatchError, r"key: .*head_dim=4.*got \(7, 2, 5\)"),
    (arguments(query=torch.ones(5, 8)), DimensionMismatchError, r"query: .*got \(5, 8\)"),
    (arguments(key=torch.ones(1, 7, 2, 4)), DimensionMismatchError, r"key: .*got \(1, 7, 2, 4\)"),
    (batched(key=torch.ones(1, 7, 2, 4)), DimensionMismatchError, r"key: .*batch=11.*got \(1, 7, 2, 4\)"),
    (arguments(query=[[1.0]]), InvalidInputError, r"query: expected a torch\.Tensor, got list"),
    (arguments(key=None), InvalidInputError, r"key: expected a torch\.Tensor, got NoneType"),
    (arguments(query=torch.ones(5, 2, 4).long()), InvalidInputError, r"query: expected a floating-point dtype"),
    (arguments(value=torch.ones(7, 2, 3).double()), InvalidInputError, r"value: expected torch\.float32, as query"),
    (arguments(key=torch.ones(7, 2, 4, device="meta")), InvalidInputError, "key: expected device cpu, as query, got m"),
    (arguments(pattern=_GRAPH.to("meta")), InvalidInputError, "graph: expected device cpu, as query, got meta"),
    (arguments(pattern=torch.ones(5, 7)), InvalidInputError, "pattern: expected a pattern .*, got Tensor. a boolean t"),
    (arguments(score="dot"), InvalidInputError, r"score: expected Dot\(\), Additive\(\) or Dynamic\(vector\), got 'd"),
    (arguments(score=Additive()), DimensionMismatchError, "query: expected head_dim 1 with the score Additive .* 4"),
    (arguments(score=Dynamic(torch.ones(2, 5))), DimensionMismatchError, r"score\.vector: .*head_dim=4"),
    (arguments(score=Dynamic(torch.ones(4))), DimensionMismatchError, r"score\.vector: .*got \(4,\)"),
    (arguments(score=Dynamic(torch.ones(2, 4).double())), InvalidInputError, r"score\.vector: expected torch\.float32"),
    (
        arguments(score=Dynamic(torch.ones(2, 4), float("nan"))),
        InvalidInputError,
        r"score\.negative_slope: expected a finite number, got nan",
    ),
    (
        arguments(mask=torch.ones(3)),
        InvalidMaskError,
        r"mask: .*True means 'may attend', got torch\.float32.*mask_from",
    ),
    (arguments(mask=torch.ones(3).int()), InvalidMaskError, r"got torch\.int32. .*anyattention\.mask_from_blocked"),
    (
        arguments(mask=torch.ones(4, dtype=torch.bool)),
        InvalidMaskError,
        r"mask: expected \(3,\) or \(3, 2\): edges=3, heads=2, got \(4,\)",
    ),
    (arguments(mask=torch.ones(3, 1, dtype=torch.bool)), InvalidMaskError, r"got \(3, 1\)"),
    (arguments(mask=torch.ones(5, 7, dtype=torch.bool)), InvalidMaskError, r"got \(5, 7\)"),
    (arguments(mask=torch.ones(1, 3, 2, dtype=torch.bool)), InvalidMaskError, r"got \(1, 3, 2\)"),
    (
        batched(mask=torch.ones(1, 3, 2, dtype=torch.bool)),
        InvalidMaskError,
        r"mask: expected \(3,\) or \(3, 2\) or \(11, 3, 2\): edges=3, heads=2, batch=11, got \(1, 3, 2\)",
    ),
    (arguments(bias=torch.ones(2)), DimensionMismatchError, r"bias: expected \(3,\) or \(3, 2\).*, got \(2,\)"),
    (arguments(bias=torch.ones(3, dtype=torch.bool)), InvalidInputError, "bias: expected a floating-point dtype"),
    (arguments(edges=torch.ones(3, 2)), InvalidInputError, "edges: expected EdgeFeatures.* or None, got Tensor"),
    (
        arguments(edges=replace(_FEATURES, features=torch.ones(4, 2))),
        DimensionMismatchError,
        r"edges\.features: expected \(edges=3, edge_dim\), got \(4, 2\). edges is 3 in the graph",
    ),
    (
        arguments(edges=replace(_FEATURES, key_weight=torch.ones(2, 4, 3))),
        DimensionMismatchError,
        r"edges\.key_weight: .*edge_dim=2\), got \(2, 4, 3\). edge_dim is 2 in edges\.features",
    ),
    (
        arguments(edges=replace(_FEATURES, value_weight=torch.ones(2, 4, 2))),
        DimensionMismatchError,
        r"edges\.value_weight: .*value_dim=3.*, got \(2, 4, 2\)",
    ),
    (
        arguments(edges=replace(_FEATURES, features=torch.ones(3, 2).double())),
        InvalidInputError,
        r"edges\.features: expected torch\.float32, as query, got torch\.float64",
    ),
    (
        arguments(edges=EdgeFeatures(None, torch.ones(2, 4, 2))),  # pyright: ignore[reportArgumentType]
        InvalidInputError,
        r"edges\.features: expected a torch\.Tensor, got NoneType",
    ),
    (arguments(scale=float("inf")), InvalidInputError, "scale: expected a finite number, got inf"),
    (arguments(scale="large"), InvalidInputError, "scale: expected a finite number, got 'large'"),
    (arguments(softcap=0.0), InvalidInputError, r"softcap: expected a finite number above 0, got 0\.0"),
    (arguments(dropout=1.0), InvalidInputError, r"dropout: expected a finite number at least 0 and below 1, got 1\.0"),
    (arguments(dropout=-0.1), InvalidInputError, r"dropout: .*got -0\.1"),
    (arguments(aggregation="min"), InvalidInputError, "aggregation: expected 'sum', 'mean' or 'max', got 'min'"),
    (arguments(normalize=None), InvalidInputError, "normalize: expected True or False, got None"),
    (arguments(return_weights="all"), InvalidInputError, "return_weights: expected False, True, 'mean' or 'heads'"),
    (
        arguments(normalize=False, return_logsumexp=True),
        UnsupportedError,
        "return_logsumexp=True: with normalize=False",
    ),
    (arguments(implementation="torch"), InvalidInputError, "implementation: expected one of .*, got 'torch'"),
    (
        arguments(implementation="nonsense"),
        InvalidInputError,
        "implementation: expected one of .*'reference'.*got 'non",
    ),
]


@pytest.mark.parametrize(("given", "error", "match"), _CALLS)
def test_attend_and_explain_refuse(given: dict[str, Any], error: type, match: str) -> None:
    for entry in (attend, explain):
        with pytest.raises(error, match=match) as caught:
            entry(**given)
        assert isinstance(caught.value, AttentionError)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("pattern", [None, Full(), Causal("top_left")], ids=repr)
@pytest.mark.parametrize(
    ("setting", "error", "match"),
    [
        ({"aggregation": "mean"}, UnsupportedError, "aggregation='mean', normalize=True: .* a Graph has the others"),
        ({"aggregation": "max"}, UnsupportedError, "aggregation='max'"),
        ({"normalize": False}, UnsupportedError, "normalize=False: the pattern"),
        ({"edges": _FEATURES}, InvalidInputError, "edges: expected None with the pattern"),
    ],
)
def test_a_graphs_settings_are_refused_without_a_graph(
    pattern: Full | Causal | None, setting: dict[str, Any], error: type, match: str
) -> None:
    given = [torch.ones(1, 3, 2, 4)] * 3
    with pytest.raises(error, match=match):
        attend(*given, pattern, **setting)


def test_the_same_settings_are_taken_with_a_graph() -> None:
    given = arguments(edges=_FEATURES, return_weights=True)
    outputs = [attend(**given, **setting).output for setting in ({}, {"normalize": False}, {"aggregation": "mean"})]
    assert all(output.isfinite().all() for output in outputs)
    assert not torch.equal(outputs[0], outputs[1])


def test_explain_names_what_runs_and_computes_nothing() -> None:
    state = torch.random.get_rng_state()
    given = arguments(dropout=0.5, implementation="reference")
    assert explain(**given).implementation == "reference"
    assert str(explain(**given)).startswith("runs: reference")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("score", [Dot(), Dynamic(torch.ones(2, 4))], ids=["dot", "dynamic"])
def test_an_empty_graph_takes_the_same_checks(score: Dot | Dynamic) -> None:
    graph = Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), num_queries=5, num_keys=7)
    assert not attend(**arguments(pattern=graph, score=score)).output.any()
    with pytest.raises(DimensionMismatchError, match=r"key: .*keys=7"):
        attend(**arguments(pattern=graph, score=score, key=torch.ones(6, 2, 4)))
