"""ExpanderGraph: a graph joined by the edges of a random regular graph and by virtual nodes, as in Exphormer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree

from anyattention._checks import Axes, require_count, require_dense, require_device, require_floating
from anyattention.ambient import shielded
from anyattention.patterns.graph import Graph
from anyattention.patterns.graph_arrays import require_one_set
from anyattention.patterns.regular import regular_edges
from anyattention.patterns.sizes import Sizes, graph_sizes, require_edges_within

__all__ = ["ExpanderGraph"]

_KINDS_ADDED = 3


@dataclass(frozen=True, eq=False, repr=False)
class ExpanderGraph:
    """A graph, the edges of a random regular graph over its nodes, and virtual nodes that all nodes share.

    Nodes keep their numbers. Virtual nodes stand behind them, those of one graph after those of the one before; each
    attends to all nodes of its graph, and they attend to it. Edges stand by their kind: those of the graph, in its
    order; of the regular graph; from nodes to virtual nodes; from virtual nodes to nodes. So any two nodes of a graph
    are two steps apart, by O(nodes) edges, and nothing leads from one graph to another.

    Build one with `from_graph`; the constructor itself checks nothing.

    Attributes:
        graph: all of it, a Graph over nodes and virtual nodes.
        sizes: the number of nodes of each graph, virtual ones left out.
        num_virtual_nodes: of each graph.
        edge_counts: the number of edges of each of the four kinds.

    Source: Shirzad et al., 2023 (Exphormer). Here an edge of two cycles of the regular graph counts twice.

    Example:
        >>> ring = Graph.from_edge_index(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), num_nodes=4)
        >>> ExpanderGraph.from_graph(ring, 2, num_virtual_nodes=1)
        ExpanderGraph(num_nodes=4, num_virtual_nodes=1, edge_counts=(4, 8, 4, 4))
    """

    graph: Graph
    sizes: tuple[int, ...]
    num_virtual_nodes: int
    edge_counts: tuple[int, int, int, int]

    @classmethod
    def from_graph(
        cls,
        graph: Graph,
        degree: int,
        *,
        num_virtual_nodes: int = 1,
        sizes: Sizes | None = None,
        batch: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ExpanderGraph:
        """Join a graph by edges of a random regular graph, and by virtual nodes.

        Args:
            graph: over as many queries as keys; several graphs as one, as by `Graph.batch`, too.
            degree: of the regular graph, see `Graph.expander`; 0 adds no such edges.
            num_virtual_nodes: of each graph, 0 too.
            sizes, batch: number of nodes of each graph, or the graph of each node, where there are several.
            generator: a torch.Generator of the CPU that the regular graph is drawn with; None is PyTorch's own.

        Raises:
            GraphStructureError: a graph between two sets of nodes, one with an edge from one graph to another, or a
                batch that falls.
            InvalidInputError, DimensionMismatchError: an argument does not fit.

        Cost: O(nodes x (degree + num_virtual_nodes) + edges).
        """
        require_one_set(graph)
        own = graph_sizes(graph.num_queries, sizes, batch)
        count = require_count("num_virtual_nodes", num_virtual_nodes, 0)
        is_regular = require_count("degree", degree, 0) > 0
        with shielded():
            counts = torch.tensor(own, dtype=torch.int64, device=graph.device)
            of_node = torch.arange(len(own), device=graph.device).repeat_interleave(counts)
            require_edges_within(graph, own)
            parts = [graph.edge_index]
            parts.append(
                (regular_edges(own, degree, generator) if is_regular else graph.edge_index[:, :0]).to(graph.device)
            )
            nodes = torch.arange(graph.num_queries, device=graph.device).repeat_interleave(count)
            virtual = (of_node * count)[:, None] + torch.arange(count, device=graph.device)
            pairs = torch.stack([nodes, graph.num_queries + virtual.flatten()])
            parts += [pairs, pairs.flip(0)]
            whole = graph.num_queries + count * len(own)
            joined = Graph.of_known(torch.cat(parts, dim=1), whole, whole)
        first, second, third, fourth = (part.shape[1] for part in parts)
        return cls(joined, own, count, (first, second, third, fourth))

    @property
    def num_nodes(self) -> int:
        """Number of nodes of all graphs, virtual ones left out: outputs are `output[..., : num_nodes, :]`."""
        return sum(self.sizes)

    def with_virtual_nodes(self, x: Tensor, features: Tensor) -> Tensor:
        """Node features with those of the virtual nodes behind them, the same for each graph.

        Args:
            x: `(..., num_nodes, d)`.
            features: `(num_virtual_nodes, d)`, a parameter say.

        Returns:
            `(..., num_nodes + graphs x num_virtual_nodes, d)`.

        Raises:
            DimensionMismatchError, InvalidInputError: shapes or devices that do not fit.

        Example:
            >>> pairs = Graph.from_edge_index(torch.tensor([[0, 2], [1, 3]]), num_nodes=4)
            >>> expander = ExpanderGraph.from_graph(pairs, 2, sizes=[2, 2])
            >>> expander.with_virtual_nodes(torch.zeros(4, 1), torch.ones(1, 1)).flatten()
            tensor([0., 0., 0., 0., 1., 1.])
        """
        axes = Axes()
        axes.set("num_nodes", self.num_nodes, "the graph")
        axes.set("num_virtual_nodes", self.num_virtual_nodes, "the graph")
        axes.bind("x", x, "batch num_nodes d" if x.ndim == 3 else "num_nodes d")
        axes.bind("features", features, "num_virtual_nodes d")
        require_device("features", features, x.device, "x")
        behind = features.repeat(len(self.sizes), 1).expand(*x.shape[:-2], -1, -1)
        return torch.cat([x, behind], dim=-2)

    def edge_features(self, edge_attr: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`(edges, edge_dim + 3)`: the features of the graph's own edges, then for each other kind a 1 in its column.

        Raises:
            DimensionMismatchError, InvalidInputError: edge_attr is no floating `(own edges, edge_dim)`.
        """
        own, *added = self.edge_counts
        if edge_attr is None:
            edge_attr = torch.zeros(own, 0, dtype=dtype, device=self.graph.device)
        axes = Axes()
        axes.set("edges", own, "the graph")
        axes.bind("edge_attr", edge_attr, "edges edge_dim")
        require_floating("edge_attr", edge_attr)
        require_dense("edge_attr", edge_attr)
        width = edge_attr.shape[1]
        kinds = torch.eye(_KINDS_ADDED, width + _KINDS_ADDED, dtype=edge_attr.dtype, device=edge_attr.device).roll(
            width, 1
        )
        behind = [row.expand(count, -1) for row, count in zip(kinds, added, strict=True)]
        return torch.cat([pad(edge_attr, (0, _KINDS_ADDED)), *behind])

    def to(self, device: torch.device | str) -> ExpanderGraph:
        """This with its tensors on the device."""
        return ExpanderGraph(self.graph.to(device), self.sizes, self.num_virtual_nodes, self.edge_counts)

    def __repr__(self) -> str:
        counts = f"num_virtual_nodes={self.num_virtual_nodes}, edge_counts={self.edge_counts}"
        return f"ExpanderGraph(num_nodes={self.num_nodes}, {counts})"


def _flatten(expander: ExpanderGraph) -> tuple[list[Any], Any]:
    return [expander.graph], (expander.sizes, expander.num_virtual_nodes, expander.edge_counts)


def _flatten_with_keys(expander: ExpanderGraph) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _flatten(expander)
    return [(_pytree.GetAttrKey("graph"), child) for child in children], context


_pytree.register_pytree_node(
    ExpanderGraph,
    _flatten,
    lambda children, context: ExpanderGraph(*children, *context),
    serialized_type_name="anyattention.ExpanderGraph",
    to_dumpable_context=list,
    from_dumpable_context=lambda context: (tuple(context[0]), context[1], tuple(context[2])),
    flatten_with_keys_fn=_flatten_with_keys,
)
