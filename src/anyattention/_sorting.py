"""Stable sorts of edges by row: the compiled counting sort, or PyTorch where it cannot run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattention import _native

__all__ = ["SymmetricRows", "compressed_rows", "symmetric_rows"]


def compressed_rows(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets `(num_rows + 1,)`, the column of each slot and the edge of each slot; ties in edge order."""
    if rows.device.type == "cpu" and _native.available():
        return _native.compressed_rows(rows.contiguous(), columns.contiguous(), num_rows, num_columns)
    edges = torch.argsort(rows, stable=True)
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=num_rows), dim=0, out=offsets[1:])
    return offsets, columns[edges], edges


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


def symmetric_rows(pairs: Tensor, num_rows: int) -> SymmetricRows:
    """Both ways of pairs `(pairs, 2)` int64 on the CPU, of different rows in range, each pair there once."""
    edge_index = pairs.new_empty(2, 2 * len(pairs))
    if _native.available():
        offsets, reverse = pairs.new_empty(num_rows + 1), pairs.new_empty(2 * len(pairs))
        arrays = (offsets, edge_index[1], edge_index[0], reverse)
        pairs = pairs.contiguous()
        pointers = [array.data_ptr() for array in arrays]
        _native.run("symmetric_rows", pairs.data_ptr(), len(pairs), num_rows, _native.num_threads(), *pointers)
        return SymmetricRows(offsets, edge_index, reverse)
    rows, columns = torch.cat([pairs, pairs.flip(1)]).T
    order = torch.argsort(columns, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    torch.stack([columns[order], rows[order]], out=edge_index)
    # Sorted by column, then row, the edges are the ways back of those sorted by row, then column.
    offsets, _, reverse = compressed_rows(edge_index[0], edge_index[1], num_rows, num_rows)
    return SymmetricRows(offsets, edge_index, reverse)
