"""NeighborLoader: each seed once in an epoch, and the same batches whatever samples them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

import anyattention
from anyattention import Graph, HeterogeneousGraph, NeighborLoader, SampledGraph
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError
from anyattention.nn import GraphAttention

_RELATION = ("a", "to", "b")


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def random_graph(nodes: int = 60, edges: int = 900) -> Graph:
    return Graph.from_edge_index(torch.randint(nodes, (2, edges), generator=seeded()), nodes)


def typed_graph() -> HeterogeneousGraph:
    edges = torch.stack([torch.randint(count, (300,), generator=seeded(count)) for count in (40, 23)])
    return HeterogeneousGraph.from_edge_index({_RELATION: edges}, {"a": 40, "b": 23})


def contents(loader: Any) -> list[Any]:
    """What the batches of an epoch hold."""
    return [(sampled.nodes.tolist(), sampled.edges[0].tolist(), sampled.num_seeds) for sampled in loader]


def typed_contents(loader: Any) -> list[Any]:
    return [
        ({kind: ids.tolist() for kind, ids in sampled.nodes.items()}, sampled.edges[0][_RELATION].tolist())
        for sampled in loader
    ]


def first_seed(sampled: SampledGraph) -> int:
    return int(sampled.nodes[0])


def seeds_of(loader: Any) -> list[list[int]]:
    return [sampled.nodes[: sampled.num_seeds].tolist() for sampled in loader]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 10, 100])
def test_each_seed_comes_once(batch_size: int, drop_last: bool) -> None:
    seeds = torch.arange(0, 60, 2)
    loader = NeighborLoader(random_graph(), seeds, [3, 2], batch_size=batch_size, shuffle=True, drop_last=drop_last)
    for _ in range(2):
        found = seeds_of(loader)
        assert len(loader) == len(found) == (30 // batch_size if drop_last else -(-30 // batch_size))
        every = [seed for batch in found for seed in batch]
        assert len(set(every)) == len(every)
        assert set(every) <= set(seeds.tolist())
        assert len(every) == (30 - 30 % batch_size if drop_last else 30)


def test_a_batch_is_a_sample() -> None:
    graph = random_graph()
    loader = NeighborLoader(graph, torch.arange(5, 25), [-1, -1], batch_size=20)
    (sampled,) = loader
    expected = graph.sample(torch.arange(5, 25), [-1, -1])
    assert torch.equal(sampled.nodes, expected.nodes)
    assert torch.equal(sampled.edges[0], expected.edges[0])


def test_epochs_differ_and_are_known_by_their_number() -> None:
    loader = NeighborLoader(random_graph(), None, [3, 2], batch_size=16, shuffle=True, generator=seeded(3))
    first, second = contents(loader), contents(loader)
    assert first != second
    assert loader.epoch == 2
    loader.epoch = 1
    assert contents(loader) == second
    again = NeighborLoader(random_graph(), None, [3, 2], batch_size=16, shuffle=True, generator=seeded(3))
    assert contents(again) == first
    another = NeighborLoader(random_graph(), None, [3, 2], batch_size=16, shuffle=True, generator=seeded(4))
    assert contents(another) != first


def test_a_seed_may_be_set() -> None:
    one, other = (NeighborLoader(random_graph(), None, [3], batch_size=16, generator=seeded(n)) for n in (3, 4))
    other.seed = one.seed
    assert contents(one) == contents(other)
    other.seed = -1
    with pytest.raises(InvalidInputError, match="seed: expected an int of at least 0, got -1"):
        iter(other)
    assert other.epoch == 1


def test_a_default_device_elsewhere() -> None:
    loader = NeighborLoader(random_graph(), None, [3], batch_size=16, generator=seeded(3))
    expected = contents(loader)
    loader.epoch = 0
    with torch.device("meta"):
        assert contents(loader) == expected


def test_in_order_epochs_still_draw_anew() -> None:
    loader = NeighborLoader(random_graph(), None, [3, 2], batch_size=16)
    assert seeds_of(loader) == [list(range(first, min(first + 16, 60))) for first in range(0, 60, 16)]
    assert contents(loader) != contents(loader)


def test_pytorchs_generator_gives_the_seed_and_no_more() -> None:
    torch.manual_seed(5)
    loader = NeighborLoader(random_graph(), None, [3], batch_size=30)
    state = torch.get_rng_state()
    first = contents(loader)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert contents(NeighborLoader(random_graph(), None, [3], batch_size=30)) == first


def test_two_iterators_do_not_disturb_each_other() -> None:
    loader = NeighborLoader(random_graph(), None, [3, 2], batch_size=16, shuffle=True)
    first, second = contents(loader), contents(loader)
    loader.epoch = 0
    one, other = iter(loader), iter(loader)
    assert [contents([next(one)]) + contents([next(other)]) for _ in range(len(loader))] == [
        [a, b] for a, b in zip(first, second, strict=True)
    ]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_batches(context: str, persistent: bool) -> None:
    graph = random_graph(200)
    weights = torch.rand(900, generator=seeded())

    def loader(workers: int, **others: Any) -> NeighborLoader:
        return NeighborLoader(
            graph, None, [3, 2], batch_size=90, shuffle=True, weights=weights, generator=seeded(1), num_workers=workers,
            **others,
        )  # fmt: skip

    expected = loader(0)
    # Kernels in this process first: their threads do not survive a fork.
    epochs = [contents(expected) for _ in range(3)]
    for workers in (1, 2):
        found = loader(workers, multiprocessing_context=context, persistent_workers=persistent)
        assert [contents(found) for _ in range(3)] == epochs


def test_workers_of_typed_graphs_give_the_same_batches() -> None:
    def loader(workers: int) -> NeighborLoader:
        return NeighborLoader(
            typed_graph(), ("b", torch.arange(1, 20)), {_RELATION: [3]}, batch_size=6, shuffle=True,
            weights={_RELATION: torch.rand(300, generator=seeded())}, generator=seeded(1), num_workers=workers,
        )  # fmt: skip

    expected = typed_contents(loader(0))
    assert sorted(seed for nodes, _ in expected for seed in nodes["b"]) == list(range(1, 20))
    assert typed_contents(loader(2)) == expected
    assert len(NeighborLoader(typed_graph(), "b", [2], batch_size=23)) == 1


def test_what_a_batch_becomes_is_made_in_the_worker() -> None:
    loader = NeighborLoader(random_graph(), None, [3], batch_size=20, transform=first_seed)
    assert list(loader) == [0, 20, 40]
    sent = NeighborLoader(random_graph(), None, [3], batch_size=20, transform=first_seed, num_workers=1)
    assert list(sent) == [0, 20, 40]


def test_it_is_pytorchs_loader() -> None:
    loader = NeighborLoader(random_graph(), None, [3], batch_size=20, num_workers=1, prefetch_factor=3)
    assert isinstance(loader, DataLoader)
    assert loader.num_workers == 1
    assert loader.prefetch_factor == 3
    assert anyattention.NeighborLoader is NeighborLoader


def test_a_network_learns_from_batches() -> None:
    torch.manual_seed(0)
    graph = random_graph(200, 2_000).with_self_loops()
    features = torch.randn(200, 4)
    labels = (features[:, 0] > 0).long()
    layer = GraphAttention(2, 1, in_features=4, score="dot", residual=True, dropout=0.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    loader = NeighborLoader(graph, torch.arange(150), [5], batch_size=32, shuffle=True)

    def output(sampled: SampledGraph) -> Tensor:
        x, (block,) = features[sampled.nodes], sampled.blocks
        return layer((x, x[: block.num_queries]), block).output

    for _ in range(10):
        for sampled in loader:
            loss = torch.nn.functional.cross_entropy(output(sampled), labels[sampled.nodes[: sampled.num_seeds]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = output(graph.sample(torch.arange(150, 200), [-1])).argmax(1)
    assert (found == labels[150:]).float().mean() > 0.9


@pytest.mark.parametrize("name", ["dataset", "sampler", "batch_sampler", "collate_fn"])
def test_what_the_loader_has_itself_is_refused(name: str) -> None:
    graph = random_graph()
    with pytest.raises(InvalidInputError, match=f"{name}: expected none: the loader has its own"):
        NeighborLoader(graph, **{name: RandomSampler(range(3))})


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"graph": torch.zeros(2, 3)}, InvalidInputError, "graph: expected a Graph or a Heterog.*, got Tensor"),
        ({"seeds": torch.tensor([1, 1])}, GraphStructureError, "seeds: expected each node once, got 1 different nodes"),
        ({"seeds": torch.tensor([60])}, GraphStructureError, "seeds: expected nodes from 0 to 59, got 60"),
        ({"seeds": "a"}, InvalidInputError, r"seeds: expected a torch\.Tensor, got str"),
        ({"fanouts": [0]}, InvalidInputError, r"fanouts\[0\]: expected an int of at least 1"),
        ({"batch_size": 0}, InvalidInputError, "batch_size: expected an int of at least 1, got 0"),
        ({"weights": torch.ones(3)}, DimensionMismatchError, r"weights: expected \(edges=900,\)"),
        ({"generator": 3}, InvalidInputError, r"generator: expected a torch\.Generator, got int"),
        ({"graph": typed_graph()}, InvalidInputError, r"seeds: expected a type, or a pair .*, of 'a', 'b'"),
        ({"graph": typed_graph(), "seeds": "c"}, InvalidInputError, "seeds: expected a type, .* got 'c'"),
    ],
)  # fmt: skip
def test_what_is_no_input(given: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        NeighborLoader(**{"graph": random_graph(), **given})


def test_an_epoch_that_is_none() -> None:
    loader = NeighborLoader(random_graph())
    loader.epoch = -1
    with pytest.raises(InvalidInputError, match="epoch: expected an int of at least 0, got -1"):
        iter(loader)
