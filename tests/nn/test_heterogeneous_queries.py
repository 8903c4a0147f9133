"""HeterogeneousGraphAttention where only the first nodes of each type attend, as in the blocks of a sample."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from anyattention import HeterogeneousGraph
from anyattention.errors import DimensionMismatchError, GraphStructureError
from anyattention.nn import HeterogeneousGraphAttention

WIDTHS = {"a": 5, "b": 3, "no edges": 2}
RELATIONS = [("a", "to", "a"), ("b", "to", "a"), ("a", "back", "b"), ("b", "to", "no edges")]
COUNTS = {"a": 11, "b": 7, "no edges": 5}
QUERIES = {"a": 4, "b": 7, "no edges": 2}
SETTINGS = [
    {"score": score, "softmax_over": over, **more}
    for score, over in itertools.product(["dot", "additive", "dynamic"], ["node", "relation"])
    for more in ({"use_bias": False}, {"concat": False, "residual": True})
]


class Doubled(nn.Module):
    """A projection that is more than a product."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def inputs(seed: int = 0) -> tuple[dict[str, Tensor], dict[Any, Tensor]]:
    torch.manual_seed(seed)
    x = {kind: torch.randn(count, WIDTHS[kind], dtype=torch.float64) for kind, count in COUNTS.items()}
    edges = {}
    for relation in RELATIONS[:3]:
        source, _, target = relation
        edges[relation] = torch.stack([torch.randint(COUNTS[source], (17,)), torch.randint(QUERIES[target], (17,))])
    return x, edges


def layer_of(**settings: Any) -> HeterogeneousGraphAttention:
    torch.manual_seed(1)
    layer = HeterogeneousGraphAttention(6, 3, in_features=WIDTHS, relations=RELATIONS, dropout=0.0, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def split_roles(x: dict[str, Tensor], edges: Any, queries: Any) -> tuple[dict[str, Tensor], HeterogeneousGraph]:
    """The same attention where those who attend are types of their own: nothing else is a target there."""
    nodes = {**x, **{f"{kind} who attend": rows[: queries[kind]] for kind, rows in x.items()}}
    renamed = {(source, name, f"{target} who attend"): each for (source, name, target), each in edges.items()}
    return nodes, HeterogeneousGraph.from_edge_index(renamed, {kind: len(rows) for kind, rows in nodes.items()})


def with_roles(layer: HeterogeneousGraphAttention) -> HeterogeneousGraphAttention:
    """The layer over the graph of `split_roles`, with the same parameters."""
    config = layer.config
    widths = {**WIDTHS, **{f"{kind} who attend": width for kind, width in WIDTHS.items()}}
    relations = [(source, name, f"{target} who attend") for source, name, target in RELATIONS]
    made = HeterogeneousGraphAttention(
        6, 3, in_features=widths, relations=relations, dropout=0.0, score=config.score, residual=config.residual,
        softmax_over=config.softmax_over, concat=config.concat, use_bias=config.base.use_bias,
    ).double()  # fmt: skip
    for name in ("query", "key", "value", "residual"):
        if hasattr(made, f"{name}_projections"):
            own = dict(layer.projections_by_type(name))
            for kind, module in made.projections_by_type(name):
                module.load_state_dict(own[kind.removesuffix(" who attend")].state_dict())
    state = {key: each for key, each in layer.state_dict().items() if "_projections" not in key}
    made.load_state_dict(state, strict=False)
    return made


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["dense", "sparse", "wrapped"])
def test_the_first_nodes_attend_and_no_other(settings: dict[str, Any], kind: str) -> None:
    x, edges = inputs()
    layer = layer_of(**settings)
    other = with_roles(layer)
    if kind == "wrapped":
        for module in (layer, other):
            name = "value" if settings["score"] == "additive" else "query"
            projections = getattr(module, f"{name}_projections")
            for place, inner in enumerate(projections):
                projections[place] = Doubled(inner)
    given: dict[str, Tensor] = {name: rows.requires_grad_() for name, rows in x.items()}
    if kind == "sparse":
        given = {name: rows.detach().to_sparse_csr() for name, rows in x.items()}
    graph = HeterogeneousGraph.from_edge_index(edges, COUNTS, num_queries=QUERIES)
    found = layer(given, graph, return_weights="heads")
    expected = other(*split_roles(x, edges, QUERIES), return_weights="heads")
    assert {name: len(rows) for name, rows in found.output.items()} == QUERIES
    for name, rows in found.output.items():
        torch.testing.assert_close(rows, expected.output[f"{name} who attend"], rtol=1e-10, atol=1e-12)
    for (source, name, target), weights in found.weights.items():
        torch.testing.assert_close(weights, expected.weights[source, name, f"{target} who attend"])
    if settings["softmax_over"] == "relation":
        for (source, name, target), weight in found.relation_weights.items():
            torch.testing.assert_close(weight, expected.relation_weights[source, name, f"{target} who attend"])
    cotangents = {name: torch.randn_like(rows) for name, rows in found.output.items()}

    def gradients(output: dict[str, Tensor], module: nn.Module) -> list[Tensor]:
        leaves = [] if kind == "sparse" else [*x.values()]
        # Projections of "additive" have two roles, which are two parameters in the other layer.
        leaves += [] if settings["score"] == "additive" else [*module.parameters()]
        if not leaves:
            return []
        loss = torch.stack([(output[name] * each).sum() for name, each in cotangents.items()]).sum()
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))

    of_roles = {name: expected.output[f"{name} who attend"] for name in cotangents}
    for own, others in zip(gradients(found.output, layer), gradients(of_roles, other), strict=True):
        torch.testing.assert_close(own, others, rtol=1e-9, atol=1e-11)


