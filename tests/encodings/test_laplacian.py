"""Eigenvectors of networkx's Laplacian, by numpy, up to the sign."""

import sys

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor

from anyattention import Graph
from anyattention.encodings import laplacian, laplacian_eigenvectors, random_signs
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidInputError,
    MatrixOperationError,
    MissingExtraError,
)


def lopsided(nodes: int, seed: int = 0) -> networkx.Graph:
    """A connected graph without symmetries, so that no eigenvalue occurs twice."""
    made = networkx.connected_watts_strogatz_graph(nodes, 4, 0.5, seed=seed)
    made.add_edges_from([(0, 2), (1, 4), (2, 2)])
    return made


def expected_of(made: networkx.Graph, k: int) -> tuple[Tensor, Tensor]:
    matrix = networkx.normalized_laplacian_matrix(made.to_undirected(), weight=None).toarray()
    values, vectors = np.linalg.eigh(matrix)
    return torch.from_numpy(vectors[:, 1 : k + 1]), torch.from_numpy(values[1 : k + 1])


def assert_equal_up_to_sign(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    signs = (found * expected).sum(0).sign()
    torch.testing.assert_close(found * signs, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("most_dense", [1024, 1])
@pytest.mark.parametrize(("nodes", "k"), [(7, 1), (11, 3), (53, 5)])
def test_networkx_and_numpy(nodes: int, k: int, most_dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense way and scipy's."""
    monkeypatch.setattr(laplacian, "_MOST_DENSE", most_dense)
    made = lopsided(nodes)
    vectors, values = laplacian_eigenvectors(Graph.from_networkx(made), k, dtype=torch.float64)
    expected, expected_values = expected_of(made, k)
    torch.testing.assert_close(values, expected_values[None], rtol=0, atol=1e-10)
    assert_equal_up_to_sign(vectors, expected)


def test_a_large_graph_goes_to_scipy() -> None:
    made = lopsided(1500)
    vectors, values = laplacian_eigenvectors(Graph.from_networkx(made), 4, dtype=torch.float64)
    expected, expected_values = expected_of(made, 4)
    torch.testing.assert_close(values, expected_values[None], rtol=0, atol=1e-10)
    assert_equal_up_to_sign(vectors, expected, 1e-9)
    again = laplacian_eigenvectors(Graph.from_networkx(made), 4, dtype=torch.float64)
    assert torch.equal(again.vectors, vectors)


def test_a_directed_edge_counts_half_either_way() -> None:
    edges = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0, 4], [1, 0, 2, 1, 3, 2, 0, 3, 1]])
    half = Graph.from_edge_index(edges, num_nodes=5)
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix.index_put_((edges[0], edges[1]), torch.tensor(0.5, dtype=torch.float64), accumulate=True)
    matrix = matrix + matrix.T
    roots = matrix.sum(1).rsqrt()
    _, expected = torch.linalg.eigh(torch.eye(5, dtype=torch.float64) - roots[:, None] * matrix * roots)
    assert_equal_up_to_sign(laplacian_eigenvectors(half, 3, dtype=torch.float64).vectors, expected[:, 1:4])


