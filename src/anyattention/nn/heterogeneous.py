"""Attention over graphs of several types of nodes and edges: HGT, HAN, and GATv2 of relations, by one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import Relation
from anyattention.config import GraphBase, HeterogeneousGraphAttentionConfig
from anyattention.nn.arguments import ParameterArguments, arguments_of, shown_settings, takes
from anyattention.nn.bare import initialise_projection, is_bare
from anyattention.nn.base import AttentionModule, require_factory, require_finite
from anyattention.nn.feature_rows import first_rows
from anyattention.nn.heterogeneous_inputs import checked_edges, checked_features, checked_graph, edges_of, parts_of
from anyattention.nn.heterogeneous_rows import HeterogeneousRows
from anyattention.nn.relation_rows import rows_by_target, weighted_relations
from anyattention.ops import attend, explain
from anyattention.ops.dispatch import Explanation
from anyattention.ops.linear_maps import add_bias, linear_maps
from anyattention.output import AttentionCache, HeterogeneousOutput
from anyattention.patterns import HeterogeneousGraph

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HeterogeneousGraphAttention"]

Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class HeterogeneousArguments(ParameterArguments, HeterogeneousGraphAttentionConfig, GraphBase):
    """The arguments of `HeterogeneousGraphAttention`."""


class HeterogeneousGraphAttention(AttentionModule):
    """Each node attends to the nodes that its edges come from, over relations between nodes of several types.

    With W the projections of a type of nodes, in each head, and a score per edge j -> i of relation r:

        dot (HGT):             prior_r (W_q x_i) . (A_r W_k x_j + E_r e) / sqrt(d_k), value M_r W_v x_j + E_r e
        additive (HAN):        LeakyReLU(a_query . W x_i + a_key_r . W x_j + E_r e), value W x_j
        dynamic (of GATv2):    a . LeakyReLU(W_q x_i + A_r W_k x_j + E_r e), value A_r W_k x_j

    softmax_over="node": the weights of all edges of a node sum up to 1, whatever their relation:

        output_i = sum over r and j of dropout(p_ij) value_j (+ W_t x_i with residual) (+ bias_t)

    softmax_over="relation": those of a node's edges of one relation do, and a_query is each relation's own. Learned
    weights b_r of the relations that end in a type, one number for all of its nodes, join what these give:

        z_r,i = sum over j of dropout(p_ij) value_j
        b = softmax over r of (mean over i of v . tanh(W_b z_r,i + c)),  output_i = sum over r of b_r z_r,i (+ as above)

    A node without edges gets 0 (and its residual and bias).

    Args: the fields of `HeterogeneousArguments`.

    With use_bias the output has a bias ("additive", "dynamic"), and so have the projections ("dynamic", "dot").

    Parameters: `query_projections` and `residual_projections` have one projection for each type that is a target,
    `key_projections` and `value_projections` one for each that is a source (of "additive", for each that is either), in
    the order of in_features. `key_relation` (A) and `value_relation` (M) `(relations, heads, d_k, d_k)`, `prior`
    `(relations, heads)`, `key_vector` and `query_vector` `(relations, heads, d_k)` stand in the order of the relations;
    with softmax_over="node" `query_vector` has one for each target in place of these. `edge_weight` (E) is
    `(heads, 1 or d_k, sum of the relations' edge_dim)`.

    Raises:
        InvalidConfigError: a setting is out of range, or is set and cannot be used.

    Cost: O(nodes x relations of their type x in_features x d_model + edges x d_model) time, for all relations one pass
    over the edges; memory O(nodes x relations of their type x d_model + edges x (heads + sum of edge_dim)).

    Source: Hu et al., 2020 (HGT); Wang et al., 2019 (HAN); Brody et al., 2022 (GATv2). HGT's layer has an activation, a
    projection and a gated skip connection after this, and HAN's an activation of z.

    Example:
        >>> layer = HeterogeneousGraphAttention(
        ...     8, 2, in_features={"author": 3, "paper": 5}, relations=[("author", "writes", "paper")]
        ... )
        >>> x = {"author": torch.ones(2, 3), "paper": torch.ones(3, 5)}
        >>> edges = {("author", "writes", "paper"): torch.tensor([[0, 1, 1], [0, 0, 2]])}
        >>> result = layer(x, edges, return_weights=True)
        >>> result.output["paper"].shape, result.weights["author", "writes", "paper"].shape
        (torch.Size([3, 8]), torch.Size([3]))
    """

    supports_heterogeneous: bool = True
    supports_masking: bool = False

    @takes(HeterogeneousArguments)
    def __init__(
        self, config: HeterogeneousGraphAttentionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.config = config
        require_factory(device, dtype)
        base, score, widths = config.base, config.score, config.widths
        relations: Any = config.relations
        sources = [node_type for node_type in widths if any(node_type == source for source, _, _ in relations)]
        targets = [node_type for node_type in widths if any(node_type == target for _, _, target in relations)]
        self.source_types, self.target_types = tuple(sources), tuple(targets)
        output_features = base.d_model if config.concat else base.d_k

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        def projections(node_types: list[str], *, bias: bool, out: int = base.d_model) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Linear(widths[node_type], out, bias=bias, device=device, dtype=dtype) for node_type in node_types
            )

        heads, width, count = base.num_heads, base.d_k, len(relations)
        if score == "additive":
            ends = len(targets) if config.softmax_over == "node" else count
            self.query_vector = parameter(ends, heads, width)
            self.key_vector = parameter(count, heads, width)
        else:
            self.key_relation = parameter(count, heads, width, width)
        if score == "dot":
            self.value_relation = parameter(count, heads, width, width)
            self.prior = parameter(count, heads)
        if score == "dynamic":
            self.score_vector = parameter(heads, width)
        edge_widths = [each or 0 for each in config.edge_widths]
        if any(edge_widths):
            self.edge_weight = parameter(heads, 1 if score == "additive" else width, sum(edge_widths))
        self.bias = parameter(len(targets), output_features) if base.use_bias and score != "dot" else None
        if score == "additive":
            self.value_projections = projections(
                [node_type for node_type in widths if node_type in {*sources, *targets}], bias=False
            )
        else:
            self.query_projections = projections(targets, bias=base.use_bias)
            self.key_projections = projections(sources, bias=base.use_bias)
        if score == "dot":
            self.value_projections = projections(sources, bias=base.use_bias)
        if config.residual:
            self.residual_projections = projections(targets, bias=False, out=output_features)
        if config.softmax_over == "relation":
            self.relation_vector = parameter(output_features)
            self.relation_projection = nn.Linear(output_features, output_features, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: HeterogeneousGraphAttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config."""
        return cls(**arguments_of(config, HeterogeneousArguments), device=device, dtype=dtype)

    @property
    def d_model(self) -> int:
        """Width of all heads together."""
        return self.config.base.d_model

    @property
    def num_graph_heads(self) -> int:
        """Number of heads."""
        return self.config.base.num_heads

    @property
    def supports_edge_features(self) -> bool:
        """Whether a relation was given an edge_dim; then every call needs its edge features."""
        return self.config.edge_dim is not None

    def projections_by_type(self, name: str) -> list[tuple[str, nn.Module]]:
        """The modules of `query_projections`, or another name of "key", "value" and "residual", with their types."""
        node_types = self.target_types if name in ("query", "residual") else self.source_types
        if self.config.score == "additive" and name == "value":
            used = {*self.source_types, *self.target_types}
            node_types = tuple(each for each in self.config.widths if each in used)
        modules: Any = getattr(self, f"{name}_projections")
        return list(zip(node_types, modules, strict=True))

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier-uniform (Glorot), each relation's on its own; priors 1, biases 0."""
        for module in self.modules():
            initialise_projection(module)
        for name, parameter in self.named_parameters(recurse=False):
            if name == "prior":
                nn.init.ones_(parameter)
            elif name == "bias":
                nn.init.zeros_(parameter)
            else:
                ends = parameter.shape[-2:].numel() if parameter.ndim == 1 else sum(parameter.shape[-2:])
                bound = (6.0 / ends) ** 0.5
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: Features | Any,
        graph: HeterogeneousGraph | Mapping[Relation, Tensor] | None = None,
        edge_attr: Mapping[Relation, Tensor] | None = None,
        *,
        return_weights: bool | str = False,
    ) -> HeterogeneousOutput:
        """Attend over the edges of all relations.

        Args:
            x: node features `(nodes, in_features)` by type, dense or sparse CSR; or a HeteroData of PyTorch Geometric,
                whose edges and edge features are taken too.
            graph: a HeterogeneousGraph, or an edge_index `(2, edges)` int64 by relation over x's nodes. A
                HeterogeneousGraph built once is cheaper than edges in every call. It may lack relations and types.
            edge_attr: `(edges, edge_dim)` by relation, of each relation of the graph that has an edge_dim.
            return_weights: "mean" over heads (or True), `(edges,)`; "heads", `(edges, heads)`; or False.

        Returns:
            HeterogeneousOutput: the output `(nodes, d_model)` of each type in x that relations end in, d_model /
            num_heads wide without concat; of a sample's block for the first nodes alone, its `num_queries`. Weights
            by relation; with softmax_over="relation" the relations' own weights, means over these nodes.

        Raises:
            InvalidInputError: an unknown type or relation, features that are missing, or of another dtype or device.
            DimensionMismatchError: features of another width or number.
            GraphStructureError: an edge names a node that is not there.
        """
        arguments, x, typed = self._arguments(x, graph, edge_attr)
        result = attend(**arguments, return_weights=return_weights)
        outputs, relation_weights = self._by_target(result.output, typed, x)
        residuals = dict(self.projections_by_type("residual")) if self.config.residual else {}
        for place, node_type in enumerate(self.target_types):
            if node_type not in outputs:
                continue
            if node_type in residuals:
                own = first_rows(x[node_type], outputs[node_type].shape[0])
                outputs[node_type] = outputs[node_type] + _product(residuals[node_type], own)
            if self.bias is not None:
                outputs[node_type] = add_bias(outputs[node_type], self.bias[place])
            if self.config.base.check_finite:
                require_finite(f"{self.name} {node_type!r}", outputs[node_type])
        weights = None if result.weights is None else typed.by_relation(result.weights)
        return HeterogeneousOutput(
            outputs, weights, relation_weights if self.config.softmax_over == "relation" else None
        )

    def graph_forward(
        self,
        node_features: Features,
        edge_index: Mapping[Relation, Tensor],
        edge_attr: Mapping[Relation, Tensor] | None = None,
    ) -> HeterogeneousOutput:
        """`forward` over edge lists, with the weights of each edge and head, `(edges, heads)` by relation."""
        return self(node_features, edge_index, edge_attr, return_weights="heads")

    def sparse_forward(
        self,
        node_features: Features,
        adjacency: Mapping[Relation, Any],
        edge_attr: Mapping[Relation, Tensor] | None = None,
    ) -> HeterogeneousOutput:
        """`forward` over an adjacency matrix of each relation (rows attend to columns), with all heads' weights.

        Args:
            node_features: `(nodes, in_features)` by type.
            adjacency: by relation what `Graph.from_adjacency` takes; only which entries are there counts.
            edge_attr: by relation `(edges, edge_dim)` in the edge order of `Graph.from_adjacency`.
        """
        edges = edges_of(adjacency, node_features)
        return self(node_features, edges, edge_attr, return_weights="heads")

    def cached_forward(
        self, x: Any, graph: Any = None, edge_attr: Any = None, **kwargs: Any
    ) -> tuple[HeterogeneousOutput, AttentionCache]:
        """The forward, and the cache that `backward` needs; see `AttentionModule.cached_forward`."""
        return super().cached_forward(*parts_of(x, graph, edge_attr), **kwargs)

    def explain_forward(
        self,
        x: Features | Any,
        graph: HeterogeneousGraph | Mapping[Relation, Tensor] | None = None,
        edge_attr: Mapping[Relation, Tensor] | None = None,
        *,
        return_weights: bool | str = False,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments, and why each faster one does not."""
        with torch.no_grad():
            arguments, _, _ = self._arguments(x, graph, edge_attr)
            return explain(**arguments, return_weights=return_weights)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return shown_settings(self.config, "score", "softmax_over")

    def _arguments(
        self, x: Any, graph: Any, edge_attr: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor], HeterogeneousGraph]:
        """The arguments of `attend`, none where the graph has no relation; the features and the graph."""
        x, graph, edge_attr = parts_of(x, graph, edge_attr)
        x = checked_features(x, self, self.config)
        graph = checked_graph(graph, x, self.config)
        edge_attr = checked_edges(edge_attr, graph, self, self.config)
        if not graph.relations:
            nothing = next(self.parameters()).new_zeros(0, self.num_graph_heads, self.config.base.d_k)
            return {"query": nothing, "key": nothing, "value": nothing, "pattern": graph.joint()}, x, graph
        rows = HeterogeneousRows(self, graph, x)
        query, key, value, score = rows.query_key_value()
        arguments = {
            **{"query": query, "key": key, "value": value},
            "pattern": graph.joint(by_relation=rows.by_relation),
            "score": score,
            "edges": rows.edge_features(edge_attr),
            "scale": self.config.get_scale(),
            "dropout": self.config.base.dropout if self.training else 0.0,
        }
        return arguments, x, graph

    def _by_target(
        self, result: Tensor, graph: HeterogeneousGraph, x: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[Relation, Tensor]]:
        """The output of each type of targets, and the weights of relations where these are learned."""
        rows = result.flatten(-2) if self.config.concat else result.mean(-2)
        by_relation = self.config.softmax_over == "relation"
        found = rows_by_target(graph, rows, by_relation=by_relation)
        weights: dict[Relation, Tensor] = {}
        if by_relation:
            for node_type, own in found.items():
                projection, vector = self.relation_projection, self.relation_vector
                found[node_type], own_weights = weighted_relations(own, projection, vector)
                weights.update(zip(graph.incoming(node_type), own_weights, strict=True))
        outputs = {}
        for node_type in self.target_types:
            if node_type in found:
                outputs[node_type] = found[node_type]
            elif node_type in x:
                count = graph.num_queries.get(node_type, x[node_type].shape[0])
                outputs[node_type] = rows.new_zeros(count, rows.shape[-1])
        return outputs, weights


def _product(projection: nn.Module, x: Tensor) -> Tensor:
    """What a projection makes of x, dense or sparse."""
    return linear_maps(x, [projection.weight], [projection.bias])[0] if is_bare(projection) else projection(x)
