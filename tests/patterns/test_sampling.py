"""Graph.sample against brute force, exact odds, the whole graph, and itself without kernels and on other threads."""

import copy
import dataclasses
import itertools
import math
import pickle
from collections import Counter
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from anyattention import Graph
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    IndexRangeError,
    InvalidInputError,
    UnsupportedError,
)
from anyattention.native import load, neighbour_sampling
from anyattention.native.neighbour_sampling import NeighbourRows, numbered_nodes, sampled_offsets, sampled_rows
from anyattention.nn import GraphAttention
from anyattention.patterns import sampling
from anyattention.patterns.graph_arrays import fields_of
from anyattention.patterns.sampled import SampledGraph, rows_of


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def random_graph(nodes: int, edges: int, seed: int = 0) -> Graph:
    """Duplicates and self-loops come by themselves; the last node is isolated, and one has many edges."""
    edge_index = torch.randint(nodes - 1, (2, edges), generator=seeded(seed))
    edge_index[1, : edges // 4] = 1
    return Graph.from_edge_index(edge_index, nodes)


def assert_same(one: SampledGraph, other: SampledGraph) -> None:
    assert torch.equal(one.nodes, other.nodes)
    assert len(one.blocks) == len(other.blocks) == len(one.edges) == len(other.edges)
    for edges, others in zip(one.edges, other.edges, strict=True):
        assert torch.equal(edges, others)
    for block, another in zip(one.blocks, other.blocks, strict=True):
        assert_same_graphs(block, another)


def assert_same_graphs(graph: Graph, other: Graph) -> None:
    for array, another in zip(fields_of(graph), fields_of(other), strict=True):
        assert array is another is None or torch.equal(array, another)


def assert_sampled(graph: Graph, seeds: Tensor, fanouts: list[int], sampled: SampledGraph, weights: Any = None) -> None:
    """All that is said of a sample, edge by edge."""
    nodes = sampled.nodes.tolist()
    assert nodes[: len(seeds)] == seeds.tolist()
    assert len(set(nodes)) == len(nodes)
    assert sampled.num_seeds == len(seeds)
    assert len(sampled.blocks) == len(fanouts)
    keys, queries = graph.edge_index.tolist()
    there = weights > 0 if weights is not None else torch.ones(graph.num_edges, dtype=torch.bool)
    degree = Counter(graph.query_index[there].tolist())
    known, hop_of = len(seeds), dict.fromkeys(range(len(seeds)), 0)
    for hop, (block, edges) in enumerate(zip(sampled.blocks[::-1], sampled.edges[::-1], strict=True)):
        assert block.num_queries == known
        known = block.num_keys
        hop_of |= dict.fromkeys(range(block.num_queries, known), hop + 1)
        assert len(set(edges.tolist())) == block.num_edges == len(edges)
        for edge, key, query in zip(edges.tolist(), *block.edge_index.tolist(), strict=True):
            assert (nodes[key], nodes[query]) == (keys[edge], queries[edge])
            assert there[edge]
        drawn = Counter(block.query_index.tolist())
        for query in range(block.num_queries):
            fanout = fanouts[hop_of[query]]
            every = degree[nodes[query]]
            assert drawn[query] == (every if fanout == -1 else min(every, fanout))
        # By query, in the caller's order; and the rows are those that the edges give.
        assert block.query_index.tolist() == sorted(block.query_index.tolist())
        assert_same_graphs(
            block, Graph.from_edge_index(block.edge_index, num_queries=block.num_queries, num_keys=known)
        )
        for query in range(block.num_queries):
            found = edges[block.query_index == query].tolist()
            assert found == sorted(found)
    assert known == len(nodes)
    # Each node but the seeds was found by an edge, in order.
    found = list(dict.fromkeys([*range(len(seeds)), *sampled.blocks[0].key_index.tolist()]))
    assert found == list(range(len(nodes)))


@pytest.mark.parametrize("fanouts", [[1], [3], [-1], [2, 3], [15, 10], [-1, -1], [3, -1, 2], [100, 100]], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_said_holds(fanouts: list[int], weighted: bool) -> None:
    graph = random_graph(53, 311)
    weights = torch.rand(311, generator=seeded()).relu_() * (torch.arange(311) % 3 > 0) if weighted else None
    seeds = torch.tensor([7, 52, 1, 30, 11])
    sampled = graph.sample(seeds, fanouts, weights=weights, generator=seeded(3))
    assert_sampled(graph, seeds, fanouts, sampled, weights)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    nodes=strategies.integers(1, 9),
    data=strategies.data(),
    seed=strategies.integers(0, 2**63 - 1),
)
def test_any_small_graph(nodes: int, data: Any, seed: int) -> None:
    ends = strategies.integers(0, nodes - 1)
    edges = data.draw(strategies.lists(strategies.tuples(ends, ends), max_size=20))
    seeds = torch.tensor(data.draw(strategies.lists(ends, unique=True)), dtype=torch.int64)
    fanouts = data.draw(strategies.lists(strategies.sampled_from([-1, 1, 2, 3]), min_size=1, max_size=3))
    edge_index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T
    graph = Graph.from_edge_index(edge_index, nodes)
    assert_sampled(graph, seeds, fanouts, graph.sample(seeds, fanouts, generator=seeded(seed)))


def star(rows: int, degree: int) -> Graph:
    """Queries that have the same keys, the first ones, in order: each draws for itself."""
    queries = torch.arange(degree, degree + rows).repeat_interleave(degree)
    return Graph.from_edge_index(torch.stack([torch.arange(degree).repeat(rows), queries]), degree + rows)


def drawn_keys(graph: Graph, degree: int, k: int, **given: Any) -> Tensor:
    """`(rows, k)`: the keys that each row has drawn."""
    seeds = torch.arange(degree, graph.num_queries)
    sampled = graph.sample(seeds, [k], generator=seeded(11), **given)
    return sampled.nodes[sampled.blocks[0].keys_by_query].view(-1, k)


def assert_distributed(observed: np.ndarray, expected: np.ndarray) -> None:
    """By chi squared; what it draws never changes, so that this holds always or never."""
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize(("degree", "k"), [(3, 1), (5, 2), (6, 4), (65, 2)])
def test_each_set_is_equally_likely(degree: int, k: int) -> None:
    rows = 30_000
    found = Counter(map(tuple, drawn_keys(star(rows, degree), degree, k).tolist()))
    sets = list(itertools.combinations(range(degree), k))
    assert found.keys() <= set(sets)
    assert_distributed(np.array([found[each] for each in sets]), np.full(len(sets), rows / len(sets)))


@pytest.mark.parametrize(("degree", "k"), [(64, 15), (100, 15), (100, 64), (100, 65), (300, 90)])
def test_each_edge_is_equally_likely(degree: int, k: int) -> None:
    rows = 4_000
    counts = torch.bincount(drawn_keys(star(rows, degree), degree, k).flatten(), minlength=degree).numpy()
    share = k / degree
    # Without replacement counts vary less than those of a multinomial, by 1 - share.
    statistic = ((counts - rows * share) ** 2 / (rows * share)).sum() * (degree - 1) / degree / (1 - share)
    assert 1e-3 < stats.chi2.sf(statistic, degree - 1) < 1 - 1e-3


def odds_of(chosen: tuple[int, ...], weights: list[float]) -> float:
    """Of drawing these in this order."""
    odds, left = 1.0, sum(weights)
    for each in chosen:
        odds *= weights[each] / left
        left -= weights[each]
    return odds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sets_have_the_odds_of_drawing_by_weight(k: int, scale: float, dtype: torch.dtype) -> None:
    of_keys = [1.0, 4.0, 0.0, 2.5, 0.5]
    rows, degree = 20_000, len(of_keys)
    weights = (torch.tensor(of_keys, dtype=torch.float64) * scale).to(dtype).repeat(rows)
    found = Counter(map(tuple, drawn_keys(star(rows, degree), degree, k, weights=weights).tolist()))
    sets = list(itertools.combinations([0, 1, 3, 4], k))
    assert found.keys() <= set(sets)
    odds = [sum(odds_of(order, of_keys) for order in itertools.permutations(each)) for each in sets]
    assert math.isclose(sum(odds), 1)
    assert_distributed(np.array([found[each] for each in sets]), rows * np.array(odds))


def test_tiny_weights_beside_tiny_ones_still_count() -> None:
    """The time of each alone would be infinite."""
    rows = 5_000
    found = drawn_keys(star(rows, 2), 2, 1, weights=torch.tensor([1e-307, 3e-307], dtype=torch.float64).repeat(rows))
    assert_distributed(np.bincount(found.flatten().numpy(), minlength=2), np.array([rows / 4, 3 * rows / 4]))


@pytest.mark.parametrize("kernels", [True, False])
def test_tiny_weights_beside_huge_ones_still_count(
    native: None, monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    """The huge one comes first, and the tiny ones, whose times would all be infinite, in proportion."""
    if not kernels:
        monkeypatch.setattr(load, "available", lambda: False)
    rows = 2_000
    weights = torch.tensor([1e-307, 1e308, 3e-307], dtype=torch.float64).repeat(rows)
    found = drawn_keys(star(rows, 3), 3, 2, weights=weights)
    assert (found == 1).sum() == rows
    others = np.bincount(found.flatten().numpy(), minlength=3)[[0, 2]]
    assert_distributed(others, np.array([rows / 4, 3 * rows / 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", [True, False])
def test_subnormal_weights_count_as_0(
    native: None, monkeypatch: pytest.MonkeyPatch, kernels: bool, dtype: torch.dtype
) -> None:
    """Whether or not the thread flushes them."""
    if not kernels:
        monkeypatch.setattr(load, "available", lambda: False)
    least = torch.finfo(dtype).tiny
    weights = torch.tensor([least / 2, least, 0.0, least / 4, 2 * least], dtype=dtype)
    graph = Graph.from_edge_index(torch.stack([torch.arange(5), torch.zeros(5, dtype=torch.int64)]), 5)
    assert graph.sample(torch.tensor([0]), [5], weights=weights).edges[0].tolist() == [1, 4]


def test_draws_of_hops_and_of_nodes_are_their_own() -> None:
    """A node's draws do not depend on what else is sampled, but on the seed and the hop."""
    graph = random_graph(200, 4_000)

    def edges(seeds: list[int], number: int) -> Tensor:
        sampled = graph.sample(torch.tensor(seeds), [5], generator=seeded(number))
        return sampled.edges[0][sampled.blocks[0].query_index == 0]

    assert torch.equal(edges([3], 1), edges([3, 5, 9], 1))
    assert not torch.equal(edges([3], 1), edges([3], 2))


@pytest.mark.parametrize("weights", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("fanouts", [[15, 10], [-1, 3], [100, 70], [1, 1, 1]], ids=str)
def test_kernels_draw_what_the_formula_says(
    native: None, monkeypatch: pytest.MonkeyPatch, fanouts: list[int], weights: torch.dtype | None
) -> None:
    graph = random_graph(301, 9_000)
    given = None if weights is None else torch.rand(9_000, dtype=weights) * (torch.arange(9_000) % 5 > 0)
    seeds = torch.randperm(300)[:40]
    found = graph.sample(seeds, fanouts, weights=given, generator=seeded(5))
    monkeypatch.setattr(load, "available", lambda: False)
    assert_same(found, graph.sample(seeds, fanouts, weights=given, generator=seeded(5)))


@pytest.mark.parametrize("weighted", [False, True])
def test_threads_do_not_change_the_result(native: None, monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    graph = random_graph(5_000, 100_000)
    weights = torch.rand(100_000) if weighted else None
    seeds = torch.randperm(4_999)[:600]
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(load, "num_threads", lambda threads=threads: threads)
        results.append(graph.sample(seeds, [15, 10], weights=weights, generator=seeded(2)))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_generator_gives_one_number() -> None:
    graph, seeds = random_graph(90, 2_000), torch.tensor([1, 5])
    generator = seeded(4)
    first, second = (graph.sample(seeds, [3, 3], generator=generator) for _ in range(2))
    assert not torch.equal(first.edges[0], second.edges[0])
    again = seeded(4)
    torch.randint(2**63 - 1, (), generator=again)
    assert torch.equal(generator.get_state(), (torch.randint(2**63 - 1, (), generator=again), again.get_state())[1])
    torch.manual_seed(7)
    by_default = graph.sample(seeds, [3, 3])
    torch.manual_seed(7)
    assert_same(by_default, graph.sample(seeds, [3, 3]))


def test_all_neighbours_give_what_the_whole_graph_gives() -> None:
    graph = random_graph(61, 400)
    layers = [GraphAttention(8, 2, in_features=5).double().eval(), GraphAttention(6, 2, in_features=8).double().eval()]
    features = torch.randn(61, 5, dtype=torch.float64)
    seeds = torch.tensor([9, 60, 3, 44])
    whole = features
    for layer in layers:
        whole = layer(whole, graph).output
    sampled = graph.sample(seeds, [-1, -1])
    x = features[sampled.nodes]
    for layer, block in zip(layers, sampled.blocks, strict=True):
        x = layer((x, x[: block.num_queries]), block).output
    torch.testing.assert_close(x, whole[seeds], rtol=0, atol=1e-12)
    joint = features[sampled.nodes]
    for layer in layers:
        joint = layer(joint, sampled.joint()).output
    torch.testing.assert_close(joint[: len(seeds)], whole[seeds], rtol=0, atol=1e-12)


def test_edge_features_and_gradients_come_through() -> None:
    graph = random_graph(31, 150)
    layer = GraphAttention(6, 2, in_features=4, edge_dim=3).double().eval()
    features = torch.randn(31, 4, dtype=torch.float64, requires_grad=True)
    of_edges = torch.randn(150, 3, dtype=torch.float64, requires_grad=True)
    seeds = torch.tensor([1, 8])
    sampled = graph.sample(seeds, [-1])
    x, (block,), (edges,) = features[sampled.nodes], sampled.blocks, sampled.edges
    found = layer((x, x[: block.num_queries]), block, of_edges[edges]).output
    whole = layer(features, graph, of_edges).output[seeds]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(whole)
    leaves = [features, of_edges]
    for one, other in zip(
        torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(whole, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_joint_graph_has_all_edges() -> None:
    graph = random_graph(53, 311)
    sampled = graph.sample(torch.tensor([3, 4]), [4, 2, 3])
    joint = sampled.joint()
    assert joint.num_queries == joint.num_keys == len(sampled.nodes)
    assert_same_graphs(joint, Graph.from_edge_index(joint.edge_index, len(sampled.nodes)))
    assert torch.equal(sampled.nodes[joint.key_index], graph.key_index[sampled.edges[0]])
    assert torch.equal(sampled.nodes[joint.query_index], graph.query_index[sampled.edges[0]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_seeds_of_other_integers(dtype: torch.dtype) -> None:
    graph, seeds = random_graph(53, 311), torch.tensor([3, 0, 52])
    expected = graph.sample(seeds, [3], generator=seeded())
    assert_same(graph.sample(seeds.to(dtype), [3], generator=seeded()), expected)
    assert_same(graph.sample(seeds.repeat(2, 1).T.to(dtype)[:, 0], np.array([3]), generator=seeded()), expected)


def test_no_seeds_and_no_edges() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for graph in (random_graph(53, 311), Graph.from_edge_index(none.view(2, 0), 4)):
        sampled = graph.sample(none, [3, 2], weights=torch.ones(graph.num_edges))
        assert len(sampled.nodes) == sampled.num_seeds == sampled.joint().num_edges == 0
        assert [block.num_edges for block in sampled.blocks] == [0, 0]
    sampled = graph.sample(torch.tensor([2, 0]), [3, 2])
    assert sampled.nodes.tolist() == [2, 0]
    assert sampled.blocks[0].num_queries == sampled.blocks[0].num_keys == 2


def test_the_seeds_stay_the_callers() -> None:
    graph, seeds = random_graph(53, 311), torch.tensor([3, 0, 52])
    sampled = graph.sample(seeds, [3])
    seeds.zero_()
    assert sampled.nodes[:3].tolist() == [3, 0, 52]


def test_what_was_sampled_is_sent_and_copied() -> None:
    sampled = random_graph(53, 311).sample(torch.tensor([3, 4]), [4, 2, 3])
    assert_same(pickle.loads(pickle.dumps(sampled)), sampled)
    assert_same(copy.deepcopy(sampled), sampled)
    assert sampled.to("cpu") is sampled
    assert sampled.to("meta").blocks[0].num_edges == sampled.blocks[0].num_edges
    assert repr(sampled).startswith("SampledGraph(num_seeds=2, num_nodes=")
    with torch.inference_mode():
        drawn = random_graph(53, 311).sample(torch.tensor([3, 4]), [4, 2, 3])
        for made in (drawn, pickle.loads(pickle.dumps(drawn))):
            assert not made.nodes.is_inference()
            assert not made.edges[0].is_inference()
            assert not made.blocks[0].key_offsets.is_inference()
            assert not made.blocks[0].edge_index.is_inference()


@pytest.mark.parametrize(
    ("place", "match"),
    [(5, "rows"), (6, "rows"), (7, "query_offsets"), (8, "query_offsets")],
)
@pytest.mark.parametrize("number", [-1, 9])
def test_what_was_sent_wrong_is_refused(native: None, place: int, number: int, match: str) -> None:
    sampled = Graph.from_edge_index(torch.tensor([[1, 2], [0, 0]]), 3).sample(torch.tensor([0]), [-1])
    rebuild, (numbers, sizes, device) = sampled.__reduce__()
    assert numbers.dtype == np.int32
    assert_same(rebuild(numbers.astype(np.int64), sizes, device), sampled)
    # Three nodes and two edges; then the keys of the edges, and the offsets of one query.
    bad = numbers.copy()
    bad[place] = number
    with pytest.raises((GraphStructureError, IndexRangeError), match=match):
        rebuild(bad, sizes, device)


@pytest.mark.parametrize("sizes", [[], [(1, 3)], [(1, 3, 3)], [(2, 1, 2)], [(1, 3, 2), (1, 2, 0)], None], ids=str)
def test_sizes_that_were_sent_wrong_are_refused(sizes: Any) -> None:
    sampled = Graph.from_edge_index(torch.tensor([[1, 2], [0, 0]]), 3).sample(torch.tensor([0]), [-1])
    rebuild, (numbers, _, device) = sampled.__reduce__()
    with pytest.raises(GraphStructureError, match="state: expected integers"):
        rebuild(numbers, sizes, device)


def test_pinned_memory_holds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = random_graph(53, 311).sample(torch.tensor([3, 4]), [4, 2, 3])
    # Without an accelerator there is none.
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    pinned = sampled.pin_memory()
    assert_same(pinned, sampled)
    assert pinned.blocks[0].edges_by_key.data_ptr() != sampled.blocks[0].edges_by_key.data_ptr()


def test_large_ids_are_sent_whole() -> None:
    sampled = Graph.from_edge_index(torch.tensor([[1, 2], [0, 0]]), 3).sample(torch.tensor([0]), [-1])
    far = dataclasses.replace(sampled, nodes=sampled.nodes + 2**40)
    assert_same(pickle.loads(pickle.dumps(far)), far)


@pytest.mark.parametrize(
    ("seeds", "error", "match"),
    [
        ([0, 53], GraphStructureError, "seeds: expected nodes from 0 to 52, got 53 at position 1"),
        ([-1], GraphStructureError, "seeds: expected nodes from 0 to 52, got -1 at position 0"),
        ([3, 4, 3], GraphStructureError, "seeds: expected each node once, got 2 different nodes in 3"),
        ([0.5], InvalidInputError, "seeds: expected a tensor of integers, got torch.float32"),
        ([True], InvalidInputError, r"seeds: expected a tensor of integers.*mask\.nonzero"),
        ([[1, 2]], DimensionMismatchError, r"seeds: expected \(seeds,\), got \(1, 2\)"),
        (3, DimensionMismatchError, r"seeds: expected \(seeds,\), got \(\)"),
    ],
)
def test_seeds_that_are_none(seeds: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        random_graph(53, 311).sample(torch.tensor(seeds), [3])


def test_seeds_that_are_no_tensor_or_elsewhere() -> None:
    graph: Any = random_graph(53, 311)
    with pytest.raises(InvalidInputError, match=r"seeds: expected a torch\.Tensor, got list"):
        graph.sample([1, 2], [3])
    with pytest.raises(InvalidInputError, match="seeds: expected device cpu, as the graph, got meta"):
        graph.sample(torch.tensor([1, 2], device="meta"), [3])


@pytest.mark.parametrize("fanout", [0, -2, 2.5, "3", True, None, 2**63], ids=repr)
def test_fanouts_that_are_none(fanout: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"fanouts\[1\]: expected an int of at least 1, or -1"):
        random_graph(53, 311).sample(torch.tensor([3]), [2, fanout])


@pytest.mark.parametrize("fanouts", [[], 3, None, "23"], ids=repr)
def test_fanouts_that_are_no_list(fanouts: Any) -> None:
    with pytest.raises(InvalidInputError, match="fanouts: expected a list of a number of neighbours for each hop"):
        random_graph(53, 311).sample(torch.tensor([3]), fanouts)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_weights_that_are_none(wrong: float) -> None:
    weights = torch.ones(311)
    weights[17] = wrong
    with pytest.raises(InvalidInputError, match=r"weights: expected finite numbers of at least 0, got .* at edge 17"):
        random_graph(53, 311).sample(torch.tensor([3]), [2], weights=weights)


def test_weights_of_another_kind() -> None:
    graph: Any = random_graph(53, 311)
    with pytest.raises(DimensionMismatchError, match=r"weights: expected \(edges=311,\), got \(310,\)"):
        graph.sample(torch.tensor([3]), [2], weights=torch.ones(310))
    with pytest.raises(InvalidInputError, match=r"weights: expected floating-point numbers, got torch\.int64"):
        graph.sample(torch.tensor([3]), [2], weights=torch.ones(311, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match="weights: expected device cpu, as the graph, got meta"):
        graph.sample(torch.tensor([3]), [2], weights=torch.ones(311, device="meta"))
    with pytest.raises(InvalidInputError, match=r"weights: expected a torch\.Tensor, got list"):
        graph.sample(torch.tensor([3]), [2], weights=[1.0] * 311)


def test_weights_of_any_floating_dtype_and_stride() -> None:
    graph, seeds = random_graph(53, 311), torch.tensor([3, 1])
    weights = (torch.arange(311) % 4).to(torch.float32)
    expected = graph.sample(seeds, [2, 2], weights=weights, generator=seeded())
    for same in (weights.half(), weights.bfloat16(), weights.repeat(2, 1).T[:, 0], weights.requires_grad_()):
        assert_same(graph.sample(seeds, [2, 2], weights=same, generator=seeded()), expected)


def test_arrays_of_any_stride_are_read() -> None:
    graph, seeds = random_graph(53, 311), torch.tensor([3, 1])
    keys = torch.stack([graph.keys_by_query, graph.keys_by_query], 1)[:, 0]
    apart = dataclasses.replace(graph, keys_by_query=keys)
    assert not apart.keys_by_query.is_contiguous()
    assert_same(apart.sample(seeds, [2, 2], generator=seeded()), graph.sample(seeds, [2, 2], generator=seeded()))


def test_weights_in_the_order_of_slots_draw_the_same() -> None:
    graph = random_graph(53, 311)
    rows = rows_of(graph, torch.rand(311))
    nodes, drawn = torch.tensor([3, 1, 5]), []
    for each in (rows, rows.slot_weights()):
        offsets = sampled_offsets(each, nodes, 3, 0)
        found = torch.empty(3, int(offsets[-1]), dtype=torch.int64)
        sampled_rows(each, nodes, offsets, 5, 0, 0, *found)
        drawn.append(found)
    assert torch.equal(*drawn)
    assert rows.slot_weights().slot_weights().has_slot_weights
    assert rows_of(graph, None).slot_weights().weights is None


def test_graphs_and_generators_that_are_none() -> None:
    bipartite = Graph.from_edge_index(torch.tensor([[1], [0]]), num_queries=2, num_keys=3)
    with pytest.raises(GraphStructureError, match="graph: expected as many queries as keys"):
        bipartite.sample(torch.tensor([0]), [1])
    graph: Any = random_graph(53, 311)
    with pytest.raises(InvalidInputError, match=r"generator: expected a torch\.Generator, got int"):
        graph.sample(torch.tensor([0]), [1], generator=3)
    with pytest.raises(UnsupportedError, match=r"graph: expected a graph on the CPU.*got a graph on meta"):
        graph.to("meta").sample(torch.tensor([0]), [1])


def test_blocks_share_nothing_with_later_samples() -> None:
    graph = random_graph(53, 2_000)
    graph.sample(torch.arange(50), [-1])
    first = graph.sample(torch.tensor([3]), [2])
    (block,) = first.blocks
    assert len(pickle.dumps(block)) < 5_000
    assert block.edges_by_query.untyped_storage().nbytes() == 8 * block.num_edges
    block.edges_by_query.zero_()
    assert graph.sample(torch.tensor([3]), [2]).blocks[0].edges_by_query.tolist() == [0, 1]


def test_kernels_run_under_a_mode(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that looks on does not send each row through PyTorch."""
    graph, seeds = random_graph(53, 311), torch.tensor([3, 1])
    expected = graph.sample(seeds, [2, 2], generator=seeded())
    monkeypatch.setattr(neighbour_sampling, "_drawn", None)
    with FlopCounterMode(display=False):
        assert_same(graph.sample(seeds, [2, 2], generator=seeded()), expected)


def test_what_cannot_be_read_is_refused() -> None:
    graph, seeds, weights = random_graph(53, 311), torch.tensor([3, 1]), torch.ones(311)
    with FakeTensorMode() as mode:
        expected = graph.sample(seeds, [2], generator=seeded())
        with pytest.raises(UnsupportedError, match="seeds: expected a tensor outside of compiled"):
            graph.sample(mode.from_tensor(seeds), [2])
        with pytest.raises(UnsupportedError, match="weights: expected a tensor outside of compiled"):
            graph.sample(seeds, [2], weights=mode.from_tensor(weights))
    assert_same(expected, graph.sample(seeds, [2], generator=seeded()))
    with pytest.raises(UnsupportedError, match="weights: expected a tensor outside of compiled"):
        torch.func.vmap(lambda each: graph.sample(seeds, [2], weights=each).nodes)(torch.ones(2, 311))
    with pytest.raises(UnsupportedError, match="seeds: expected a tensor outside of compiled"):
        torch.func.vmap(lambda each: graph.sample(each, [2]).nodes)(torch.tensor([[3, 1], [2, 4]]))


def test_a_compiled_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "is_readable", lambda *tensors: False)
    with pytest.raises(UnsupportedError, match="outside of compiled and traced code, got a compiled or traced call"):
        random_graph(53, 311).sample(torch.tensor([3]), [2])


def test_weights_that_another_thread_mends_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights, extremes = random_graph(53, 311), torch.full((311,), -1.0), Tensor.aminmax

    def then_mended(x: Tensor) -> Any:
        found = extremes(x)
        weights.fill_(1)
        return found

    monkeypatch.setattr(Tensor, "aminmax", then_mended)
    sampled = graph.sample(torch.tensor([3]), [2], weights=weights, generator=seeded())
    monkeypatch.undo()
    assert_same(sampled, graph.sample(torch.tensor([3]), [2], weights=torch.ones(311), generator=seeded()))


@pytest.mark.parametrize("kernels", [True, False])
def test_rows_that_were_changed_are_refused(native: None, monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    if not kernels:
        monkeypatch.setattr(load, "available", lambda: False)
    rows = NeighbourRows(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), 2)
    for node in (-1, 2, 2**40):
        with pytest.raises(IndexRangeError, match="sampled_offsets"):
            sampled_offsets(rows, torch.tensor([0, node]), 3, 0)
        with pytest.raises(IndexRangeError, match="numbered_nodes"):
            numbered_nodes(torch.tensor([0, node]), 2, torch.empty(2, dtype=torch.int64), 0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("offsets", torch.empty(0, dtype=torch.int64)),
        ("columns", torch.tensor([0, 1])),
        ("columns", torch.tensor([0, 1, 1], dtype=torch.int32)),
        ("columns", torch.tensor([0, 1, 1], device="meta")),
        ("edges", torch.tensor([[0, 1], [1, 1], [2, 1]])[:, 0]),
        ("weights", torch.ones(2)),
        ("weights", torch.ones(3).half()),
    ],
)
def test_rows_that_kernels_could_not_read(name: str, wrong: Tensor) -> None:
    arrays = {"offsets": torch.tensor([0, 1, 3]), "columns": torch.tensor([0, 1, 1]), "edges": torch.tensor([0, 1, 2])}
    with pytest.raises(InvalidInputError, match=f"{name}: expected torch.* on the cpu, contiguous"):
        NeighbourRows(**{**arrays, name: wrong}, num_columns=2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("array", ["offsets", "columns", "edges"])
def test_kernels_read_no_slot_that_is_not_there(native: None, array: str) -> None:
    arrays = {
        "offsets": torch.tensor([0, 1, 3]), "columns": torch.tensor([0, 1, 1]), "edges": torch.tensor([0, 1, 2])
    }  # fmt: skip
    rows = NeighbourRows(**arrays, num_columns=2)
    nodes = torch.tensor([0, 1])
    offsets = sampled_offsets(rows, nodes, 3, 0)
    places = torch.empty(3, 3, dtype=torch.int64)
    sampled_rows(rows, nodes, offsets, 0, 0, 0, *places)
    arrays[array][1] = 2**40
    with pytest.raises(IndexRangeError, match="sampled_rows"):
        sampled_rows(rows, nodes, offsets, 0, 0, 0, *places)
