"""The Graph that a layer remembers: used again while the edge list is the same, and no longer."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyattention.errors import GraphStructureError
from anyattention.interop import pyg
from anyattention.interop.pyg import remembered
from anyattention.interop.pyg.remembered import prepared_graph
from anyattention.patterns import Graph


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


def make_edges() -> Tensor:
    return torch.randint(7, (2, 20))


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv", "TransformerConv"])
def test_a_second_call_builds_nothing(name: str, built: list[Graph]) -> None:
    layer, x, edge_index = getattr(pyg, name)(3, 4), torch.randn(7, 3), make_edges()
    first = layer(x, edge_index)
    assert torch.equal(layer(x, edge_index), first)
    assert len(built) == 1
    layer(x, edge_index.clone())
    assert len(built) == 2


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv", "TransformerConv"])
def test_a_tensor_changed_in_place_is_read_again(name: str, built: list[Graph]) -> None:
    layer, x, edge_index = getattr(pyg, name)(3, 4), torch.randn(7, 3), make_edges()
    layer(x, edge_index)
    edge_index[1] = edge_index[1].flip(0)
    expected = getattr(pyg, name)(3, 4)
    expected.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, edge_index), expected(x, edge_index.clone()))
    assert len(built) == 3
    # A view, or `.data`, of the same memory counts too.
    edge_index.data = edge_index.flip(1)
    layer(x, edge_index)
    assert len(built) == 4
    edge_index[:, :3].zero_()
    layer(x, edge_index)
    assert len(built) == 5


@pytest.mark.parametrize("num_loops", [None, 7])
@pytest.mark.parametrize(
    "write",
    [
        lambda x, new: x.data.copy_(new),
        lambda x, new: x.numpy().__setitem__(slice(None), new.numpy()),
        lambda x, new: torch.from_dlpack(x.detach()).copy_(new),
        lambda x, new: torch.empty(0, dtype=torch.int64).set_(x.untyped_storage(), 0, x.shape).copy_(new),
        lambda x, new: x.share_memory_().data.copy_(new),
    ],
    ids=["data", "numpy", "dlpack", "storage", "shared memory"],
)
def test_a_change_that_pytorch_does_not_see_is_seen(
    write: Callable[[Tensor, Tensor], Any], num_loops: int | None
) -> None:
    layer, edge_index, new = nn.Identity(), make_edges(), make_edges()
    old = prepared_graph(layer, edge_index, 7, 7, num_loops).graph.edge_index.clone()
    write(edge_index, new)
    found = prepared_graph(layer, edge_index, 7, 7, num_loops).graph.edge_index
    assert not torch.equal(found, old)
    assert torch.equal(found, prepared_graph(nn.Identity(), new, 7, 7, num_loops).graph.edge_index)


@pytest.mark.parametrize("add_self_loops", [False, True])
def test_a_student_learns_on_the_graph_of_its_teacher(add_self_loops: bool) -> None:
    settings = {"add_self_loops": add_self_loops, "edge_dim": 2}
    teacher, student = pyg.GATConv(3, 4, **settings), pyg.GATConv(3, 4, **settings)
    x, edge_index, edge_attr = torch.randn(7, 3), make_edges(), torch.randn(20, 2, requires_grad=True)
    edge_index[:, 0] = 1
    with torch.inference_mode():
        teacher(x, edge_index, edge_attr)
    student(x, edge_index, edge_attr).sum().backward()
    assert edge_attr.grad is not None


def test_sizes_and_loops_belong_to_it(built: list[Graph]) -> None:
    layer, edge_index = nn.Identity(), make_edges()
    for asked in ((7, 7, None), (8, 7, None), (7, 8, None), (7, 7, 7), (7, 7, 6)):
        sources, targets, loops = asked
        graph = prepared_graph(layer, edge_index, *asked).graph
        assert (graph.num_keys, graph.num_queries) == (sources, targets)
        own = edge_index if loops is None else edge_index[:, edge_index[0] != edge_index[1]]
        loop = torch.arange(loops or 0).expand(2, -1)
        assert torch.equal(graph.edge_index, torch.cat([own, loop], dim=1))
    assert len(built) == 5


def test_layers_share_the_graph_of_one_edge_list(built: list[Graph]) -> None:
    edge_index = make_edges()
    first, second = nn.Identity(), nn.Identity()
    assert prepared_graph(first, edge_index, 7, 7, 7) is prepared_graph(second, edge_index, 7, 7, 7)
    assert len(built) == 1


def test_the_graph_goes_with_the_edge_list_and_with_the_layer() -> None:
    layer, edge_index = nn.Identity(), make_edges()
    for num_loops in (None, 7):
        edge_index = make_edges()
        graph = weakref.ref(prepared_graph(layer, edge_index, 7, 7, num_loops).graph)
        assert graph() is not None
        del edge_index
        gc.collect()
        assert graph() is None
    edge_index = make_edges()
    graph = weakref.ref(prepared_graph(layer, edge_index, 7, 7, None).graph)
    del layer
    gc.collect()
    assert graph() is None


def test_another_edge_list_replaces_the_first() -> None:
    layer, first, second = nn.Identity(), make_edges(), make_edges()
    graph = weakref.ref(prepared_graph(layer, first, 7, 7, None).graph)
    kept = prepared_graph(layer, second, 7, 7, None)
    gc.collect()
    assert graph() is None
    del first
    gc.collect()
    assert prepared_graph(layer, second, 7, 7, None) is kept


def test_a_new_tensor_at_an_old_address_is_another_one() -> None:
    """Short-lived tensors of one size get the same id, version and memory over and over."""
    layer, held = nn.Identity(), []
    for _ in range(50):
        edge_index = make_edges()
        prepared = prepared_graph(layer, edge_index, 7, 7, 0)
        assert torch.equal(prepared.graph.edge_index, edge_index[:, edge_index[0] != edge_index[1]])
        # Someone, such as a thread in its backward pass, may still hold what was built for the last one.
        held.append(prepared)
        del edge_index


def test_inference_tensors_are_remembered_while_they_are_the_same(built: list[Graph]) -> None:
    layer = nn.Identity()
    with torch.inference_mode():
        edge_index = make_edges()
        kept = prepared_graph(layer, edge_index, 7, 7, None)
        assert prepared_graph(layer, edge_index, 7, 7, None) is kept
        edge_index[0] = 0
        assert torch.equal(prepared_graph(layer, edge_index, 7, 7, None).graph.key_index, edge_index[0])
    assert len(built) == 2


def test_a_wrong_edge_list_leaves_the_old_graph_alone() -> None:
    layer, edge_index = nn.Identity(), make_edges()
    kept = prepared_graph(layer, edge_index, 7, 7, None)
    with pytest.raises(GraphStructureError, match=r"source \(key\): expected indices from 0 to 6"):
        prepared_graph(layer, torch.tensor([[7], [0]]), 7, 7, None)
    assert prepared_graph(layer, edge_index, 7, 7, None) is kept


def test_threads_get_the_graph_of_their_own_edges() -> None:
    layer = pyg.GATConv(3, 4, heads=2)
    x = torch.randn(7, 3)
    edges = [make_edges() for _ in range(4)]
    with torch.no_grad():
        expected = [layer(x, each) for each in edges]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(60):
                if not torch.equal(layer(x, edges[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