def test_what_it_is_is_kept() -> None:
    x, edges = inputs()
    layer, graph = layer_of(), HeterogeneousGraph.from_edge_index(edges, COUNTS, num_queries=QUERIES)
    expected = layer(x, graph).output
    leaves, spec = _pytree.tree_flatten(graph)
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
    kept = [
        _pytree.tree_unflatten(leaves, spec), pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph),
        graph.to("cpu"), graph.with_joint(graph.joint()),
    ]  # fmt: skip
    for each in kept:
        assert each.num_queries == QUERIES
        for name, rows in layer(x, each).output.items():
            assert torch.equal(rows, expected[name])
    assert graph.to("meta").num_queries == QUERIES
    assert (graph["b", "to", "a"].num_queries, graph["b", "to", "a"].num_keys) == (4, 7)
    assert graph.joint().num_queries == graph.joint_sizes()[0] == 4 + 7
    assert graph.joint(by_relation=True).num_queries == graph.joint_sizes(by_relation=True)[0] == 2 * 4 + 7
    assert graph.with_reverse().num_queries == COUNTS


def test_all_attend_where_nothing_is_said() -> None:
    _, edges = inputs()
    for graph in (
        HeterogeneousGraph.from_edge_index(edges, COUNTS),
        HeterogeneousGraph.from_edge_index(edges, COUNTS, num_queries=COUNTS),
    ):
        assert graph.num_queries is graph.num_nodes
        leaves, spec = _pytree.tree_flatten(graph)
        back = _pytree.tree_unflatten(leaves, spec)
        assert len(leaves) == len(COUNTS) + len(edges)
        assert back.num_queries is back.num_nodes


@pytest.mark.parametrize("over", ["node", "relation"])
def test_compiled(over: str) -> None:
    x, edges = inputs()
    layer = layer_of(softmax_over=over, residual=True)
    graph = HeterogeneousGraph.from_edge_index(edges, COUNTS, num_queries=QUERIES)
    expected = layer(x, graph).output
    torch.compiler.reset()
    found = torch.compile(layer, fullgraph=True)(x, graph).output
    for name, rows in found.items():
        torch.testing.assert_close(rows, expected[name])


@pytest.mark.parametrize(
    ("queries", "match"),
    [
        ({**QUERIES, "a": 12}, "num_queries: expected 'a': 11 at most, 'b': 7 at most, .* got {'a': 12"),
        ({"a": 4}, "num_queries: expected 'a': 11 at most"),
        ({**QUERIES, "c": 1}, "num_queries: expected 'a': 11 at most"),
        ({**QUERIES, "a": -1}, r"num_queries\['a'\]: expected an int >= 0"),
        ([4, 7, 2], "num_queries: expected a dictionary"),
        ({**QUERIES, "b": 3}, r"edge_index\[\('a', 'back', 'b'\)\]: .*expected"),
    ],
)
def test_what_are_no_queries(queries: Any, match: str) -> None:
    _, edges = inputs()
    with pytest.raises(GraphStructureError, match=match):
        HeterogeneousGraph.from_edge_index(edges, COUNTS, num_queries=queries)


def test_features_are_those_of_all_nodes() -> None:
    x, edges = inputs()
    graph = HeterogeneousGraph.from_edge_index(edges, COUNTS, num_queries=QUERIES)
    with pytest.raises(DimensionMismatchError, match="graph: expected 4 nodes of type 'a', as x has, got 11"):
        layer_of()({**x, "a": x["a"][:4]}, graph)
