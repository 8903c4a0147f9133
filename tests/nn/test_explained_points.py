"""What layers between points say that they run, and what their graph lacks."""

from typing import Any

import pytest
import torch

from anyattention import Graph
from anyattention.errors import AttentionError, DimensionMismatchError, InvalidMaskError
from anyattention.nn import DistanceAttention, EquivariantAttention

_EDGES = torch.tensor([[0, 1, 2, 1, 1], [1, 0, 1, 2, 1]])
_GRAPH = Graph.from_edge_index(_EDGES, num_nodes=4)
_X, _POINTS = torch.randn(4, 8), torch.rand(4, 3)
_LACKING = (
    "3 of 4 points have no edge to themselves, which the smooth cut-off needs: their output jumps as the last "
    "neighbour leaves; graph.with_self_loops() adds the edges"
)


@pytest.fixture(params=[DistanceAttention, EquivariantAttention])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("graph", [_GRAPH, _EDGES], ids=["Graph", "edge_index"])
def test_self_loops_that_are_forgotten_are_named_in_a_line(kind: Any, graph: Any) -> None:
    explanation = kind(8, 2, radius=1.0).explain_forward(_X, _POINTS, graph=graph)
    assert explanation.notes[-1] == _LACKING
    assert str(explanation).splitlines()[-1] == _LACKING


def test_without_them_the_output_jumps_as_the_last_neighbour_leaves(kind: Any) -> None:
    layer = kind(8, 2, radius=1.0).eval()

    def output(distance: float, graph: Graph) -> torch.Tensor:
        with torch.no_grad():
            return layer(_X[:2], torch.tensor([[0.0, 0, 0], [distance, 0, 0]]), graph=graph).output

    pair = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), num_nodes=2)
    for graph, jumps in ((pair, True), (pair.with_self_loops(), False)):
        is_lacking = "no edge to themselves" in str(layer.explain_forward(_X[:2], _POINTS[:2], graph=graph))
        assert is_lacking == jumps
        assert ((output(0.999, graph) - output(1.001, graph)).abs().max() > 1e-3) == jumps


def test_nothing_is_said_where_nothing_is_lacking(kind: Any) -> None:
    image = Graph.from_edge_index(torch.tensor([[0], [0]]), 1, shifts=torch.tensor([[1, 0, 0]]))
    for layer, graph in (
        (kind(8, 2, radius=1.0), _GRAPH.with_self_loops()),
        (kind(8, 2, radius=1.0), None),
        (kind(8, 2), _GRAPH),
        (kind(8, 2, radial_range=1.0), _GRAPH),
    ):
        assert "to themselves" not in str(layer.explain_forward(_X, _POINTS, graph=graph))
    layer = kind(8, 2, radius=1.0)
    found = layer.explain_forward(_X[:1], _POINTS[:1], graph=image, cell=torch.eye(3))
    assert "1 of 1 points have no edge to themselves" in str(found)


@pytest.mark.parametrize(
    ("settings", "graph", "note"),
    [
        ({}, None, "dense attention over all pairs"),
        ({"radius": 1.0}, None, "over the pairs within the radius, found among all pairs"),
        ({"radial_range": 1.0}, None, "over a graph of all pairs"),
        ({}, _GRAPH, "over the graph's 5 edges"),
    ],
)
def test_the_pairs_are_named(kind: Any, settings: dict[str, Any], graph: Graph | None, note: str) -> None:
    for batch in ((), (2,)):
        x, points = _X.expand(*batch, 4, 8), _POINTS.expand(*batch, 4, 3)
        explanation = kind(8, 2, **settings).explain_forward(x, points, graph=graph)
        assert explanation.notes[0] == note


def test_what_has_no_kernel_is_named(kind: Any, native: object, monkeypatch: pytest.MonkeyPatch) -> None:
    bessel = kind(8, 2, radius=1.0, radial_basis="bessel")
    explanation = bessel.explain_forward(_X, _POINTS, graph=_GRAPH.with_self_loops())
    assert explanation.implementation == "cpu"
    assert explanation.notes[1:] == ("the scores of the distance run as reference: the kernel has no bessel basis",)
    monkeypatch.setattr("anyattention.native.available", lambda: False)
    explanation = kind(8, 2, radius=1.0).explain_forward(_X, _POINTS, graph=_GRAPH.with_self_loops())
    assert explanation.implementation == "reference"
    assert "no kernels are compiled" in str(explanation)


def test_weights_over_all_pairs_run_on_the_kernels(kind: Any, native: object) -> None:
    layer = kind(8, 2)
    assert layer.explain_forward(_X, _POINTS, return_weights=True).implementation == "cpu"
    assert layer.explain_forward(_X, _POINTS, mask=torch.ones(4, 4, dtype=torch.bool)).implementation == "cpu"


def test_arguments_that_do_not_fit_are_refused_as_in_forward(kind: Any) -> None:
    layer = kind(8, 2, radius=1.0)
    with pytest.raises(DimensionMismatchError, match="features: expected"):
        layer.explain_forward(_X[:, :7], _POINTS, graph=_GRAPH)
    with pytest.raises(InvalidMaskError, match="mask: expected"):
        layer.explain_forward(_X, _POINTS, graph=_GRAPH, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(AttentionError, match="return_weights: expected"):
        layer.explain_forward(_X, _POINTS, graph=_GRAPH, return_weights="all")