@pytest.mark.parametrize("most_dense", [1024, 8])
def test_a_batch_is_a_loop(most_dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplacian, "_MOST_DENSE", most_dense)
    graphs = [Graph.from_networkx(lopsided(nodes, seed)) for seed, nodes in enumerate((7, 11, 7, 23, 11, 7))]
    sizes = [graph.num_queries for graph in graphs]
    each = [laplacian_eigenvectors(graph, 3, dtype=torch.float64) for graph in graphs]
    found = laplacian_eigenvectors(Graph.batch(graphs), 3, sizes=sizes, dtype=torch.float64)
    torch.testing.assert_close(found.vectors, torch.cat([one.vectors for one in each]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.values, torch.cat([one.values for one in each]), rtol=0, atol=1e-12)
    batch = torch.arange(6).repeat_interleave(torch.tensor(sizes))
    again = laplacian_eigenvectors(Graph.batch(graphs), 3, batch=batch, dtype=torch.float64)
    assert torch.equal(again.vectors, found.vectors)


def test_what_small_graphs_lack_is_padded() -> None:
    graphs = [Graph.from_networkx(made) for made in (networkx.empty_graph(1), networkx.path_graph(2), lopsided(7))]
    found = laplacian_eigenvectors(Graph.batch(graphs), 4, sizes=[1, 2, 7], pad=True, dtype=torch.float64)
    alone = laplacian_eigenvectors(graphs[2], 4, dtype=torch.float64)
    torch.testing.assert_close(found.vectors[3:], alone.vectors)
    torch.testing.assert_close(found.values[2], alone.values[0])
    half = 0.5**0.5
    expected = torch.tensor([[0.0, 0, 0, 0], [half, 0, 0, 0], [-half, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found.vectors[:3], expected)
    torch.testing.assert_close(found.values[:2, 0], torch.tensor([0.0, 2.0], dtype=torch.float64))
    empty = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), num_nodes=0)
    assert laplacian_eigenvectors(empty, 2, sizes=[]).vectors.shape == (0, 2)


def test_most_eigenvectors_of_a_large_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which scipy refuses."""
    made = lopsided(11)
    expected = laplacian_eigenvectors(Graph.from_networkx(made), 10, dtype=torch.float64)
    monkeypatch.setattr(laplacian, "_MOST_DENSE", 4)
    found = laplacian_eigenvectors(Graph.from_networkx(made), 10, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("most_dense", [1024, 1])
def test_equal_eigenvalues_span_the_same_space(most_dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring has each but the first twice; nodes without edges have the eigenvalue 0, as components have."""
    monkeypatch.setattr(laplacian, "_MOST_DENSE", most_dense)
    made = networkx.disjoint_union(networkx.cycle_graph(7), networkx.empty_graph(1))
    matrix = networkx.normalized_laplacian_matrix(made).toarray()
    vectors, values = laplacian_eigenvectors(Graph.from_networkx(made), 3, dtype=torch.float64)
    found = vectors.numpy()
    assert np.allclose(matrix @ found, found * values.numpy(), atol=1e-10)
    assert np.allclose(found.T @ found, np.eye(3), atol=1e-10)
    assert np.allclose(values[0, :1], 0, atol=1e-10)


def joined(*graphs: networkx.Graph) -> networkx.Graph:
    return networkx.disjoint_union_all(graphs)


REPEATED = {
    "a large component and paths": (lambda: joined(lopsided(1100), *[networkx.path_graph(3)] * 40), 8),
    "more than the zeros": (lambda: joined(lopsided(1100), *[networkx.path_graph(3)] * 5), 20),
    "lone nodes": (lambda: joined(networkx.barabasi_albert_graph(1500, 3, seed=0), networkx.empty_graph(10)), 10),
    "grid": (lambda: networkx.grid_2d_graph(30, 40), 20),
    "torus": (lambda: networkx.grid_2d_graph(34, 34, periodic=True), 20),
    "two large rings": (lambda: joined(networkx.cycle_graph(1030), networkx.cycle_graph(1030)), 5),
    "star": (lambda: networkx.star_graph(1100), 6),
}


@pytest.mark.parametrize("name", REPEATED)
def test_none_of_the_equal_eigenvalues_of_a_large_graph_is_missed(name: str) -> None:
    make, k = REPEATED[name]
    made = networkx.convert_node_labels_to_integers(make())
    matrix = torch.from_numpy(networkx.normalized_laplacian_matrix(made).toarray())
    vectors, values = laplacian_eigenvectors(Graph.from_networkx(made), k, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(matrix)[1 : k + 1].clamp(0, 2)
    torch.testing.assert_close(values[0], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-11)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-11)
    assert values.min() >= 0
    assert values.max() <= 2


@pytest.mark.parametrize("most_dense", [1024, 1])
def test_the_vector_of_the_degrees_of_the_largest_component_is_left_out(
    most_dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others of eigenvalue 0 are those of one component each, larger ones first."""
    monkeypatch.setattr(laplacian, "_MOST_DENSE", most_dense)
    made = joined(networkx.path_graph(3), lopsided(23), networkx.empty_graph(1), networkx.star_graph(4))
    vectors, values = laplacian_eigenvectors(Graph.from_networkx(made), 4, dtype=torch.float64)
    expected = torch.zeros(len(made), 3, dtype=torch.float64)
    expected[27:, 0] = torch.tensor([4.0, 1, 1, 1, 1], dtype=torch.float64).sqrt() / 8**0.5
    expected[:3, 1] = torch.tensor([1.0, 2, 1], dtype=torch.float64).sqrt() / 2
    expected[26, 2] = 1.0
    torch.testing.assert_close(vectors[:, :3], expected, rtol=0, atol=1e-12)
    of_largest, own = expected_of(lopsided(23), 1)
    assert_equal_up_to_sign(vectors[3:26, 3:], of_largest)
    assert values[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert values[0, 3].item() == pytest.approx(own.item(), abs=1e-12)
    fewer = laplacian_eigenvectors(Graph.from_networkx(made), 2, dtype=torch.float64)
    torch.testing.assert_close(fewer.vectors, expected[:, :2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_zeros_of_components_whose_nodes_are_mixed(seed: int) -> None:
    """Each vector of eigenvalue 0 is of one of networkx's components, which none of the others touches."""
    number = np.random.default_rng(seed).permutation(154).tolist()
    made = joined(networkx.gnp_random_graph(53, 0.03, seed=seed), networkx.path_graph(101))
    edges = torch.tensor([[number[u], number[v]] for u, v in made.edges]).T
    vectors, values = laplacian_eigenvectors(Graph.from_edge_index(edges, num_nodes=154), 153, dtype=torch.float64)
    components = sorted(networkx.connected_components(made), key=len, reverse=True)
    is_zero = values[0] < 1e-12
    assert is_zero.sum() == len(components) - 1
    found = {frozenset(vector.nonzero()[:, 0].tolist()) for vector in vectors[:, is_zero].T}
    assert found == {frozenset(number[node] for node in nodes) for nodes in components[1:]}


@pytest.mark.parametrize("most_dense", [1024, 1])
def test_values_stay_from_0_to_2(most_dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 for each component, and 2 for each without an odd cycle: rounding leads out of them."""
    monkeypatch.setattr(laplacian, "_MOST_DENSE", most_dense)
    made = joined(*[networkx.path_graph(nodes) for nodes in (2, 3, 5, 7, 11)])
    _, values = laplacian_eigenvectors(Graph.from_networkx(made), 27, dtype=torch.float64)
    assert values.min() >= 0
    assert values.max() <= 2


def test_the_first_of_the_largest_entries_is_positive() -> None:
    vectors, _ = laplacian_eigenvectors(Graph.from_networkx(networkx.path_graph(5)), 4, dtype=torch.float64)
    for vector in vectors.T.tolist():
        largest = max(map(abs, vector))
        assert next(number for number in vector if abs(number) > largest * (1 - 1e-6)) > 0


def test_random_signs_of_each_graph_and_vector() -> None:
    vectors, sizes = torch.randn(300, 5).requires_grad_(), [100, 0, 1, 199]
    found = random_signs(vectors, sizes=sizes, generator=torch.Generator().manual_seed(4))
    signs = found / vectors
    torch.testing.assert_close(signs.abs(), torch.ones(300, 5))
    for part in signs.split(sizes):
        torch.testing.assert_close(part, part[:1].expand_as(part))
    batch = torch.tensor([0] * 100 + [2] + [3] * 199)
    assert torch.equal(random_signs(vectors, batch=batch, generator=torch.Generator().manual_seed(4)), found)
    drawn = torch.stack([random_signs(torch.ones(1, 3)) for _ in range(400)])
    assert drawn.mean(0).abs().max() < 0.2
    torch.testing.assert_close(torch.autograd.grad(found.sum(), vectors)[0], signs.detach())


def test_what_does_not_fit() -> None:
    graph = Graph.from_networkx(networkx.path_graph(5))
    with pytest.raises(InvalidInputError, match="k: expected an int of at least 1, got 0"):
        laplacian_eigenvectors(graph, 0)
    with pytest.raises(InvalidInputError, match=r"k: expected below 5, the nodes of graph 0, got 5.*pad=True"):
        laplacian_eigenvectors(graph, 5)
    with pytest.raises(InvalidInputError, match="k: expected below 2, the nodes of graph 1, got 2"):
        laplacian_eigenvectors(graph, 2, sizes=[3, 2])
    with pytest.raises(InvalidInputError, match="dtype"):
        laplacian_eigenvectors(graph, 2, dtype=torch.int64)
    bipartite = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), num_queries=1, num_keys=2)
    with pytest.raises(GraphStructureError, match="graph: expected as many queries as keys"):
        laplacian_eigenvectors(bipartite, 1)
    with pytest.raises(
        GraphStructureError, match=r"graph: expected edges within each graph.*edge 2 from node 2 to node 1"
    ):
        laplacian_eigenvectors(graph, 1, sizes=[2, 3])
    with pytest.raises(InvalidInputError, match="vectors: expected a floating-point"):
        random_signs(torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(DimensionMismatchError, match=r"vectors: expected \(nodes, k\)"):
        random_signs(torch.ones(3))
    with pytest.raises(InvalidInputError, match=r"generator: expected a torch.Generator of the CPU, or None, got int"):
        random_signs(torch.ones(3, 1), generator=3)  # pyright: ignore[reportArgumentType]


def test_large_graphs_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplacian, "_MOST_DENSE", 4)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), num_nodes=5)
    with pytest.raises(MissingExtraError, match=r"need scipy: pip install 'anyattention\[graphs\]'"):
        laplacian_eigenvectors(graph, 1)


def test_scipy_that_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.sparse import linalg

    def fail(*_: object, **__: object) -> None:
        raise linalg.ArpackNoConvergence("No convergence", np.zeros(0), np.zeros((5, 0)))

    monkeypatch.setattr(laplacian, "_MOST_DENSE", 4)
    monkeypatch.setattr(linalg, "eigsh", fail)
    graph = Graph.from_networkx(networkx.path_graph(5))
    with pytest.raises(MatrixOperationError, match=r"no eigenvectors of a graph of 5 nodes.*No convergence"):
        laplacian_eigenvectors(graph, 1)
