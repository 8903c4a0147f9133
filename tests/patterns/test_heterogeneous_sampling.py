"""HeterogeneousGraph.sample against brute force, the whole graph, and itself without kernels and on other threads."""

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import HeterogeneousGraph, SampledHeterogeneousGraph
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError, UnsupportedError
from anyattention.native import load
from anyattention.nn import HeterogeneousGraphAttention

_NODES = {"author": 31, "paper": 47, "word": 13}
_WRITES, _CITES, _HAS = ("author", "writes", "paper"), ("paper", "cites", "paper"), ("word", "in", "paper")
_BY = ("paper", "by", "author")
_SIZES = {_WRITES: 150, _CITES: 210, _HAS: 0, _BY: 90}


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def random_graph() -> HeterogeneousGraph:
    edges = {}
    for relation, count in _SIZES.items():
        ends = [torch.randint(_NODES[relation[end]], (count,), generator=seeded(count + end)) for end in (0, 2)]
        edges[relation] = torch.stack(ends)
    return HeterogeneousGraph.from_edge_index(edges, _NODES)


def assert_same(one: SampledHeterogeneousGraph, other: SampledHeterogeneousGraph) -> None:
    assert list(one.nodes) == list(other.nodes)
    assert all(torch.equal(ids, other.nodes[kind]) for kind, ids in one.nodes.items())
    assert one.num_seeds == other.num_seeds
    for block, another in zip(one.blocks, other.blocks, strict=True):
        assert dict(block.num_nodes) == dict(another.num_nodes)
        assert block.relations == another.relations
        assert all(torch.equal(ends, another.edge_index[key]) for key, ends in block.edge_index.items())
    for edges, others in zip(one.edges, other.edges, strict=True):
        assert all(torch.equal(each, others[key]) for key, each in edges.items())


def assert_sampled(
    graph: HeterogeneousGraph,
    seeds: dict[str, Tensor],
    fanouts: dict[Any, list[int]],
    sampled: SampledHeterogeneousGraph,
) -> None:
    nodes = {kind: ids.tolist() for kind, ids in sampled.nodes.items()}
    for kind, ids in nodes.items():
        assert len(set(ids)) == len(ids)
        given = seeds.get(kind, torch.empty(0)).tolist()
        assert ids[: len(given)] == given
        assert sampled.num_seeds[kind] == len(given)
    known = dict(sampled.num_seeds)
    hop_of = {kind: dict.fromkeys(range(count), 0) for kind, count in known.items()}
    for hop in range(len(sampled.blocks)):
        block, edges = sampled.blocks[-1 - hop], sampled.edges[-1 - hop]
        assert block.num_queries == known
        for kind, count in block.num_nodes.items():
            hop_of[kind] |= dict.fromkeys(range(known[kind], count), hop + 1)
        for relation, ends in block.edge_index.items():
            source, _, target = relation
            keys, queries = graph.edge_index[relation].tolist()
            found = edges[relation].tolist()
            assert len(set(found)) == len(found)
            for edge, key, query in zip(found, *ends.tolist(), strict=True):
                assert (nodes[source][key], nodes[target][query]) == (keys[edge], queries[edge])
                assert key < block.num_nodes[source]
            drawn, degree = Counter(ends[1].tolist()), Counter(queries)
            for query in range(known[target]):
                fanout, every = fanouts[relation][hop_of[target][query]], degree[nodes[target][query]]
                assert drawn[query] == (every if fanout == -1 else min(fanout, every))
        known = dict(block.num_nodes)
    assert known == {kind: len(ids) for kind, ids in nodes.items()}


_SEEDS = {"paper": torch.tensor([3, 46, 11]), "author": torch.tensor([30, 2], dtype=torch.int32)}


@pytest.mark.parametrize("fanouts", [[2], [-1], [3, 2], [4, -1, 2]], ids=str)
def test_what_is_said_holds(fanouts: list[int]) -> None:
    graph = random_graph()
    sampled = graph.sample(_SEEDS, fanouts, generator=seeded(1))
    assert_sampled(graph, _SEEDS, dict.fromkeys(graph.relations, fanouts), sampled)


def test_each_relation_has_fanouts_of_its_own() -> None:
    graph = random_graph()
    fanouts = {_WRITES: [2, 1], _BY: [-1, 3]}
    sampled = graph.sample(_SEEDS, fanouts)
    assert_sampled(graph, _SEEDS, {_CITES: [0, 0], _HAS: [0, 0], **fanouts}, sampled)
    assert sampled.blocks[0].relations == graph.relations


