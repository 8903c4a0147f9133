"""The maximum over each query's edges: a kernel says which edge wins, and gathers that autograd knows do the rest.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, C value_dim, F edge_dim, P = B x N x H x C picks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.ops.edges.operators import edge_argmax, edge_dot
from anyattention.patterns import Graph

__all__ = ["edge_maximum"]


def edge_maximum(
    weights: Tensor,
    hidden: Tensor | None,
    value: Tensor,
    features: Tensor | None,
    value_weight: Tensor | None,
    graph: GraphArrays,
) -> Tensor:
    """The maximum `(B, N, H, C)` of `weights[e, h] (value[j, g, c] + value_weight[h, c] . features[e])` by query.

    Args:
        weights: `(B, E, H)`, after dropout; a dropped edge takes part with 0.
        hidden: `(B, E, H)`, the edges that take no part; None for none. Where all are hidden the maximum is 0.
        value: `(B, M, G, C)`.
        features, value_weight: `(E, F)` and `(H, C, F)`, both or neither.
        graph: the edges.

    Differentiable to any order, with the whole gradient to the first of equal edges; memory O(P).
    """
    shown = weights if hidden is None else torch.where(hidden, -torch.inf, weights)
    edge = edge_argmax(shown, value, features, value_weight, graph)
    batch, _, heads, channels = edge.shape
    num_edges, (num_keys, key_heads) = graph.num_edges, value.shape[1:3]
    is_found = edge >= 0
    edge = torch.where(is_found, edge, num_edges)

    entry, head, channel = (torch.arange(count, device=edge.device) for count in (batch, heads, channels))
    entry, head = entry[:, None, None, None], head[:, None]
    key = _take(graph.key_index, edge, is_found)
    weight = _take(weights, (entry * num_edges + edge) * heads + head, is_found)
    key_head = (entry * num_keys + key) * key_heads + head // (heads // key_heads)
    picked = _take(value, key_head * channels + channel, is_found)
    if features is not None and value_weight is not None:
        # A query without edges meets a row of zeros, and an infinite weight makes NaN of that.
        picked = picked + torch.where(is_found, _features_part(features, value_weight, edge), 0.0)
    return weight * picked


def _take(numbers: Tensor, position: Tensor, is_found: Tensor) -> Tensor:
    """The numbers at positions of their row-major order, 0 where none is found.

    Not by masking afterwards: a gradient of 0 would meet whatever stood at the position taken instead. Nor by `gather`
    or by indexing: their gradients are as large as what they broadcast, or summed by threads in any order.
    """
    position = torch.where(is_found, position, numbers.numel())
    return F.pad(numbers.flatten(), (0, 1)).index_select(0, position.flatten()).view_as(position)


def _features_part(features: Tensor, value_weight: Tensor, edge: Tensor) -> Tensor:
    """`value_weight[h, c] . features[edge]`, as the products of a graph with an edge for each pick."""
    rows = F.pad(features, (0, 0, 0, 1))[None, :, None]
    columns = value_weight.flatten(0, 1)[None, :, None]
    # The graph whose queries are edges, whose keys are pairs of head and channel, and whose edges are the P picks.
    channel = torch.arange(edge.numel(), device=edge.device) % columns.shape[1]
    picks = Graph.of_known(torch.stack([channel, edge.flatten()]), rows.shape[1], columns.shape[1])
    return edge_dot(rows, columns, arrays_of(picks)).view_as(edge)
