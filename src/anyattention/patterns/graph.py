"""Graph: an explicit pattern, kept as an edge list, as compressed rows and as their transpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from anyattention._checks import allocation_failures_named, require_count
from anyattention.errors import GraphStructureError, SparseMatrixError
from anyattention.patterns.adjacency import read_adjacency, read_networkx
from anyattention.patterns.base import Pattern
from anyattention.patterns.graph_arrays import (
    all_pairs_arrays,
    edges_as_keys_arrays,
    joined_arrays,
    joined_radius,
    loops_added,
    moved_arrays,
    own_edges,
    require_edge_index,
    require_nodes,
    require_sizes,
    require_values_and_shifts,
    row_arrays,
    sorted_arrays,
)
from anyattention.patterns.graph_sets import shared_pairs, united_pairs
from anyattention.patterns.graph_state import checked_state, register_with_pytree
from anyattention.patterns.points import PointPattern
from anyattention.patterns.regular import regular_edges
from anyattention.patterns.reorder import ReorderMethod, reordered
from anyattention.patterns.sampled import SampledGraph, sample_graph
from anyattention.patterns.sizes import Sizes, graph_sizes

__all__ = ["Graph"]


@dataclass(frozen=True, eq=False, repr=False)
class Graph(PointPattern):
    """The (query, key) pairs of a graph: a multiset, in the caller's edge order.

    Build one with `from_edge_index`, `from_adjacency`, `from_networkx`, `radius`, `nearest` or `batch`; the
    constructor itself checks nothing. Its tensors must not be changed.

    `a | b` is the Graph of the pairs of either of two, `a & b` that of the pairs of both: each once, edges by query,
    then key, without `values`, `shifts` and `search_radius`, so that weights have the order of the new edges. Both have
    the same numbers of queries and keys, and each edge once.

    Attributes:
        edge_index: `(2, edges)` int64; row 0 = source = key, row 1 = target = query.
        query_offsets: `(num_queries + 1,)` int64; the slots of query i are `query_offsets[i]` to
            `query_offsets[i + 1]`.
        keys_by_query: `(edges,)` int64; the key of each slot, slots ordered by query, then caller's order.
        edges_by_query: `(edges,)` int64; the caller's position of the edge in each slot.
        key_offsets, queries_by_key, edges_by_key: the same for the transpose, slots ordered by key.
        values: `(edges,)` the entries of the adjacency matrix it came from, or None. Nothing uses them
            unless they are passed on as bias or edge features.
        shifts: `(edges, dim)` int64, or None: the edge leads to the image of its key by so many vectors of the
            periodic cell. `displacements` uses them, attention does not; `&` and `|` drop them as they do values.
        search_radius: the r of `Graph.radius`, or None: all pairs up to so far apart are edges. Layers between
            points refuse a graph of a smaller radius than their own.

    Example:
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [2, 2]]), num_nodes=3)
        >>> graph  # node 2 attends to nodes 0 and 1
        Graph(num_queries=3, num_keys=3, num_edges=2)
        >>> graph.query_offsets
        tensor([0, 0, 0, 2])
        >>> other = Graph.from_edge_index(torch.tensor([[2, 1], [0, 2]]), num_nodes=3)
        >>> (graph | other).edge_index
        tensor([[2, 0, 1],
                [0, 2, 2]])
        >>> (graph & other).edge_index
        tensor([[1],
                [2]])
    """

    edge_index: Tensor
    query_offsets: Tensor
    keys_by_query: Tensor
    edges_by_query: Tensor
    key_offsets: Tensor
    queries_by_key: Tensor
    edges_by_key: Tensor
    values: Tensor | None = None
    shifts: Tensor | None = None
    search_radius: float | None = None

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        num_nodes: int | None = None,
        *,
        num_queries: int | None = None,
        num_keys: int | None = None,
        values: Tensor | None = None,
        shifts: Tensor | None = None,
    ) -> Graph:
        """A Graph from an edge list, PyTorch Geometric's way round.

        Args:
            edge_index: `(2, edges)` int64; row 0 = source = key, row 1 = target = query. A copy is kept.
            num_nodes: number of nodes, when queries and keys are the same ones. It is never read off the
                edges: the last nodes may be isolated.
            num_queries, num_keys: the two numbers of a bipartite graph, in place of num_nodes.
            values: `(edges,)`, kept as `graph.values`; not a copy.
            shifts: `(edges, dim)` int64, kept as `graph.shifts`, not a copy: another library's neighbour list, say.

        Raises:
            GraphStructureError: an index outside its range, or no number of nodes, or two.
            InvalidInputError: `edge_index` is not an int64 tensor.
            DimensionMismatchError: `edge_index` is not `(2, edges)`.

        Cost: a stable counting sort each way, O(edges + nodes); 48 bytes per edge.

        Example:
            >>> Graph.from_edge_index(torch.tensor([[0, 1], [0, 0]]), num_queries=1, num_keys=2)
            Graph(num_queries=1, num_keys=2, num_edges=2)
        """
        require_edge_index(edge_index)
        queries, keys = require_nodes(edge_index, num_nodes, num_queries, num_keys)
        require_values_and_shifts(values, shifts, edge_index)
        with allocation_failures_named():
            return cls.of_known(own_edges(edge_index), queries, keys, values, shifts)

    @classmethod
    def of_known(
        cls,
        edge_index: Tensor,
        num_queries: int,
        num_keys: int,
        values: Tensor | None = None,
        shifts: Tensor | None = None,
        search_radius: float | None = None,
    ) -> Graph:
        """`from_edge_index` of edges that are known to be right, and the Graph's own, who shares their memory."""
        with allocation_failures_named():
            arrays = sorted_arrays(edge_index, num_queries, num_keys)
            return cls(*arrays, values=values, shifts=shifts, search_radius=search_radius)

    @classmethod
    def from_rows(cls, keys: Tensor, num_keys: int) -> Graph:
        """An edge from each of `keys[i]`, `(num_queries, k)` int64, to query i, in order; indices are in range."""
        return cls(*row_arrays(keys, num_keys))

    @classmethod
    def all_pairs(cls, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Graph:
        """Every pair as an edge, by query, then key; nothing needs to be sorted."""
        return cls(*all_pairs_arrays(num_queries, num_keys, device))

    def edges_as_keys(self) -> Graph:
        """The same queries and edges, each edge from a key of its own, with their `values` and `shifts`."""
        return Graph(*edges_as_keys_arrays(self), values=self.values, shifts=self.shifts)

    @classmethod
    def from_adjacency(cls, adjacency: Any) -> Graph:
        """A Graph from a matrix A: query i attends to key j where `A[i, j]` is there.

        Args:
            adjacency: `(num_queries, num_keys)`: a scipy sparse matrix or array, a torch sparse CSR, CSC or COO
                tensor (stored entries, explicit zeros included; duplicates of scipy and COO added up), or a dense
                matrix (non-zero entries). Note the direction: rows attend to columns. `from_edge_index` reads source,
                then target.

        Returns:
            The Graph with `values`; edges by row, then column. CSR and CSC: as the matrix stores them, after
            scipy's own sorting where its indices are unsorted.

        Raises:
            SparseMatrixError: another layout, or offsets and indices that do not fit.
            DimensionMismatchError: not a matrix.

        Example:
            >>> Graph.from_adjacency(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).edge_index
            tensor([[1],
                    [0]])
        """
        rows, columns, values, (num_rows, num_columns) = read_adjacency(adjacency)
        try:
            edge_index = torch.stack([columns, rows])
            return cls.from_edge_index(edge_index, num_queries=num_rows, num_keys=num_columns, values=values)
        except GraphStructureError as outside:
            raise SparseMatrixError(f"adjacency: {outside}", argument="adjacency") from outside

    @classmethod
    def from_networkx(cls, graph: Any) -> Graph:
        """A Graph from a networkx graph: an edge u -> v means that v attends to u.

        An undirected edge gives both directions. Nodes are numbered in networkx's order; the edge attribute
        "weight" (1 where absent) becomes `values`; parallel edges become one, their weights added up.
        Equal to `from_adjacency(A.T)` for networkx's adjacency matrix A.

        Raises:
            InvalidInputError: not a networkx graph.
            MissingExtraError: networkx or scipy is not installed.

        Example:
            >>> import networkx
            >>> Graph.from_networkx(networkx.DiGraph([("u", "v")])).edge_index
            tensor([[0],
                    [1]])
        """
        return cls.from_adjacency(read_networkx(graph))

    @classmethod
    def expander(
        cls, num_nodes: int, degree: int, *, sizes: Sizes | None = None, generator: torch.Generator | None = None
    ) -> Graph:
        """A random regular graph, few steps between any two nodes: degree / 2 random Hamiltonian cycles, both ways.

        An edge that two cycles share is there twice. A graph of a single node has no edges.

        Args:
            num_nodes, degree: number of nodes; of edges to each node and from it, an even one.
            sizes: number of nodes of each of several graphs, which have cycles of their own.
            generator: a torch.Generator of the CPU; None is PyTorch's own.

        Raises:
            InvalidInputError, DimensionMismatchError: an argument does not fit.

        Example:
            >>> Graph.expander(100, 6, generator=torch.Generator().manual_seed(0))
            Graph(num_queries=100, num_keys=100, num_edges=600)
        """
        count = require_count("num_nodes", num_nodes, 0)
        return cls.of_known(regular_edges(graph_sizes(count, sizes), degree, generator), count, count)

    @classmethod
    def batch(cls, graphs: Sequence[Graph]) -> Graph:
        """Several graphs as one block-diagonal Graph, edges one graph after the other.

        Args:
            graphs: any number, all on one device; nothing is sorted again. `values` are kept when every graph has
                them, `shifts` when one has (0 in the others), and the least `search_radius` there is.

        Raises:
            InvalidInputError: an item is not a Graph, or the devices differ.
            GraphStructureError: shifts of several dimensions.

        Example:
            >>> one = Graph.from_edge_index(torch.tensor([[0], [1]]), num_nodes=2)
            >>> Graph.batch([one, one]).edge_index
            tensor([[0, 2],
                    [1, 3]])
        """
        return cls(*joined_arrays(graphs), search_radius=joined_radius(graphs))

    def with_self_loops(self, *, fill: float = 1.0) -> Graph:
        """This graph plus one edge i -> i for each node that has none.

        The new edges stand after the caller's, in the order of their nodes. An edge to an image of the node itself is
        no self-loop; the new edges have shift 0. Edge features of the caller's are extended by as many rows as edges
        were added, as in the example.

        Args:
            fill: the value of the new edges where the graph has `values`, in whose dtype it is kept; without them it
                has no effect. Derivatives of the other values are kept.

        Raises:
            GraphStructureError: queries and keys are different sets.
            InvalidInputError: fill is no finite number, or none that the values' dtype holds.

        Example:
            >>> graph = Graph.from_edge_index(torch.tensor([[1, 2], [0, 2]]), num_nodes=3)
            >>> looped = graph.with_self_loops()
            >>> looped.edge_index
            tensor([[1, 2, 0, 1],
                    [0, 2, 0, 1]])
            >>> features = torch.tensor([[5.0], [6.0]])
            >>> torch.cat([features, features.new_zeros(looped.num_edges - graph.num_edges, 1)]).flatten()
            tensor([5., 6., 0., 0.])
        """
        edge_index, values, shifts = loops_added(self, fill)
        return Graph.of_known(edge_index, self.num_queries, self.num_keys, values, shifts, self.search_radius)

    def reorder(self, method: ReorderMethod) -> tuple[Graph, Tensor]:
        """This graph with its nodes numbered anew, so that neighbours lie close to each other in memory; the numbers.

        Node i of the new graph is node `order[i]` of this one: `x[order]` are the features in the new order, and
        `output[torch.argsort(order)]` are outputs in the old one. Edges keep their places, and so do edge features.

        Args:
            method: "rcm" (reverse Cuthill-McKee, of the graph without directions), "degree" (most edges first) or
                "metis" (cut by METIS into parts that fit a core's cache, one after the other).

        Raises:
            InvalidInputError: another method. GraphStructureError: queries and keys are different sets.
            MissingExtraError: scipy ("rcm") or pymetis ("metis") is not installed (the extra "graphs").

        Example:
            >>> path = Graph.from_edge_index(torch.tensor([[0, 2, 4, 1], [2, 4, 1, 3]]), num_nodes=5)
            >>> reordered, order = path.reorder("rcm")
            >>> (reordered.key_index - reordered.query_index).abs()
            tensor([1, 1, 1, 1])
            >>> torch.equal(order[reordered.edge_index], path.edge_index)
            True
        """
        order, edge_index = reordered(self, method)
        sizes = (self.num_queries, self.num_keys)
        return Graph.of_known(edge_index, *sizes, self.values, self.shifts, self.search_radius), order

    def sample(
        self,
        seeds: Tensor,
        fanouts: Sequence[int],
        *,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SampledGraph:
        """Nodes with some of their neighbours, these with some of theirs, and so on: a mini-batch of a large graph.

        Each node that is found draws among its edges once, without replacement; all sets of edges are equally likely.

        Args:
            seeds: `(seeds,)` integers, each node once.
            fanouts: for each hop, from the seeds on, the most edges of a node; -1 for all. One for each layer.
            weights: `(edges,)` floating, finite, >= 0, in the caller's order: one edge after the other is drawn, with
                odds in proportion to its weight; those of weight 0, or below the smallest normal number, never are.
            generator: gives one number, on which all draws depend, on any number of threads; else PyTorch's own.

        Returns:
            The SampledGraph, without `values` and `shifts`: `graph.values[sampled.edges[0]]` are those of its edges.

        Raises:
            GraphStructureError: seeds that are no nodes, or there twice; queries and keys are different sets.
            InvalidInputError, DimensionMismatchError, UnsupportedError: what is no input; a graph not on the CPU.

        Cost: O(nodes and edges that are found), with weights O(edges); 4 bytes for each node, kept for the thread.

        Example:
            >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 3], [0, 0, 1]]), num_nodes=4)
            >>> graph.sample(torch.tensor([0]), [2, 1])
            SampledGraph(num_seeds=1, num_nodes=4, num_edges=(3, 2))
        """
        return sample_graph(self, seeds, fanouts, weights, generator)

    def to_graph(
        self,
        num_queries: int | None = None,
        num_keys: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Graph:
        """This graph, on the device."""
        require_sizes(self, num_queries, num_keys)
        return self if device is None else self.to(device)

    def to(self, device: torch.device | str) -> Graph:
        """This graph with its tensors on the device; itself where they are there already."""
        if self.device == torch.device(device):
            return self
        return Graph(*moved_arrays(self, device), search_radius=self.search_radius)

    @overload
    def __and__(self, other: Graph) -> Graph: ...
    @overload
    def __and__(self, other: Pattern) -> Pattern: ...
    def __and__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Graph):
            return super().__and__(other)
        return Graph.of_known(shared_pairs(self, other), self.num_queries, self.num_keys)

    @overload
    def __or__(self, other: Graph) -> Graph: ...
    @overload
    def __or__(self, other: Pattern) -> Pattern: ...
    def __or__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Graph):
            return super().__or__(other)
        return Graph.of_known(united_pairs(self, other), self.num_queries, self.num_keys)

    def __setstate__(self, state: object) -> None:
        # A file can hold anything, and kernels read what the arrays say.
        vars(self).update(checked_state(Graph, state))


register_with_pytree(Graph)
