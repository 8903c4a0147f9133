"""Random walks that come back, against powers of networkx's matrix and a count of all walks."""

import itertools

import networkx
import numpy as np
import pytest
import torch

from anyattention import Graph
from anyattention.encodings import random_walk_probabilities, walks
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError

pytestmark = pytest.mark.usefixtures("native")


def graph_of(made: networkx.Graph) -> Graph:
    return Graph.from_networkx(made)


def powers(made: networkx.Graph, steps: int) -> torch.Tensor:
    """Diagonals of powers of D^-1 A."""
    matrix = networkx.to_numpy_array(made)
    degree = matrix.sum(1, keepdims=True)
    step = np.divide(matrix, degree, out=np.zeros_like(matrix), where=degree > 0)
    found, power = [], np.eye(len(matrix))
    for _ in range(steps):
        power = power @ step
        found.append(power.diagonal())
    return torch.from_numpy(np.stack(found, axis=1))


GRAPHS = {
    "random": networkx.gnp_random_graph(23, 0.2, seed=1),
    "directed": networkx.gnp_random_graph(13, 0.2, seed=2, directed=True),
    "star and a lone node": networkx.disjoint_union(networkx.star_graph(5), networkx.empty_graph(1)),
    "one node": networkx.empty_graph(1),
    "with a loop": networkx.Graph([(0, 0), (0, 1), (1, 2)]),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("numbers", [1, 40, 2**24])
def test_powers_of_networkx(name: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many starts are held at a time."""
    monkeypatch.setattr(walks, "_NUMBERS", numbers)
    found = random_walk_probabilities(graph_of(GRAPHS[name]), 7, dtype=torch.float64)
    torch.testing.assert_close(found, powers(GRAPHS[name], 7), rtol=0, atol=1e-10)


def test_every_walk_one_by_one() -> None:
    """Of a directed multigraph: duplicates count each, and a walk into a node without edges ends."""
    edge_index = torch.tensor([[0, 0, 0, 1, 2, 2, 3], [1, 1, 2, 0, 0, 3, 3]])
    graph = Graph.from_edge_index(edge_index, num_nodes=5)
    ways = {node: [edge[1] for edge in edge_index.T.tolist() if edge[0] == node] for node in range(5)}
    found = random_walk_probabilities(graph, 4, dtype=torch.float64)
    for start, steps in itertools.product(range(5), range(1, 5)):
        walks_of = [(start, 1.0)]
        for _ in range(steps):
            walks_of = [(end, share / len(ways[at])) for at, share in walks_of for end in ways[at]]
        expected = sum(share for at, share in walks_of if at == start)
        assert found[start, steps - 1].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("numbers", [60, 2**24])
def test_a_batch_is_a_loop(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "_NUMBERS", numbers)
    graphs = [graph_of(made) for made in GRAPHS.values()]
    sizes = [graph.num_queries for graph in graphs]
    expected = torch.cat([random_walk_probabilities(graph, 5) for graph in graphs])
    joined = Graph.batch(graphs)
    assert torch.equal(random_walk_probabilities(joined, 5, sizes=sizes), expected)
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert torch.equal(random_walk_probabilities(joined, 5, batch=batch), expected)
    torch.testing.assert_close(random_walk_probabilities(joined, 5), expected)


def test_no_nodes() -> None:
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), num_nodes=0)
    assert random_walk_probabilities(graph, 3).shape == (0, 3)
    assert random_walk_probabilities(graph, 3, sizes=[]).shape == (0, 3)


def test_the_result_is_of_its_dtype() -> None:
    graph = graph_of(GRAPHS["random"])
    assert random_walk_probabilities(graph, 2).dtype == torch.float32
    assert random_walk_probabilities(graph, 2, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_does_not_fit() -> None:
    graph = graph_of(GRAPHS["one node"])
    with pytest.raises(InvalidInputError, match="steps: expected an int of at least 1, got 0"):
        random_walk_probabilities(graph, 0)
    with pytest.raises(InvalidInputError, match="dtype: expected"):
        random_walk_probabilities(graph, 1, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match="graph: expected a Graph"):
        random_walk_probabilities(torch.zeros(2, 0), 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DimensionMismatchError, match="sizes: expected numbers that add up to the 1 nodes, got 2"):
        random_walk_probabilities(graph, 1, sizes=[2])
    path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]]), num_nodes=4)
    for given in ({"sizes": [2, 2]}, {"batch": torch.tensor([0, 0, 1, 1])}):
        with pytest.raises(
            GraphStructureError, match=r"graph: expected edges within each.*edge 2 from node 1 to node 2"
        ):
            random_walk_probabilities(path, 2, **given)  # pyright: ignore[reportArgumentType]
    bipartite = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), num_queries=1, num_keys=2)
    with pytest.raises(GraphStructureError, match="graph: expected as many queries as keys, got 1 queries and 2 keys"):
        random_walk_probabilities(bipartite, 1)
