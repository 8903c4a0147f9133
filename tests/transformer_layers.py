"""Graphs, layers and calls of nn.GraphTransformerLayer that its tests share."""

from typing import Any

import torch
from torch import Tensor, nn

from anyattention import ExpanderGraph, Graph
from anyattention.nn import GraphTransformerLayer

# A self-loop, a duplicate edge, an isolated node (4) and one that only sends (0); then a second graph of 3 nodes.
EDGE_INDEX = torch.tensor([[0, 0, 1, 2, 2, 5, 0, 3, 6, 7], [1, 2, 2, 2, 3, 1, 1, 5, 7, 8]])
SIZES = (6, 3)
GRAPH = Graph.from_edge_index(EDGE_INDEX, num_nodes=9)
KINDS = ("graph", "all", "expander", "graph + all")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def expander(graph: Graph = GRAPH, sizes: tuple[int, ...] = SIZES, virtual: int = 1) -> ExpanderGraph:
    generator = torch.Generator().manual_seed(3)
    return ExpanderGraph.from_graph(graph, 2, num_virtual_nodes=virtual, sizes=sizes, generator=generator)


def layer_of(attention: Any, **settings: Any) -> GraphTransformerLayer:
    layer = GraphTransformerLayer(6, 2, attention=attention, dtype=torch.float64, **settings).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def call_of(attention: str, edge_attr: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments over the nine nodes of two graphs."""
    if attention == "expander":
        return (random(11, 6), expander(), edge_attr), {}
    return (random(9, 6), None if attention == "all" else GRAPH, edge_attr), {"sizes": SIZES}


def assert_same_with_gradients(layer: nn.Module, found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    sources, cotangent = [*inputs, *layer.parameters()], torch.randn_like(found)
    gradients = [
        torch.autograd.grad(each, sources, cotangent, allow_unused=True, materialize_grads=True)
        for each in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


ALLOWED = torch.block_diag(*[torch.ones(size, size) for size in SIZES]).bool()
