"""Nodes numbered anew: attention is the same in another order, and neighbours lie closer."""

import itertools
import sys
from types import ModuleType
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor

from anyattention import Graph, attend
from anyattention.errors import GraphStructureError, InvalidInputError, MissingExtraError
from anyattention.nn import GraphAttention

METHODS = ("rcm", "degree", "metis")


@pytest.fixture(autouse=True)
def metis(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of pymetis, which not everybody has: nodes i of a part where i mod parts is the part's number."""
    seen: dict[str, Any] = {}

    def part_graph(nparts: int, *, xadj: Any, adjncy: Any) -> tuple[int, list[int]]:
        seen.update(nparts=nparts, xadj=np.asarray(xadj), adjncy=np.asarray(adjncy))
        return 0, [node % nparts for node in range(len(xadj) - 1)]

    stand_in = ModuleType("pymetis")
    stand_in.part_graph = part_graph  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "pymetis", stand_in)
    monkeypatch.setattr("anyattention.patterns.reorder._NODES_OF_A_PART", 3)
    return seen


def shuffled(made: networkx.Graph, seed: int = 0) -> Graph:
    graph = Graph.from_networkx(made)
    number = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed))
    return Graph.from_edge_index(number[graph.edge_index], num_nodes=len(made))


def bandwidth(graph: Graph) -> int:
    return int((graph.key_index - graph.query_index).abs().max())


# A self-loop, a duplicate edge, an isolated node (4) and one that only sends (0).
EDGE_INDEX = torch.tensor([[0, 0, 1, 2, 2, 5, 0, 3], [1, 2, 2, 2, 3, 1, 1, 5]])
GRAPHS = {
    "directed multigraph": Graph.from_edge_index(EDGE_INDEX, num_nodes=6),
    "random": shuffled(networkx.gnp_random_graph(23, 0.2, seed=1)),
    "no edges": Graph.from_edge_index(EDGE_INDEX[:, :0], num_nodes=3),
    "no nodes": Graph.from_edge_index(EDGE_INDEX[:, :0], num_nodes=0),
    "one node": Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), num_nodes=1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GRAPHS)
