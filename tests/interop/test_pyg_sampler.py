"""interop.pyg.NeighborSampler under PyTorch Geometric's loaders: batches are compared with the data edge by edge."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError, UnsupportedError
from anyattention.native import load

pytest.importorskip("torch_geometric")

from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import LinkLoader, NodeLoader
from torch_geometric.nn import SAGEConv
from torch_geometric.sampler import EdgeSamplerInput, NodeSamplerInput, NumNeighbors
from torch_geometric.utils import trim_to_layer

from anyattention.interop.pyg import NeighborSampler

_WRITES, _CITES, _BY = ("author", "writes", "paper"), ("paper", "cites", "paper"), ("paper", "by", "author")


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def some_data() -> Data:
    edge_index = torch.randint(53, (2, 311), generator=seeded())
    return Data(
        x=torch.randn(53, 4), edge_index=edge_index, edge_attr=torch.randn(311, 3), weight=torch.arange(311) % 3.0,
        y=torch.arange(53),
    )  # fmt: skip


def hub(degree: int) -> Tensor:
    """The edges of node 0, to all nodes."""
    return torch.stack([torch.arange(degree), torch.zeros(degree, dtype=torch.int64)])


def typed_data() -> HeteroData:
    data = HeteroData()
    counts = {"author": 31, "paper": 47, "word": 13}
    for kind, count in counts.items():
        data[kind].x = torch.randn(count, 4)
    for place, (relation, count) in enumerate({_WRITES: 150, _CITES: 210, _BY: 90}.items()):
        ends = [torch.randint(counts[relation[end]], (count,), generator=seeded(place + end)) for end in (0, 2)]
        data[relation].edge_index = torch.stack(ends)
        data[relation].edge_attr = torch.randn(count, 2)
    return data


def assert_edges(ends: Tensor, whole: Tensor, e_id: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Each edge of a batch is the one that it says, and none is there twice."""
    assert len(e_id.unique()) == len(e_id)
    assert torch.equal(torch.stack([sources[ends[0]], targets[ends[1]]]), whole[:, e_id])


def assert_counts(ends: Tensor, whole: Tensor, nodes: Tensor, first: int, last: int, fanout: int) -> None:
    """The nodes from `first` to `last`, which one hop has found, have as many edges as they should."""
    drawn, degree = Counter(ends[1].tolist()), Counter(whole[1].tolist())
    for number in range(first, last):
        every = degree[int(nodes[number])]
        assert drawn[number] == (every if fanout == -1 else min(fanout, every))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fanouts", [[3], [4, 2], [-1, 3], [2, 0, 2]], ids=str)
def test_batches_of_nodes(fanouts: list[int], workers: int) -> None:
    data = some_data()
    seeds = torch.arange(0, 53, 3)
    loader = NodeLoader(data, NeighborSampler(data, fanouts), seeds, batch_size=7, num_workers=workers)
    found = []
    for batch in loader:
        found += batch.n_id[: batch.batch_size].tolist()
        assert len(batch.n_id.unique()) == len(batch.n_id) == batch.num_nodes == sum(batch.num_sampled_nodes)
        assert batch.num_sampled_nodes[0] == batch.batch_size
        assert len(batch.num_sampled_nodes) == len(batch.num_sampled_edges) + 1 == len(fanouts) + 1
        assert sum(batch.num_sampled_edges) == batch.num_edges
        assert_edges(batch.edge_index, data.edge_index, batch.e_id, batch.n_id, batch.n_id)
        assert torch.equal(batch.x, data.x[batch.n_id])
        assert torch.equal(batch.y, data.y[batch.n_id])
        assert torch.equal(batch.edge_attr, data.edge_attr[batch.e_id])
        assert torch.equal(seeds[batch.input_id], batch.n_id[: batch.batch_size])
        assert batch.batch is None
        ends = torch.tensor([0, *batch.num_sampled_nodes]).cumsum(0).tolist()
        for first, last, fanout in zip(ends[:-1], ends[1:], [*fanouts, 0], strict=True):
            assert_counts(batch.edge_index, data.edge_index, batch.n_id, first, last, fanout)
    assert found == seeds.tolist()


