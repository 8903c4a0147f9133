"""Edges in each form that PyTorch Geometric's layers take: a tensor, an EdgeIndex, a sparse matrix of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.utils import add_self_loops, coalesce, remove_self_loops
from torch_geometric.utils.sparse import ptr2index, set_sparse_value

__all__ = [
    "contents_of",
    "declared_sizes",
    "edge_list_of",
    "edges_refusal",
    "features_of",
    "is_matrix",
    "looped_matrix_edges",
    "with_weights",
]

_MATRICES = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


def is_matrix(edge_index: Tensor) -> bool:
    """Whether the edges are a sparse matrix of PyTorch, the transposed adjacency: a row for each target."""
    return edge_index.layout in _MATRICES


def edges_refusal(edge_index: Any, adds_loops: bool) -> str | None:
    """Why the kernels cannot take the edges; None where they can.

    Args:
        adds_loops: whether self-loops are replaced.
    """
    if type(edge_index) not in (Tensor, EdgeIndex):
        return f"edge_index is a {type(edge_index).__name__}"
    if edge_index.device.type != "cpu":
        return f"edge_index is on {edge_index.device}"
    if not is_matrix(edge_index):
        if edge_index.layout != torch.strided:
            return f"edge_index is a {type(edge_index).__name__} of layout {edge_index.layout}"
        if edge_index.dtype not in (torch.int64, torch.int32) or edge_index.ndim != 2 or edge_index.shape[0] != 2:
            dtype, shape = edge_index.dtype, tuple(edge_index.shape)
            return f"edge_index is {dtype} of shape {shape}, not int64 or int32 of shape (2, edges)"
        return None
    if edge_index.sparse_dim() != 2 or edge_index.ndim - edge_index.dense_dim() != 2:
        return f"edge_index is a sparse tensor of shape {tuple(edge_index.shape)}, not a matrix"
    if adds_loops and edge_index.layout == torch.sparse_csc:
        return "edge_index is a sparse CSC matrix, to which PyTorch Geometric adds no self-loops"
    if adds_loops and edge_index.dense_dim() > 0:
        return "edge_index is a sparse matrix of features, whose self-loops are replaced"
    if not adds_loops and _is_loose(edge_index):
        return "edge_index is a sparse COO matrix that is not coalesced"
    return None


def _is_loose(matrix: Tensor) -> bool:
    """Whether the entries of a matrix may stand in any order, and more than once."""
    return matrix.layout == torch.sparse_coo and not matrix.is_coalesced()


def contents_of(edge_index: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that say which edges there are."""
    if isinstance(edge_index, EdgeIndex):
        return (edge_index.as_tensor(),)
    layout = edge_index.layout
    if layout == torch.strided:
        return (edge_index,)
    if layout == torch.sparse_coo:
        return (edge_index._indices(),)
    if layout == torch.sparse_csr:
        return (edge_index.crow_indices(), edge_index.col_indices())
    return (edge_index.ccol_indices(), edge_index.row_indices())


def edge_list_of(edge_index: Tensor) -> Tensor:
    """`(2, edges)` int64; row 0 = source = key, row 1 = target = query; in the order of the parent's weights."""
    contents = contents_of(edge_index)
    if edge_index.layout == torch.sparse_coo:
        return contents[0].flip(0).long()
    if edge_index.layout == torch.sparse_csr:
        return torch.stack([contents[1], ptr2index(contents[0])]).long()
    if edge_index.layout == torch.sparse_csc:
        return torch.stack([ptr2index(contents[0]), contents[1]]).long()
    return contents[0].long()


def looped_matrix_edges(edge_index: Tensor, num_loops: int) -> Tensor:
    """The edges of a sparse matrix, its self-loops replaced by one on each of the first nodes, as `edge_list_of`.

    In PyTorch Geometric's order: by target, then source, and each edge once.
    """
    targets_first = edge_list_of(edge_index).flip(0)
    proper = targets_first[:, targets_first[0] != targets_first[1]]
    loops = torch.arange(num_loops, device=proper.device).expand(2, -1)
    return coalesce(torch.cat([proper, loops], dim=1), num_nodes=max(edge_index.shape[:2])).flip(0)


def declared_sizes(edge_index: Tensor) -> tuple[int | None, int | None]:
    """The numbers of sources and targets that the edges themselves say, where they do."""
    if isinstance(edge_index, EdgeIndex):
        return edge_index.num_rows, edge_index.num_cols
    return (edge_index.shape[1], edge_index.shape[0]) if is_matrix(edge_index) else (None, None)


def features_of(edge_index: Any, edge_attr: Any) -> Any:
    """The features of the edges: those given, else the rows of numbers that a sparse matrix has for its entries."""
    if edge_attr is not None or type(edge_index) is not Tensor or not is_matrix(edge_index):
        return edge_attr
    return None if edge_index.dense_dim() == 0 or _is_loose(edge_index) else edge_index.values()


def with_weights(layer: Any, edge_index: Any, weights: Tensor, sizes: tuple[int, int]) -> tuple[Any, Tensor]:
    """What the parent returns for attention weights: the edges, with the self-loops that a layer adds, and them."""
    if is_matrix(edge_index) and _is_loose(edge_index):
        # PyTorch Geometric's functions mark the matrix that they are given as coalesced, which it may not be.
        indices, values = edge_index._indices(), edge_index._values()
        edge_index = torch.sparse_coo_tensor(
            indices, values, edge_index.shape, device=indices.device, is_coalesced=True
        )
    if layer.add_self_loops:
        edge_index, _ = remove_self_loops(edge_index)
        edge_index, _ = add_self_loops(edge_index, fill_value=layer.fill_value, num_nodes=min(sizes))
    return (set_sparse_value(edge_index, weights) if is_matrix(edge_index) else edge_index), weights
