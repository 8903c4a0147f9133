"""Every refusal of Graph's constructors, with the argument, what was expected and what came."""

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import networkx
import numpy as np
import pytest
import scipy.sparse
import torch

from anyattention.errors import (
    AttentionError,
    DimensionMismatchError,
    GraphStructureError,
    InvalidInputError,
    MissingExtraError,
    SparseMatrixError,
)
from anyattention.patterns import Graph

_EDGES = torch.tensor([[0, 1], [2, 2]])


@pytest.fixture(autouse=True)
def _sparse_csr_is_not_warned_about() -> Iterator[None]:
    # PyTorch warns once per process that its CSR and CSC tensors are in beta, which is no fault of the code here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CS[RC]|BSR) tensor support is in beta", category=UserWarning)
        yield


@pytest.mark.parametrize(
    ("edge_index", "settings", "error", "match"),
    [
        ([[0], [1]], {"num_nodes": 2}, InvalidInputError, r"edge_index: expected a torch\.Tensor, got list"),
        (_EDGES.int(), {"num_nodes": 3}, InvalidInputError, r"edge_index: expected torch\.int64, got torch\.int32"),
        (_EDGES.float(), {"num_nodes": 3}, InvalidInputError, r"expected torch\.int64, got torch\.float32"),
        (
            torch.zeros(3, 2, dtype=torch.int64),
            {"num_nodes": 3},
            DimensionMismatchError,
            r"edge_index: expected \(2, edges\), got \(3, 2\)",
        ),
        (_EDGES[0], {"num_nodes": 3}, DimensionMismatchError, r"edge_index: expected \(2, edges\), got \(2,\)"),
        (_EDGES[None], {"num_nodes": 3}, DimensionMismatchError, r"expected \(2, edges\), got \(1, 2, 2\)"),
        (
            _EDGES,
            {},
            GraphStructureError,
            "num_queries: expected a number of nodes, got None. give num_nodes, or num_q",
        ),
        (_EDGES, {"num_queries": 3}, GraphStructureError, "num_keys: expected a number of nodes, got None"),
        (_EDGES, {"num_keys": 3}, GraphStructureError, "num_queries: expected a number of nodes, got None"),
        (
            _EDGES,
            {"num_nodes": 3, "num_queries": 3, "num_keys": 2},
            GraphStructureError,
            "num_nodes: expected None beside num_queries and num_keys, got 3",
        ),
        (_EDGES, {"num_nodes": 3, "num_keys": 3}, GraphStructureError, "num_nodes: expected None beside"),
        (_EDGES, {"num_nodes": -1}, GraphStructureError, "num_queries: expected an int >= 0.*, got -1"),
        (_EDGES, {"num_nodes": 3.0}, GraphStructureError, r"num_queries: expected an int >= 0.*, got 3\.0"),
        (_EDGES, {"num_nodes": True}, GraphStructureError, "num_queries: expected an int >= 0.*, got True"),
        (_EDGES, {"num_nodes": 2}, GraphStructureError, r"target \(query\): .* 0 to 1 \(2 nodes\), got 2 at edge 0"),
        (
            _EDGES,
            {"num_queries": 3, "num_keys": 1},
            GraphStructureError,
            r"source \(key\): expected indices from 0 to 0 \(1 nodes\), got 1 at edge 1",
        ),
        (-_EDGES, {"num_nodes": 3}, GraphStructureError, r"source \(key\): .* got -1 at edge 1"),
        (_EDGES, {"num_nodes": 0}, GraphStructureError, r"\(0 nodes\), got 0 at edge 0"),
        (_EDGES, {"num_nodes": 3, "values": [1.0, 2.0]}, InvalidInputError, r"values: expected a torch\.Tensor"),
        (
            _EDGES,
            {"num_nodes": 3, "values": torch.ones(3)},
            DimensionMismatchError,
            r"values: expected \(edges=2,\), got \(3,\)",
        ),
        (
            _EDGES,
            {"num_nodes": 3, "values": torch.ones(2, 1)},
            DimensionMismatchError,
            r"values: expected \(edges=2,\), got \(2, 1\)",
        ),
    ],
)
def test_from_edge_index_refuses(edge_index: Any, settings: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        Graph.from_edge_index(edge_index, **settings)
    assert isinstance(caught.value, AttentionError)
    assert caught.value.argument
    assert caught.value.expected


def broken_csr(offsets: list[int], columns: list[int], size: tuple[int, int]) -> torch.Tensor:
    """A matrix that PyTorch builds unchecked, though its parts do not fit."""
    values = torch.ones(len(columns))
    return torch.sparse_csr_tensor(
        torch.tensor(offsets), torch.tensor(columns), values, size=size, check_invariants=False
    )


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: [[0.0, 1.0]], SparseMatrixError, "adjacency: expected a scipy.sparse matrix, .*, got list"),
        (lambda: "matrix", SparseMatrixError, "got str"),
        (lambda: torch.ones(3), DimensionMismatchError, r"adjacency: expected a matrix, got \(3,\)"),
        (lambda: torch.ones(2, 3, 3), DimensionMismatchError, r"adjacency: expected a matrix, got \(2, 3, 3\)"),
        (lambda: np.ones(3), DimensionMismatchError, r"adjacency: expected a matrix, got \(3,\)"),
        (
            lambda: torch.ones(2, 3).to_sparse(1),
            SparseMatrixError,
            "adjacency: expected one number per stored entry, got a hybrid tensor",
        ),
        (lambda: scipy.sparse.coo_array(np.ones(3)), DimensionMismatchError, r"expected a matrix, got \(3,\)"),
        (
            lambda: torch.eye(2)[None].expand(3, 2, 2).to_sparse_csr(),
            DimensionMismatchError,
            r"expected a matrix, got \(3, 2, 2\)",
        ),
        (
            lambda: torch.eye(4).to_sparse_bsr((2, 2)),
            SparseMatrixError,
            r"expected layout CSR, CSC, COO or dense, got torch\.sparse_bsr",
        ),
        (lambda: np.array([["a"]]), SparseMatrixError, "expected entries of a numeric dtype, got <U1"),
        (lambda: np.array([[object()]]), SparseMatrixError, "expected entries of a numeric dtype, got object"),
        (lambda: np.ones((2, 2), dtype=">f4"), SparseMatrixError, "expected entries of a numeric dtype, got >f4"),
        (
            lambda: scipy.sparse.csr_array(np.ones((2, 2), dtype=np.longdouble)),
            SparseMatrixError,
            r"expected entries of a numeric dtype, got (float128|longdouble)",
        ),
        (lambda: broken_csr([0, 2, 1], [0, 1], (2, 2)), SparseMatrixError, "3 offsets that rise from 0 to 2"),
        (lambda: broken_csr([1, 1, 2], [0, 1], (2, 2)), SparseMatrixError, r"got 3 offsets from \[1\] to \[2\]"),
        (lambda: broken_csr([0, 1, 1], [0, 1], (2, 2)), SparseMatrixError, r"got 3 offsets from \[0\] to \[1\]"),
        (lambda: broken_csr([0, 1, 2], [0, 2], (2, 2)), SparseMatrixError, r"adjacency: source \(key\): .* got 2 at e"),
        (lambda: broken_csr([0, 1, 2], [0, -1], (2, 2)), SparseMatrixError, r"adjacency: source \(key\): .* got -1 at"),
    ],
)
def test_from_adjacency_refuses(make: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        Graph.from_adjacency(make())
    assert isinstance(caught.value, AttentionError)
    assert caught.value.argument == "adjacency"


def test_from_adjacency_refuses_scipy_indices_out_of_range() -> None:
    matrix = scipy.sparse.csr_array(np.eye(2))
    matrix.indices[1] = 7
    with pytest.raises(SparseMatrixError, match=r"adjacency: source \(key\): .* got 7 at edge 1"):
        Graph.from_adjacency(matrix)


@pytest.mark.parametrize("given", [None, np.eye(2), {"a": ["b"]}])
def test_from_networkx_refuses_other_types(given: object) -> None:
    with pytest.raises(InvalidInputError, match="graph: expected a networkx graph, got"):
        Graph.from_networkx(given)


def test_from_networkx_refuses_weights_that_are_no_numbers() -> None:
    graph = networkx.DiGraph()
    graph.add_edge(0, 1, weight="heavy")
    with pytest.raises(InvalidInputError, match="graph: expected numbers as edge weights"):
        Graph.from_networkx(graph)


@pytest.mark.parametrize("missing", ["networkx", "scipy.sparse"])
def test_from_networkx_names_the_extra_that_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = networkx.DiGraph([(0, 1)])
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        MissingExtraError, match=r"needs networkx and scipy: pip install 'anyattention\[viz\]'"
    ) as caught:
        Graph.from_networkx(graph)
    assert isinstance(caught.value, ImportError)


