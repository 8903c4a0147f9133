"""The choice of keys as operators that opcheck, torch.compile and torch.export know; neither has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattention import _native
from anyattention.ops.graph.edge_operators import define
from anyattention.ops.topk import kernels
from anyattention.patterns import Graph

__all__ = ["chosen_keys", "graph_of_rows"]


def chosen_keys(
    query: Tensor,
    key: Tensor,
    begins: Tensor | None,
    ends: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    k: int,
) -> Tensor:
    """Int64 `(B, L, H, k)`; see `kernels.chosen_keys`."""
    query, key = query.detach(), key.detach()
    return _chosen_keys(query, key, begins, ends, mask, None if bias is None else bias.detach(), scale, k)


def graph_of_rows(keys: Tensor, num_keys: int) -> Graph:
    """The Graph in which query i has an edge to each of `keys[i]`, `(num_queries, k)`, in order."""
    num_queries, k = keys.shape
    edges = torch.arange(num_queries * k, device=keys.device)
    offsets = torch.arange(num_queries + 1, device=keys.device) * k
    queries = torch.arange(num_queries, device=keys.device).repeat_interleave(k)
    keys = keys.flatten()
    by_key = _compressed_rows(keys, queries, num_keys, num_queries)
    return Graph(torch.stack([keys, queries]), offsets, keys, edges, *by_key)


def _run_compressed_rows(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, ...]:
    return tuple(_native.compressed_rows(rows, columns, num_rows, num_columns))


def _compressed_shapes(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, ...]:
    return rows.new_empty(num_rows + 1), rows.new_empty(rows.shape), rows.new_empty(rows.shape)


def _chosen_shapes(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], rest[-1], dtype=torch.int64)


_chosen_keys = define(
    "topk_indices",
    "Tensor query, Tensor key, Tensor? begins, Tensor? ends, Tensor? mask, Tensor? bias, float scale, SymInt k)"
    " -> Tensor",
    kernels.chosen_keys,
    _chosen_shapes,
    None,
)
_compressed_rows = define(
    "compressed_rows",
    "Tensor rows, Tensor columns, SymInt num_rows, SymInt num_columns) -> (Tensor, Tensor, Tensor)",
    _run_compressed_rows,
    _compressed_shapes,
    None,
)
