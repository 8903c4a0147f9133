"""Graph attention: GAT, GATv2 and the graph transformer's dot product, by one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import Axes, require_dense, require_floating
from anyattention.config import GraphAttentionConfig, GraphBase
from anyattention.errors import DimensionMismatchError, InvalidInputError
from anyattention.nn.arguments import ParameterArguments, arguments_of, shown_settings, takes
from anyattention.nn.bare import initialise_projection, is_bare
from anyattention.nn.base import (
    AttentionModule,
    graph_of_edges,
    require_as_built,
    require_factory,
    require_finite,
    require_parameter_kind,
)
from anyattention.ops import attend
from anyattention.ops.graph.projected import Projections, projected_attention, suits_nodes, suits_parameters
from anyattention.ops.linear_maps import add_bias, folded, linear_maps, rows_and_terms
from anyattention.output import AttentionOutput
from anyattention.patterns import Graph
from anyattention.scores import Additive, Dot, Dynamic, EdgeFeatures, Score

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GraphAttention"]


@dataclass(frozen=True)
class GraphArguments(ParameterArguments, GraphAttentionConfig, GraphBase):
    """The arguments of `GraphAttention`."""


class GraphAttention(AttentionModule):
    """Each node attends to the nodes that its edges come from.

    With W the projections, h = W x in each head, and a score per edge j -> i:

        additive (GAT):        LeakyReLU(a_query . h_i + a_key . h_j + w_edge e), value h_j
        dynamic  (GATv2):      a . LeakyReLU(W_q x_i + W_k x_j + W_e e), value W_k x_j
        dot (transformer):     (W_q x_i) . (W_k x_j + W_e e) / sqrt(d_k), value W_v x_j + W_e e

        output_i = aggregate over j of dropout(p_ij) value_j (+ W_r x_i with residual) (+ bias)

    No self-loops are added: `graph.with_self_loops()` does that. A node without edges gets 0
    (and its residual and bias).

    Args: the fields of `GraphArguments`.

    With use_bias the output has a bias ("additive", "dynamic"), and so have the projections ("dynamic", "dot").

    Parameters, in the order of `get_parameters()`: query_vector, key_vector ("additive") or score_vector ("dynamic"),
    each `(heads, d_k)`; edge_weight `(heads, 1 or d_k, edge_dim)`; bias; then the projections.

    Raises:
        InvalidConfigError: a setting is out of range, or is set and cannot be used.

    Cost: O(nodes x in_features x d_model + edges x d_model) time.

    Source: Velickovic et al., 2018 (GAT); Brody et al., 2022 (GATv2); Shi et al., 2021 (transformer). The edge
    weight of "additive" is one vector per head, the product of the two that GAT implementations keep.

    Example:
        >>> layer = GraphAttention(8, 2, in_features=3)
        >>> edge_index = torch.tensor([[0, 1], [1, 2]])
        >>> layer(torch.zeros(3, 3), edge_index).output.shape
        torch.Size([3, 8])
    """

    supports_heterogeneous: bool = False

    @takes(GraphArguments)
    def __init__(
        self, config: GraphAttentionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.config = config
        require_factory(device, dtype)
        base, score = config.base, config.score
        source, target = config.source_features, config.target_features
        output_features = base.d_model if config.concat else base.d_k

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        def projection(width: int, *, bias: bool, out: int = base.d_model) -> nn.Linear:
            return nn.Linear(width, out, bias=bias, device=device, dtype=dtype)

        if score == "additive":
            self.query_vector = parameter(base.num_heads, base.d_k)
            self.key_vector = parameter(base.num_heads, base.d_k)
            self.value_projection = projection(source, bias=False)
            if isinstance(config.in_features, tuple):
                self.query_projection = projection(target, bias=False)
        elif score == "dynamic":
            self.score_vector = parameter(base.num_heads, base.d_k)
            self.query_projection = projection(target, bias=base.use_bias)
            self.key_projection = projection(source, bias=base.use_bias)
        else:
            self.query_projection = projection(target, bias=base.use_bias)
            self.key_projection = projection(source, bias=base.use_bias)
            self.value_projection = projection(source, bias=base.use_bias)
        if config.edge_dim is not None:
            self.edge_weight = parameter(base.num_heads, 1 if score == "additive" else base.d_k, config.edge_dim)
        self.bias = parameter(output_features) if base.use_bias and score != "dot" else None
        if config.residual:
            self.residual_projection = projection(target, bias=False, out=output_features)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: GraphAttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config."""
        return cls(**arguments_of(config, GraphArguments), device=device, dtype=dtype)

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
        """Whether this module was built with an edge_dim; then every call needs edge features."""
        return self.config.edge_dim is not None

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier-uniform (Glorot), biases 0."""
        for module in self.children():
            initialise_projection(module)
        for name, parameter in self.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        graph: Graph | Tensor,
        edge_attr: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> AttentionOutput:
        """Attend over the graph's edges.

        Args:
            x: node features `(nodes, in_features)` or `(batch, nodes, in_features)`, or a pair (source, target);
                without batch also a sparse CSR matrix.
            graph: a Graph, or an edge_index `(2, edges)` int64 (row 0 = source, row 1 = target) over x's nodes. A
                Graph built once is cheaper than an edge_index in every call.
            edge_attr: `(edges, edge_dim)`, exactly when the module has an edge_dim; `(edges,)` too where it is 1.
            mask: boolean, True = may attend: `(edges,)`, `(edges, heads)` or `(batch, edges, heads)`.
            return_weights: "mean" over heads (or True), `(..., edges)`; "heads", `(..., edges, heads)`; or False.

        Returns:
            AttentionOutput(output `(..., target nodes, d_model)`, or d_model / num_heads wide without concat; weights).

        Raises:
            DimensionMismatchError, InvalidInputError, InvalidMaskError: an argument does not fit.
            GraphStructureError: edge_index names a node that is not there.
        """
        source, target = self._check_nodes(x)
        if not isinstance(graph, Graph):
            graph = graph_of_edges(graph, target.shape[-2], source.shape[-2], target.device, "x")
        self._check_graph(graph, source, target)
        edge_attr = self._read_edges(edge_attr, graph)
        is_simple = mask is None and edge_attr is None and return_weights is False and self.config.aggregation == "sum"
        is_one = is_simple and source is target and suits_nodes(source, graph)
        score = self._score()
        heads = self._attend_as_one(source, graph, score) if is_one else None
        weights = None
        if heads is None:
            query, key, value = self._project(source, target)
            heads, weights, *_ = attend(
                query,
                key,
                value,
                graph,
                score=score.cast(lambda x: x.to(query.dtype)),
                mask=mask,
                edges=self._edge_features(edge_attr),
                scale=self.config.get_scale(),
                dropout=self._dropout(),
                aggregation=self.config.aggregation,
                normalize=self.config.normalize,
                return_weights=return_weights,
            )
        output = heads.flatten(-2) if self.config.concat else heads.mean(-2)
        if self.config.residual:
            output = output + _maps(target, self.residual_projection)[0]
        bias = self.bias
        if bias is not None:
            output = add_bias(output, bias)
        if self.config.base.check_finite:
            require_finite(self.name, output)
        return AttentionOutput(output, weights)

    def graph_forward(
        self, node_features: Tensor, edge_index: Tensor, edge_attr: Tensor | None = None
    ) -> AttentionOutput:
        """`forward` over an edge list, with the weights of each edge and head, `(edges, heads)`."""
        return self(node_features, edge_index, edge_attr, return_weights="heads")

    def sparse_forward(self, node_features: Tensor, adjacency: Any, edge_attr: Tensor | None = None) -> AttentionOutput:
        """`forward` over an adjacency matrix (rows attend to columns), with the weights of each edge and head.

        Args:
            node_features: `(nodes, in_features)`.
            adjacency: what `Graph.from_adjacency` takes; only which entries are there counts, not their values.
            edge_attr: `(edges, edge_dim)` in the Graph's edge order.
        """
        graph = Graph.from_adjacency(adjacency)
        return self(node_features, graph, edge_attr, return_weights="heads")

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return shown_settings(self.config, "score")

    def _check_nodes(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        is_pair = isinstance(x, tuple | list)
        if is_pair and len(x) != 2:
            raise InvalidInputError(
                argument="x",
                expected="a tensor or a pair (x_source, x_target)",
                actual=f"{len(x)} items",
            )
        source, target = (x[0], x[1]) if is_pair else (x, x)
        names = ("x[0]", "x[1]") if is_pair else ("x", "x")
        sides = ("source_", "target_") if is_pair else ("", "")
        widths = (self.config.source_features, self.config.target_features)
        axes = Axes()
        for name, features, side, width in zip(names, (source, target), sides, widths, strict=True):
            require_floating(name, features)
            if features.layout not in (torch.strided, torch.sparse_csr):
                raise InvalidInputError(
                    argument=name,
                    expected="a dense tensor or a sparse CSR matrix",
                    actual=features.layout,
                )
            batch = "batch " if source.ndim == 3 else ""
            axes.set(f"{side}features", width, "the module")
            axes.bind(name, features, f"{batch}{side}nodes {side}features")
            require_parameter_kind(name, features, self)
            if not is_pair:
                break
        return source, target

    def _check_graph(self, graph: Graph, source: Tensor, target: Tensor) -> None:
        sizes = (source.shape[-2], target.shape[-2])
        if (graph.num_keys, graph.num_queries) != sizes:
            raise DimensionMismatchError(
                argument="graph",
                expected=f"{sizes[0]} keys and {sizes[1]} queries, the nodes of x",
                actual=f"{graph.num_keys} keys and {graph.num_queries} queries",
            )

    def _read_edges(self, edge_attr: Tensor | None, graph: Graph) -> Tensor | None:
        width = self.config.edge_dim
        require_as_built("edge_attr", edge_attr, "edge_dim", width, f"(edges, edge_dim={width})")
        if edge_attr is not None and width is not None:
            if width == 1 and isinstance(edge_attr, Tensor) and edge_attr.ndim == 1:
                edge_attr = edge_attr.unsqueeze(-1)
            axes = Axes()
            axes.set("edges", graph.num_edges, "the graph")
            axes.set("edge_dim", width, "the module")
            axes.bind("edge_attr", edge_attr, "edges edge_dim")
            require_floating("edge_attr", edge_attr)
            require_dense("edge_attr", edge_attr)
            require_parameter_kind("edge_attr", edge_attr, self)
        return edge_attr

    def _dropout(self) -> float:
        return self.config.base.dropout if self.training else 0.0

    def _attend_as_one(self, x: Tensor, graph: Graph, score: Score) -> Tensor | None:
        """Each head's output `(nodes, heads, d_k)`, maps and attention as one node of autograd; None where apart."""
        config, projections = self.config, self._projections()
        if projections is None or not suits_parameters(x, score, projections):
            return None
        settings = {"scale": config.get_scale(), "dropout": self._dropout(), "normalize": config.normalize}
        return projected_attention(x, projections, graph, score, **settings)

    def _projections(self) -> Projections | None:
        """What makes all rows from one x; None where a weight may not be read."""
        config, heads, width = self.config, self.config.base.num_heads, self.config.base.d_k
        if config.score == "additive":
            if isinstance(config.in_features, tuple) or not _is_foldable(self.value_projection):
                return None
            vectors, columns = (self.key_vector, self.query_vector), {"value": width, "key": 1, "query": 1}
            return Projections(columns, heads, [self.value_projection.weight], [None], vectors)
        names = ["key", "query"] if config.score == "dynamic" else ["key", "value", "query"]
        maps = [getattr(self, f"{name}_projection") for name in names]
        if not _are_one_map(maps):
            return None
        columns = dict.fromkeys(names, width)
        return Projections(columns, heads, [each.weight for each in maps], [each.bias for each in maps])

    def _score(self) -> Score:
        slope = self.config.negative_slope
        if self.config.score == "additive":
            return Additive(slope)
        return Dot() if self.config.score == "dot" else Dynamic(self.score_vector, slope)

    def _project(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value with heads, `(..., nodes, heads, d_k or 1)`."""
        config = self.config
        if config.score == "additive":
            value, key, query = self._value_and_terms(source, target)
            return query, key, value
        keys = [self.key_projection] if config.score == "dynamic" else [self.key_projection, self.value_projection]
        if source is target:
            *rows, query = map(self._heads, _maps(source, *keys, self.query_projection))
        else:
            rows = [self._heads(row) for row in _maps(source, *keys)]
            query = self._heads(_maps(target, self.query_projection)[0])
        return query, rows[0], rows[-1]

    def _value_and_terms(self, source: Tensor, target: Tensor) -> list[Tensor]:
        """Value with heads, and the keys' and the queries' terms `(..., nodes, heads, 1)`, of "additive"."""
        projection, key_vector, query_vector = self.value_projection, self.key_vector, self.query_vector
        is_shared = not isinstance(self.config.in_features, tuple)
        if is_shared and source is target:
            return _rows_and_terms(source, projection, key_vector, query_vector)
        if is_shared and not _is_foldable(projection) and source.layout == target.layout == torch.strided:
            # One call for both, which evaluates what the weight is made of once.
            rows = projection(torch.cat([source, target], dim=-2)).unflatten(-1, key_vector.shape)
            value, others = rows.split([source.shape[-2], target.shape[-2]], dim=-3)
            return [value, _term(value, key_vector), _term(others, query_vector)]
        value, key = _rows_and_terms(source, projection, key_vector)
        target_projection = projection if is_shared else self.query_projection
        if _is_foldable(target_projection):
            query = linear_maps(target, [folded(target_projection.weight, query_vector)])[0].unsqueeze(-1)
        else:
            _, query = _rows_and_terms(target, target_projection, query_vector)
        return [value, key, query]

    def _heads(self, rows: Tensor) -> Tensor:
        heads = self.config.base.num_heads
        return rows.unflatten(-1, (heads, rows.shape[-1] // heads))

    def _edge_features(self, edge_attr: Tensor | None) -> EdgeFeatures | None:
        if edge_attr is None:
            return None
        weight = self.edge_weight
        return EdgeFeatures(edge_attr, weight, weight if self.config.score == "dot" else None)


def _maps(x: Tensor, *projections: nn.Linear) -> list[Tensor]:
    """What each projection makes of x, dense or sparse: bare ones in one product."""
    if not _are_one_map(projections):
        return [each(x) for each in projections]
    return linear_maps(x, [each.weight for each in projections], [each.bias for each in projections])


def _are_one_map(projections: Sequence[nn.Linear]) -> bool:
    """Whether projections may be one product: weights that may be read, and biases of all or of none."""
    return all(is_bare(each) for each in projections) and len({each.bias is None for each in projections}) == 1


def _rows_and_terms(x: Tensor, projection: nn.Linear, *vectors: Tensor) -> list[Tensor]:
    """A projection's rows `(..., nodes, heads, d_k)` and their products with vectors, `(..., nodes, heads, 1)`."""
    if _is_foldable(projection):
        return rows_and_terms(x, projection.weight, vectors)
    rows = projection(x).unflatten(-1, vectors[0].shape)
    return [rows, *(_term(rows, vector) for vector in vectors)]


def _term(rows: Tensor, vector: Tensor) -> Tensor:
    """`(..., nodes, heads, 1)` from `(..., nodes, heads, d_k)` and `(heads, d_k)`."""
    return (rows * vector.to(rows.dtype)).sum(-1, keepdim=True)


def _is_foldable(projection: nn.Linear) -> bool:
    """Whether a projection is a product with a weight that may be read."""
    return is_bare(projection) and projection.bias is None
