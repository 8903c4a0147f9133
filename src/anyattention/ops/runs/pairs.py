"""Masks and biases of pairs at the edges of a graph.

Axes: B batch, L query_length, S key_length, H heads, E pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.patterns import Graph

__all__ = ["masked_bias", "pairs_at_edges", "place_by_distance"]


def place_by_distance(graph: Graph) -> Tensor:
    """Where a bias by distance, as the kernels take it, has each edge's number, `(E,)`."""
    return graph.query_index - graph.key_index + graph.num_keys - 1


def masked_bias(mask: Tensor | None, bias: Tensor | None, graph: Graph, query: Tensor) -> Tensor | None:
    """Mask and bias, as the kernels take them, as one bias of a graph's edges `(B, E, H)`, -inf where hidden."""
    if mask is None and bias is None:
        return None
    edges = query.new_zeros(())
    if bias is not None:
        by_distance = bias.index_select(1, place_by_distance(graph)).T[None] if bias.ndim == 2 else None
        edges = pairs_at_edges(bias, graph) if by_distance is None else by_distance
    if mask is not None:
        edges = torch.where(pairs_at_edges(mask, graph), edges, -torch.inf)
    return edges.expand(query.shape[0], graph.num_edges, query.shape[2])


def pairs_at_edges(pairs: Tensor, graph: Graph) -> Tensor:
    """`(B | 1, H | 1, L | 1, S | 1)` at a graph's edges: `(B | 1, E, H | 1)`."""
    num_queries, num_keys = pairs.shape[2:]
    place = graph.key_index if num_keys != 1 else torch.zeros_like(graph.key_index)
    if num_queries != 1:
        place = place + graph.query_index * num_keys
    # Not by indexing, whose gradient cannot be mapped over, nor `flatten`, which cannot be.
    return pairs.reshape(*pairs.shape[:2], num_queries * num_keys).index_select(2, place).transpose(1, 2)
