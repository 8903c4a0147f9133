"""Each constructor's direction on one three-node graph, and scipy as the oracle of every conversion."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import networkx
import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from torch import Tensor

from anyattention.patterns import Graph

_SCIPY_CLASSES = [
    getattr(scipy.sparse, f"{layout}_{kind}")
    for layout in ("csr", "csc", "coo", "lil", "dok", "bsr", "dia")
    for kind in ("array", "matrix")
]


@pytest.fixture(autouse=True)
def _discouraged_matrices_are_not_warned_about() -> Iterator[None]:
    # PyTorch warns once per process that its CSR and CSC tensors are in beta, which is no fault of the code here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CS[RC] tensor support is in beta", category=UserWarning)
        # numpy discourages np.matrix; that it is read all the same is what is tested.
        warnings.filterwarnings("ignore", message="the matrix subclass", category=PendingDeprecationWarning)
        yield


def three_nodes() -> np.ndarray:
    """Node 0 attends to nodes 1 and 2, node 2 to node 1: not symmetric in any way."""
    return np.array([[0.0, 5.0, 7.0], [0.0, 0.0, 0.0], [0.0, 11.0, 0.0]])


def pairs_with_values(graph: Graph) -> dict[tuple[int, int], float]:
    """(query, key) -> value of every edge; every edge once."""
    assert graph.values is not None
    found = dict(
        zip(
            zip(graph.query_index.tolist(), graph.key_index.tolist(), strict=True),
            graph.values.tolist(),
            strict=True,
        )
    )
    assert len(found) == graph.num_edges
    return found


EXPECTED = {(0, 1): 5.0, (0, 2): 7.0, (2, 1): 11.0}


def as_torch_coo(matrix: np.ndarray) -> Tensor:
    return torch.tensor(matrix).to_sparse_coo()


def as_torch_csr(matrix: np.ndarray) -> Tensor:
    return torch.tensor(matrix).to_sparse_csr()


def as_torch_csc(matrix: np.ndarray) -> Tensor:
    return torch.tensor(matrix).to_sparse_csc()


def as_named_table(matrix: np.ndarray) -> pandas.DataFrame:
    return pandas.DataFrame(matrix, index=list("abc"), columns=list("abc"))


def as_sparse_table(matrix: np.ndarray) -> pandas.DataFrame:
    return pandas.DataFrame(matrix).astype(pandas.SparseDtype("float64", 0.0))


_TORCH_FORMS = [torch.tensor, as_torch_coo, as_torch_csr, as_torch_csc]
_TABLES = [pandas.DataFrame, as_named_table, as_sparse_table]


@pytest.mark.parametrize(
    "convert",
    [*_SCIPY_CLASSES, *_TORCH_FORMS, *_TABLES, np.asarray, np.asmatrix, np.float32],
    ids=lambda convert: convert.__name__,
)
def test_rows_of_an_adjacency_attend_to_columns(convert: Callable[[np.ndarray], Any]) -> None:
    graph = Graph.from_adjacency(convert(three_nodes()))
    assert (graph.num_queries, graph.num_keys) == (3, 3)
    found = pairs_with_values(graph)
    if convert in (scipy.sparse.bsr_array, scipy.sparse.bsr_matrix):
        # Blocks are stored whole, so their zeros are stored entries.
        assert {pair: value for pair, value in found.items() if value} == EXPECTED
    else:
        assert found == EXPECTED


@pytest.mark.parametrize("convert", [*_SCIPY_CLASSES, torch.tensor, as_torch_coo, as_torch_csr, as_torch_csc])
def test_boolean_adjacencies_have_the_same_direction(convert: Callable[[np.ndarray], Any]) -> None:
    graph = Graph.from_adjacency(convert(three_nodes() != 0))
    assert graph.values is not None
    assert graph.values.dtype == torch.bool
    assert {pair for pair, value in pairs_with_values(graph).items() if value} == set(EXPECTED)


def test_edge_index_names_the_source_first() -> None:
    graph = Graph.from_edge_index(torch.tensor([[1, 2, 1], [0, 0, 2]]), num_nodes=3)
    assert graph.key_index.tolist() == [1, 2, 1]
    assert graph.query_index.tolist() == [0, 0, 2]
    assert graph.values is None
    assert graph.to_dense().tolist() == (three_nodes() != 0).tolist()
    assert graph.query_offsets.tolist() == [0, 2, 2, 3]
    assert graph.key_offsets.tolist() == [0, 0, 2, 3]


def test_a_networkx_edge_lets_its_head_attend_to_its_tail() -> None:
    digraph = networkx.DiGraph()
    digraph.add_nodes_from([0, 1, 2])
    digraph.add_weighted_edges_from([(1, 0, 5.0), (2, 0, 7.0), (1, 2, 11.0)])
    assert pairs_with_values(Graph.from_networkx(digraph)) == EXPECTED


def test_an_undirected_networkx_edge_goes_both_ways_and_a_loop_once() -> None:
    path = networkx.Graph()
    path.add_nodes_from("abc")
    path.add_edge("a", "b", weight=2.0)
    path.add_edge("c", "c")
    assert pairs_with_values(Graph.from_networkx(path)) == {(0, 1): 2.0, (1, 0): 2.0, (2, 2): 1.0}


def test_parallel_networkx_edges_become_one_with_their_sum() -> None:
    multi = networkx.MultiDiGraph()
    multi.add_nodes_from([0, 1])
    multi.add_edge(0, 1, weight=2.0)
    multi.add_edge(0, 1, weight=3.5)
    multi.add_edge(1, 1, weight=0.0)
    assert pairs_with_values(Graph.from_networkx(multi)) == {(1, 0): 5.5, (1, 1): 0.0}


@pytest.mark.parametrize("kind", [networkx.DiGraph, networkx.Graph, networkx.MultiDiGraph, networkx.MultiGraph])
def test_from_networkx_equals_the_transposed_adjacency(kind: type) -> None:
    random = np.random.default_rng(3)
    made = kind()
    made.add_nodes_from(range(7))
    made.add_weighted_edges_from([(*random.integers(0, 7, 2).tolist(), float(n)) for n in range(1, 12)])
    adjacency = networkx.to_scipy_sparse_array(made, dtype=float)
    assert_same(Graph.from_networkx(made), Graph.from_adjacency(adjacency.T.tocsr()))


@pytest.mark.parametrize("kind", [networkx.DiGraph, networkx.Graph])
def test_networkx_graphs_without_edges_or_nodes(kind: type) -> None:
    assert repr(Graph.from_networkx(kind())) == "Graph(num_queries=0, num_keys=0, num_edges=0)"
    lonely = kind()
    lonely.add_nodes_from("xy")
    assert repr(Graph.from_networkx(lonely)) == "Graph(num_queries=2, num_keys=2, num_edges=0)"


def assert_same(actual: Graph, expected: Graph) -> None:
    names = ["edge_index", "query_offsets", "keys_by_query", "edges_by_query"]
    for name in [*names, "key_offsets", "queries_by_key", "edges_by_key", "values"]:
        left, right = getattr(actual, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            assert left.tolist() == right.tolist(), name


def random_coo(seed: int, rows: int, columns: int, entries: int) -> scipy.sparse.coo_array:
    """Stored zeros and duplicates included; distinct values otherwise."""
    random = np.random.default_rng(seed)
    values = random.permutation(entries).astype(np.float64)
    indices = (random.integers(0, rows, entries), random.integers(0, columns, entries))
    return scipy.sparse.coo_array((values, indices), shape=(rows, columns))


def assert_is_matrix(graph: Graph, matrix: scipy.sparse.coo_array) -> None:
    """The graph's rows, its transpose and its values are scipy's own, explicit zeros included."""
    rows, columns = matrix.tocsr(), matrix.tocsc()
    for each in (rows, columns):
        each.sum_duplicates()
    assert (graph.num_queries, graph.num_keys) == matrix.shape
    assert graph.values is not None
    assert graph.query_offsets.tolist() == rows.indptr.tolist()
    assert graph.key_offsets.tolist() == columns.indptr.tolist()
    assert_rows(graph.query_offsets, graph.keys_by_query, graph.values[graph.edges_by_query], rows)
    assert_rows(graph.key_offsets, graph.queries_by_key, graph.values[graph.edges_by_key], columns)
    assert graph.key_index[graph.edges_by_query].tolist() == graph.keys_by_query.tolist()
    assert graph.query_index[graph.edges_by_key].tolist() == graph.queries_by_key.tolist()
    by_edge = {
        (query, key): value
        for query, key, value in zip(
            graph.query_index.tolist(), graph.key_index.tolist(), graph.values.tolist(), strict=True
        )
    }
    dense = rows.toarray()
    assert all(dense[pair] == value for pair, value in by_edge.items())


def assert_rows(offsets: Tensor, indices: Tensor, values: Tensor, expected: Any) -> None:
    for row in range(offsets.numel() - 1):
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        ours = sorted(zip(indices[part].tolist(), values[part].tolist(), strict=True))
        part = slice(expected.indptr[row], expected.indptr[row + 1])
        theirs = sorted(zip(expected.indices[part].tolist(), expected.data[part].tolist(), strict=True))
        assert ours == theirs


_SHAPES = [(7, 7, 20), (5, 11, 40), (13, 3, 30), (1, 1, 3), (1, 5, 4), (5, 1, 4), (4, 4, 0), (0, 3, 0), (0, 0, 0)]


@pytest.mark.parametrize(("rows", "columns", "entries"), _SHAPES)
@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_scipy_matrices_keep_zeros_and_coalesce_duplicates(layout: str, rows: int, columns: int, entries: int) -> None:
    matrix = random_coo(entries, rows, columns, entries)
    assert_is_matrix(Graph.from_adjacency(matrix.asformat(layout)), matrix)


@pytest.mark.parametrize("layout", ["lil", "dok"])
def test_scipy_builders_are_read_like_their_csr(layout: str) -> None:
    matrix = random_coo(2, 7, 5, 20).asformat(layout)
    assert_is_matrix(Graph.from_adjacency(matrix), matrix.tocoo())


@pytest.mark.parametrize(("rows", "columns", "entries"), [shape for shape in _SHAPES if 0 not in shape[:2]])
@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_torch_sparse_matrices_are_read_like_scipys(layout: str, rows: int, columns: int, entries: int) -> None:
    matrix = random_coo(entries, rows, columns, entries)
    assert_is_matrix(Graph.from_adjacency(to_torch(matrix, layout)), matrix)


def to_torch(matrix: scipy.sparse.coo_array, layout: str) -> Tensor:
    if layout == "coo":
        indices = torch.tensor(np.stack([matrix.row, matrix.col]), dtype=torch.int64)
        return torch.sparse_coo_tensor(indices, torch.tensor(matrix.data), matrix.shape, check_invariants=True)
    compressed = matrix.asformat(layout)
    compressed.sum_duplicates()
    make = torch.sparse_csr_tensor if layout == "csr" else torch.sparse_csc_tensor
    # scipy's indices are int32 here, which PyTorch takes too.
    parts = [torch.tensor(part) for part in (compressed.indptr, compressed.indices, compressed.data)]
    return make(*parts, size=matrix.shape, check_invariants=True)


def test_dense_matrices_take_the_non_zero_entries() -> None:
    matrix = random_coo(4, 5, 7, 20).toarray()
    matrix[3] = 0
    for given in (matrix, torch.tensor(matrix)):
        graph = Graph.from_adjacency(given)
        expected = scipy.sparse.coo_array(matrix)
        assert_is_matrix(graph, expected)
        assert graph.query_index.tolist() == sorted(graph.query_index.tolist())


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_unsorted_scipy_indices_are_understood_and_left_alone(layout: str) -> None:
    matrix = scipy.sparse.csr_array(
        (np.array([1.0, 2.0, 3.0, 4.0]), np.array([2, 0, 1, 0]), np.array([0, 2, 2, 4])), shape=(3, 3)
    )
    if layout == "csc":
        matrix = matrix.T
    before = matrix.indices.copy(), matrix.data.copy()
    assert not matrix.has_sorted_indices
    graph = Graph.from_adjacency(matrix)
    assert_is_matrix(graph, matrix.tocoo())
    assert matrix.indices.tolist() == before[0].tolist()
    assert matrix.data.tolist() == before[1].tolist()


def test_scipy_csr_with_duplicates_is_coalesced_in_a_copy() -> None:
    matrix = scipy.sparse.csr_array((np.array([1.0, 2.0, 4.0]), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 2))
    assert pairs_with_values(Graph.from_adjacency(matrix)) == {(0, 1): 3.0, (1, 0): 4.0}
    assert matrix.nnz == 3


def test_unsorted_torch_indices_keep_their_order() -> None:
    matrix = torch.sparse_csr_tensor(
        torch.tensor([0, 2, 3]),
        torch.tensor([1, 0, 1]),
        torch.tensor([5.0, 6.0, 7.0]),
        size=(2, 2),
        check_invariants=False,
    )
    graph = Graph.from_adjacency(matrix)
    assert graph.key_index.tolist() == [1, 0, 1]
    assert pairs_with_values(graph) == {(0, 1): 5.0, (0, 0): 6.0, (1, 1): 7.0}


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.float32, np.float64, np.complex64, np.bool_])
def test_values_keep_their_dtype(dtype: type) -> None:
    matrix = three_nodes().astype(dtype)
    expected = torch.tensor(matrix).dtype
    for given in (matrix, scipy.sparse.csr_array(matrix), torch.tensor(matrix).to_sparse_coo()):
        graph = Graph.from_adjacency(given)
        assert graph.values is not None
        assert graph.values.dtype == expected
        assert graph.num_edges == 3


def test_the_values_of_a_tensor_are_differentiable() -> None:
    dense = torch.tensor(three_nodes(), requires_grad=True)
    graph = Graph.from_adjacency(dense)
    assert graph.values is not None
    graph.values.backward(torch.tensor([2.0, 3.0, 13.0], dtype=torch.float64))
    assert dense.grad is not None
    assert dense.grad.tolist() == [[0, 2, 3], [0, 0, 0], [0, 13, 0]]


def test_the_values_of_a_numpy_or_scipy_matrix_are_copied() -> None:
    dense = three_nodes()
    sparse = scipy.sparse.csr_array(dense)
    graphs = [Graph.from_adjacency(dense), Graph.from_adjacency(sparse)]
    dense[:] = -1.0
    sparse.data[:] = -1.0
    assert all(pairs_with_values(graph) == EXPECTED for graph in graphs)