def test_from_adjacency_works_in_a_process_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scipy.sparse")
    assert Graph.from_adjacency(np.eye(2)).num_edges == 2


@pytest.mark.parametrize(
    ("graphs", "match"),
    [
        ([_EDGES], r"graphs\[0\]: expected a Graph, got Tensor"),
        ([Graph.from_edge_index(_EDGES, 3), None], r"graphs\[1\]: expected a Graph, got NoneType"),
        (
            [Graph.from_edge_index(_EDGES, 3), Graph.from_edge_index(_EDGES, 3).to("meta")],
            r"graphs\[1\]: expected device cpu, as graphs\[0\], got meta",
        ),
        (Graph.from_edge_index(_EDGES, 3), "graphs: expected a list of Graphs, got Graph"),
        (iter([]), "graphs: expected a list of Graphs, got list_iterator"),
    ],
)
def test_batch_refuses(graphs: Any, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        Graph.batch(graphs)


def test_self_loops_need_one_set_of_nodes() -> None:
    graph = Graph.from_edge_index(_EDGES, num_queries=3, num_keys=2)
    with pytest.raises(GraphStructureError, match="as many queries as keys for self-loops, got 3 queries and 2 keys"):
        graph.with_self_loops()


@pytest.mark.parametrize("sizes", [(2, 3), (3, 3), (2, None), (None, 3)])
def test_a_graph_has_its_own_sizes(sizes: tuple[int | None, int | None]) -> None:
    graph = Graph.from_edge_index(_EDGES, num_queries=3, num_keys=2)
    with pytest.raises(DimensionMismatchError, match=r"\(num_queries, num_keys\): expected \(3, 2\), the graph's own"):
        graph.to_dense(*sizes)
    with pytest.raises(DimensionMismatchError, match=r"expected \(3, 2\), the graph's own, got"):
        graph.to_graph(*sizes)
