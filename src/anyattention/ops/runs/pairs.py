"""Masks and biases of pairs at the edges of a graph.

Axes: B batch, L query_length, S key_length, H heads, E pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.patterns import Graph

__all__ = ["bias_of_edges", "by_distance", "masked_bias", "pairs_at_edges"]


def by_distance(bias: RelativeBias, query: Tensor, key: Tensor) -> Tensor:
    """A bias as the kernels take it, `(H | 1, L + S - 1)`: that of query i and key j at i - j + S - 1."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    places = torch.arange(max(num_queries + num_keys - 1, 0), device=query.device)
    return bias.at(places, places.new_full((), num_keys - 1), num_queries, num_keys)


def masked_bias(mask: Tensor | None, bias: Tensor | None, graph: Graph, query: Tensor) -> Tensor | None:
    """Mask and bias, as the kernels take them, as one bias of a graph's edges `(B, E, H)`, -inf where hidden."""
    if mask is None and bias is None:
        return None
    edges = query.new_zeros(())
    if bias is not None:
        edges = pairs_at_edges(bias, graph)
    if mask is not None:
        edges = torch.where(pairs_at_edges(mask, graph), edges, -torch.inf)
    return edges.expand(query.shape[0], graph.num_edges, query.shape[2])


def pairs_at_edges(pairs: Tensor, graph: Graph) -> Tensor:
    """`(B | 1, H | 1, L | 1, S | 1)`, or by distance, at a graph's edges: `(B | 1, E, H | 1)`."""
    # Not by indexing, whose gradient cannot be mapped over.
    return _in_a_row(pairs).index_select(2, _places(pairs, graph)).transpose(1, 2)


def bias_of_edges(bias: Tensor | None, graph: Graph, by_edges: Tensor | None) -> Tensor | None:
    """The gradient of a bias, as the kernels take it, of that of a graph's edges `(B, E, H)`."""
    if bias is None or by_edges is None:
        return None
    zeros = _in_a_row(bias.new_zeros(bias.shape))
    by_places = by_edges.transpose(1, 2).sum_to_size(*zeros.shape[:2], graph.num_edges)
    return zeros.index_add(2, _places(bias, graph), by_places).reshape(bias.shape)


def _in_a_row(pairs: Tensor) -> Tensor:
    """Numbers of pairs, or by distance, as `(B | 1, H | 1, places)`."""
    # Not by `flatten`, which cannot be mapped over.
    return pairs[None] if pairs.ndim == 2 else pairs.reshape(*pairs.shape[:2], pairs.shape[2] * pairs.shape[3])


def _places(pairs: Tensor, graph: Graph) -> Tensor:
    """Where they have each edge's number, `(E,)`."""
    if pairs.ndim == 2:
        return graph.query_index - graph.key_index + graph.num_keys - 1
    num_queries, num_keys = pairs.shape[2:]
    place = graph.key_index if num_keys != 1 else torch.zeros_like(graph.key_index)
    return place + graph.query_index * num_keys if num_queries != 1 else place
