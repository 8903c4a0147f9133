"""Pairs of points: displacements, the pairs within a radius, masks and weights of pairs and edges, rows of distances.

Axes: B batch, N queries, M keys, E edges, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.ambient import is_readable
from anyattention.ops.edges import edge_dot
from anyattention.patterns import Graph

__all__ = [
    "as_pairs",
    "displacements",
    "from_centre",
    "in_use",
    "mask_of_edges",
    "pairs_within",
    "shown",
    "squared_distance_rows",
]


def displacements(query_positions: Tensor, key_positions: Tensor, graph: Graph, offsets: Tensor | None) -> Tensor:
    """From each edge's query to its key, moved by the offsets, `(B, E, dim)`; differentiable to any order.

    Written as products of two numbers, 1 x_j - x_i 1, whose gradients are then weighted sums by the graph's kernels.
    """
    query = torch.stack([torch.ones_like(query_positions), query_positions], -1)
    key = torch.stack([key_positions, -torch.ones_like(key_positions)], -1)
    found = edge_dot(query, key, graph)
    return found if offsets is None else found + offsets


def pairs_within(places: Tensor, others: Tensor, radius: float | None) -> Graph:
    """The pairs that a layer without a graph attends over: all, or those that have a weight in any of the batch."""
    num_queries, num_keys = places.shape[1], others.shape[1]
    if radius is None or not is_readable(places, others):
        return Graph.all_pairs(num_queries, num_keys, device=places.device)
    # Differences, as products lose digits; a little more than the radius, where the envelope decides.
    mode = "donot_use_mm_for_euclid_dist"
    near = torch.cdist(places.detach(), others.detach(), compute_mode=mode) < radius * (1.0 + 1e-5)
    return Graph.from_edge_index(near.any(0).nonzero().T.flip(0), num_queries=num_queries, num_keys=num_keys)


def mask_of_edges(mask: Tensor, batch: int, heads: int, graph: Graph) -> Tensor:
    """A mask of all pairs as one of a graph's edges, `(B, E, H)`."""
    whole = mask.expand(batch, heads, graph.num_queries, graph.num_keys)
    return whole[:, :, graph.query_index, graph.key_index].transpose(1, 2)


def as_pairs(weights: Tensor | None, graph: Graph) -> Tensor | None:
    """Weights of edges, `(B, E)` or `(B, E, H)`, as those of all pairs, `(B, N, M)` or `(B, H, N, M)`."""
    if weights is None:
        return None
    pairs = weights.new_zeros(weights.shape[0], graph.num_queries * graph.num_keys, *weights.shape[2:])
    pairs = pairs.index_copy(1, graph.query_index * graph.num_keys + graph.key_index, weights)
    pairs = pairs.unflatten(1, (graph.num_queries, graph.num_keys))
    return pairs if pairs.ndim == 3 else pairs.permute(0, 3, 1, 2)


def in_use(mask: Tensor | None, graph: Graph | None) -> tuple[Tensor | None, Tensor | None]:
    """Which queries may attend to anything, and which keys are attended to by any: `(B | 1, points | 1)`.

    None where all do, so that nothing needs to be hidden. The mask is that of `read_pairs_mask`.
    """
    if graph is None:
        return (None, None) if mask is None else (_unless_all(mask.any(3).any(1)), _unless_all(mask.any(2).any(1)))
    if mask is None:
        asks, seen = graph.query_offsets.diff()[None] > 0, graph.key_offsets.diff()[None] > 0
    else:
        edges = mask.any(-1).long()
        edges = edges if mask.ndim == 3 else edges[None]
        asks = edges.new_zeros(len(edges), graph.num_queries).index_add(1, graph.query_index, edges) > 0
        seen = edges.new_zeros(len(edges), graph.num_keys).index_add(1, graph.key_index, edges) > 0
    return _unless_all(asks), _unless_all(seen)


def _unless_all(used: Tensor) -> Tensor | None:
    return None if is_readable(used) and used.all() else used


def shown(rows: Tensor, seen: Tensor | None, hidden: Tensor | float = 0.0) -> Tensor:
    """Rows `(B, points, ...)`, with zeros where not seen: their weights are 0, but 0 x NaN is NaN."""
    if seen is None:
        return rows
    return torch.where(seen.view(*seen.shape, *[1] * (rows.ndim - 2)), rows, hidden)


def from_centre(places: Tensor, others: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions `(B, N, dim)` and `(B, M, dim)` taken from the mean of the keys seen, where squares are smallest."""
    points = others.detach()
    if points.shape[1] == 0:
        return places, others
    if seen is None:
        centre = points.mean(1, keepdim=True)
    else:
        count = seen.expand(points.shape[:2]).sum(1).clamp(min=1)
        centre = (points.sum(1) / count[:, None])[:, None]
    return places - centre, others - centre


def squared_distance_rows(places: Tensor, others: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key, `(B, N, H, dim + 1)` and `(B, M, H, dim + 1)`, whose product is -decay |x_j - x_i|^2.

    But for decay |x_i|^2, which all scores of a query have in common: it changes no weight.
    """
    decay, heads = decay[:, None], decay.shape[0]
    places, others = places[:, :, None], others[:, :, None]
    query = torch.cat([2.0 * decay * places, torch.ones_like(places[..., :1]).expand(-1, -1, heads, -1)], -1)
    key = torch.cat([others.expand(-1, -1, heads, -1), -decay * others.square().sum(-1, keepdim=True)], -1)
    return query, key
