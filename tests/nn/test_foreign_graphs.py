"""A graph of another library, given in place of ours: the error names what makes a Graph of it."""

import re
from collections.abc import Callable
from typing import Any

import networkx
import pytest
import scipy.sparse
import torch

from anyattention import Graph, TopK, attend, edge_dot, edge_softmax, edge_sum
from anyattention.errors import AttentionError
from anyattention.nn import DistanceAttention, EquivariantAttention, GraphAttention, MultiHeadAttention, SparseAttention

_X = torch.ones(3, 2, 4)
_ROWS = torch.ones(3, 8)
_POINTS = torch.rand(3, 3)


def _dgl_graph() -> object:
    kind = type("DGLGraph", (), {})
    kind.__module__ = "dgl.heterograph"
    return kind()


_FOREIGN = {
    "networkx": (networkx.DiGraph([(0, 1), (1, 2)]), "Graph.from_networkx(...)"),
    "scipy": (scipy.sparse.eye(3, format="csr"), "Graph.from_adjacency(...)"),
    "dgl": (_dgl_graph(), "Graph.from_edge_index(torch.stack(graph.edges()), graph.num_nodes())"),
}
_TAKERS: dict[str, Callable[[Any], object]] = {
    "attend": lambda graph: attend(_X, _X, _X, graph),
    "TopK": lambda graph: TopK(2, among=graph),
    "edge_dot": lambda graph: edge_dot(_X, _X, graph),
    "edge_sum": lambda graph: edge_sum(torch.ones(2, 2), _X, graph),
    "edge_softmax": lambda graph: edge_softmax(torch.ones(2, 2), graph),
    "Graph.batch": lambda graph: Graph.batch([graph]),
    "GraphAttention": lambda graph: GraphAttention(8, 2)(_ROWS, graph),
    "MultiHeadAttention": lambda graph: MultiHeadAttention(8, 2, pattern=graph),
    "DistanceAttention": lambda graph: DistanceAttention(8, 2)(_ROWS, _POINTS, graph=graph),
    "EquivariantAttention": lambda graph: EquivariantAttention(8, 2).equivariant_forward(_ROWS, _POINTS, graph=graph),
}


@pytest.mark.parametrize("taker", _TAKERS)
@pytest.mark.parametrize("library", _FOREIGN)
def test_the_error_names_the_constructor(library: str, taker: str) -> None:
    graph, constructor = _FOREIGN[library]
    with pytest.raises(AttentionError, match=re.escape(constructor)):
        _TAKERS[taker](graph)


_OTHERS_TAKERS: dict[str, Callable[[Any], object]] = {
    "from_edge_index": lambda graph: Graph.from_edge_index(graph, num_nodes=3),
    "from_adjacency": Graph.from_adjacency,
    "from_networkx": Graph.from_networkx,
    "GraphAttention.sparse_forward": lambda graph: GraphAttention(8, 2).sparse_forward(_ROWS, graph),
    "SparseAttention.sparse_forward": lambda graph: SparseAttention(8, 2).sparse_forward(
        _ROWS[None], _ROWS[None], _ROWS[None], graph
    ),
}
_OWN_TAKERS = {
    "networkx": ("from_networkx",),
    "scipy": ("from_adjacency", "GraphAttention.sparse_forward", "SparseAttention.sparse_forward"),
    "dgl": (),
}


@pytest.mark.parametrize("taker", _OTHERS_TAKERS)
@pytest.mark.parametrize("library", _FOREIGN)
def test_another_librarys_constructor_names_the_right_one(library: str, taker: str) -> None:
    graph, constructor = _FOREIGN[library]
    if taker in _OWN_TAKERS[library]:
        _OTHERS_TAKERS[taker](graph)
    else:
        with pytest.raises(AttentionError, match=re.escape(constructor)):
            _OTHERS_TAKERS[taker](graph)


def test_an_edge_list_in_place_of_a_graph() -> None:
    with pytest.raises(AttentionError, match=r"graph: expected a Graph, got Tensor.*Graph.from_edge_index"):
        edge_dot(_X, _X, torch.zeros(2, 1, dtype=torch.int64))  # pyright: ignore[reportArgumentType]
