"""Maps and attention as one node of autograd: the numbers of the two apart, and every derivative."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyattention import Graph
from anyattention.nn import GraphAttention
from anyattention.ops.graph import projected

SCORES = ["additive", "dynamic", "dot"]
NODES, FEATURES = 7, 5


def make(score: str, **settings: Any) -> tuple[GraphAttention, Tensor, Graph]:
    torch.manual_seed(0)
    layer = GraphAttention(6, 2, in_features=FEATURES, score=score, **{"dropout": 0.0, **settings})
    x = torch.randn(NODES, FEATURES, dtype=settings.get("dtype", torch.float32), requires_grad=True)
    # With an edge that is there twice, a loop, and a node that nobody names.
    edges = torch.tensor([[0, 1, 1, 2, 3, 3, 4, 0], [1, 0, 0, 2, 1, 5, 5, 5]])
    return layer, x, Graph.from_edge_index(edges, NODES)


def node_names(x: Tensor) -> set[str]:
    found, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            found.add(node.name())
            left += [each for each, _ in node.next_functions]
    return found


def apart(layer: GraphAttention, x: Tensor, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr("anyattention.nn.graph.suits_nodes", lambda *_: False)
        return layer(x, graph).output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "settings", [{}, {"use_bias": False}, {"concat": False, "residual": True}, {"normalize": False}]
)
@pytest.mark.parametrize("score", SCORES)
def test_it_gives_the_bits_of_the_two_apart(
    score: str, settings: Any, dropout: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, graph = make(score, dropout=dropout, dtype=dtype, **settings)
    torch.manual_seed(3)
    found = layer(x, graph).output
    torch.manual_seed(3)
    expected = apart(layer, x, graph, monkeypatch)
    assert any("ProjectedAttention" in name for name in node_names(found))
    assert not any("ProjectedAttention" in name for name in node_names(expected))
    assert torch.equal(found, expected)
    cotangent = torch.randn_like(found)
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(found, leaves, cotangent, allow_unused=True)
    others = torch.autograd.grad(expected, leaves, cotangent, allow_unused=True)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for mine, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("score", SCORES)
def test_first_and_second_derivatives(score: str) -> None:
    layer, x, graph = make(score, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, graph)).output

    leaves = [x, *[each.detach().clone().requires_grad_() for each in layer.parameters()]]
    assert any("ProjectedAttention" in name for name in node_names(call(*leaves)))
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("wanted", ["x", "parameters", "one parameter"])
def test_it_gives_only_what_is_needed(score: str, wanted: str) -> None:
    layer, x, graph = make(score, dtype=torch.float64)
    x = x.detach().requires_grad_(wanted == "x")
    for n, parameter in enumerate(layer.parameters()):
        parameter.requires_grad_(wanted == "parameters" or (wanted == "one parameter" and n == 0))
    output = layer(x, graph).output
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    gradients = [each.grad for each in (x, *layer.parameters())]
    again, other, _ = make(score, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    other = x.detach().requires_grad_()
    again(other, graph).output.backward(cotangent)
    for found, expected in zip(gradients, [each.grad for each in (other, *again.parameters())], strict=True):
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert [each is not None for each in gradients] == [each.requires_grad for each in (x, *layer.parameters())]


def test_one_that_is_part_of_a_larger_second_derivative() -> None:
    layer, x, graph = make("dynamic", dtype=torch.float64)

    def slopes(x: Tensor) -> Tensor:
        (by_x,) = torch.autograd.grad(layer(x.sin(), graph).output.square().sum(), x, create_graph=True)
        return by_x

    assert torch.autograd.gradcheck(slopes, (x,))


@pytest.mark.parametrize("score", SCORES)
def test_columns_of_a_larger_matrix_and_frozen_views(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, graph = make(score)
    x = torch.randn(FEATURES + 3, NODES + 2).T[1:-1, 2:-1].requires_grad_()
    found, expected = layer(x, graph).output, apart(layer, x, graph, monkeypatch)
    assert torch.equal(found, expected)
    cotangent = torch.randn_like(found)
    for mine, other in zip(*(torch.autograd.grad(each, [x], cotangent) for each in (found, expected)), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_graph_that_was_changed_is_refused() -> None:
    layer, x, graph = make("additive")
    output = layer(x, graph).output
    graph.keys_by_query.add_(0)
    with pytest.raises(RuntimeError, match="changed in place since the forward"):
        output.sum().backward()


def test_a_parameter_that_was_changed_is_refused() -> None:
    layer, x, graph = make("dot")
    output = layer(x, graph).output
    with torch.no_grad():
        layer.key_projection.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_parameters_of_another_dtype_run_apart() -> None:
    layer, x, graph = make("dynamic")
    layer.score_vector.data = layer.score_vector.data.double()
    projections = layer._projections()
    assert projections is not None
    assert projected.suits_nodes(x, graph)
    assert not projected.suits_parameters(x, layer._score(), projections)


@pytest.mark.parametrize(
    ("score", "name", "part"),
    [
        ("dot", "key_projection", nn.Linear(FEATURES, 4)),
        ("dynamic", "query_projection", nn.Linear(FEATURES, 8)),
        ("additive", "value_projection", nn.Linear(FEATURES, 12, bias=False)),
        ("dynamic", "score_vector", nn.Parameter(torch.randn(2, 4))),
        ("additive", "key_vector", nn.Parameter(torch.randn(2, 5))),
    ],
)
def test_parts_of_other_sizes_are_refused_as_they_are_apart(
    score: str, name: str, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, graph = make(score)
    setattr(layer, name, part)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        layer(x, graph)
    with pytest.raises(type(caught.value)) as expected:
        apart(layer, x, graph, monkeypatch)
    assert str(caught.value) == str(expected.value)


def test_sizes_that_add_up_to_the_right_sum_are_refused() -> None:
    layer, x, graph = make("dot")
    layer.key_projection, layer.query_projection = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 4)
    with pytest.raises(ValueError, match="expected"):
        layer(x, graph)


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_autocast_around_the_backward_alone_changes_nothing(score: str, is_recorded: bool) -> None:
    layer, x, graph = make(score)
    leaves = [x, *layer.parameters()]

    def derivatives(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaves, create_graph=is_recorded)

    expected = derivatives(layer(x, graph).output.square().sum())
    loss = layer(x, graph).output.square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = derivatives(loss)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_an_unneeded_weight_and_a_needed_bias(score: str) -> None:
    layer, x, graph = make(score, dtype=torch.float64)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    output = layer(x.detach(), graph).output
    wanted = [each for each in layer.parameters() if each.requires_grad]
    cotangent = torch.randn_like(output)
    found = torch.autograd.grad(output, wanted, cotangent)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    expected = torch.autograd.grad(layer(x, graph).output, wanted, cotangent)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
