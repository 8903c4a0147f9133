"""Rows of nodes for each of their relations: a projection of the nodes' type, then a matrix of each relation and head.

Axes: R relations of a type, N nodes, I in_features, H heads, D channels of a head, M numbers of a head in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattention.nn.bare import is_bare
from anyattention.ops.linear_maps import linear_maps, stacked_maps
from anyattention.patterns import HeterogeneousGraph
from anyattention.patterns.heterogeneous import Relation
from anyattention.scores import EdgeFeatures

__all__ = ["Projection", "RelationMap", "joint_edge_features", "relation_rows"]


class Projection(NamedTuple):
    """A projection of nodes `(N, I)` to heads `(N, H x D)`: a weight and a bias to multiply by, or its result.

    Attributes:
        weight, bias: `(H x D, I)` and `(H x D,)`; the bias may be None, and so is the weight where there are rows.
        rows: `(N, H x D)`, of a projection that is more than a product.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, x: Tensor) -> Projection:
        """A module's: the weight of a bare linear one is read, any other is called."""
        return cls(module.weight, module.bias) if is_bare(module) else cls(None, rows=module(x))

    @property
    def width(self) -> int:
        """H x D."""
        return self.weight.shape[0] if self.weight is not None else self.rows.shape[-1]  # pyright: ignore[reportOptionalMemberAccess]  # one is there


class RelationMap(NamedTuple):
    """A part of the rows: a projection, and what each relation makes of its heads.

    Attributes:
        projection: of the nodes; parts that share one share the object.
        heads, relations: H and R.
        matrices: `(R, H, D, M)`; None leaves the heads as they are.
    """

    projection: Projection
    heads: int
    relations: int
    matrices: Tensor | None = None

    @property
    def numbers(self) -> int:
        """H x M, the numbers of this part in a row."""
        return self.projection.width if self.matrices is None else self.heads * self.matrices.shape[-1]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The weight `(R, H x M, I)` and the bias `(R, H x M)` of the projection and the matrices after it."""
        weight, bias = self.projection.weight, self.projection.bias
        assert weight is not None
        if self.matrices is None:
            return weight.expand(self.relations, -1, -1), None if bias is None else bias.expand(self.relations, -1)
        weight = torch.einsum("hdi,rhdm->rhmi", weight.unflatten(0, (self.heads, -1)), self.matrices).flatten(1, 2)
        if bias is not None:
            bias = torch.einsum("hd,rhdm->rhm", bias.unflatten(0, (self.heads, -1)), self.matrices).flatten(1)
        return weight, bias

    def apart(self, rows: Tensor) -> Tensor:
        """The matrices as a weight `(R, H x M, H x D)` for projected rows."""
        matrices = self.matrices
        if matrices is None:
            eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
            return eye.expand(self.relations, -1, -1)
        eye = torch.eye(self.heads, dtype=matrices.dtype, device=matrices.device)
        return torch.einsum("rhdm,hg->rhmgd", matrices, eye).flatten(3).flatten(1, 2)


def relation_rows(inputs: Sequence[Tensor], maps: Sequence[Sequence[RelationMap]]) -> list[Tensor]:
    """The rows of the keys, or of the queries, of a `HeterogeneousGraph.joint()`.

    Args:
        inputs: of each type `(N, I)`, dense or sparse CSR.
        maps: of each type the parts of a row, as many of each type and as wide.

    Returns:
        Of each part `(rows, H, M)`: type after type, in each node after node, in each its relations. They are the
        columns of one matrix.

    Cost: one product for each type, O(N x R x I x H x M). Where I is more than twice the projected width, or the
    projection is known by its rows alone, one to project and one for the relations.
    """
    found = [_weight_of(x, parts) for x, parts in zip(inputs, maps, strict=True)]
    sources, weights, biases = zip(*found, strict=True)
    rows = stacked_maps(sources, weights, biases, [part.numbers for part in maps[0]])
    return [each.unflatten(-1, (part.heads, -1)) for each, part in zip(rows, maps[0], strict=True)]


def joint_edge_features(
    graph: HeterogeneousGraph,
    features: Mapping[Relation, Tensor],
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor] | None,
) -> EdgeFeatures:
    """The edge features of all relations side by side: an edge has 0 in the columns of other relations.

    Args:
        features: `(edges, F)` of each relation that has some.
        key_weights, value_weights: `(H, D, F)` of each relation of the graph, F = 0 of those that have none.
    """
    like = next(iter(features.values()))
    each = [features.get(relation, like.new_zeros(edges.shape[1], 0)) for relation, edges in graph.edge_index.items()]
    value_weight = None if value_weights is None else torch.cat(list(value_weights), dim=-1)
    return EdgeFeatures(torch.block_diag(*each), torch.cat(list(key_weights), dim=-1), value_weight)


def _weight_of(x: Tensor, parts: Sequence[RelationMap]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The input of the product that makes a type's rows, its weight and its bias."""
    projections = list({id(part.projection): part.projection for part in parts}.values())
    is_wide = x.shape[-1] > 2 * sum(each.width for each in projections)
    if not is_wide and x.layout == torch.strided and all(each.weight is not None for each in projections):
        weights, biases = zip(*[part.folded() for part in parts], strict=True)
        bias = None
        if any(each is not None for each in biases):
            each_bias = zip(weights, biases, strict=True)
            bias = torch.cat([w.new_zeros(w.shape[:2]) if b is None else b for w, b in each_bias], dim=1).flatten()
        return x, torch.cat(weights, dim=1).flatten(0, 1), bias
    rows = [_projected(x, each) for each in projections]
    return torch.cat(rows, dim=-1), _weight_after(parts, projections, rows), None


def _projected(x: Tensor, projection: Projection) -> Tensor:
    if projection.weight is None:
        assert projection.rows is not None
        return projection.rows
    return linear_maps(x, [projection.weight], [projection.bias])[0]


def _weight_after(parts: Sequence[RelationMap], projections: Sequence[Projection], rows: Sequence[Tensor]) -> Tensor:
    """The weight that makes a type's rows of its projections side by side."""
    total = sum(each.width for each in projections)
    weights = []
    for part in parts:
        place = next(place for place, each in enumerate(projections) if each is part.projection)
        before = sum(each.width for each in projections[:place])
        weights.append(F.pad(part.apart(rows[place]), (before, total - before - part.projection.width)))
    return torch.cat(weights, dim=1).flatten(0, 1)
