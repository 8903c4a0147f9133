"""Query, key and value of `HeterogeneousGraphAttention`: what its parameters make of the features, for each score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import Relation
from anyattention.nn.feature_rows import first_rows
from anyattention.nn.relation_rows import Projection, RelationMap, joint_edge_features, joint_rows
from anyattention.patterns import HeterogeneousGraph
from anyattention.scores import Additive, Dot, Dynamic, EdgeFeatures, Score

__all__ = ["HeterogeneousRows"]


@dataclass(frozen=True, eq=False)
class HeterogeneousRows:
    """The rows of `graph.joint()`, which has at least one relation.

    Attributes:
        layer: a HeterogeneousGraphAttention.
        graph: of relations that it knows.
        x: the features of each type, checked.
    """

    layer: Any
    graph: HeterogeneousGraph
    x: Mapping[str, Tensor]

    @property
    def by_relation(self) -> bool:
        """Whether each relation has queries of its own."""
        return self.layer.config.softmax_over == "relation"

    def query_key_value(self) -> tuple[Tensor, Tensor, Tensor, Score]:
        """`(rows, heads, d_k or 1)` each, and the score."""
        config = self.layer.config
        if config.score == "additive":
            projections = self._projections("value")
            value, key = joint_rows(self.graph, 0, self.x, self._additive_keys(projections))
            (query,) = joint_rows(self.graph, 2, self.x, self._additive_queries(projections))
            return query, key, value, Additive(config.negative_slope)
        key, *values = joint_rows(self.graph, 0, self.x, self._keys())
        queries = {}
        for node_type, projection in self._projections("query").items():
            incoming = len(self.graph.incoming(node_type))
            queries[node_type] = [self._part(projection, incoming if self.by_relation else 1)]
        (query,) = joint_rows(self.graph, 2, self.x, queries)
        if config.score == "dot":
            return query, key, values[0], Dot()
        return query, key, key, Dynamic(self.layer.score_vector.to(query.dtype), config.negative_slope)

    def edge_features(self, edge_attr: Mapping[Relation, Tensor]) -> EdgeFeatures | None:
        """Those of all relations, with the weights that the score has for them."""
        if not edge_attr:
            return None
        config = self.layer.config
        widths = [each or 0 for each in config.edge_widths]
        by_relation = dict(zip(config.relations, self.layer.edge_weight.split(widths, dim=-1), strict=True))
        weights = [by_relation[relation] for relation in self.graph.relations]
        if config.score != "dot":
            return joint_edge_features(self.graph, edge_attr, weights, None)
        priors = self._of_relations(self.layer.prior, self.graph.relations)[..., None, None].unbind()
        key_weights = [weight * prior for weight, prior in zip(weights, priors, strict=True)]
        return joint_edge_features(self.graph, edge_attr, key_weights, weights)

    def _projections(self, name: str) -> dict[str, Projection]:
        """The projections of a name that the graph's nodes need, by type."""
        ends = {"query": (2,), "key": (0,), "value": (0,)}[name]
        if self.layer.config.score == "additive":
            ends = (0, 2)
        needed = {relation[end] for relation in self.graph.relations for end in ends}
        found = {}
        for node_type, module in self.layer.projections_by_type(name):
            if node_type in needed:
                x = self.x[node_type]
                own = first_rows(x, self.graph.num_queries[node_type]) if name == "query" else x
                found[node_type] = Projection.of(module, own, self.layer.d_model)
        return found

    def _part(self, projection: Projection, relations: int, matrices: Tensor | None = None) -> RelationMap:
        return RelationMap(projection, self.layer.num_graph_heads, relations, matrices)

    def _of_relations(self, parameter: Tensor, relations: Sequence[Relation]) -> Tensor:
        """A parameter's parts of some relations, in their order."""
        places = [self.layer.config.relations.index(relation) for relation in relations]
        if places == list(range(len(parameter))):
            return parameter
        # Not parameter[places]: compiled, PyTorch 2.13's backward of that is wrong on two threads.
        return torch.stack([parameter[place] for place in places])

    def _keys(self) -> dict[str, list[RelationMap]]:
        """Of each type of sources the parts of "dot", key and value, or of "dynamic", which are one."""
        layer, is_dot = self.layer, self.layer.config.score == "dot"
        values, parts = self._projections("value") if is_dot else {}, {}
        for node_type, projection in self._projections("key").items():
            relations = self.graph.outgoing(node_type)
            matrices = self._of_relations(layer.key_relation, relations)
            if is_dot:
                matrices = matrices * self._of_relations(layer.prior, relations)[..., None, None]
            parts[node_type] = [self._part(projection, len(relations), matrices)]
            if is_dot:
                matrices = self._of_relations(layer.value_relation, relations)
                parts[node_type].append(self._part(values[node_type], len(relations), matrices))
        return parts

    def _additive_keys(self, projections: Mapping[str, Projection]) -> dict[str, list[RelationMap]]:
        """Of each type of sources the parts of "additive": the value, and the key's term."""
        parts = {}
        for node_type, projection in projections.items():
            relations = self.graph.outgoing(node_type)
            if relations:
                vectors = self._of_relations(self.layer.key_vector, relations)[..., None]
                value = self._part(projection, len(relations))
                parts[node_type] = [value, self._part(projection, len(relations), vectors)]
        return parts

    def _additive_queries(self, projections: Mapping[str, Projection]) -> dict[str, list[RelationMap]]:
        """Of each type of targets the query's term of "additive"."""
        parts, vectors = {}, self.layer.query_vector
        for node_type, projection in projections.items():
            relations = self.graph.incoming(node_type)
            if relations and self.by_relation:
                own = self._of_relations(vectors, relations)
            elif relations:
                own = vectors[self.layer.target_types.index(node_type)].unsqueeze(0)
            else:
                continue
            parts[node_type] = [self._part(projection, len(own), own[..., None])]
        return parts