def test_kernels_draw_what_the_formula_says(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph()
    weights = {_CITES: torch.rand(210), _BY: torch.rand(90, dtype=torch.float64)}
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(load, "num_threads", lambda threads=threads: threads)
        results.append(graph.sample(_SEEDS, [3, 2], weights=weights, generator=seeded(5)))
    monkeypatch.setattr(load, "available", lambda: False)
    results.append(graph.sample(_SEEDS, [3, 2], weights=weights, generator=seeded(5)))
    for each in results[1:]:
        assert_same(results[0], each)


def test_relations_of_the_same_ends_draw_for_themselves() -> None:
    edges = torch.stack([torch.arange(60) % 20, torch.arange(60) // 20])
    graph = HeterogeneousGraph.from_edge_index({("a", "to", "b"): edges, ("a", "of", "b"): edges}, {"a": 20, "b": 3})
    (found,) = graph.sample({"b": torch.arange(3)}, [5]).edges
    assert not torch.equal(found["a", "to", "b"], found["a", "of", "b"])


def test_weights_of_zero_are_never_drawn() -> None:
    graph = random_graph()
    weights = (torch.arange(210) % 2).to(torch.float32)
    sampled = graph.sample(_SEEDS, [-1, -1], weights={_CITES: weights})
    assert len(sampled.edges[0][_CITES]) > 0
    assert (sampled.edges[0][_CITES] % 2 == 1).all()
    assert (sampled.edges[0][_BY] % 2 == 0).any()


@pytest.mark.parametrize("over_blocks", [True, False])
def test_all_neighbours_give_what_the_whole_graph_gives(over_blocks: bool) -> None:
    graph = random_graph()
    features = {kind: torch.randn(count, 4, dtype=torch.float64) for kind, count in _NODES.items()}
    layers = [
        HeterogeneousGraphAttention(
            4, 2, in_features=dict.fromkeys(_NODES, 4), relations=list(_SIZES), dropout=0.0
        ).double()
        for _ in range(2)
    ]
    whole = features
    for layer in layers:
        whole = {**whole, **layer(whole, graph).output}
    sampled = graph.sample(_SEEDS, [-1, -1])
    x = {kind: features[kind][ids] for kind, ids in sampled.nodes.items()}
    for place, (layer, block) in enumerate(zip(layers, sampled.blocks, strict=True)):
        if over_blocks:
            x = sampled.queries_of({**x, **layer(x, block).output}, place)
        else:
            x = {**x, **layer(x, sampled.joint()).output}
    for kind, seeds in _SEEDS.items():
        torch.testing.assert_close(x[kind][: len(seeds)], whole[kind][seeds.long()], rtol=0, atol=1e-12)


def test_what_was_sampled_is_sent_and_copied() -> None:
    sampled = random_graph().sample(_SEEDS, [3, 2])
    assert_same(pickle.loads(pickle.dumps(sampled)), sampled)
    assert_same(copy.deepcopy(sampled), sampled)
    assert sampled.to("cpu") is sampled
    moved = sampled.to("meta")
    assert moved.device.type == moved.blocks[0].device.type == moved.edges[0][_CITES].device.type == "meta"
    assert repr(sampled).startswith("SampledHeterogeneousGraph(author=")


def test_what_was_sent_wrong_is_refused() -> None:
    rebuild, (numbers, counts, num_edges, device) = random_graph().sample(_SEEDS, [3, 2]).__reduce__()
    bad = numbers.copy()
    bad[-1] = 99
    with pytest.raises(GraphStructureError, match="edge_index"):
        rebuild(bad, counts, num_edges, device)
    for given in ((numbers[:-1], counts, num_edges), (numbers, [{}], num_edges), (None, counts, num_edges)):
        with pytest.raises(GraphStructureError, match="state: expected integers"):
            rebuild(*given, device)


def test_pinned_memory_holds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = random_graph().sample(_SEEDS, [3, 2])
    # Without an accelerator there is none.
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    pinned = sampled.pin_memory()
    assert_same(pinned, sampled)
    assert pinned.nodes["paper"].data_ptr() != sampled.nodes["paper"].data_ptr()


def test_a_graph_without_relations_has_no_neighbours() -> None:
    with pytest.raises(GraphStructureError, match="graph: expected a relation at least, got none"):
        HeterogeneousGraph.from_edge_index({}, {"a": 3}).sample({"a": torch.tensor([1])}, [2])


def test_no_seeds() -> None:
    sampled = random_graph().sample({}, [3, 2])
    assert {kind: len(ids) for kind, ids in sampled.nodes.items()} == dict.fromkeys(_NODES, 0)
    assert sampled.blocks[0].num_edges == 0


@pytest.mark.parametrize(
    ("seeds", "error", "match"),
    [
        ({"shop": torch.tensor([1])}, InvalidInputError, "seeds: expected types of the graph: 'author', .* got 'shop'"),
        (torch.tensor([1]), InvalidInputError, "seeds: expected a dictionary of tensors of nodes, by type, got Tensor"),
        ({"paper": torch.tensor([47])}, GraphStructureError, r"seeds\['paper'\]: expected nodes from 0 to 46, got 47"),
        ({"paper": torch.tensor([1, 1])}, GraphStructureError, "seeds: expected each node once"),
        ({"paper": torch.tensor([0.5])}, InvalidInputError, r"seeds\['paper'\]: expected a tensor of integers"),
    ],
)
def test_seeds_that_are_none(seeds: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        random_graph().sample(seeds, [2])


@pytest.mark.parametrize(
    ("fanouts", "match"),
    [
        ([0], r"fanouts\[0\]: expected an int of at least 1"),
        ({}, "fanouts: expected as many hops for each relation, and one relation at least"),
        ({_WRITES: [1], _CITES: [1, 2]}, r"fanouts: expected as many hops for each relation.*got \[1, 2\] hops"),
        ({_WRITES: [0]}, r"fanouts\[\('author', 'writes', 'paper'\)\]\[0\]: expected an int"),
        ({"writes": [1]}, "fanouts: expected relations .* of three strings, got 'writes'"),
        ({("a", "b", "c"): [1]}, r"fanouts: expected relations of the graph: .* got \('a', 'b', 'c'\)"),
    ],
)
def test_fanouts_that_are_none(fanouts: Any, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        random_graph().sample(_SEEDS, fanouts)


def test_weights_that_are_none() -> None:
    graph: Any = random_graph()
    with pytest.raises(InvalidInputError, match="weights: expected a dictionary by relation, got Tensor"):
        graph.sample(_SEEDS, [1], weights=torch.ones(3))
    with pytest.raises(DimensionMismatchError, match=r"weights\[\('paper', 'cites', 'paper'\)\]: expected \(edges=210"):
        graph.sample(_SEEDS, [1], weights={_CITES: torch.ones(3)})
    with pytest.raises(UnsupportedError, match="graph: expected a graph on the CPU"):
        graph.to("meta").sample(_SEEDS, [1])
