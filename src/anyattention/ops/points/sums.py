"""The sums of equivariant attention, over a graph's edges and over all pairs.

Axes: B batch, N queries, M keys, E edges, H heads, D head_dim, C vector channels, X coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ops.attend import attend
from anyattention.ops.edges import edge_dot, edge_softmax, edge_sum
from anyattention.ops.points.pairs import from_centre, squared_distance_rows
from anyattention.patterns import Graph

__all__ = ["EquivariantSums", "Rows", "sums_of_all", "sums_of_edges"]


class Rows(NamedTuple):
    """What the points bring, with heads.

    Attributes:
        query: `(B, N, H, D)`, scaled.
        key, value: `(B, M, H, D)`.
        vectors: `(B, M, H, C / H x X)`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    vectors: Tensor


class EquivariantSums(NamedTuple):
    """What each query gets from its keys.

    Attributes:
        values: `(B, N, H, D)`, the sum of g_ij value_j.
        vectors: `(B, N, H, C / H x X)`, the sum of g_ij vectors_j.
        relative: `(B, N, H, X)`, the sum of g_ij (x_j - x_i).
        weights: p_ij, of edges `(B, E, H)`, of all pairs as asked for.
    """

    values: Tensor
    vectors: Tensor
    relative: Tensor
    weights: Tensor | None


def sums_of_edges(
    rows: Rows,
    displacement: Tensor,
    distance_score: Tensor,
    gate: Tensor | None,
    graph: Graph,
    mask: Tensor | None,
    dropout: float,
) -> EquivariantSums:
    """Over edges, in the primitives of graph attention: nothing larger than a number per edge and head is kept.

    `displacement` `(B, E, X)` leads from query to key; `distance_score` and `gate`, less 1, are `(B, E, H)`.
    """
    query, key, value, vectors = rows
    scores = edge_dot(query, key, graph) + distance_score
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    weights = edge_softmax(scores, graph)
    gated = F.dropout(weights, dropout, training=dropout > 0)
    gated = gated if gate is None else gated * (1.0 + gate)
    sums = edge_sum(gated, torch.cat([value, vectors], -1), graph)
    # An edge's displacement is the value of a key of its own, that all heads share.
    relative = edge_sum(gated, displacement[:, :, None], graph.edges_as_keys())
    values, summed = sums.split([value.shape[-1], vectors.shape[-1]], -1)
    return EquivariantSums(values, summed, relative, weights)


def sums_of_all(
    rows: Rows,
    places: Tensor,
    others: Tensor,
    decay: Tensor,
    mask: Tensor | None,
    seen: Tensor | None,
    dropout: float,
    return_weights: bool | str,
) -> EquivariantSums:
    """Over all pairs, the squared distance as part of the product: one call of dense attention.

    `places` `(B, N, X)` and `others` `(B, M, X)` are the positions, `decay` `(H,)` what a unit of the squared distance
    costs, and `seen` says which keys are attended to, `(B | 1, M | 1)`.
    """
    query, key, value, vectors = rows
    places, others = from_centre(places, others, seen)
    near, near_keys = squared_distance_rows(places, others, decay)
    # Beside the keys' positions a 1, whose sum is that of the weights: 0 for a query without keys.
    reach = F.pad(others, (0, 1), value=1.0)[:, :, None].expand(-1, -1, len(decay), -1)
    result = attend(
        torch.cat([query, near], -1),
        torch.cat([key, near_keys], -1),
        torch.cat([value, vectors, reach], -1),
        mask=mask,
        scale=1.0,
        dropout=dropout,
        return_weights=return_weights,
    )
    widths = [value.shape[-1], vectors.shape[-1], others.shape[-1], 1]
    values, summed, reached, total = result.output.split(widths, -1)
    return EquivariantSums(values, summed, reached - total * places[:, :, None], result.weights)
