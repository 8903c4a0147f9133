"""Rows of nodes for each of their relations: a projection of the nodes' type, then a matrix of each relation and head.

Axes: R relations of a type, N nodes, I in_features, H heads, D channels of a head, M numbers of a head in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattention._checks import Relation
from anyattention.ambient import without_autocast
from anyattention.errors import DimensionMismatchError
from anyattention.nn.bare import is_bare
from anyattention.nn.feature_rows import first_rows
from anyattention.ops.linear_maps import linear_maps, stacked_maps
from anyattention.patterns import HeterogeneousGraph
from anyattention.scores import EdgeFeatures

__all__ = [
    "Projection",
    "RelationMap",
    "joint_edge_features",
    "joint_rows",
    "relation_rows",
    "rows_by_target",
    "weighted_relations",
]


@dataclass(eq=False)
class Projection:
    """A projection of nodes `(N, I)` to heads `(N, H x D)`: a weight and a bias to multiply by, or its result.

    Attributes:
        weight, bias: `(H x D, I)` and `(H x D,)`; the bias may be None, and so may the weight where there are rows.
        rows: `(N, H x D)`: of a projection that is more than a product, or once they were needed.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, x: Tensor, width: int) -> Projection:
        """A module's to so many numbers: the weight of a bare linear one is read, any other is called."""
        if is_bare(module) and module.out_features == width:
            return cls(module.weight, module.bias)
        rows = module(x)
        if rows.shape[-1] != width:
            raise DimensionMismatchError(
                argument=f"the rows of {type(module).__name__}", expected=f"{width} features", actual=rows.shape[-1]
            )
        return cls(None, rows=rows)

    def first(self, count: int) -> Projection:
        """That of the first nodes."""
        if self.rows is None or self.rows.shape[0] == count:
            return self
        return Projection(self.weight, self.bias, self.rows[:count])

    @property
    def width(self) -> int:
        """H x D."""
        if self.weight is not None:
            return self.weight.shape[0]
        assert self.rows is not None
        return self.rows.shape[-1]


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

    def apart(self) -> Tensor:
        """The part `(N, R, H, M)` of the projected rows."""
        assert self.projection.rows is not None
        rows = self.projection.rows.unflatten(-1, (self.heads, -1))
        if self.matrices is None:
            return rows.unsqueeze(1).expand(-1, self.relations, -1, -1)
        return torch.einsum("nhd,rhdm->nrhm", rows, self.matrices.to(rows.dtype))


def joint_rows(
    graph: HeterogeneousGraph, end: int, x: Mapping[str, Tensor], maps: Mapping[str, Sequence[RelationMap]]
) -> list[Tensor]:
    """`relation_rows` of the types that are sources (end 0: keys), or targets (end 2: queries), in a graph.

    x and the maps are those of all nodes of a type, also where only some attend.
    """
    needed = {relation[end] for relation in graph.relations}
    node_types = [node_type for node_type in graph.num_nodes if node_type in needed]
    if end == 0:
        return relation_rows([x[each] for each in node_types], [maps[each] for each in node_types])
    inputs, parts = [], []
    for each in node_types:
        count = graph.num_queries[each]
        inputs.append(first_rows(x[each], count))
        parts.append([part._replace(projection=part.projection.first(count)) for part in maps[each]])
    return relation_rows(inputs, parts)


def relation_rows(inputs: Sequence[Tensor], maps: Sequence[Sequence[RelationMap]]) -> list[Tensor]:
    """The rows of the keys, or of the queries, of a `HeterogeneousGraph.joint()`.

    Args:
        inputs: of each type `(N, I)`, dense or sparse CSR.
        maps: of each type the parts of a row, as many of each type and as wide.

    Returns:
        Of each part `(rows, H, M)`: type after type, in each node after node, in each its relations. They are the
        columns of one matrix where all of it is folded.

    Cost: one product for each type, O(N x R x I x H x M). Where I is more than twice the projected width, x is sparse,
    or a projection is more than a product, it comes first, and the relations' matrices follow.
    """
    for x, parts in zip(inputs, maps, strict=True):
        _project_first(x, parts)
    widths = [part.numbers for part in maps[0]]
    if all(part.projection.rows is None for parts in maps for part in parts):
        weights, biases = zip(*map(_folded, maps), strict=True)
        return [
            rows.unflatten(-1, (part.heads, -1))
            for rows, part in zip(stacked_maps(inputs, weights, biases, widths), maps[0], strict=True)
        ]
    # Some are not folded: rows of each type, one type after the other.
    by_type = []
    for x, parts in zip(inputs, maps, strict=True):
        if any(part.projection.rows is not None for part in parts):
            by_type.append([part.apart().flatten(0, 1) for part in parts])
        else:
            weight, bias = _folded(parts)
            rows = stacked_maps([x], [weight], [bias], widths)
            by_type.append([each.unflatten(-1, (part.heads, -1)) for each, part in zip(rows, parts, strict=True)])
    return [torch.cat(each) for each in zip(*by_type, strict=True)]