@pytest.mark.parametrize("fanouts", [[3, 2], {_WRITES: [-1, 2], _CITES: [2, 0], _BY: [1, 3]}], ids=str)
def test_batches_of_typed_nodes(fanouts: Any) -> None:
    data = typed_data()
    seeds = torch.arange(5, 40)
    loader = NodeLoader(data, NeighborSampler(data, fanouts), ("paper", seeds), batch_size=10)
    found = []
    for batch in loader:
        found += batch["paper"].n_id[: batch["paper"].batch_size].tolist()
        for kind in data.node_types:
            assert torch.equal(batch[kind].x, data[kind].x[batch[kind].n_id])
            assert sum(batch[kind].num_sampled_nodes) == len(batch[kind].n_id) == len(batch[kind].n_id.unique())
            assert batch[kind].num_sampled_nodes[0] == (batch["paper"].batch_size if kind == "paper" else 0)
        for relation in data.edge_types:
            source, _, target = relation
            ends, whole = batch[relation].edge_index, data[relation].edge_index
            assert_edges(ends, whole, batch[relation].e_id, batch[source].n_id, batch[target].n_id)
            assert torch.equal(batch[relation].edge_attr, data[relation].edge_attr[batch[relation].e_id])
            assert sum(batch[relation].num_sampled_edges) == ends.shape[1]
            wanted = fanouts[relation] if isinstance(fanouts, dict) else fanouts
            places = torch.tensor([0, *batch[target].num_sampled_nodes]).cumsum(0).tolist()
            for first, last, fanout in zip(places[:-1], places[1:], [*wanted, 0], strict=True):
                assert_counts(ends, whole, batch[target].n_id, first, last, fanout)
    assert found == seeds.tolist()


