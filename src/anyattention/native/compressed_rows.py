"""Edges sorted by row: the compiled counting sorts, or PyTorch's sort where they cannot run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention import ambient
from anyattention.errors import IndexRangeError
from anyattention.native import load

__all__ = ["CompressedRows", "EdgeOutOfRange", "SymmetricRows", "compressed_rows", "sort_rows", "symmetric_rows"]

_OUT_OF_RANGE = 2


class EdgeOutOfRange(IndexRangeError):
    """An edge names a row or a column that does not exist.

    Args:
        array: "rows" or "columns", whichever holds the index.
        edge: position of the first such edge.
        index: the index found there.
        size: the number of rows, or of columns.
    """

    def __init__(self, array: str, edge: int, index: int, size: int) -> None:
        expected = f"0 <= index < {size}"
        message = f"{array}[{edge}] is {index}, expected {expected}"
        super().__init__(message, argument=array, expected=expected, actual=index)
        self.array, self.edge, self.index, self.size = array, edge, index, size


class CompressedRows(NamedTuple):
    """Edges sorted by row, ties in the caller's order.

    Args:
        offsets: (num_rows + 1) int64, the slots offsets[r] up to offsets[r + 1] belong to row r.
        columns: (num_edges) int64, the column of each slot.
        edges: (num_edges) int64, the edge of each slot, as the caller counts.
    """

    offsets: Tensor
    columns: Tensor
    edges: Tensor


class SymmetricRows(NamedTuple):
    """A symmetric graph, its edges sorted by row, then column.

    Attributes:
        offsets: `(num_rows + 1,)` int64, the edges of each row.
        edge_index: `(2, edges)` int64; row 0 = columns, row 1 = rows.
        reverse: `(edges,)` int64, the edge with row and column exchanged.
    """

    offsets: Tensor
    edge_index: Tensor
    reverse: Tensor


def compressed_rows(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> CompressedRows:
    """Sorts edges by row, keeping the caller's order within a row.

    Exchange `rows` with `columns` and `num_rows` with `num_columns` for the transpose. The kernel compares every index
    with its bounds.

    Args:
        rows, columns: (num_edges) int64, on one device.
        num_rows, num_columns: how many there are.

    Raises:
        EdgeOutOfRange: an index is negative or too large.
        IndexRangeError: another thread changed the edges meanwhile.
        OutOfMemoryError: there is no memory for the workspace.

    Time O(num_edges + num_rows); beside the result at most 2 num_edges + num_rows integers are allocated.
    """
    if not (rows.is_cpu and _runs(rows, columns)):
        edges = torch.argsort(rows, stable=True)
        bounds = torch.arange(num_rows + 1, device=rows.device)
        return CompressedRows(torch.searchsorted(rows[edges], bounds), columns[edges], edges)
    rows, columns = rows.contiguous(), columns.contiguous()
    _check_indices(rows=rows, columns=columns)
    num_edges = rows.numel()
    # In large pages: what reads rows here and there, as sampling does, waits a third less for memory.
    offsets, slot_columns, slot_edges = (
        load.large_empty(rows, (size,)) for size in (num_rows + 1, num_edges, num_edges)
    )
    bad_edge = ctypes.c_int64(-1)
    given = (rows.data_ptr(), columns.data_ptr(), num_edges, num_rows, num_columns, load.num_threads())
    results = (offsets.data_ptr(), slot_columns.data_ptr(), slot_edges.data_ptr(), ctypes.byref(bad_edge))
    status = load.kernel("compressed_rows", 10)(*given, *results)
    edge = bad_edge.value
    if status == _OUT_OF_RANGE and edge >= 0:
        row, column = int(rows[edge]), int(columns[edge])
        if not 0 <= row < num_rows:
            raise EdgeOutOfRange("rows", edge, row, num_rows)
        if not 0 <= column < num_columns:
            raise EdgeOutOfRange("columns", edge, column, num_columns)
    load.check_status(status, "compressed_rows")
    return CompressedRows(offsets, slot_columns, slot_edges)


def sort_rows(offsets: Tensor, edges: Tensor, numbers: Sequence[Tensor], into: Sequence[Tensor] = ()) -> None:
    """Sorts the edges of each row, where they lie, by columns of numbers.

    By the first column, among equal numbers by the next, and last by the edge itself.

    Args:
        offsets: `(num_rows + 1,)` int64, the slots of each row, as of compressed rows.
        edges: `(num_edges,)` int64, the edge of each slot, contiguous.
        numbers: `(num_edges,)` int64 each, of any stride: the numbers of each edge. Floats that are not negative are
            in order as int64 too (`.view`).
        into: where each column's sorted numbers go, of any stride; nowhere where there are none.

    Raises:
        IndexRangeError: an edge or a slot that is not there.
        OutOfMemoryError: there is no memory for the workspace.

    Time O(num_edges log(longest row) + num_rows), less where rows are nearly sorted.
    """
    if edges.is_cpu and _runs(offsets, edges, *numbers, *into):
        given = (len(offsets) - 1, len(edges), *_columns(numbers), len(numbers), load.num_threads())
        sorted_numbers = _columns(into) if into else (None, None)
        load.run("sorted_rows", offsets.data_ptr(), *given, edges.data_ptr(), *sorted_numbers)
        return
    order = torch.argsort(edges)
    for column in reversed(numbers):
        order = order[torch.argsort(column[edges[order]], stable=True)]
    row = torch.repeat_interleave(offsets.diff())
    edges.copy_(edges[order[torch.argsort(row[order], stable=True)]])
    for column, result in zip(numbers, into, strict=False):
        result.copy_(column[edges])


def symmetric_rows(pairs: Tensor, num_rows: int) -> SymmetricRows:
    """Both ways of pairs `(pairs, 2)` int64, of different rows in range, each pair there once."""
    edge_index = pairs.new_empty(2, 2 * len(pairs))
    if pairs.is_cpu and _runs(pairs):
        offsets, reverse = pairs.new_empty(num_rows + 1), pairs.new_empty(2 * len(pairs))
        arrays = (offsets, edge_index[1], edge_index[0], reverse)
        pairs = pairs.contiguous()
        pointers = [array.data_ptr() for array in arrays]
        load.run("symmetric_rows", pairs.data_ptr(), len(pairs), num_rows, load.num_threads(), *pointers)
        return SymmetricRows(offsets, edge_index, reverse)
    rows, columns = torch.cat([pairs, pairs.flip(1)]).T
    order = torch.argsort(columns, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    torch.stack([columns[order], rows[order]], out=edge_index)
    # Sorted by column, then row, the edges are the ways back of those sorted by row, then column.
    offsets, _, reverse = compressed_rows(edge_index[0], edge_index[1], num_rows, num_rows)
    return SymmetricRows(offsets, edge_index, reverse)


def _columns(columns: Sequence[Tensor]) -> tuple[Any, Any]:
    """Pointers to the columns, and their strides."""
    pointers = (ctypes.c_void_p * len(columns))(*[column.data_ptr() for column in columns])
    return pointers, (ctypes.c_int64 * len(columns))(*[column.stride(0) for column in columns])


def _runs(*arrays: Tensor) -> bool:
    """Whether a kernel can read these; what a compiler or a transform looks at goes by way of PyTorch."""
    return ambient.moment_of(arrays) is ambient.Moment.PLAIN and load.available()


def _check_indices(**arrays: Tensor) -> None:
    """The last check before pointers are taken; callers have given kinder errors by then."""
    sizes = {array.numel() for array in arrays.values()}
    for name, array in arrays.items():
        if array.dtype != torch.int64 or not array.is_cpu:
            raise TypeError(f"{name}: expected int64 on the CPU, got {array.dtype} on {array.device}")
        if array.dim() != 1 or len(sizes) != 1:
            raise ValueError(f"{name}: expected one dimension and equal sizes, got {sizes}")