def rows_by_target(graph: HeterogeneousGraph, rows: Tensor, *, by_relation: bool = False) -> dict[str, Tensor]:
    """The rows of the queries of `graph.joint(by_relation=by_relation)` by type of targets.

    Returns:
        `(queries, ...)`; by relation `(queries, relations, ...)`, in the order of `graph.incoming(type)`.
    """
    found, first = {}, 0
    for node_type, count in graph.num_queries.items():
        relations = len(graph.incoming(node_type))
        if relations:
            own = rows.narrow(0, first, count * (relations if by_relation else 1))
            found[node_type] = own.unflatten(0, (count, relations)) if by_relation else own
            first += own.shape[0]
    return found


def weighted_relations(rows: Tensor, projection: Callable[[Tensor], Tensor], vector: Tensor) -> tuple[Tensor, Tensor]:
    """What relations give together, and their weights (HAN).

        weights = softmax over r of (vector . mean over nodes of tanh(projection(rows))),  sum over r of weights rows

    Args:
        rows: `(N, R, F)`.
        projection: of F features to F.
        vector: `(F,)`.

    Returns:
        `(N, F)` and `(R,)`. Without nodes there is no mean, and all weights are the same.
    """
    hidden = torch.tanh(projection(rows))
    mean = hidden.mean(0) if rows.shape[0] else hidden.sum(0)
    weights = torch.softmax((vector * mean).sum(-1), dim=0)
    # In the dtype of the weights; autocast would round a product.
    with without_autocast(rows.device):
        return torch.einsum("nrf,r->nf", rows.to(weights.dtype), weights), weights


def joint_edge_features(
    graph: HeterogeneousGraph,
    features: Mapping[Relation, Tensor],
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor] | None,
) -> EdgeFeatures:
    """The edge features of all relations side by side: an edge has 0 in the columns of other relations.

    So a number that is not finite, in a relation's features or weights, shows in the weights of other relations too.

    Args:
        features: `(edges, F)` of each relation that has some.
        key_weights, value_weights: `(H, D, F)` of each relation of the graph, F = 0 of those that have none.
    """
    like = next(iter(features.values()))
    widths = [weight.shape[-1] for weight in key_weights]
    rows = []
    for place, (relation, edges) in enumerate(graph.edge_index.items()):
        own = features.get(relation, like.new_zeros(edges.shape[1], 0))
        rows.append(F.pad(own, (sum(widths[:place]), sum(widths[place + 1 :]))))
    value_weight = None if value_weights is None else torch.cat(list(value_weights), dim=-1)
    return EdgeFeatures(torch.cat(rows), torch.cat(list(key_weights), dim=-1), value_weight)


def _project_first(x: Tensor, parts: Sequence[RelationMap]) -> None:
    """Give the projections of a type their rows, where folding is not possible or costs more."""
    projections = list({id(part.projection): part.projection for part in parts}.values())
    unknown = [each for each in projections if each.rows is None]
    is_wide = x.shape[-1] > 2 * sum(each.width for each in projections)
    if unknown and (is_wide or x.layout != torch.strided or len(unknown) < len(projections)):
        weights = [each.weight for each in unknown if each.weight is not None]
        if len({each.bias is None for each in unknown}) == 1:
            found = linear_maps(x, weights, [each.bias for each in unknown])
        else:
            found = [linear_maps(x, [each.weight], [each.bias])[0] for each in unknown if each.weight is not None]
        for each, rows in zip(unknown, found, strict=True):
            each.rows = rows


def _folded(parts: Sequence[RelationMap]) -> tuple[Tensor, Tensor | None]:
    """The weight `(R x numbers, I)` and the bias of a type's rows."""
    weights, biases = zip(*[part.folded() for part in parts], strict=True)
    bias = None
    if any(each is not None for each in biases):
        both = zip(weights, biases, strict=True)
        bias = torch.cat([w.new_zeros(w.shape[:2]) if b is None else b for w, b in both], dim=1).flatten()
    return torch.cat(weights, dim=1).flatten(0, 1), bias