def test_all_neighbours_give_what_the_whole_data_gives() -> None:
    """In PyTorch Geometric's own layers, trimmed hop by hop."""
    data = some_data()
    layers = [SAGEConv(4, 5).double(), SAGEConv(5, 3).double()]
    whole = data.x.double()
    for layer in layers:
        whole = layer(whole, data.edge_index)
    for batch in NodeLoader(data, NeighborSampler(data, [-1, -1]), torch.arange(20), batch_size=8):
        x, edge_index = batch.x.double(), batch.edge_index
        for place, layer in enumerate(layers):
            x, edge_index, _ = trim_to_layer(
                place, batch.num_sampled_nodes, batch.num_sampled_edges, x=x, edge_index=edge_index
            )
            x = layer(x, edge_index)
        torch.testing.assert_close(x[: batch.batch_size], whole[batch.input_id], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernels", [True, False])
def test_nodes_that_come_twice_have_edges_twice(native: None, monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    """As oversampling loaders give them: each has a row of the batch, and edges lead to the first."""
    data = some_data()
    sampler = NeighborSampler(data, [3, 2], generator=seeded(1))
    if not kernels:
        monkeypatch.setattr(load, "available", lambda: False)
    seeds = torch.tensor([7, 3, 7, 7, 11])
    output: Any = sampler.sample_from_nodes(NodeSamplerInput(torch.arange(5), seeds))
    assert output.node[:5].tolist() == seeds.tolist()
    assert len(output.node[[0, 1, *range(4, len(output.node))]].unique()) == len(output.node) - 2
    assert torch.equal(torch.stack([output.node[output.row], output.node[output.col]]), data.edge_index[:, output.edge])
    assert not torch.isin(output.row, torch.tensor([2, 3])).any()
    degree = int((data.edge_index[1] == 7).sum())
    first = output.edge[output.col == 0].tolist()
    assert len(first) == min(degree, 3)
    assert first == output.edge[output.col == 2].tolist() == output.edge[output.col == 3].tolist()
    assert output.num_sampled_nodes[0] == 5


def test_weights_of_edges() -> None:
    data = some_data()
    for batch in NodeLoader(data, NeighborSampler(data, [5, 5], weight_attr="weight"), batch_size=53):
        assert (data.weight[batch.e_id] > 0).all()
        there = Data(edge_index=data.edge_index[:, data.weight > 0])
        assert_counts(batch.edge_index, there.edge_index, batch.n_id, 0, 53, 5)
    typed = typed_data()
    for relation in typed.edge_types:
        typed[relation].weight = (torch.arange(typed[relation].num_edges) % 2).float()
    sampler = NeighborSampler(typed, [-1], weight_attr="weight")
    for batch in NodeLoader(typed, sampler, "paper", batch_size=47):
        assert (batch[_CITES].e_id % 2 == 1).all()
        assert batch[_CITES].num_edges == int((typed[_CITES].weight > 0).sum())


def test_a_generator_and_manual_seed_govern_what_is_drawn() -> None:
    data = some_data()

    def drawn(**given: Any) -> list[int]:
        (batch,) = NodeLoader(data, NeighborSampler(data, [2, 2], **given), torch.arange(9), batch_size=9)
        return batch.e_id.tolist()

    assert drawn(generator=seeded(1)) == drawn(generator=seeded(1)) != drawn(generator=seeded(2))
    torch.manual_seed(5)
    first = drawn()
    torch.manual_seed(5)
    assert drawn() == first


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def test_workers_with_a_generator_draw_different_numbers(context: str) -> None:
    """Of the same node in each batch."""
    data = Data(edge_index=hub(200), num_nodes=200)
    seeds = torch.zeros(8, dtype=torch.int64)

    def two_epochs() -> list[tuple[int, ...]]:
        sampler = NeighborSampler(data, [5], generator=seeded(1))
        loader: Any = NodeLoader(data, sampler, seeds, num_workers=2, multiprocessing_context=context)
        return [tuple(batch.e_id.tolist()) for _ in range(2) for batch in loader]

    torch.manual_seed(3)
    assert len(set(found := two_epochs())) == 16
    torch.manual_seed(3)
    assert two_epochs() == found


def test_a_generator_alone_governs_what_the_main_process_draws() -> None:
    data = Data(edge_index=hub(200), num_nodes=200)
    found = []
    for number in (3, 4):
        torch.manual_seed(number)
        loader = NodeLoader(data, NeighborSampler(data, [5], generator=seeded(1)), torch.zeros(4, dtype=torch.int64))
        found.append([tuple(batch.e_id.tolist()) for _ in range(2) for batch in loader])
    assert found[0] == found[1]
    assert len(set(found[0])) == 8


@pytest.mark.parametrize("amount", [None, 1.0])
def test_batches_of_edges(amount: float | None) -> None:
    data = some_data()
    edges = data.edge_index[:, :40]
    given: Any = {} if amount is None else {"neg_sampling": {"mode": "binary", "amount": amount}}
    sampler = NeighborSampler(data, [3, 2])
    for place, batch in enumerate(LinkLoader(data, sampler, edge_label_index=edges, batch_size=10, **given)):
        assert_edges(batch.edge_index, data.edge_index, batch.e_id, batch.n_id, batch.n_id)
        assert torch.equal(batch.n_id[batch.edge_label_index[:, :10]], edges[:, 10 * place : 10 * place + 10])
        assert batch.edge_label_index.shape[1] == (10 if amount is None else 20)


def test_batches_of_typed_edges() -> None:
    data = typed_data()
    edges = data[_WRITES].edge_index[:, :40]
    loader = LinkLoader(data, NeighborSampler(data, [3, 2]), edge_label_index=(_WRITES, edges), batch_size=40)
    for batch in loader:
        authors, papers = batch[_WRITES].edge_label_index
        assert torch.equal(torch.stack([batch["author"].n_id[authors], batch["paper"].n_id[papers]]), edges)


def test_edges_go_both_ways_where_that_is_asked() -> None:
    data = some_data()
    sampler = NeighborSampler(data, [3], "bidirectional")
    for batch in NodeLoader(data, sampler, torch.arange(10), batch_size=10):
        pairs = set(map(tuple, batch.edge_index.T.tolist()))
        assert pairs == {(target, source) for source, target in pairs}
        whole = set(map(tuple, data.edge_index.T.tolist()))
        for source, target in batch.n_id[batch.edge_index].T.tolist():
            assert (source, target) in whole or (target, source) in whole


def test_numbers_of_pytorch_geometrics_own_kind() -> None:
    data = typed_data()
    sampler = NeighborSampler(data, NumNeighbors({_CITES: [2]}, default=[0]))
    for batch in NodeLoader(data, sampler, "paper", batch_size=47):
        assert batch[_WRITES].num_edges == 0
        assert batch[_CITES].num_edges > 0
    sampler.num_neighbors = [1]
    for batch in NodeLoader(data, sampler, "paper", batch_size=47):
        assert batch[_WRITES].num_edges > 0
        assert len(batch["author"].num_sampled_nodes) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"replace": True},
        {"disjoint": True},
        {"time_attr": "time"},
        {"subgraph_type": "induced"},
        {"subgraph_type": "x"},
    ],
    ids=str,
)
def test_what_this_sampler_has_not(given: Any) -> None:
    (name,) = given
    with pytest.raises(UnsupportedError, match=f"{name}: expected"):
        NeighborSampler(some_data(), [2], **given)


