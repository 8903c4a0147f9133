"""Weights of a pattern's pairs, spread over all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import require_memory
from anyattention.patterns import Causal, Full, Graph, Pattern, TopK

__all__ = ["spread"]


def spread(
    pattern: Pattern | TopK, lengths: tuple[int, int], by_head: bool, indices: Tensor | None, weights: Tensor
) -> Tensor:
    """The weights of every pair, `(batch, heads, queries, keys)` or without batch or heads as those given.

    Args:
        pattern: whose pairs the weights are of.
        lengths: of queries and keys.
        by_head: whether the weights are those of each head.
        indices: the chosen keys `(batch, queries, heads, k)` of a selection.
        weights: as `attend` returns them.
    """
    num_queries, num_keys = lengths
    if isinstance(pattern, Full | Causal):
        return weights
    if indices is not None:
        places, values = indices.transpose(1, 2), weights.transpose(1, 2)
        shape = (*values.shape[:-1], num_keys)
        _require_memory(shape, weights)
        if num_keys == 0:
            return weights.new_zeros(shape)
        used = torch.where(places >= 0, values, 0.0)
        return weights.new_zeros(shape).scatter_add(-1, places.clamp(min=0), used)
    assert isinstance(pattern, Pattern)
    graph = pattern if isinstance(pattern, Graph) else pattern.to_graph(num_queries, num_keys, device=weights.device)
    if by_head:
        weights = weights.movedim(-1, -2)
    shape = (*weights.shape[:-1], num_queries, num_keys)
    _require_memory(shape, weights)
    place = graph.query_index * num_keys + graph.key_index
    flat = weights.new_zeros(*shape[:-2], num_queries * num_keys).index_add(-1, place, weights)
    return flat.unflatten(-1, shape[-2:])


def _require_memory(shape: tuple[int, ...], weights: Tensor) -> None:
    numbers = torch.Size(shape).numel()
    require_memory(numbers * weights.itemsize, "the matrix of all pairs' weights", weights.device)
