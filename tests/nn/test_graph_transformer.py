"""nn.GraphTransformerLayer: batches, empty graphs, the contract, precision, compilation, parts that were replaced."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformer_layers import (
    ALLOWED,
    EDGE_INDEX,
    GRAPH,
    KINDS,
    SIZES,
    assert_same_with_gradients,
    call_of,
    expander,
    layer_of,
    random,
)

from anyattention import ExpanderGraph, Graph, load, save
from anyattention.nn import GraphTransformerLayer
from anyattention.testing import check_attention

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("attention", KINDS)
def test_a_batch_is_a_loop_over_its_graphs(attention: str) -> None:
    layer = layer_of(attention)
    (x, graph, _), given = call_of(attention)
    found = layer(x, graph, **given).output
    whole_graph = graph.graph if isinstance(graph, ExpanderGraph) else GRAPH
    for number, first in enumerate((0, 6)):
        nodes = torch.arange(first, first + SIZES[number])
        if attention == "expander":
            nodes = torch.cat([nodes, torch.tensor([9 + number])])
        place = torch.full((11,), -1)
        place[nodes] = torch.arange(len(nodes))
        is_own = place[whole_graph.query_index] >= 0
        edges = place[whole_graph.edge_index[:, is_own]]
        if isinstance(graph, ExpanderGraph):
            kind = torch.arange(4).repeat_interleave(torch.tensor(graph.edge_counts))
            counts = tuple(torch.bincount(kind[is_own], minlength=4).tolist())
            alone = ExpanderGraph(
                Graph.from_edge_index(edges, num_nodes=len(nodes)), SIZES[number : number + 1], 1, counts
            )
        else:
            alone = Graph.from_edge_index(edges, num_nodes=len(nodes))
        torch.testing.assert_close(found[nodes], layer(x[nodes], alone).output)


@pytest.mark.parametrize("attention", KINDS)
def test_nothing_crosses_from_one_graph_to_another(attention: str) -> None:
    layer = layer_of(attention)
    (x, graph, _), given = call_of(attention)
    other = x.clone()
    other[6:9] = torch.nan
    if attention == "expander":
        other[10] = torch.nan
    own = [*range(6), 9] if attention == "expander" else list(range(6))
    x.requires_grad_()
    found = layer(x, graph, **given).output
    assert torch.equal(found[own], layer(other, graph, **given).output[own])
    (gradient,) = torch.autograd.grad(found[own].sin().sum(), x)
    assert not gradient[6:9].any()


@pytest.mark.parametrize("attention", KINDS)
def test_permuted_nodes_give_permuted_outputs(attention: str) -> None:
    layer = layer_of(attention)
    (x, graph, _), given = call_of(attention)
    order = torch.cat([torch.randperm(6), 6 + torch.randperm(3), torch.arange(9, len(x))])
    number = torch.argsort(order)
    if isinstance(graph, ExpanderGraph):
        edges = Graph.from_edge_index(number[graph.graph.edge_index], num_nodes=len(x))
        moved: Any = ExpanderGraph(edges, graph.sizes, graph.num_virtual_nodes, graph.edge_counts)
    else:
        moved = Graph.from_edge_index(number[EDGE_INDEX], num_nodes=9)
    torch.testing.assert_close(layer(x[order], moved, **given).output, layer(x, graph, **given).output[order])


@pytest.mark.parametrize("attention", KINDS)
def test_finite_differences(attention: str) -> None:
    layer = layer_of(attention, hidden_features=2)
    (x, graph, _), given = call_of(attention)
    named = {name: each.detach().requires_grad_() for name, each in layer.named_parameters()}

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(named, parameters, strict=True)), (x, graph), given).output

    inputs = (x.requires_grad_(), *named.values())
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("attention", KINDS)
def test_many_feature_sets_over_one_graph_are_a_loop(attention: str) -> None:
    layer = layer_of(attention)
    (x, graph, _), given = call_of(attention)
    sets = torch.stack([x, -x, x.flip(0)])
    each = torch.stack([layer(one, graph, **given).output for one in sets])
    torch.testing.assert_close(layer(sets, graph, **given).output, each)


def test_weights_of_all_pairs_are_not_computed_beside_those_of_edges() -> None:
    layer, asked = layer_of("graph + all"), []
    layer.all_attention.register_forward_pre_hook(
        lambda _, args, given: asked.append(given["return_weights"]), with_kwargs=True
    )
    assert layer(random(9, 6), GRAPH, return_weights="heads").weights.shape == (10, 2)
    assert asked == [False]


def test_a_bias_of_distance_over_many_feature_sets() -> None:
    layer, sets, distances = layer_of("all", max_distance=3), random(2, 9, 6), torch.randint(0, 5, (9, 9))
    each = [layer(one, sizes=SIZES, distances=distances, return_weights="heads") for one in sets]
    found = layer(sets, sizes=SIZES, distances=distances, return_weights="heads")
    torch.testing.assert_close(found.output, torch.stack([one.output for one in each]))
    torch.testing.assert_close(found.weights, torch.stack([one.weights for one in each]))
    assert not found.weights[..., ~ALLOWED].any()


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("nodes", [0, 1, 4])
def test_graphs_without_edges(attention: str, nodes: int) -> None:
    """A node without edges has attention 0, and so what the projections' biases make of it."""
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), num_nodes=nodes)
    made: Any = graph if attention != "expander" else ExpanderGraph.from_graph(graph, 2, num_virtual_nodes=0)
    layer, x = layer_of(attention), random(nodes, 6).requires_grad_()
    found = layer(x, made)
    assert found.output.shape == (nodes, 6)
    assert found.output.isfinite().all()
    (gradient,) = torch.autograd.grad(found.output.sum(), x)
    assert gradient.isfinite().all()
    if attention == "graph":
        hidden = x + layer.graph_projection.bias
        expected = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
        torch.testing.assert_close(found.output, expected)


