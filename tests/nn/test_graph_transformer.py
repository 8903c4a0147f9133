"""nn.GraphTransformerLayer against PyTorch Geometric's GPSConv, and a loop over the edges, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric import nn as pyg

from anyattention import ExpanderGraph, Graph, load, save
from anyattention.nn import GraphTransformerLayer
from anyattention.testing import check_attention

pytestmark = pytest.mark.usefixtures("native")

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


def softmax_over_edges(layer: GraphTransformerLayer, rows: Tensor, edge_index: Tensor, features: Tensor) -> Tensor:
    """The "dot" attention of GraphAttention and its output projection, edge by edge."""
    part = layer.graph_attention
    query, key, value = (
        module(rows).unflatten(-1, (2, 3))
        for module in (part.query_projection, part.key_projection, part.value_projection)
    )
    weight = part.edge_weight if hasattr(part, "edge_weight") else rows.new_zeros(2, 3, features.shape[1])
    output = []
    for node in range(len(rows)):
        edges = [edge for edge in range(edge_index.shape[1]) if edge_index[1, edge] == node]
        if not edges:
            output.append(rows.new_zeros(6))
            continue
        more = [torch.einsum("hdf,f->hd", weight, features[edge]) for edge in edges]
        keys = torch.stack([key[edge_index[0, edge]] + each for edge, each in zip(edges, more, strict=True)])
        values = torch.stack([value[edge_index[0, edge]] + each for edge, each in zip(edges, more, strict=True)])
        weights = torch.softmax((keys * query[node]).sum(-1) / math.sqrt(3), dim=0)
        output.append((weights.unsqueeze(-1) * values).sum(0).flatten())
    return layer.graph_projection(torch.stack(output))


def softmax_over_all(layer: GraphTransformerLayer, rows: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    part = layer.all_attention
    query, key, value = (
        module(rows).unflatten(-1, (2, 3))
        for module in (part.query_projection, part.key_projection, part.value_projection)
    )
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(3) + bias
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
    return part.output_projection(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))


def whole(layer: GraphTransformerLayer, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    def norm(rows: Tensor, by: Any) -> Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * by.weight + by.bias

    hidden = x + attention(norm(x, layer.attention_norm))
    first, last = layer.feed_forward[0], layer.feed_forward[3]
    inside = norm(hidden, layer.feed_forward_norm) @ first.weight.T + first.bias
    inside = 0.5 * inside * (1 + torch.erf(inside / math.sqrt(2)))
    return hidden + inside @ last.weight.T + last.bias


def assert_same_with_gradients(layer: nn.Module, found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    sources, cotangent = [*inputs, *layer.parameters()], torch.randn_like(found)
    gradients = [
        torch.autograd.grad(each, sources, cotangent, allow_unused=True, materialize_grads=True)
        for each in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


ALLOWED = torch.block_diag(*[torch.ones(size, size) for size in SIZES]).bool()


class TestBruteForce:
    @pytest.mark.parametrize("edge_dim", [None, 2])
    def test_graph(self, edge_dim: int | None) -> None:
        layer, x = layer_of("graph", edge_dim=edge_dim), random(9, 6).requires_grad_()
        features = random(10, edge_dim or 1).requires_grad_()
        found = layer(x, GRAPH, features if edge_dim else None).output
        expected = whole(layer, x, lambda rows: softmax_over_edges(layer, rows, EDGE_INDEX, features))
        assert_same_with_gradients(layer, found, expected, [x, features])

    @pytest.mark.parametrize("largest", [None, 2])
    def test_all(self, largest: int | None) -> None:
        layer, x = layer_of("all", max_distance=largest), random(9, 6).requires_grad_()
        distances = torch.randint(-1, 6, (9, 9))
        found = layer(x, sizes=SIZES, distances=None if largest is None else distances).output
        bias = torch.zeros(2, 9, 9, dtype=torch.float64)
        if largest is not None:
            rows = [[[3 if d < 0 or d > 2 else d for d in row] for row in distances.tolist()]]
            bias = torch.stack([head[torch.tensor(rows[0])] for head in layer.distance_bias])
        expected = whole(layer, x, lambda rows: softmax_over_all(layer, rows, ALLOWED, bias))
        assert_same_with_gradients(layer, found, expected, [x])

    @pytest.mark.parametrize("edge_dim", [None, 2])
    def test_expander(self, edge_dim: int | None) -> None:
        made = expander(virtual=2)
        layer, x = layer_of("expander", edge_dim=edge_dim), random(13, 6).requires_grad_()
        edge_attr = random(10, 2).requires_grad_()
        found = layer(x, made, edge_attr if edge_dim else None).output
        counts = made.edge_counts
        kinds = [edge_attr if edge_dim else random(10, 2) * 0, *(random(count, 2) * 0 for count in counts[1:])]
        ones = torch.zeros(sum(counts), 3, dtype=torch.float64)
        for kind, place in ((0, counts[0]), (1, sum(counts[:2])), (2, sum(counts[:3]))):
            ones[place : place + counts[kind + 1], kind] = 1
        features = torch.cat([torch.cat(kinds), ones], dim=1)[:, 0 if edge_dim else 2 :]
        edges = made.graph.edge_index
        expected = whole(layer, x, lambda rows: softmax_over_edges(layer, rows, edges, features))
        assert_same_with_gradients(layer, found, expected, [x, *([edge_attr] if edge_dim else [])])

    def test_graph_and_all(self) -> None:
        layer, x = layer_of("graph + all"), random(9, 6).requires_grad_()
        found = layer(x, EDGE_INDEX, batch=torch.tensor([0] * 6 + [1] * 3)).output
        zero = torch.zeros(10, 1, dtype=torch.float64)
        expected = whole(
            layer,
            x,
            lambda rows: (
                softmax_over_edges(layer, rows, EDGE_INDEX, zero) + softmax_over_all(layer, rows, ALLOWED, zero[0])
            ),
        )
        assert_same_with_gradients(layer, found, expected, [x])


@pytest.mark.parametrize("sizes", [(5,), (2, 5, 3), (1, 7)])
def test_all_is_the_layer_of_gps_without_its_norms(sizes: tuple[int, ...]) -> None:
    """GPSConv over dense batches; ours as a function of its weights, so that one backward gives both gradients."""
    theirs = pyg.GPSConv(6, None, heads=2, norm=None).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ours = GraphTransformerLayer(6, 2, attention="all", activation="relu", dtype=torch.float64).eval()
    ours.attention_norm = ours.feed_forward_norm = nn.Identity()
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = random(sum(sizes), 6).requires_grad_()
    weights, biases = theirs.attn.in_proj_weight.chunk(3), theirs.attn.in_proj_bias.chunk(3)
    names = ("query", "key", "value")
    parts = {f"all_attention.{name}_projection.weight": each for name, each in zip(names, weights, strict=True)}
    parts |= {f"all_attention.{name}_projection.bias": each for name, each in zip(names, biases, strict=True)}
    parts |= {f"all_attention.output_projection.{name}": x for name, x in theirs.attn.out_proj.named_parameters()}
    parts |= {f"feed_forward.{name}": x for name, x in theirs.mlp.named_parameters()}
    assert parts.keys() == dict(ours.named_parameters()).keys()
    found = functional_call(ours, parts, (x,), {"batch": batch}).output
    expected = theirs(x, torch.zeros(2, 0, dtype=torch.int64), batch)
    assert_same_with_gradients(theirs, found, expected, [x])


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
        bias = layer.graph_projection.bias
        torch.testing.assert_close(found.output, whole(layer, x, lambda rows: torch.zeros_like(rows) + bias))


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
