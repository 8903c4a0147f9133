"""The Graph itself: compressed rows of any edge list, batches, self-loops, devices, pytrees, compilation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import strategies
from torch import Tensor
from torch.utils import _pytree

from anyattention.native import load
from anyattention.patterns import Graph

# Fixed examples on every run, and no stored ones.
_settings = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=60)


@strategies.composite
def edge_lists(draw: strategies.DrawFn, square: bool = False) -> tuple[int, int, list[tuple[int, int]]]:
    """(num_queries, num_keys, (query, key) pairs): duplicates, loops, isolated nodes, hubs, none at all."""
    num_queries = draw(strategies.integers(0, 9))
    num_keys = num_queries if square else draw(strategies.integers(0, 9))
    if num_queries == 0 or num_keys == 0:
        return num_queries, num_keys, []
    node = strategies.tuples(strategies.integers(0, num_queries - 1), strategies.integers(0, num_keys - 1))
    pairs = draw(strategies.lists(node, max_size=30))
    if draw(strategies.booleans()):
        hub = draw(strategies.integers(0, num_queries - 1))
        pairs += [(hub, key % num_keys) for key in range(draw(strategies.integers(0, 40)))]
    return num_queries, num_keys, pairs


def build(drawn: tuple[int, int, list[tuple[int, int]]]) -> Graph:
    num_queries, num_keys, pairs = drawn
    edge_index = torch.tensor([[key, query] for query, key in pairs], dtype=torch.int64).reshape(-1, 2).T
    return Graph.from_edge_index(edge_index, num_queries=num_queries, num_keys=num_keys)


def all_parts(graph: Graph) -> dict[str, Any]:
    parts = {field.name: getattr(graph, field.name) for field in dataclasses.fields(graph)}
    return {name: part.tolist() if isinstance(part, Tensor) else part for name, part in parts.items()}


def counts(graph: Graph) -> np.ndarray:
    """How many edges there are from each query to each key."""
    ones = np.ones(graph.num_edges, dtype=np.int64)
    indices = (graph.query_index.numpy(), graph.key_index.numpy())
    return scipy.sparse.coo_array((ones, indices), shape=(graph.num_queries, graph.num_keys)).toarray()


@_settings
@hypothesis.given(edge_lists())
def test_slots_are_the_edges_ordered_by_row_and_stably(drawn: tuple[int, int, list[tuple[int, int]]]) -> None:
    num_queries, num_keys, pairs = drawn
    graph = build(drawn)
    assert (graph.num_queries, graph.num_keys, graph.num_edges) == (num_queries, num_keys, len(pairs))
    assert list(zip(graph.query_index.tolist(), graph.key_index.tolist(), strict=True)) == pairs
    by_query = sorted(range(len(pairs)), key=lambda edge: pairs[edge][0])
    by_key = sorted(range(len(pairs)), key=lambda edge: pairs[edge][1])
    assert graph.edges_by_query.tolist() == by_query
    assert graph.keys_by_query.tolist() == [pairs[edge][1] for edge in by_query]
    assert graph.edges_by_key.tolist() == by_key
    assert graph.queries_by_key.tolist() == [pairs[edge][0] for edge in by_key]
    expected = np.zeros((num_queries, num_keys), dtype=np.int64)
    for query, key in pairs:
        expected[query, key] += 1
    assert graph.query_offsets.tolist() == [0, *expected.sum(1).cumsum().tolist()]
    assert graph.key_offsets.tolist() == [0, *expected.sum(0).cumsum().tolist()]
    assert graph.to_dense().tolist() == (expected > 0).tolist()


@_settings
@hypothesis.given(edge_lists())
def test_a_graph_survives_the_way_through_scipy_but_for_duplicates(
    drawn: tuple[int, int, list[tuple[int, int]]],
) -> None:
    graph = build(drawn)
    returned = Graph.from_adjacency(scipy.sparse.coo_array(counts(graph)))
    assert returned.to_dense().tolist() == graph.to_dense().tolist()
    assert returned.values is not None
    assert returned.values.sum() == graph.num_edges


@_settings
@hypothesis.given(edge_lists())
def test_native_and_plain_construction_agree(drawn: tuple[int, int, list[tuple[int, int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fast = build(drawn)
        patch.setattr(load, "available", lambda: False)
        patch.setattr(load, "kernel", None)
        plain = build(drawn)
    assert all_parts(fast) == all_parts(plain)
    for field in dataclasses.fields(fast):
        left, right = getattr(fast, field.name), getattr(plain, field.name)
        assert (left is None and right is None) or left.dtype == right.dtype == torch.int64


def test_the_native_kernel_is_the_one_that_builds(native: object, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    kernel = load.kernel

    def counted(function: str, num_arguments: int) -> Any:
        def call(*arguments: Any) -> int:
            calls.append((function, arguments[3]))
            return kernel(function, num_arguments)(*arguments)

        return call

    monkeypatch.setattr(load, "kernel", counted)
    build((3, 5, [(2, 4), (0, 1)]))
    assert calls == [("compressed_rows", 3), ("compressed_rows", 5)]


@_settings
@hypothesis.given(strategies.lists(edge_lists(), max_size=5))
def test_a_batch_is_the_block_diagonal_matrix(drawn: list[tuple[int, int, list[tuple[int, int]]]]) -> None:
    graphs = [build(each) for each in drawn]
    batch = Graph.batch(graphs)
    shape = (sum(graph.num_queries for graph in graphs), sum(graph.num_keys for graph in graphs))
    assert (batch.num_queries, batch.num_keys) == shape
    blocks = [scipy.sparse.coo_array(counts(graph)) for graph in graphs if 0 not in counts(graph).shape]
    # scipy's block_diag takes no matrices without rows or columns: those move the others, so place by hand.
    expected = np.zeros(shape, dtype=np.int64)
    row, column = 0, 0
    for graph in graphs:
        expected[row : row + graph.num_queries, column : column + graph.num_keys] = counts(graph)
        row, column = row + graph.num_queries, column + graph.num_keys
    assert counts(batch).tolist() == expected.tolist()
    if len(blocks) == len(graphs) > 0:
        assert counts(batch).tolist() == scipy.sparse.block_diag(blocks).toarray().tolist()
    # Nothing is sorted again, so the joined parts must be those of a fresh build.
    rebuilt = Graph.from_edge_index(batch.edge_index, num_queries=shape[0], num_keys=shape[1])
    assert all_parts(batch) == all_parts(rebuilt)


def test_a_batch_keeps_the_edges_graph_by_graph_and_their_values() -> None:
    first = Graph.from_adjacency(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    second = Graph.from_adjacency(torch.tensor([[5.0, 0.0, 7.0]]))
    empty = Graph.from_adjacency(torch.zeros(2, 1))
    batch = Graph.batch([first, empty, second])
    assert batch.edge_index.tolist() == [[1, 0, 3, 5], [0, 1, 4, 4]]
    assert batch.values is not None
    assert batch.values.tolist() == [2.0, 3.0, 5.0, 7.0]
    without_values = Graph.from_edge_index(torch.tensor([[0], [0]]), num_nodes=1)
    assert Graph.batch([first, without_values]).values is None


def test_an_empty_batch_is_an_empty_graph() -> None:
    batch = Graph.batch([])
    assert repr(batch) == "Graph(num_queries=0, num_keys=0, num_edges=0)"
    assert batch.query_offsets.tolist() == batch.key_offsets.tolist() == [0]


@_settings
@hypothesis.given(edge_lists(square=True))
def test_self_loops_are_added_where_they_are_missing(drawn: tuple[int, int, list[tuple[int, int]]]) -> None:
    num_nodes, _, pairs = drawn
    graph = build(drawn).with_self_loops()
    missing = [(node, node) for node in range(num_nodes) if (node, node) not in pairs]
    assert list(zip(graph.query_index.tolist(), graph.key_index.tolist(), strict=True)) == pairs + missing
    assert graph.to_dense().diagonal().all()
    assert all_parts(graph.with_self_loops()) == all_parts(graph)
    assert graph.values is None


def test_edges_may_be_any_view() -> None:
    wide = torch.tensor([[9, 1, 9, 0], [9, 2, 9, 2]])
    graph = Graph.from_edge_index(wide[:, 1::2], num_nodes=3)
    assert graph.edge_index.tolist() == [[1, 0], [2, 2]]
    assert graph.keys_by_query.tolist() == [1, 0]


def test_to_moves_every_part() -> None:
    graph = Graph.from_edge_index(
        torch.tensor([[1, 0], [0, 1]]), 2, values=torch.ones(2), shifts=torch.ones(2, 3, dtype=torch.int64)
    )
    assert graph.to("cpu") is graph
    assert graph.to_graph(2, 2, device="cpu") is graph
    moved = graph.to("meta")
    assert moved.device.type == "meta"
    for field in dataclasses.fields(moved)[:-1]:
        assert getattr(moved, field.name).device.type == "meta", field.name
    assert repr(moved) == repr(graph)
    assert graph.to_graph(device="meta").device.type == "meta"
    assert graph.to_dense(device="meta").device.type == "meta"
    assert Graph.from_edge_index(torch.tensor([[0], [0]]), num_nodes=1).to("meta").values is None


@pytest.mark.parametrize("has_values", [True, False])
def test_a_graph_is_a_pytree_of_its_tensors(has_values: bool) -> None:
    values = torch.tensor([2.5, 3.5]) if has_values else None
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [2, 2]]), num_nodes=3, values=values)
    leaves, structure = _pytree.tree_flatten(graph)
    assert all(isinstance(leaf, Tensor) for leaf in leaves if leaf is not None)
    returned = _pytree.tree_unflatten(leaves, structure)
    assert isinstance(returned, Graph)
    assert all_parts(returned) == all_parts(graph)
    doubled = _pytree.tree_map_only(Tensor, lambda part: part * 2, graph)
    assert doubled.edge_index.tolist() == [[0, 2], [4, 4]]


def test_a_graph_goes_into_a_compiled_function() -> None:
    def degrees(graph: Graph, x: Tensor) -> tuple[Tensor, int]:
        sums = x.new_zeros(graph.num_queries, x.shape[1])
        return sums.index_add(0, graph.query_index, x[graph.key_index]), graph.num_keys

    compiled: Callable[[Graph, Tensor], tuple[Tensor, int]] = torch.compile(
        degrees, fullgraph=True, backend="aot_eager"
    )
    for num_keys, edges in ((3, [[0, 1], [2, 2]]), (5, [[0, 4, 4], [1, 0, 1]])):
        graph = Graph.from_edge_index(torch.tensor(edges), num_queries=3, num_keys=num_keys)
        x = torch.randn(num_keys, 2)
        expected = torch.tensor(counts(graph), dtype=x.dtype) @ x
        output, keys = compiled(graph, x)
        torch.testing.assert_close(output, expected)
        assert keys == num_keys


def test_a_large_skewed_graph_is_built_alike_on_both_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    query = np.minimum(random.zipf(1.3, 50_000) - 1, 999)
    edge_index = torch.tensor(np.stack([random.integers(0, 700, 50_000), query]))
    fast = Graph.from_edge_index(edge_index, num_queries=1000, num_keys=700)
    monkeypatch.setattr(load, "library", lambda: None)
    plain = Graph.from_edge_index(edge_index, num_queries=1000, num_keys=700)
    for field in dataclasses.fields(fast):
        if field.name not in ("values", "shifts", "search_radius"):
            assert torch.equal(getattr(fast, field.name), getattr(plain, field.name)), field.name