def test_graphs_without_nodes_in_a_batch() -> None:
    layer, x = layer_of("graph + all"), random(9, 6)
    expected = layer(x, GRAPH, sizes=SIZES).output
    torch.testing.assert_close(layer(x, GRAPH, sizes=(0, 6, 0, 3)).output, expected)
    torch.testing.assert_close(layer(x, GRAPH, sizes=torch.tensor(SIZES)).output, expected)
    torch.testing.assert_close(layer(x, GRAPH, batch=torch.tensor([1] * 6 + [3] * 3)).output, expected)
    assert layer(x[:0], EDGE_INDEX[:, :0], sizes=()).output.shape == (0, 6)


@pytest.mark.parametrize("attention", KINDS)
def test_the_contract(attention: str) -> None:
    settings = {} if attention == "all" else {"edge_dim": 3, "score": "additive"}
    module = GraphTransformerLayer(12, 3, attention=attention, hidden_features=5, **settings)  # pyright: ignore
    edge_attr = None if attention == "all" else torch.randn(10, 3)
    given = () if attention == "all" else (GRAPH, edge_attr)
    if attention == "expander":
        made = expander()
        layer = module.eval()
        x = torch.randn(11, 12)
        heads = layer(x, made, edge_attr, return_weights="heads").weights
        assert heads.shape == (made.graph.num_edges, 3)
        torch.testing.assert_close(layer(x, made, edge_attr, return_weights=True).weights, heads.mean(-1))
        sums = torch.zeros(11, 3).index_add(0, made.graph.query_index, heads)
        torch.testing.assert_close(sums, torch.ones(11, 3))
        return
    check_attention(module, torch.randn(9, 12), *given)
    if attention != "all":
        x = torch.randn(9, 12)
        found = module.eval().graph_forward(x, EDGE_INDEX, edge_attr)
        assert torch.equal(found.output, module(x, *given).output)


def test_an_adjacency_matrix_is_its_graph() -> None:
    layer, x = layer_of("graph"), random(9, 6)
    dense = torch.zeros(9, 9)
    dense[EDGE_INDEX[1], EDGE_INDEX[0]] = 1
    unique = Graph.from_adjacency(dense)
    found, expected = layer.sparse_forward(x, dense), layer(x, unique, return_weights="heads")
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.weights, expected.weights)


def test_dropout_is_drawn_in_training_alone() -> None:
    layer, x = layer_of("graph + all", dropout=0.5, feature_dropout=0.5), random(9, 6)
    assert torch.equal(layer(x, GRAPH).output, layer(x, GRAPH).output)
    layer.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(x, GRAPH).output)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_saved_layer_is_loaded(tmp_path: Any) -> None:
    layer = GraphTransformerLayer(8, 2, attention="graph + all", max_distance=3, edge_dim=1, activation="relu")
    save(layer, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == layer.config
    x, edge_attr, distances = torch.randn(9, 8), torch.randn(10, 1), torch.randint(0, 5, (9, 9))
    call = {"edge_attr": edge_attr, "distances": distances, "sizes": SIZES}
    assert torch.equal(loaded(x, GRAPH, **call).output, layer.eval()(x, GRAPH, **call).output)


@pytest.mark.parametrize("attention", KINDS)
def test_autocast_and_low_precision(attention: str) -> None:
    layer = layer_of(attention).float()
    (x, graph, _), given = call_of(attention)
    expected = layer.double()(x, graph, **given).output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer.float()(x.float(), graph, **given).output
    torch.testing.assert_close(mixed.double(), expected, rtol=0.05, atol=0.1)
    low = layer.bfloat16()(x.bfloat16(), graph, **given).output
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("attention", KINDS)
def test_compiled_whole(attention: str) -> None:
    torch.compiler.reset()
    layer = layer_of(attention)
    (x, graph, _), given = call_of(attention)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, graph, **given).output, layer(x, graph, **given).output
    assert_same_with_gradients(layer, found, expected, [])


def test_distances_compiled_whole() -> None:
    torch.compiler.reset()
    layer, x, distances = layer_of("all", max_distance=2), random(9, 6), torch.randint(0, 4, (9, 9))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = compiled(x, sizes=SIZES, distances=distances).output
    assert_same_with_gradients(layer, found, layer(x, sizes=SIZES, distances=distances).output, [])


def test_adapters_and_hooks_of_every_projection() -> None:
    class Adapted(nn.Module):
        def __init__(self, inside: nn.Linear) -> None:
            super().__init__()
            self.inside, self.calls = inside, 0
            self.low = nn.Parameter(random(inside.out_features, inside.in_features))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inside(x) + x @ self.low.T

    layer, x = layer_of("graph + all"), random(9, 6)
    merged = layer.clone()
    adapted = []
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            adapted.append(Adapted(module))
            setattr(layer.get_submodule(parent), last, adapted[-1])
            with torch.no_grad():
                merged.get_submodule(name).weight += adapted[-1].low
    torch.testing.assert_close(layer(x, GRAPH, sizes=SIZES).output, merged(x, GRAPH, sizes=SIZES).output)
    assert len(adapted) == 10
    assert all(each.calls == 1 for each in adapted)


def test_another_norm_in_place_of_ours() -> None:
    layer, x = layer_of("graph"), random(9, 6)
    layer.attention_norm, layer.feed_forward_norm = (nn.BatchNorm1d(6, dtype=torch.float64) for _ in range(2))
    layer.train()
    before = layer.attention_norm.running_mean.clone()
    assert layer(x, GRAPH).output.isfinite().all()
    assert not torch.equal(before, layer.attention_norm.running_mean)
