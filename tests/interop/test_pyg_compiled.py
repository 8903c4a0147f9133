"""The drop-in layers under torch.compile(fullgraph=True): on the kernels, equal to eager, the graph sorted once."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch_geometric import nn as parent

from anyattention.errors import GraphStructureError
from anyattention.interop import pyg
from anyattention.interop.pyg import remembered
from anyattention.ops import handles
from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.patterns import Graph

_NAMES = ("GATConv", "GATv2Conv", "TransformerConv")
_SOME_NAMES = ["GATConv", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in _NAMES[1:])]
# Those of the programs that the inductor compiles take seconds.
_BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def make_layers(name: str, *args: Any, **settings: Any) -> tuple[Any, Any]:
    ours, theirs = (getattr(home, name)(*args, **settings).double() for home in (pyg, parent))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_graph(nodes: int = 7, edges: int = 30) -> tuple[Tensor, Tensor]:
    x = torch.randn(nodes, 3, dtype=torch.float64, requires_grad=True)
    return x, torch.randint(nodes, (2, edges))


def compiled(layer: Any, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(layer, fullgraph=True, backend=counter), counter


def operators(counter: CompileCounterWithBackend) -> str:
    return " ".join(str(node.target) for graph in counter.graphs for node in graph.graph.nodes)


def equal_with_gradients(found: Any, expected: Any, leaves: list[Any]) -> None:
    """Of results of ours, compiled, and of the parent's, by random cotangents; leaves of each."""
    by = [torch.randn_like(each) for each in expected]
    gradients = []
    for results, of in zip((found, expected), leaves, strict=True):
        for mine, right in zip(results, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
        gradients.append(torch.autograd.grad(results, of, by, allow_unused=True, materialize_grads=True))
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", _BACKENDS)
@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("GATConv", False),
        ("TransformerConv", True),
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in (("GATConv", True), ("GATv2Conv", False), ("GATv2Conv", True), ("TransformerConv", False))
        ),
    ],
)
def test_one_program_serves_every_size(name: str, features: bool, backend: str) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2, edge_dim=2 if features else None)
    program, counter = compiled(ours, backend)
    for nodes, edges in ((7, 30), (11, 20), (13, 50)):
        x, edge_index = make_graph(nodes, edges)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(edge_index, 1)
        given = [x, edge_index]
        if features:
            given.append(torch.randn(edges, 2, dtype=torch.float64, requires_grad=True))
            torch._dynamo.mark_dynamic(given[-1], 0)
        leaves = [[x, *given[2:], *layer.parameters()] for layer in (ours, theirs)]
        equal_with_gradients([program(*given)], [theirs(*given)], leaves)
    assert counter.frame_count == 1
    assert "anyattention.graph_attention" in operators(counter)


@pytest.mark.parametrize(
    ("name", "loops"),
    [
        ("GATv2Conv", True),
        ("TransformerConv", False),
        *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in (("GATConv", True), ("GATConv", False))),
    ],
)
def test_weights_and_their_edges(name: str, loops: bool) -> None:
    settings = {} if name == "TransformerConv" else {"add_self_loops": loops}
    ours, theirs = make_layers(name, 3, 4, heads=2, **settings)
    program, counter = compiled(ours)
    x, edge_index = make_graph()
    found, (edges, weights) = program(x, edge_index, return_attention_weights=True)
    expected, (expected_edges, alpha) = theirs(x, edge_index, return_attention_weights=True)
    assert torch.equal(edges, expected_edges)
    leaves = [[x, *layer.parameters()] for layer in (ours, theirs)]
    equal_with_gradients((found, weights), (expected, alpha), leaves)
    assert "anyattention.graph_attention" in operators(counter)


@pytest.mark.parametrize("name", _SOME_NAMES)
def test_two_sides_and_int32_edges(name: str) -> None:
    ours, theirs = make_layers(name, (3, 5), 4, heads=2)
    program, counter = compiled(ours)
    x = (make_graph(11)[0], torch.randn(7, 5, dtype=torch.float64, requires_grad=True))
    edge_index = torch.stack([torch.randint(11, (30,)), torch.randint(7, (30,))])
    leaves = [[*x, *layer.parameters()] for layer in (ours, theirs)]
    equal_with_gradients([program(x, edge_index.int())], [theirs(x, edge_index)], leaves)
    assert "anyattention.graph_attention" in operators(counter)


@pytest.mark.parametrize("name", _SOME_NAMES)
def test_dropout_and_autocast(name: str) -> None:
    ours, _ = make_layers(name, 3, 4, heads=2, dropout=0.5)
    ours.float()
    program, counter = compiled(ours)
    x, edge_index = make_graph()
    x = x.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = program(x, edge_index), program(x, edge_index)
        assert not torch.equal(first, second)
        ours.eval()
        found, expected = program(x, edge_index), ours(x, edge_index)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)
    assert "anyattention.graph_attention" in operators(counter)


