"""One number for each edge, `(edges,)`, is an edge feature of width 1."""

from typing import Literal

import pytest
import torch

from anyattention import EdgeFeatures, Graph, attend
from anyattention.errors import DimensionMismatchError
from anyattention.nn import GraphAttention

_GRAPH = Graph.from_edge_index(torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]]), num_nodes=3)


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_a_layer_takes_one_number_for_each_edge(score: Literal["additive", "dynamic", "dot"]) -> None:
    layer = GraphAttention(8, 2, edge_dim=1, score=score).eval()
    x, numbers = torch.randn(3, 8), torch.randn(4)
    assert torch.equal(layer(x, _GRAPH, numbers).output, layer(x, _GRAPH, numbers[:, None]).output)
    with pytest.raises(DimensionMismatchError, match="edge_attr: expected"):
        layer(x, _GRAPH, numbers[:3])
    with pytest.raises(DimensionMismatchError, match="edge_attr: expected"):
        GraphAttention(8, 2, edge_dim=4)(x, _GRAPH, numbers)


def test_attend_takes_one_number_for_each_edge() -> None:
    x, numbers, weight = torch.randn(3, 2, 4), torch.randn(4, requires_grad=True), torch.randn(2, 4, 1)
    output = attend(x, x, x, _GRAPH, edges=EdgeFeatures(numbers, weight, weight)).output
    column = numbers.detach()[:, None].requires_grad_()
    expected = attend(x, x, x, _GRAPH, edges=EdgeFeatures(column, weight, weight)).output
    assert torch.equal(output, expected)
    (found,) = torch.autograd.grad(output.sum(), numbers)
    (same,) = torch.autograd.grad(expected.sum(), column)
    assert torch.equal(found, same[:, 0])
    with pytest.raises(DimensionMismatchError):
        attend(x, x, x, _GRAPH, edges=EdgeFeatures(numbers, torch.randn(2, 4, 3)))


def test_a_compiled_call_takes_one_number_for_each_edge() -> None:
    x, numbers, weight = torch.randn(3, 2, 4), torch.randn(4), torch.randn(2, 4, 1)
    layer = GraphAttention(8, 2, edge_dim=1).eval()

    def call(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        edges = EdgeFeatures(numbers, weight, weight)
        return attend(x, x, x, _GRAPH, edges=edges).output, layer(x.flatten(1), _GRAPH, numbers).output

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(numbers), call(numbers))
