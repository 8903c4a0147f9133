"""Nodes numbered anew, so that neighbours lie close to each other in memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from anyattention.ambient import lasting
from anyattention.errors import InvalidInputError, MissingExtraError
from anyattention.patterns.graph_arrays import require_one_set

if TYPE_CHECKING:
    from anyattention.patterns.edges import EdgePattern

__all__ = ["ReorderMethod", "reordered"]

ReorderMethod = Literal["rcm", "degree", "metis"]

# Nodes of a part of METIS: 256 rows of 512 bytes fill a small part of a core's second cache.
_NODES_OF_A_PART = 256


def reordered(graph: EdgePattern, method: ReorderMethod) -> tuple[Tensor, Tensor]:
    """The old number of each new node, `(nodes,)`, and the edges by their new numbers, in the caller's order."""
    if not isinstance(method, str) or method not in _ORDERS:
        raise InvalidInputError(
            argument="method", expected="one of " + ", ".join(map(repr, _ORDERS)), actual=repr(method)
        )
    require_one_set(graph)
    with lasting(graph.edge_index):
        order = _ORDERS[method](graph).to(graph.device)
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order), device=graph.device)
        return order, number[graph.edge_index]


def _by_degree(graph: EdgePattern) -> Tensor:
    """Most neighbours first, those of equally many by their number."""
    counts = graph.query_offsets.diff() + graph.key_offsets.diff()
    return torch.argsort(counts, descending=True, stable=True)


def _by_cuthill_mckee(graph: EdgePattern) -> Tensor:
    if graph.num_queries == 0:  # which scipy refuses
        return torch.arange(0, device="cpu")
    csgraph = _library("scipy.sparse.csgraph")
    matrix = _undirected(graph)
    return torch.from_numpy(csgraph.reverse_cuthill_mckee(matrix, symmetric_mode=True).astype(np.int64))


def _by_metis(graph: EdgePattern) -> Tensor:
    """The parts one after the other, inside a part by the number."""
    pymetis = _library("pymetis")
    parts = graph.num_queries // _NODES_OF_A_PART
    if parts < 2:
        return torch.arange(graph.num_queries, device="cpu")
    matrix = _undirected(graph)
    matrix.setdiag(0)
    matrix.eliminate_zeros()
    _, part = pymetis.part_graph(parts, xadj=matrix.indptr, adjncy=matrix.indices)
    return torch.argsort(torch.tensor(part, dtype=torch.int64, device="cpu"), stable=True)


def _undirected(graph: EdgePattern) -> Any:
    """The pairs as a symmetric scipy matrix in CSR."""
    sparse = _library("scipy.sparse")
    source, target = graph.edge_index.cpu().numpy()
    ones = np.ones(2 * len(source), dtype=np.int32)
    places = (np.concatenate([target, source]), np.concatenate([source, target]))
    return sparse.csr_array((ones, places), shape=(graph.num_queries, graph.num_queries))


def _library(module: str) -> Any:
    """A library of the extra "graphs", or the error that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"this order needs {package}: pip install 'anyattention[graphs]'", argument="method"
        ) from missing


_ORDERS = {"rcm": _by_cuthill_mckee, "degree": _by_degree, "metis": _by_metis}