def test_weights_after_dropout() -> None:
    ours, _ = make_layers("GATConv", 3, 4, heads=2, dropout=0.5)
    program, counter = compiled(ours)
    x, edge_index = make_graph()
    found, (edges, weights) = program(x, edge_index, return_attention_weights=True)
    assert 0 < (weights == 0).sum() < weights.numel()
    values = ours.lin(x).unflatten(-1, (2, 4))[edges[0]] * weights[..., None]
    expected = torch.zeros(7, 2, 4, dtype=torch.float64).index_add(0, edges[1], values).flatten(1) + ours.bias
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert "anyattention.edge_sum" in operators(counter)


@pytest.mark.parametrize("name", _NAMES)
def test_explain_forward_says_so_inside_a_program(name: str) -> None:
    ours, _ = make_layers(name, 3, 4, heads=2)
    x, edge_index = make_graph()

    def explained(x: Tensor) -> tuple[Tensor, str]:
        return x + 1.0, ours.explain_forward(x, edge_index).implementation

    assert torch.compile(explained, fullgraph=True, backend="eager")(x)[1] == "cpu"


class Net(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.first = layers.GATConv(3, 4, heads=3)
        self.second = layers.GATConv(12, 2, heads=1, concat=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(F.elu(self.first(x, edge_index)), edge_index)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Every Graph built through the memory, in order."""
    graphs: list[Graph] = []

    class Counted(Graph):
        @classmethod
        def from_edge_index(cls, *args: Any, **settings: Any) -> Graph:
            graphs.append(Graph.from_edge_index(*args, **settings))
            return graphs[-1]

    monkeypatch.setattr(remembered, "Graph", Counted)
    return graphs


@pytest.mark.parametrize("backend", _BACKENDS)
def test_training_sorts_the_edges_once_and_leaves_the_arrays_alone(backend: str, built: list[Graph]) -> None:
    """The compiler may write into results of operators, once they are read: never into what is remembered."""
    models = [Net(home).double() for home in (pyg, parent)]
    models[0].load_state_dict(models[1].state_dict())
    x, edge_index = make_graph(23, 100)
    program, counter = compiled(models[0], backend)
    losses = []
    for run, model in zip((program, models[1]), models, strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = (run(x, edge_index) - x[:, :2].detach()).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    assert counter.frame_count == 1
    assert len(built) == 1
    right = Graph.from_edge_index(built[0].edge_index, 23)
    for field in GraphArrays.__dataclass_fields__:
        assert torch.equal(getattr(arrays_of(built[0]), field), getattr(arrays_of(right), field))


@pytest.mark.parametrize("name", _SOME_NAMES)
def test_a_change_of_the_edges_in_place_is_seen(name: str) -> None:
    ours, theirs = make_layers(name, 3, 4)
    x, edge_index = make_graph()
    program, _ = compiled(ours)
    first = program(x, edge_index)
    edge_index.numpy()[1] = edge_index.numpy()[1][::-1].copy()
    second = program(x, edge_index)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, theirs(x, edge_index), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", _SOME_NAMES)
def test_a_gradient_is_that_of_its_own_forward(name: str) -> None:
    """Whatever happened to the edges since, and however many others were given."""
    ours, theirs = make_layers(name, 3, 4)
    x, edge_index = make_graph()
    program, _ = compiled(ours)
    found, expected = program(x, edge_index), theirs(x, edge_index.clone())
    edge_index.numpy()[1] = edge_index.numpy()[1][::-1].copy()
    others = [make_graph()[1] for _ in range(remembered._NUM_OF_PROGRAMS + 3)]
    for other in [edge_index, *others]:
        program(x, other)
    del edge_index
    gc.collect()
    equal_with_gradients([found], [expected], [[x, *layer.parameters()] for layer in (ours, theirs)])
    assert len(remembered._of_programs) <= remembered._NUM_OF_PROGRAMS


def test_the_graph_goes_with_the_edge_list(built: list[Graph]) -> None:
    ours, _ = make_layers("GATConv", 3, 4)
    x, edge_index = make_graph()
    program, _ = compiled(ours)
    for _ in range(3):
        program(x, edge_index).sum().backward()
    graph = weakref.ref(built.pop())
    gc.collect()
    assert graph() is not None
    del edge_index
    gc.collect()
    assert graph() is None


def test_edges_that_a_program_makes_itself() -> None:
    """Their memory is the compiler's, and another's in the next run."""
    ours, theirs = make_layers("GATv2Conv", 3, 4)
    x, edge_index = make_graph()

    def both(x: Tensor, edge_index: Tensor) -> Tensor:
        return ours(x, edge_index.flip(0)) - ours(x, edge_index + 0)

    program = torch.compile(both, fullgraph=True)
    for _ in range(3):
        edge_index = torch.randint(7, (2, 30))
        expected = theirs(x, edge_index.flip(0)) - theirs(x, edge_index)
        equal_with_gradients(
            [program(x, edge_index)], [expected], [[x, *layer.parameters()] for layer in (ours, theirs)]
        )


def test_an_edge_to_a_node_that_is_not_there() -> None:
    ours, _ = make_layers("GATConv", 3, 4)
    program, _ = compiled(ours)
    with pytest.raises(GraphStructureError, match=r"source \(key\): expected indices from 0 to 6"):
        program(make_graph()[0], torch.tensor([[0, 9], [1, 2]]))


@pytest.mark.parametrize("method", ["message", "aggregate", "edge_update"])
def test_a_method_that_is_replaced_later_is_used(method: str) -> None:
    ours, _ = make_layers("GATConv", 3, 4)
    x, edge_index = make_graph()
    program, _ = compiled(ours, "eager")
    program(x, edge_index)
    plain = getattr(ours, method)
    setattr(ours, method, lambda *given, **named: 2.0 * plain(*given, **named))
    expected = ours(x, edge_index)
    torch.testing.assert_close(program(x, edge_index), expected, rtol=1e-10, atol=1e-10)
    delattr(ours, method)
    assert not torch.allclose(program(x, edge_index), expected)


_HOOKS: dict[str, Any] = {
    "a folded projection": lambda layer: layer.lin.register_forward_hook(lambda *given: 2.0 * given[-1]),
    "the aggregation": lambda layer: layer.aggr_module.register_forward_hook(lambda *given: 2.0 * given[-1]),
    "messages": lambda layer: layer.register_message_forward_hook(lambda *given: 2.0 * given[-1]),
    "propagation": lambda layer: layer.register_propagate_forward_hook(lambda *given: 2.0 * given[-1]),
}


@pytest.mark.parametrize("where", list(_HOOKS))
def test_a_hook_that_is_there_before(where: str) -> None:
    """The parent's forward is compiled, which runs hooks of modules, and passes over its own of message passing."""
    ours, theirs = make_layers("GATConv", 3, 4)
    x, edge_index = make_graph()
    plain = ours(x, edge_index)
    for layer in (ours, theirs):
        _HOOKS[where](layer)
    program, counter = compiled(ours, "eager")
    found, expected = program(x, edge_index), compiled(theirs, "eager")[0](x, edge_index)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(found, plain) == (where in ("messages", "propagation"))
    assert "anyattention" not in operators(counter)


def test_an_exported_program_has_pytorchs_operators_alone() -> None:
    ours, theirs = make_layers("GATConv", 3, 4)
    x, edge_index = make_graph()
    exported = torch.export.export(ours, (x, edge_index))
    assert "anyattention" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x, edge_index), theirs(x, edge_index), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_loops", [-1, 7])
def test_the_operator_keeps_pytorchs_rules(num_loops: int) -> None:
    edge_index = torch.randint(7, (2, 30))
    # Not its results from call to call: they are names, and those of other tensors are others.
    checks = ("test_schema", "test_faketensor")
    given = (edge_index, 7, 7, num_loops)
    torch.library.opcheck(torch.ops.anyattention.remembered_graph, given, test_utils=checks)


def test_names_stand_for_the_arrays_in_any_order_and_as_copies() -> None:
    arrays = arrays_of(Graph.from_edge_index(torch.randint(5, (2, 13)), 5))
    names = handles.names_of(arrays)
    fields = list(reversed(GraphArrays.__dataclass_fields__))
    named = {name: names[place].expand(1) for place, name in enumerate(fields)}
    assert handles.resolved(GraphArrays(**named)) is arrays
    turned = handles.resolved(GraphArrays(**{name: x.repeat(3) for name, x in named.items()}).transposed)
    for name in fields:
        assert getattr(turned, name) is getattr(arrays.transposed, name)
    mixed = GraphArrays(**{**named, "keys_by_query": torch.arange(4)})
    assert torch.equal(handles.resolved(mixed).keys_by_query, torch.arange(4))
    assert handles.resolved(mixed).key_offsets is arrays.key_offsets
    assert handles.resolved(arrays) is arrays


def test_a_name_of_what_is_gone() -> None:
    arrays = arrays_of(Graph.from_edge_index(torch.randint(5, (2, 13)), 5))
    names = handles.names_of(arrays)
    held, copied = weakref.ref(arrays), names.clone()
    del arrays
    gc.collect()
    assert held() is not None
    del names
    gc.collect()
    assert held() is None
    with pytest.raises(GraphStructureError, match="a graph that the compiled program holds, got one that is gone"):
        handles.resolved(GraphArrays(*copied[:, None].flip(0)))
