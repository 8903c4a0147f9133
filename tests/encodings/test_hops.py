"""Distances and degrees against networkx."""

import networkx
import pytest
import torch

from anyattention import Graph
from anyattention.encodings import degrees, hop_distances, hops
from anyattention.errors import GraphStructureError, InvalidInputError, OutOfMemoryError

pytestmark = pytest.mark.usefixtures("native")

GRAPHS = {
    "random": networkx.gnp_random_graph(23, 0.1, seed=1),
    "directed": networkx.gnp_random_graph(17, 0.15, seed=2, directed=True),
    "path": networkx.path_graph(11),
    "two parts": networkx.disjoint_union(networkx.cycle_graph(7), networkx.path_graph(3)),
    "one node": networkx.empty_graph(1),
    "no node": networkx.empty_graph(0),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("largest", [1, 2, 3, 50])
@pytest.mark.parametrize("numbers", [30, 2**24])
def test_distances_of_networkx(name: str, largest: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops, "_NUMBERS", numbers)
    made = GRAPHS[name]
    if name == "no node":
        graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), num_nodes=0)
    else:
        graph = Graph.from_networkx(made)
    expected = torch.full((len(made), len(made)), largest + 1)
    # An edge u -> v is one that v attends along: its source is the key, in the column.
    for key, reached in networkx.all_pairs_shortest_path_length(made):
        for query, length in reached.items():
            expected[query, key] = min(length, largest + 1)
    assert torch.equal(hop_distances(graph, largest), expected)


def test_no_path_leads_from_one_graph_to_another() -> None:
    graphs = [Graph.from_networkx(GRAPHS[name]) for name in ("path", "random")]
    found = hop_distances(Graph.batch(graphs), 4)
    expected = torch.block_diag(*[hop_distances(graph, 4) - 5 for graph in graphs]) + 5
    assert torch.equal(found, expected)


def test_degrees_of_networkx() -> None:
    made = GRAPHS["directed"]
    graph = Graph.from_networkx(made)
    expected = torch.tensor([[made.in_degree(node), made.out_degree(node)] for node in made])
    assert torch.equal(degrees(graph), expected)
    doubled = Graph.from_edge_index(torch.tensor([[0, 0, 1], [1, 1, 1]]), num_nodes=3)
    assert degrees(doubled).tolist() == [[0, 2], [3, 1], [0, 0]]


def test_what_does_not_fit() -> None:
    graph = Graph.from_networkx(GRAPHS["path"])
    with pytest.raises(InvalidInputError, match="max_distance: expected an int of at least 1, got 0"):
        hop_distances(graph, 0)
    bipartite = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), num_queries=1, num_keys=2)
    for call in (degrees, lambda graph: hop_distances(graph, 1)):
        with pytest.raises(GraphStructureError, match="graph: expected as many queries as keys"):
            call(bipartite)
        with pytest.raises(InvalidInputError, match="graph: expected a Graph"):
            call([[0], [1]])
    large = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), num_nodes=10_000_000)
    with pytest.raises(OutOfMemoryError, match="the distances"):
        hop_distances(large, 1)