def test_times_are_refused() -> None:
    data = some_data()
    sampler = NeighborSampler(data, [2])
    with pytest.raises(UnsupportedError, match="time: expected None"):
        sampler.sample_from_nodes(NodeSamplerInput(torch.arange(2), torch.arange(2), torch.arange(2)))
    edges = EdgeSamplerInput(None, torch.arange(2), torch.arange(2), time=torch.arange(2))
    with pytest.raises(UnsupportedError, match="time: expected None"):
        sampler.sample_from_edges(edges)


@pytest.mark.parametrize(
    ("fanouts", "match"),
    [
        ([-2], r"num_neighbors\[0\]: expected an int of at least 0"),
        ([], "num_neighbors: expected a list of a number of neighbours for each hop"),
        (3, "num_neighbors: expected a list"),
    ],
)
def test_numbers_of_neighbours_that_are_none(fanouts: Any, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        NeighborSampler(some_data(), fanouts)


def test_numbers_of_neighbours_of_edge_types_that_are_none() -> None:
    with pytest.raises(InvalidInputError, match=r"num_neighbors: expected a list.*Missing number of neighbors"):
        NeighborSampler(typed_data(), {_CITES: [2]})
    with pytest.raises(InvalidInputError, match=r"num_neighbors: expected a list.*exist in the graph"):
        NeighborSampler(typed_data(), {("a", "b", "c"): [2]})


def test_data_that_is_none() -> None:
    with pytest.raises(UnsupportedError, match="data: expected a Data or HeteroData, got tuple"):
        NeighborSampler((1, 2), [2])
    with pytest.raises(UnsupportedError, match="data: expected an edge_index, got none"):
        NeighborSampler(Data(num_nodes=3), [2])
    with pytest.raises(InvalidInputError, match="data: expected an edge attribute 'w', got none"):
        NeighborSampler(some_data(), [2], weight_attr="w")
    with pytest.raises(DimensionMismatchError, match=r"data\.edge_attr: expected \(edges=311,\)"):
        NeighborSampler(some_data(), [2], weight_attr="edge_attr")
    with pytest.raises(GraphStructureError, match=r"data: source \(key\): expected indices from 0 to 2"):
        NeighborSampler(Data(edge_index=torch.tensor([[5], [0]]), num_nodes=3), [2])
    nodes = HeteroData()
    nodes["a"].name = "nothing that says how many"
    with (
        pytest.warns(UserWarning, match="Unable to accurately infer 'num_nodes'"),
        pytest.raises(InvalidInputError, match=r"data\['a'\]: expected a number of nodes"),
    ):
        NeighborSampler(nodes, [2])


def test_seeds_that_are_not_there() -> None:
    sampler = NeighborSampler(some_data(), [2])
    with pytest.raises(GraphStructureError, match="seeds: expected nodes from 0 to 52, got 99"):
        sampler.sample_from_nodes(NodeSamplerInput(torch.arange(1), torch.tensor([99])))
