"""Graphs remember the radius that they were built with, and layers of a larger one refuse them."""

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from anyattention import Graph, Window
from anyattention.errors import GraphStructureError
from anyattention.nn import DistanceAttention, EquivariantAttention

pytest.importorskip("vesin")

_LAYERS = [DistanceAttention, EquivariantAttention]
_POINTS = torch.rand(12, 3)
_X = torch.randn(12, 8)


def _layer(kind: type[Any], radius: float | None, **settings: Any) -> Any:
    return kind(8, 2, radius=radius, **settings).eval()


@pytest.mark.parametrize("kind", _LAYERS)
def test_a_layer_refuses_a_graph_of_a_smaller_radius(kind: type[nn.Module]) -> None:
    layer = _layer(kind, 0.6)
    graph = Graph.radius(_POINTS, 0.4)
    message = r"graph: expected a radius of at least 0\.6, the layer's, got a graph of radius 0\.4"
    for given in (graph, graph.with_self_loops(), graph.to("cpu"), Graph.batch([graph]), copy.deepcopy(graph)):
        with pytest.raises(GraphStructureError, match=message):
            layer(_X, _POINTS, graph=given)
        with pytest.raises(GraphStructureError, match=message):
            layer.explain_forward(_X, _POINTS, graph=given)


@pytest.mark.parametrize("kind", _LAYERS)
def test_the_energy_would_jump_as_a_pair_enters_the_smaller_radius(kind: type[nn.Module]) -> None:
    layer = _layer(kind, 0.6)

    def energy(distance: float, r: float) -> Tensor:
        points = torch.tensor([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])
        graph = Graph.radius(points, r).with_self_loops()
        # As an edge list, whose radius is not known.
        with torch.no_grad():
            return layer(_X[:2], points, graph=graph.edge_index).output.double().sum()

    jump = energy(0.4 + 1e-6, 0.4) - energy(0.4 - 1e-6, 0.4)
    smooth = energy(0.6 + 1e-6, 0.6) - energy(0.6 - 1e-6, 0.6)
    assert smooth.abs() < 1e-5
    assert jump.abs() > 1e-4


@pytest.mark.parametrize("kind", _LAYERS)
@pytest.mark.parametrize("radius", [0.4, 0.3, None, float(np.float32(0.4)), np.float32(0.4)], ids=repr)
def test_equal_smaller_and_no_radius_are_taken(kind: type[nn.Module], radius: float | None) -> None:
    _layer(kind, radius)(_X, _POINTS, graph=Graph.radius(_POINTS, 0.4).with_self_loops())


@pytest.mark.parametrize("kind", _LAYERS)
def test_graphs_of_unknown_radius_are_taken(kind: type[nn.Module]) -> None:
    layer, graph = _layer(kind, 0.6), Graph.radius(_POINTS, 0.4)
    for given in (graph.edge_index, Graph.from_edge_index(graph.edge_index, 12), Graph.nearest(_POINTS, 2)):
        layer(_X, _POINTS, graph=given)
    layer.distance_attention(_POINTS, _X, 0.2)


def test_who_keeps_the_radius_and_who_chooses_edges_otherwise() -> None:
    graph, other = Graph.radius(_POINTS, np.float32(0.5)), Graph.radius(_POINTS, 1)
    assert type(graph.search_radius) is float
    kept = [graph.with_self_loops(), graph.to_graph(), graph.to("meta"), _pytree.tree_map(lambda x: x, graph)]
    assert [each.search_radius for each in kept] == [0.5] * 4
    assert graph.to("meta").values is None
    plain = Graph.from_edge_index(graph.edge_index, 12)
    assert Graph.batch([other, graph, plain]).search_radius == 0.5
    lost = [Graph.batch([plain]), Graph.batch([]), (graph & Window(3, 3)).to_graph(12, 12), graph.edges_as_keys()]
    lost += [Graph.nearest(_POINTS, 2), (graph | Window(0, 0)).to_graph(12, 12)]
    assert [each.search_radius for each in lost] == [None] * 6
    assert Graph.radius(_POINTS[:0], 0.5).search_radius == 0.5
    assert Graph.radius(_POINTS, 0.5, queries=_POINTS[:3]).search_radius == 0.5


@pytest.mark.parametrize("kind", _LAYERS)
def test_compiled_whole(kind: type[nn.Module]) -> None:
    torch._dynamo.reset()
    layer = _layer(kind, 0.4)

    def call(x: Tensor, positions: Tensor, graph: Graph) -> Tensor:
        return layer(x, positions, graph=graph).output

    compiled: Callable[..., Tensor] = torch.compile(call, fullgraph=True, backend="aot_eager")
    for r in (0.4, 0.5, 0.7):
        graph = Graph.radius(_POINTS, r).with_self_loops()
        torch.testing.assert_close(compiled(_X, _POINTS, graph), call(_X, _POINTS, graph))


class _Output(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, positions: Tensor, graph: Graph) -> Tensor:
        return self.layer(x, positions, graph).output


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_that_was_exported_and_read_takes_graphs_of_any_radius(strict: bool) -> None:
    layer = _Output(_layer(DistanceAttention, 0.4))
    graph = Graph.radius(_POINTS, 0.4).with_self_loops()
    plain = Graph.from_edge_index(graph.edge_index, 12)
    for example in (graph, plain):
        file = io.BytesIO()
        torch.export.save(torch.export.export(layer, (_X, _POINTS, example), strict=strict), file)
        file.seek(0)
        with torch.serialization.safe_globals([Graph]):  # the example is a Graph
            exported = torch.export.load(file).module()
        for given in (graph, plain, dataclasses.replace(graph, search_radius=0.5)):
            moved = _POINTS * 0.9
            torch.testing.assert_close(exported(_X, moved, given), layer(_X, moved, given))
    with pytest.raises(GraphStructureError, match="the layer's"):
        torch.export.export(layer, (_X, _POINTS, Graph.radius(_POINTS, 0.3)), strict=False)


def test_trees_of_graphs_of_two_radii_are_of_one_structure() -> None:
    first, second = Graph.radius(_POINTS, 0.4), Graph.radius(_POINTS, 0.4 + 1e-9)
    sums = _pytree.tree_map(lambda x, y: x if x is None else x + y, first, second)
    assert sums.search_radius == 0.4
    assert torch.equal(sums.edge_index, 2 * first.edge_index)
