"""Rows of features, dense or sparse CSR."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["first_rows", "rows_at", "sparse_csr"]


def sparse_csr(offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse CSR matrix of parts that were checked before, without PyTorch's warning that it is in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(offsets, columns, values, shape, device=values.device, check_invariants=False)


def rows_at(x: Tensor, nodes: Tensor) -> Tensor:
    """The rows of x `(nodes, in_features)`, dense or sparse CSR, at some nodes, `(any,)` int64."""
    if x.layout == torch.strided:
        return x[nodes]
    begins = x.crow_indices()
    lengths = begins.diff()[nodes]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(begins.dtype)
    shift = (begins[nodes] - offsets[:-1]).repeat_interleave(lengths)
    places = torch.arange(len(shift), device=x.device) + shift
    return sparse_csr(offsets, x.col_indices()[places], x.values()[places], (len(nodes), x.shape[1]))


def first_rows(x: Tensor, count: int) -> Tensor:
    """The first so many rows of x `(nodes, in_features)`, dense or sparse CSR."""
    if x.shape[0] == count:
        return x
    if x.layout == torch.strided:
        return x[:count]
    offsets = x.crow_indices()[: count + 1]
    end = int(offsets[-1])
    return sparse_csr(offsets, x.col_indices()[:end], x.values()[:end], (count, x.shape[1]))
