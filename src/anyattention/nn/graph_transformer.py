"""A layer of a graph transformer: attention over a graph, over all nodes, over an expander, or a sum; feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import Axes, require_dense, require_device, require_floating
from anyattention.config import GraphBase, GraphTransformerConfig
from anyattention.errors import DimensionMismatchError, InvalidInputError
from anyattention.nn.arguments import ParameterArguments, arguments_of, shown_settings, takes
from anyattention.nn.bare import initialise_projection
from anyattention.nn.base import (
    AttentionModule,
    require_as_built,
    require_factory,
    require_finite,
    require_parameter_kind,
)
from anyattention.nn.dense import MultiHeadAttention
from anyattention.nn.graph import GraphAttention
from anyattention.nn.layer_norm import LayerNorm
from anyattention.output import AttentionOutput
from anyattention.patterns import ExpanderGraph, Graph
from anyattention.patterns.sizes import Sizes, graph_sizes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GraphTransformerLayer"]


@dataclass(frozen=True)
class GraphTransformerArguments(ParameterArguments, GraphTransformerConfig, GraphBase):
    """The arguments of `GraphTransformerLayer`."""


class GraphTransformerLayer(AttentionModule):
    """Attention over a graph's nodes and a feed-forward part, each behind a norm and added to what came in.

        h_i = x_i + attention(norm(x))_i
        output_i = h_i + W_2 activation(W_1 norm(h_i))

    attention(x)_i is one of these, or the sum of the first two:

        graph      W_O graph_attention(x, edges)_i, over the nodes that i's edges come from: see `GraphAttention`
        all        W_O concat_h(softmax_j(q_i . k_j / sqrt(d_k) + bias(distance_ij)) v_j), over all nodes of i's graph
        expander   as graph, over the edges of an `ExpanderGraph`, of which each kind has features of its own

    No self-loops are added. A node without edges gets attention 0, with the bias of W_O.

    Args: the fields of `GraphTransformerArguments`.

    With use_bias all projections have a bias.

    Parameters, in the order of `get_parameters()`: distance_bias `(heads, max_distance + 2)` (with max_distance: of
    distance 0 to max_distance, and of all that are farther or that no path leads to); attention_norm; graph_attention
    and graph_projection `(d_model, d_model)` (but for "all"); all_attention ("all", "graph + all");
    feed_forward_norm; feed_forward, two projections.

    Raises:
        InvalidConfigError: a setting is out of range, or is set and cannot be used.

    Cost: O(nodes x d_model x (d_model + hidden_features) + edges x d_model) time; "all" adds O(sum of the squared sizes
    of the graphs x d_model) time and O(nodes) memory, with distances O(nodes^2) memory.

    Source: Rampasek et al., 2022 (GPS: the sum of both); Shirzad et al., 2023 (Exphormer: expanders and virtual nodes);
    Ying et al., 2021 (Graphormer: a bias by distance); Dwivedi and Bresson, 2021 (attention over edges). Here the norms
    come first (Xiong et al., 2020) and are over each node's channels.

    Example:
        >>> layer = GraphTransformerLayer(8, 2, attention="graph + all")
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 3], [1, 2, 4]]), num_nodes=5)
        >>> layer(torch.zeros(5, 8), graph, sizes=[3, 2]).output.shape  # two graphs, of 3 and 2 nodes
        torch.Size([5, 8])
    """

    supports_heterogeneous: bool = False
    supports_masking: bool = False

    @takes(GraphTransformerArguments)
    def __init__(
        self, config: GraphTransformerConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.config = config
        require_factory(device, dtype)
        base, kind = config.base, {"device": device, "dtype": dtype}
        width, hidden = base.d_model, config.get_hidden_features()
        settings = {name: getattr(base, name) for name in ("dropout", "use_bias", "scale")} | kind
        if config.max_distance is not None:
            table = torch.empty(base.num_heads, config.max_distance + 2, device=device, dtype=dtype)
            self.distance_bias = nn.Parameter(table)
        self.attention_norm = LayerNorm(width, **kind)
        if config.has_edges:
            self.graph_attention = GraphAttention(
                width, base.num_heads, score=config.score, edge_dim=config.get_edge_columns(), **settings
            )
            self.graph_projection = nn.Linear(width, width, bias=base.use_bias, **kind)
        if config.has_all:
            self.all_attention = MultiHeadAttention(width, base.num_heads, **settings)
        self.feed_forward_norm = LayerNorm(width, **kind)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden, bias=base.use_bias, **kind),
            nn.GELU() if config.activation == "gelu" else nn.ReLU(),
            nn.Dropout(config.feature_dropout),
            nn.Linear(hidden, width, bias=base.use_bias, **kind),
            nn.Dropout(config.feature_dropout),
        )
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: GraphTransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config."""
        return cls(**arguments_of(config, GraphTransformerArguments), device=device, dtype=dtype)

    @property
    def d_model(self) -> int:
        """Width of all heads together, and of the nodes' features."""
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
        """Draw the weights anew: Xavier-uniform (Glorot), biases 0, also those by distance; gains of the norms 1."""
        for module in [*self.children(), *self.feed_forward.children()]:
            if isinstance(module, AttentionModule | LayerNorm):
                module.reset_parameters()  # pyright: ignore[reportCallIssue]
            initialise_projection(module)
        if self.config.max_distance is not None:
            nn.init.zeros_(self.distance_bias)

    def forward(
        self,
        x: Tensor,
        graph: Graph | ExpanderGraph | Tensor | None = None,
        edge_attr: Tensor | None = None,
        *,
        sizes: Sizes | None = None,
        batch: Tensor | None = None,
        distances: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> AttentionOutput:
        """Attend, and feed forward.

        **Without sizes or batch, "all" and "graph + all" take all nodes as one graph, and attend from one graph of a
        batch to another, without an error.**

        Args:
            x: node features `(nodes, d_model)`, or `(batch, nodes, d_model)`: many feature sets over one graph.
            graph: a Graph, or an edge_index `(2, edges)` int64 (row 0 = source, row 1 = target) over x's nodes; for
                "expander" an ExpanderGraph, and x has its virtual nodes at the end. "all" reads no edges.
            edge_attr: `(edges, edge_dim)`, exactly when the module has an edge_dim. For "expander" of the edges of the
                graph that it was made of.
            sizes: number of nodes of each graph, where several are joined, as by `Graph.batch`: attention over all
                nodes stays within each. Attention over edges goes by the edges, and does not read it.
            batch: `(nodes,)` int64, the graph of each node, from 0 and never falling; instead of sizes.
            distances: `(nodes, nodes)` int64, from `encodings.hop_distances`, exactly when the module has max_distance:
                entry (i, j) of query i and key j. A negative one, and one above max_distance, has the last bias.
            return_weights: "mean" over heads (or True), "heads", or False.

        Returns:
            AttentionOutput(output, of x's shape; weights). The weights are those of the edges, `(..., edges)` or
            `(..., edges, heads)`, for "graph + all" too. Those of "all" are dense, `(..., nodes, nodes)` or
            `(..., heads, nodes, nodes)`; with several graphs and no distances those of the pairs of `Documents(sizes)`.

        Raises:
            DimensionMismatchError, InvalidInputError: an argument does not fit.
            GraphStructureError: edge_index names a node that is not there, or batch falls.
        """
        self._check_nodes(x)
        rows = self.attention_norm(x)
        added, weights = [], None
        if self.config.has_all:
            own = graph_sizes(x.shape[-2], sizes, batch)
            # The weights that are returned are those of the edges, where there are any.
            wanted = False if self.config.has_edges else return_weights
            output, weights = self._attend_to_all(rows, own, distances, wanted)
            added.append(output)
        elif distances is not None:
            raise InvalidInputError(
                argument="distances", expected="None without attention over all nodes", actual="a tensor"
            )
        if self.config.has_edges:
            output, weights = self._attend_over_edges(rows, graph, edge_attr, return_weights)
            added.append(self.graph_projection(output))
        elif edge_attr is not None:
            raise InvalidInputError(
                argument="edge_attr", expected="None: attention over all nodes reads no edges", actual="a tensor"
            )
        hidden = x + self.feature_dropout(added[0] if len(added) == 1 else added[0] + added[1])
        output = hidden + self.feed_forward(self.feed_forward_norm(hidden))
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
            node_features: `(nodes, d_model)`.
            adjacency: what `Graph.from_adjacency` takes; only which entries are there counts, not their values.
            edge_attr: `(edges, edge_dim)` in the Graph's edge order.
        """
        return self(node_features, Graph.from_adjacency(adjacency), edge_attr, return_weights="heads")

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return shown_settings(self.config, "attention")

    def _check_nodes(self, x: Tensor) -> None:
        axes = Axes()
        axes.set("d_model", self.d_model, "the module")
        require_floating("x", x)
        require_dense("x", x)
        axes.bind("x", x, "batch nodes d_model" if x.ndim == 3 else "nodes d_model")
        require_parameter_kind("x", x, self.graph_attention if self.config.has_edges else self.all_attention)

    def _attend_over_edges(
        self,
        rows: Tensor,
        graph: Graph | ExpanderGraph | Tensor | None,
        edge_attr: Tensor | None,
        return_weights: bool | str,
    ) -> AttentionOutput:
        is_expander = self.config.attention == "expander"
        if isinstance(graph, ExpanderGraph) != is_expander or graph is None:
            raise InvalidInputError(
                argument="graph",
                expected="an ExpanderGraph" if is_expander else "a Graph or an edge_index",
                actual=type(graph).__name__,
                hint=f"the module was built with attention={self.config.attention!r}",
            )
        if isinstance(graph, ExpanderGraph):
            edge_attr = self._edges_of_each_kind(graph, edge_attr, rows)
            graph = graph.graph
        return self.graph_attention(rows, graph, edge_attr, return_weights=return_weights)

    def _edges_of_each_kind(self, graph: ExpanderGraph, edge_attr: Tensor | None, rows: Tensor) -> Tensor:
        width = self.config.edge_dim
        shape = f"(edges={graph.edge_counts[0]}, edge_dim={width})"
        require_as_built("edge_attr", edge_attr, "edge_dim", width, shape)
        features = graph.edge_features(edge_attr, rows.dtype)
        if features.shape[1] != self.config.get_edge_columns():
            raise DimensionMismatchError(
                argument="edge_attr",
                expected=shape,
                actual=None if edge_attr is None else tuple(edge_attr.shape),
            )
        return features

    def _attend_to_all(
        self, rows: Tensor, sizes: tuple[int, ...], distances: Tensor | None, return_weights: bool | str
    ) -> AttentionOutput:
        """Attention of each node to all of its graph, within `Documents` where there are several."""
        sets = rows if rows.ndim == 3 else rows.unsqueeze(0)
        given: dict[str, Any] = {"return_weights": return_weights}
        bias = self._bias(distances, rows)
        if bias is not None:
            given["bias"] = bias.unsqueeze(0)
        if len(sizes) != 1:
            if bias is None:
                given["documents"] = [sizes] * len(sets)
            else:
                graphs = torch.arange(len(sizes), device=rows.device)
                repeats = torch.tensor(sizes, dtype=torch.int64, device=rows.device)
                graphs = graphs.repeat_interleave(repeats, output_size=rows.shape[-2])
                given["mask"] = graphs[:, None] == graphs
        output, weights = self.all_attention(sets, **given)
        if rows.ndim == 3:
            return AttentionOutput(output, weights)
        return AttentionOutput(output.squeeze(0), None if weights is None else weights.squeeze(0))

    def _bias(self, distances: Tensor | None, rows: Tensor) -> Tensor | None:
        """`(heads, nodes, nodes)`, the learned numbers of the distances."""
        largest = self.config.max_distance
        shape = f"(nodes, nodes), as max_distance={largest}"
        require_as_built("distances", distances, "max_distance", largest, shape)
        if distances is None or largest is None:
            return None
        nodes = rows.shape[-2]
        require_dense("distances", distances)
        require_device("distances", distances, rows.device, "x")
        if distances.dtype != torch.int64:
            raise InvalidInputError(argument="distances", expected="torch.int64", actual=distances.dtype)
        if distances.shape != (nodes, nodes):
            raise DimensionMismatchError(
                argument="distances", expected=f"(nodes={nodes}, nodes={nodes})", actual=tuple(distances.shape)
            )
        places = torch.where(distances < 0, largest + 1, distances.clamp(max=largest + 1))
        bias = self.distance_bias.index_select(1, places.flatten())
        return bias.to(rows.dtype).unflatten(1, (nodes, nodes))
