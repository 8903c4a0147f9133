"""Reads adjacency matrices of other libraries into rows, columns and values, in the matrix's own order."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import conversion_of, describe_shape
from anyattention.ambient import is_mapped, lasting
from anyattention.errors import (
    DimensionMismatchError,
    InvalidInputError,
    MissingExtraError,
    SparseMatrixError,
    UnsupportedError,
)

__all__ = ["Entries", "read_adjacency", "read_networkx"]

Entries = tuple[Tensor, Tensor, Tensor, tuple[int, int]]
"""Rows, columns and values of the stored entries, and the shape."""


def read_adjacency(adjacency: Any) -> Entries:
    """The stored (sparse) or non-zero (dense) entries of a matrix."""
    if isinstance(adjacency, Tensor):
        if is_mapped(adjacency):
            raise UnsupportedError(
                "an adjacency under vmap: each entry has other edges. Join their graphs by Graph.batch, outside",
                argument="adjacency",
            )
        with lasting(adjacency):
            return _read_torch(adjacency)
    with lasting():
        return _read_others(adjacency)


def _read_others(adjacency: Any) -> Entries:
    # A scipy matrix can only come from a process in which scipy is already imported.
    scipy_sparse = sys.modules.get("scipy.sparse")
    if scipy_sparse is not None and scipy_sparse.issparse(adjacency):
        return _read_scipy(adjacency)
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(adjacency, pandas.DataFrame):
        return _read_pandas(adjacency)
    if hasattr(adjacency, "__array__"):
        return _read_torch(_from_array(adjacency))
    raise SparseMatrixError(
        argument="adjacency",
        expected="a scipy.sparse matrix, a torch tensor (CSR, CSC, COO or dense), an array or a pandas DataFrame",
        actual=type(adjacency).__name__,
        hint=conversion_of(adjacency),
    )


def read_networkx(graph: Any) -> Any:
    """The transposed adjacency matrix of a networkx graph, as scipy keeps it."""
    try:
        import networkx
        import scipy.sparse
    except ImportError as missing:
        raise MissingExtraError(
            "Graph.from_networkx needs networkx and scipy: pip install 'anyattention[viz]'"
        ) from missing
    if not isinstance(graph, networkx.Graph):
        raise InvalidInputError(
            argument="graph", expected="a networkx graph", actual=type(graph).__name__, hint=conversion_of(graph)
        )
    if len(graph) == 0:
        return scipy.sparse.csr_array((0, 0))
    try:
        return networkx.to_scipy_sparse_array(graph, dtype=float, format="csr").T.tocsr()
    except (TypeError, ValueError) as refusal:
        raise InvalidInputError(
            argument="graph", expected="numbers as edge weights", actual=f"others ({refusal})"
        ) from refusal


def _read_torch(matrix: Tensor) -> Entries:
    if matrix.ndim != 2:
        raise DimensionMismatchError(argument="adjacency", expected="a matrix", actual=describe_shape(matrix))
    if matrix.dense_dim() and matrix.layout != torch.strided:
        raise SparseMatrixError(
            argument="adjacency", expected="one number per stored entry", actual="a hybrid tensor, which has dense axes"
        )
    shape = (matrix.shape[0], matrix.shape[1])
    if matrix.layout == torch.strided:
        rows, columns = matrix.nonzero(as_tuple=True)
        return rows, columns, matrix[rows, columns], shape
    if matrix.layout == torch.sparse_coo:
        matrix = matrix.coalesce()
        rows, columns = matrix.indices()
        return rows, columns, matrix.values(), shape
    if matrix.layout == torch.sparse_csr:
        offsets, columns = matrix.crow_indices().long(), matrix.col_indices().long()
        rows = _expand(offsets, shape[0], columns.numel())
        return rows, columns, matrix.values(), shape
    if matrix.layout == torch.sparse_csc:
        offsets, rows = matrix.ccol_indices().long(), matrix.row_indices().long()
        columns = _expand(offsets, shape[1], rows.numel())
        return rows, columns, matrix.values(), shape
    raise SparseMatrixError(argument="adjacency", expected="layout CSR, CSC, COO or dense", actual=matrix.layout)


def _read_scipy(matrix: Any) -> Entries:
    if len(matrix.shape) != 2:
        raise DimensionMismatchError(argument="adjacency", expected="a matrix", actual=str(matrix.shape))
    if matrix.format not in ("csr", "csc"):
        matrix = matrix.tocoo().tocsr()
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    offsets = torch.tensor(matrix.indptr, dtype=torch.int64, device="cpu")
    inner = torch.tensor(matrix.indices, dtype=torch.int64, device="cpu")
    outer = _expand(offsets, matrix.shape[matrix.format == "csc"], inner.numel())
    rows, columns = (outer, inner) if matrix.format == "csr" else (inner, outer)
    return rows, columns, _from_array(matrix.data), matrix.shape


def _read_pandas(frame: Any) -> Entries:
    """A table of numbers, by the places of its rows and columns; their labels do not count."""
    types = {type(dtype).__name__ for dtype in frame.dtypes}
    return (
        _read_scipy(frame.sparse.to_coo()) if types == {"SparseDtype"} else _read_torch(_from_array(frame.to_numpy()))
    )


def _from_array(array: Any) -> Tensor:
    try:
        return torch.tensor(array, device="cpu")
    except (TypeError, ValueError, RuntimeError) as refusal:
        raise SparseMatrixError(
            argument="adjacency",
            expected="entries of a numeric dtype",
            actual=getattr(array, "dtype", type(array).__name__),
        ) from refusal


def _expand(offsets: Tensor, count: int, num_entries: int) -> Tensor:
    """The row of each entry, from the rows' offsets."""
    sizes = offsets.diff()
    fits = offsets.numel() == count + 1 and offsets[0] == 0 and offsets[-1] == num_entries
    if not fits or (sizes < 0).any():
        raise SparseMatrixError(
            argument="adjacency",
            expected=f"{count + 1} offsets that rise from 0 to {num_entries}, the number of entries",
            actual=f"{offsets.numel()} offsets from {offsets[:1].tolist()} to {offsets[-1:].tolist()}",
        )
    return torch.repeat_interleave(torch.arange(count, device=offsets.device), sizes)