class TestEach:
    def test_the_order_is_a_permutation_and_edges_keep_their_places(self, name: str, method: Any) -> None:
        graph = GRAPHS[name]
        reordered, order = graph.reorder(method)
        assert torch.equal(order.sort().values, torch.arange(graph.num_queries))
        assert torch.equal(order[reordered.edge_index], graph.edge_index)
        assert (reordered.num_queries, reordered.num_keys) == (graph.num_queries, graph.num_keys)
        again, same = graph.reorder(method)
        assert torch.equal(same, order)
        assert torch.equal(again.edge_index, reordered.edge_index)

    def test_attention_over_it_is_permuted(self, name: str, method: Any) -> None:
        """With edge features in the caller's order, and with its gradients."""
        graph = GRAPHS[name]
        reordered, order = graph.reorder(method)
        layer = GraphAttention(6, 2, edge_dim=2, dropout=0.0, dtype=torch.float64)
        x = torch.randn(graph.num_queries, 6, dtype=torch.float64).requires_grad_()
        edge_attr = torch.randn(graph.num_edges, 2, dtype=torch.float64).requires_grad_()
        expected = layer(x, graph, edge_attr, return_weights=True)
        found = layer(x[order], reordered, edge_attr, return_weights=True)
        inverse = torch.argsort(order)
        torch.testing.assert_close(found.output[inverse], expected.output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-12, atol=1e-12)
        cotangent = torch.randn_like(expected.output)
        gradients = [
            torch.autograd.grad(output, [x, edge_attr], cotangent)
            for output in (expected.output, found.output[inverse])
        ]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_values_shifts_and_radius_stay() -> None:
    positions, cell = torch.rand(11, 2), torch.eye(2)
    found = Graph.radius(positions, 0.4, cell=cell)
    reordered, order = found.reorder("degree")
    torch.testing.assert_close(reordered.displacements(positions[order], cell), found.displacements(positions, cell))
    assert reordered.search_radius == found.search_radius
    weighted = Graph.from_adjacency(torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    reordered, order = weighted.reorder("degree")
    dense = torch.zeros(2, 2)
    dense[order[reordered.query_index], order[reordered.key_index]] = reordered.values
    assert torch.equal(dense, torch.tensor([[0.0, 2.0], [3.0, 4.0]]))


def test_cuthill_mckee_has_the_bandwidth_of_networkx() -> None:
    """A path has 1, and a grid its short side; where ties are broken otherwise it may differ a little."""
    assert bandwidth(shuffled(networkx.path_graph(101)).reorder("rcm")[0]) == 1
    assert bandwidth(shuffled(networkx.grid_2d_graph(4, 30)).reorder("rcm")[0]) <= 6
    for seed in range(3):
        made = networkx.connected_watts_strogatz_graph(200, 4, 0.02, seed=seed)
        theirs = list(networkx.utils.reverse_cuthill_mckee_ordering(made))
        number = {node: place for place, node in enumerate(theirs)}
        expected = max(abs(number[u] - number[v]) for u, v in made.edges)
        assert bandwidth(shuffled(made).reorder("rcm")[0]) <= 2 * expected < bandwidth(shuffled(made))


def test_by_degree_the_most_edges_come_first() -> None:
    graph = GRAPHS["directed multigraph"]
    reordered, order = graph.reorder("degree")
    counts = reordered.query_offsets.diff() + reordered.key_offsets.diff()
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert order.tolist() == [2, 1, 0, 3, 5, 4]


def test_metis_gets_each_neighbour_once_and_no_loop(metis: dict[str, Any]) -> None:
    graph = GRAPHS["directed multigraph"]
    _, order = graph.reorder("metis")
    assert metis["nparts"] == 2
    pairs = {
        (node, int(other))
        for node, (first, last) in enumerate(itertools.pairwise(metis["xadj"]))
        for other in metis["adjncy"][first:last]
    }
    expected = {(u, v) for u, v in EDGE_INDEX.T.tolist() if u != v}
    assert pairs == expected | {(v, u) for u, v in expected}
    assert len(metis["adjncy"]) == len(pairs)
    assert order.tolist() == [0, 2, 4, 1, 3, 5]
    _, order = GRAPHS["random"].reorder("metis")
    assert metis["nparts"] == 7
    assert order.tolist() == sorted(range(23), key=lambda node: (node % 7, node))


def test_metis_leaves_a_graph_of_one_part_as_it_is(metis: dict[str, Any]) -> None:
    assert GRAPHS["no edges"].reorder("metis")[1].tolist() == [0, 1, 2]
    assert not metis


def test_a_reordered_graph_is_ready_for_attention() -> None:
    """Its rows are those of a graph that is built from its edges."""
    reordered, _ = GRAPHS["random"].reorder("rcm")
    built = Graph.from_edge_index(reordered.edge_index, num_nodes=23)
    for name, array in vars(built).items():
        assert array is None or torch.equal(getattr(reordered, name), array)
    x: Tensor = torch.randn(23, 2, 3)
    assert torch.equal(attend(x, x, x, reordered).output, attend(x, x, x, built).output)


def test_what_does_not_fit() -> None:
    with pytest.raises(InvalidInputError, match="method: expected one of 'rcm', 'degree', 'metis', got 'random'"):
        GRAPHS["random"].reorder("random")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match=r"method: expected one of .*, got \['rcm'\]"):
        GRAPHS["random"].reorder(["rcm"])  # pyright: ignore[reportArgumentType]
    bipartite = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), num_queries=1, num_keys=2)
    with pytest.raises(GraphStructureError, match="graph: expected as many queries as keys"):
        bipartite.reorder("degree")


@pytest.mark.parametrize(("method", "library"), [("rcm", "scipy"), ("metis", "pymetis")])
def test_without_a_library(method: Any, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy.sparse.csgraph", "pymetis"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"needs {library}: pip install 'anyattention\[graphs\]'"):
        GRAPHS["random"].reorder(method)
