"""Two Graphs as one: against sets of pairs, dense masks and the composed patterns of other kinds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyattention import Graph, Window, attend, nn
from anyattention.errors import DimensionMismatchError, GraphStructureError
from anyattention.ops import edge_softmax


def _graph(pairs, num_queries, num_keys, **more):
    """Of pairs of a query and a key, in the given order."""
    edges = torch.tensor([(key, query) for query, key in pairs], dtype=torch.int64).reshape(-1, 2).T
    return Graph.from_edge_index(edges, num_queries=num_queries, num_keys=num_keys, **more)


def _pairs(graph):
    return list(zip(graph.query_index.tolist(), graph.key_index.tolist(), strict=True))


@st.composite
def _two(draw):
    num_queries, num_keys = draw(st.integers(0, 5)), draw(st.integers(0, 7))
    every = [(query, key) for query in range(num_queries) for key in range(num_keys)]
    some = st.lists(st.sampled_from(every), unique=True) if every else st.just([])
    return num_queries, num_keys, draw(some), draw(some)


@given(_two())
def test_the_pairs_are_those_of_sets(case):
    num_queries, num_keys, first, second = case
    a, b = (_graph(pairs, num_queries, num_keys) for pairs in (first, second))
    for graph, pairs in ((a | b, {*first} | {*second}), (a & b, {*first} & {*second})):
        assert type(graph) is Graph
        assert (graph.num_queries, graph.num_keys) == (num_queries, num_keys)
        assert _pairs(graph) == sorted(pairs)
        again = _graph(sorted(pairs), num_queries, num_keys)
        for name in ("edge_index", "query_offsets", "keys_by_query", "edges_by_query"):
            assert torch.equal(getattr(graph, name), getattr(again, name))
        for name in ("key_offsets", "queries_by_key", "edges_by_key"):
            assert torch.equal(getattr(graph, name), getattr(again, name))


def _random(count, num_queries, num_keys, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(num_queries * num_keys, generator=generator)[:count]
    return _graph(torch.stack([pairs // num_keys, pairs % num_keys], 1).tolist(), num_queries, num_keys)


@pytest.mark.parametrize("operation", ["or", "and"])
def test_attention_over_both_is_that_over_the_dense_masks(operation):
    a, b = _random(31, 7, 11, 0), _random(29, 7, 11, 1)
    graph = a | b if operation == "or" else a & b
    mask = a.to_dense() | b.to_dense() if operation == "or" else a.to_dense() & b.to_dense()
    assert torch.equal(graph.to_dense(), mask)
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(n, 2, 5, generator=generator, dtype=torch.float64) for n in (7, 11, 11))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    found = attend(query, key, value, graph, return_weights="heads")
    dense = attend(query[None], key[None], value[None], mask=mask, return_weights="heads")
    cotangent = torch.randn(7, 2, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(found.output, dense.output[0])
    torch.testing.assert_close(found.weights, dense.weights[0].permute(1, 2, 0)[graph.query_index, graph.key_index])
    for ours, theirs in zip(
        torch.autograd.grad(found.output, leaves, cotangent),
        torch.autograd.grad(dense.output[0], leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_layers_and_primitives_take_both_as_one_graph():
    points = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    a, b = _random(20, 12, 12, 3), Graph.nearest(points, 3, measure="cosine")
    graph = a | b
    layer = nn.GraphAttention(16, 2).eval()
    again = Graph.from_edge_index(graph.edge_index, 12)
    torch.testing.assert_close(layer(points, graph).output, layer(points, again).output)
    weights = edge_softmax(torch.randn(graph.num_edges, 2), graph)
    assert weights.shape == (graph.num_edges, 2)


def test_what_belongs_to_one_of_the_graphs_is_dropped():
    edges = torch.tensor([[0, 1], [1, 1]])
    a = Graph.from_edge_index(edges, 2, values=torch.ones(2), shifts=torch.zeros(2, 3, dtype=torch.int64))
    b = Graph.radius(torch.zeros(2, 1), 1.0)
    for graph in (a | b, a & b, a | a, b & b):
        assert (graph.values, graph.shifts, graph.search_radius) == (None, None, None)


def test_a_graph_with_itself_is_itself_in_order():
    a = _graph([(1, 2), (0, 1), (1, 0)], 2, 3)
    assert _pairs(a | a) == _pairs(a & a) == [(0, 1), (1, 0), (1, 2)]


@pytest.mark.parametrize("repeated", [0, 1])
def test_a_repeated_edge_is_refused(repeated):
    graphs = [_graph([(1, 1), (0, 1)], 2, 2), _graph([(1, 1), (0, 0)], 2, 2)]
    graphs[repeated] = _graph([(0, 0), (1, 0), (0, 0)], 2, 2)
    text = "graph: expected each edge once in a composed pattern, got an edge that is repeated"
    with pytest.raises(GraphStructureError, match=text):
        _ = graphs[0] | graphs[1]
    with pytest.raises(GraphStructureError, match=text):
        _ = graphs[0] & graphs[1]


def test_graphs_of_other_sizes_are_refused():
    a = _graph([(0, 1)], 2, 2)
    for other in (_graph([(0, 1)], 2, 3), _graph([(0, 1)], 3, 2)):
        sizes = rf"\({other.num_queries}, {other.num_keys}\)"
        text = rf"graph: expected \(num_queries, num_keys\) = \(2, 2\), those of the other graph, got {sizes}"
        with pytest.raises(DimensionMismatchError, match=text):
            _ = a | other
        with pytest.raises(DimensionMismatchError, match=text):
            _ = a & other


def test_with_another_pattern_a_graph_stays_a_composed_one():
    a, window = _random(9, 5, 5, 0), Window(1, 0)
    for pattern in (a | window, window | a):
        assert not isinstance(pattern, Graph)
        assert torch.equal(pattern.to_dense(5, 5), a.to_dense() | window.to_dense(5, 5))
    assert torch.equal((a & window).to_dense(5, 5), a.to_dense() & window.to_dense(5, 5))
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = a | 3
