"""Self-loops: the values, shifts, edge features and derivatives of a graph that gets them."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.utils import add_remaining_self_loops

from anyattention import Graph, attend
from anyattention.errors import AttentionError, GraphStructureError

_EDGES = torch.tensor([[1, 2, 0, 3], [0, 2, 3, 3]])


def _weighted(values: Tensor) -> Graph:
    return Graph.from_edge_index(_EDGES, num_nodes=5, values=values)


@pytest.mark.parametrize("fill", [1.0, 0.0, -2.5])
def test_the_values_are_those_of_the_matrix_with_its_empty_diagonal_filled(fill: float) -> None:
    matrix = np.random.default_rng(0).normal(size=(7, 7)) * (np.random.default_rng(1).random((7, 7)) < 0.4)
    looped = Graph.from_adjacency(matrix).with_self_loops(fill=fill)
    expected = matrix + np.diag(np.where(np.diag(matrix) == 0.0, fill, 0.0))
    found = np.zeros((7, 7))
    assert looped.values is not None
    np.add.at(found, (looped.query_index.numpy(), looped.key_index.numpy()), looped.values.numpy())
    np.testing.assert_array_equal(found, expected)
    assert looped.is_simple()


def test_new_edges_have_the_value_one_after_the_callers() -> None:
    looped = _weighted(torch.tensor([2.0, 3.0, 4.0, 5.0])).with_self_loops()
    assert looped.edge_index.tolist() == [[1, 2, 0, 3, 0, 1, 4], [0, 2, 3, 3, 0, 1, 4]]
    assert looped.values is not None
    assert looped.values.tolist() == [2.0, 3.0, 4.0, 5.0, 1.0, 1.0, 1.0]
    assert Graph.from_edge_index(_EDGES, num_nodes=5).with_self_loops(fill=2.0).values is None


def test_the_weights_of_pairs_are_those_of_torch_geometric() -> None:
    values = torch.tensor([2.0, 3.0, 4.0, 5.0])
    ours = _weighted(values).with_self_loops(fill=7.0)
    theirs, weights = add_remaining_self_loops(_EDGES, values, fill_value=7.0, num_nodes=5)
    assert ours.values is not None
    assert weights is not None
    found = dict(zip(map(tuple, ours.edge_index.T.tolist()), ours.values.tolist(), strict=True))
    assert found == dict(zip(map(tuple, theirs.T.tolist()), weights.tolist(), strict=True))


def test_values_and_shifts_together() -> None:
    shifts = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 0]])
    graph = Graph.from_edge_index(_EDGES, num_nodes=5, values=torch.tensor([2, 3, 4, 5]), shifts=shifts)
    looped = graph.with_self_loops(fill=9)
    # The edge from node 2 to itself leads to an image.
    assert looped.edge_index[0].tolist() == [1, 2, 0, 3, 0, 1, 2, 4]
    assert looped.values is not None
    assert looped.shifts is not None
    assert looped.values.tolist() == [2, 3, 4, 5, 9, 9, 9, 9]
    assert looped.shifts.tolist() == [*shifts.tolist(), [0, 0], [0, 0], [0, 0], [0, 0]]


def test_derivatives_of_the_values_are_kept() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return attend(x, x, x, (graph := _weighted(values).with_self_loops()), bias=graph.values).output.square().sum()

    values = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (values,))
    (expected,) = torch.autograd.grad(loss(values), values)
    assert (expected != 0).tolist() == [True, False, True, True]  # node 2 has one edge
    plain = values.detach()
    torch.testing.assert_close(torch.func.grad(loss)(plain), expected)
    _, tangent = torch.func.jvp(loss, (plain,), (torch.ones_like(plain),))
    torch.testing.assert_close(tangent, expected.sum())
    many = torch.stack([plain, 2.0 * plain])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many)[0], expected)


@pytest.mark.parametrize(
    ("dtype", "fill", "held"),
    [(torch.int64, 2, 2), (torch.int64, 2.0, 2), (torch.bool, 1.0, True), (torch.float16, 65504.0, 65504.0)],
)
def test_the_fill_is_kept_in_the_values_dtype(dtype: torch.dtype, fill: float, held: float) -> None:
    values = _weighted(torch.ones(4, dtype=dtype)).with_self_loops(fill=fill).values
    assert values is not None
    assert values.dtype == dtype
    assert values[4:].tolist() == [held] * 3


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.int64, 0.5),
        (torch.uint8, 256),
        (torch.uint8, -1),
        (torch.bool, 2),
        (torch.float16, 1e6),
        (torch.float32, float("nan")),
        (torch.float32, "mean"),
        (torch.float32, True),
    ],
)
def test_a_fill_that_the_values_cannot_hold_is_refused(dtype: torch.dtype, fill: float) -> None:
    with pytest.raises(AttentionError, match=r"fill: expected a .*number.*, got"):
        _weighted(torch.ones(4, dtype=dtype)).with_self_loops(fill=fill)


def test_queries_and_keys_that_differ_are_refused() -> None:
    with pytest.raises(GraphStructureError, match="graph: expected as many queries as keys"):
        Graph.from_edge_index(_EDGES, num_queries=5, num_keys=6, values=torch.ones(4)).with_self_loops()


def test_edges_as_keys_are_the_same_edges() -> None:
    shifts = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 0]])
    values = torch.tensor([2.0, 3.0, 4.0, 5.0], requires_grad=True)
    graph = Graph.from_edge_index(_EDGES, num_nodes=5, values=values, shifts=shifts).edges_as_keys()
    assert graph.values is values
    assert graph.shifts is not None
    assert graph.shifts.tolist() == shifts.tolist()
