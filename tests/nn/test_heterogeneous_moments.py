"""HeterogeneousGraphAttention in other moments and circumstances: what was found by reading, and is held here."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from anyattention import HeterogeneousGraph
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from anyattention.nn import HeterogeneousGraphAttention
from anyattention.nn.relation_rows import Projection, RelationMap, relation_rows

RELATIONS = [("a", "w", "p"), ("p", "c", "p"), ("p", "r", "a"), ("a", "x", "p")]
COUNTS = {"a": 5, "p": 7}
SETTINGS = [(score, over) for score in ("dot", "additive", "dynamic") for over in ("node", "relation")]


def layer_of(score="dot", over="node", **more):
    torch.manual_seed(0)
    settings = {"in_features": {"a": 3, "p": 5}, "relations": RELATIONS, "dropout": 0.0, "dtype": torch.float64, **more}
    return HeterogeneousGraphAttention(8, 2, score=score, softmax_over=over, **settings)


def call(dtype=torch.float64):
    torch.manual_seed(1)
    x = {"a": torch.randn(5, 3, dtype=dtype), "p": torch.randn(7, 5, dtype=dtype)}
    edges = {
        (source, name, target): torch.stack([torch.randint(COUNTS[source], (9,)), torch.randint(COUNTS[target], (9,))])
        for source, name, target in RELATIONS
    }
    return x, edges


def test_a_graph_that_was_first_used_under_a_mode_serves_plain_calls():
    x, edges = call()
    layer, graph = layer_of(), HeterogeneousGraph.from_edge_index(edges, COUNTS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(x, graph)
    output = layer(x, graph).output["p"]
    assert type(output) is torch.Tensor
    fresh = layer(x, HeterogeneousGraph.from_edge_index(edges, COUNTS)).output["p"]
    assert output.equal(fresh)


@pytest.mark.parametrize(("score", "over"), SETTINGS)
def test_many_cotangents_at_once_are_a_loop(score, over):
    x, edges = call()
    layer, graph = layer_of(score, over), HeterogeneousGraph.from_edge_index(edges, COUNTS)
    leaves = [x["p"].requires_grad_(), *layer.parameters()]
    output = layer(x, graph).output["p"]
    cotangents = torch.randn(3, *output.shape, dtype=torch.float64)
    at_once = torch.autograd.grad(
        output, leaves, cotangents, is_grads_batched=True, retain_graph=True, materialize_grads=True
    )
    for place, cotangent in enumerate(cotangents):
        one = torch.autograd.grad(output, leaves, cotangent, retain_graph=True, materialize_grads=True)
        for found, wanted in zip(at_once, one, strict=True):
            torch.testing.assert_close(found[place], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("score", "over"), SETTINGS)
def test_transforms_of_torch_func(score, over):
    x, edges = call()
    layer, graph = layer_of(score, over), HeterogeneousGraph.from_edge_index(edges, COUNTS)

    def output(features):
        return layer({**x, "p": features}, graph).output["a"]

    several = torch.randn(3, 7, 5, dtype=torch.float64)
    batched = torch.func.vmap(output)(several)
    for found, features in zip(batched, several, strict=True):
        torch.testing.assert_close(found, output(features), rtol=1e-12, atol=1e-12)
    forward, reverse = torch.func.jacfwd(output)(x["p"]), torch.func.jacrev(output)(x["p"])
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-12)


def test_the_mean_over_many_nodes_holds_in_half_precision():
    layer = layer_of("additive", "relation", dtype=torch.float16)
    with torch.no_grad():
        layer.relation_projection.bias.fill_(3.0)
    x = {"a": torch.randn(5, 3).half(), "p": torch.randn(70_000, 5).half()}
    _, edges = call()
    result = layer(x, edges)
    assert torch.stack(list(result.relation_weights.values())).isfinite().all()
    assert result.output["p"].isfinite().all()


def test_a_number_that_is_not_finite_stays_in_its_head_where_rows_are_projected_first():
    rows = torch.tensor([[math.inf, 1.0, 1.0, 1.0]])
    whole, part = RelationMap(Projection(None, rows=rows), 2, 1), Projection(None, rows=rows)
    matrices = torch.ones(1, 2, 2, 2)
    found, mapped = relation_rows([rows], [[whole, RelationMap(part, 2, 1, matrices)]])
    assert found.flatten().tolist() == [math.inf, 1.0, 1.0, 1.0]
    assert mapped.flatten().tolist() == [math.inf, math.inf, 2.0, 2.0]


@pytest.mark.parametrize("score", ["dot", "additive", "dynamic"])
def test_gradients_by_an_output_that_nothing_leads_to(score):
    x, edges = call()
    layer = layer_of(score, use_bias=False)
    _, cache = layer.cached_forward(x, {relation: edges[relation] for relation in RELATIONS[:2]})
    cotangent = {node_type: torch.randn_like(each) for node_type, each in cache.output.items()}
    found = layer.backward(cotangent, cache)
    assert found.inputs["x['a']"].any()
    _, cache = layer.cached_forward(x, {})
    assert not layer.backward(cotangent, cache).parameters.any()
    with pytest.raises(InvalidInputError, match=r"grad_output: expected gradients of the outputs .*got Tensor"):
        layer.backward(torch.ones(3), cache)


@pytest.mark.parametrize(("score", "over"), SETTINGS)
def test_outputs_may_be_changed_in_place(score, over):
    x, edges = call()
    layer = layer_of(score, over, use_bias=False)
    with torch.no_grad():
        output = layer(x, edges).output
        expected = output["p"].relu()
        assert torch.nn.ReLU(inplace=True)(output["p"]).equal(expected)


def test_numpy_numbers_and_other_collections_are_taken():
    _, edges = call()
    typed = layer_of(in_features={"a": np.int64(3), "p": np.int32(5)}, edge_dim={RELATIONS[0]: np.int64(2)})
    assert typed.config.widths == {"a": 3, "p": 5}
    assert typed.config.edge_widths == (2, None, None, None)
    assert type(typed.config.widths["a"]) is int
    assert layer_of(relations=edges.keys()).config.relations == tuple(RELATIONS)


def test_a_graph_cannot_be_changed():
    _, edges = call()
    graph = HeterogeneousGraph.from_edge_index(edges, COUNTS)
    with pytest.raises(TypeError, match="does not support item assignment"):
        graph.edge_index[RELATIONS[0]] = edges[RELATIONS[1]]
    with pytest.raises(TypeError, match="does not support item assignment"):
        graph.num_nodes["a"] = 9


def test_bad_input_is_named():
    x, edges = call()
    layer = layer_of()
    with pytest.raises(InvalidInputError, match="adjacency: expected a dictionary, got Tensor"):
        layer.sparse_forward(x, torch.eye(3))
    with pytest.raises(InvalidInputError, match="node_features: expected a dictionary, got Tensor"):
        layer.sparse_forward(x["a"], {RELATIONS[0]: torch.eye(3)})
    graph = HeterogeneousGraph.from_edge_index(edges, COUNTS)
    with pytest.raises(GraphStructureError, match="prefix: expected a string, got 3"):
        graph.with_reverse(3)
    assert graph[list(RELATIONS[0])].num_edges == 9
    with pytest.raises(GraphStructureError, match=r"num_nodes: expected at most 2\^59 nodes"):
        HeterogeneousGraph.from_edge_index(
            {("a", str(name), "a"): torch.zeros(2, 0, dtype=torch.int64) for name in range(2)}, {"a": 2**59}
        )
    with pytest.raises(InvalidConfigError, match=r"relations: expected relations .*of three strings, got 'w'"):
        layer_of(relations=["w"])
    layer.key_projections[0] = torch.nn.Linear(3, 7, dtype=torch.float64)
    with pytest.raises(DimensionMismatchError, match="the rows of Linear: expected 8 features, got 7"):
        layer(x, edges)
