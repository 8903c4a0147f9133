"""Stable sorts of edges by row: the compiled counting sort, or PyTorch where it cannot run."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention import _native

__all__ = ["compressed_rows"]


def compressed_rows(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets `(num_rows + 1,)`, the column of each slot and the edge of each slot; ties in edge order."""
    if rows.device.type == "cpu" and _native.available():
        return _native.compressed_rows(rows.contiguous(), columns.contiguous(), num_rows, num_columns)
    edges = torch.argsort(rows, stable=True)
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=num_rows), dim=0, out=offsets[1:])
    return offsets, columns[edges], edges
