"""Graph: an explicit pattern, kept as an edge list, as compressed rows and as their transpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from anyattention import _native
from anyattention._checks import allocation_failures_named, describe_shape, require_dense, require_device
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidInputError,
    SparseMatrixError,
)
from anyattention.patterns.adjacency import read_adjacency, read_networkx
from anyattention.patterns.base import Pattern
from anyattention.patterns.spans import Spans

__all__ = ["Graph"]


@dataclass(frozen=True, eq=False, repr=False)
class Graph(Pattern):
    """The (query, key) pairs of a graph: a multiset, in the caller's edge order.

    Build one with `from_edge_index`, `from_adjacency`, `from_networkx` or `batch`; the constructor itself
    checks nothing.

    Attributes:
        edge_index: `(2, edges)` int64; row 0 = source = key, row 1 = target = query.
        query_offsets: `(num_queries + 1,)` int64; the slots of query i are `query_offsets[i]` to
            `query_offsets[i + 1]`.
        keys_by_query: `(edges,)` int64; the key of each slot, slots ordered by query, then caller's order.
        edges_by_query: `(edges,)` int64; the caller's position of the edge in each slot.
        key_offsets, queries_by_key, edges_by_key: the same for the transpose, slots ordered by key.
        values: `(edges,)` the entries of the adjacency matrix it came from, or None. Nothing uses them
            unless they are passed on as bias or edge features.

    Example:
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [2, 2]]), num_nodes=3)
        >>> graph  # node 2 attends to nodes 0 and 1
        Graph(num_queries=3, num_keys=3, num_edges=2)
        >>> graph.query_offsets
        tensor([0, 0, 0, 2])
    """

    edge_index: Tensor
    query_offsets: Tensor
    keys_by_query: Tensor
    edges_by_query: Tensor
    key_offsets: Tensor
    queries_by_key: Tensor
    edges_by_key: Tensor
    values: Tensor | None = None

    @property
    def num_queries(self) -> int:
        """Number of queries, isolated ones included."""
        return self.query_offsets.shape[0] - 1

    @property
    def num_keys(self) -> int:
        """Number of keys, unused ones included."""
        return self.key_offsets.shape[0] - 1

    @property
    def num_edges(self) -> int:
        """Number of edges; a duplicate counts again."""
        return self.edge_index.shape[1]

    @property
    def key_index(self) -> Tensor:
        """`(edges,)` int64: the key (source) of each edge, in the caller's order."""
        return self.edge_index[0]

    @property
    def query_index(self) -> Tensor:
        """`(edges,)` int64: the query (target) of each edge, in the caller's order."""
        return self.edge_index[1]

    @property
    def device(self) -> torch.device:
        """Where the index arrays are."""
        return self.edge_index.device

    def __repr__(self) -> str:
        return f"Graph(num_queries={self.num_queries}, num_keys={self.num_keys}, num_edges={self.num_edges})"

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        num_nodes: int | None = None,
        *,
        num_queries: int | None = None,
        num_keys: int | None = None,
        values: Tensor | None = None,
    ) -> Graph:
        """A Graph from an edge list, PyTorch Geometric's way round.

        Args:
            edge_index: `(2, edges)` int64; row 0 = source = key, row 1 = target = query. Where it is contiguous the
                Graph shares its memory, so do not change it in place afterwards.
            num_nodes: number of nodes, when queries and keys are the same ones. It is never read off the
                edges: the last nodes may be isolated.
            num_queries, num_keys: the two numbers of a bipartite graph, in place of num_nodes.
            values: `(edges,)`, kept as `graph.values`.

        Raises:
            GraphStructureError: an index outside its range, or no number of nodes, or two.
            InvalidInputError: `edge_index` is not an int64 tensor.
            DimensionMismatchError: `edge_index` is not `(2, edges)`.

        Cost: a stable counting sort each way, O(edges + nodes); 48 bytes per edge.

        Example:
            >>> Graph.from_edge_index(torch.tensor([[0, 1], [0, 0]]), num_queries=1, num_keys=2)
            Graph(num_queries=1, num_keys=2, num_edges=2)
        """
        require_dense("edge_index", edge_index)
        if edge_index.device.type == "meta":
            raise InvalidInputError(argument="edge_index", expected="a device with data", actual=edge_index.device)
        if edge_index.dtype != torch.int64:
            raise InvalidInputError(argument="edge_index", expected="torch.int64", actual=edge_index.dtype)
        if edge_index.ndim != 2 or edge_index.shape[0] != 2:
            raise DimensionMismatchError(
                argument="edge_index", expected="(2, edges)", actual=describe_shape(edge_index)
            )
        if num_nodes is not None:
            if num_queries is not None or num_keys is not None:
                raise GraphStructureError(
                    argument="num_nodes",
                    expected="None beside num_queries and num_keys",
                    actual=num_nodes,
                )
            num_queries = num_keys = num_nodes
        queries = _require_count("num_queries", num_queries)
        keys = _require_count("num_keys", num_keys)
        _require_range("source (key)", edge_index[0], keys)
        _require_range("target (query)", edge_index[1], queries)
        if values is not None:
            require_dense("values", values)
            require_device("values", values, edge_index.device, "edge_index")
            if values.shape != edge_index.shape[1:]:
                raise DimensionMismatchError(
                    argument="values",
                    expected=f"(edges={edge_index.shape[1]},)",
                    actual=describe_shape(values),
                )
        # Kernels read both rows; a transposed list of pairs would have them interleaved.
        edge_index = edge_index.contiguous()
        key_index, query_index = edge_index[0], edge_index[1]
        with allocation_failures_named():
            by_query = _compressed_rows(query_index, key_index, queries, keys)
            by_key = _compressed_rows(key_index, query_index, keys, queries)
        return cls(edge_index, *by_query, *by_key, values)

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
            SparseMatrixError: another layout, or offsets and indices that do not fit each other.
            DimensionMismatchError: not a matrix.

        Example:
            >>> Graph.from_adjacency(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).edge_index
            tensor([[1],
                    [0]])
        """
        rows, columns, values, (num_rows, num_columns) = read_adjacency(adjacency)
        try:
            return cls.from_edge_index(
                torch.stack([columns, rows]),
                num_queries=num_rows,
                num_keys=num_columns,
                values=values,
            )
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
    def batch(cls, graphs: Sequence[Graph]) -> Graph:
        """Several graphs as one block-diagonal Graph, edges one graph after the other.

        Args:
            graphs: any number, all on one device; nothing is sorted again. `values` are kept when every graph has them.

        Raises:
            InvalidInputError: an item is not a Graph, or the devices differ.

        Example:
            >>> one = Graph.from_edge_index(torch.tensor([[0], [1]]), num_nodes=2)
            >>> Graph.batch([one, one]).edge_index
            tensor([[0, 2],
                    [1, 3]])
        """
        if not isinstance(graphs, list | tuple):
            raise InvalidInputError(argument="graphs", expected="a list of Graphs", actual=type(graphs).__name__)
        for position, graph in enumerate(graphs):
            if not isinstance(graph, Graph):
                raise InvalidInputError(argument=f"graphs[{position}]", expected="a Graph", actual=type(graph).__name__)
            if graph.device != graphs[0].device:
                raise InvalidInputError(
                    argument=f"graphs[{position}]",
                    expected=f"device {graphs[0].device}, as graphs[0]",
                    actual=graph.device,
                )
        if not graphs:
            return cls.from_edge_index(torch.empty(2, 0, dtype=torch.int64), num_nodes=0)
        edges, queries, keys = 0, 0, 0
        parts: list[tuple[Tensor, ...]] = []
        for graph in graphs:
            shift = torch.tensor([[keys], [queries]], device=graph.device)
            first = 0 if not parts else 1
            parts.append(
                (
                    graph.edge_index + shift,
                    graph.query_offsets[first:] + edges,
                    graph.keys_by_query + keys,
                    graph.edges_by_query + edges,
                    graph.key_offsets[first:] + edges,
                    graph.queries_by_key + queries,
                    graph.edges_by_key + edges,
                )
            )
            edges += graph.num_edges
            queries += graph.num_queries
            keys += graph.num_keys
        values = [graph.values for graph in graphs if graph.values is not None]
        whole = torch.cat(values) if len(values) == len(graphs) else None
        joined = [torch.cat(part, dim=-1) for part in zip(*parts, strict=True)]
        return cls(*joined, values=whole)

    def with_self_loops(self) -> Graph:
        """This graph plus one edge i -> i for each node that has none, after the caller's edges; no `values`.

        Raises:
            GraphStructureError: queries and keys are different sets.

        Example:
            >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [0, 0]]), num_nodes=2)
            >>> graph.with_self_loops().edge_index
            tensor([[0, 1, 1],
                    [0, 0, 1]])
        """
        if self.num_queries != self.num_keys:
            raise GraphStructureError(
                argument="graph",
                expected="as many queries as keys for self-loops",
                actual=f"{self.num_queries} queries and {self.num_keys} keys",
            )
        missing = torch.ones(self.num_queries, dtype=torch.bool, device=self.device)
        missing[self.key_index[self.key_index == self.query_index]] = False
        loops = missing.nonzero().T.expand(2, -1)
        return Graph.from_edge_index(torch.cat([self.edge_index, loops], dim=1), num_nodes=self.num_queries)

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where there is an edge. Cost: a sort of the edges."""
        self._require_sizes(num_queries, num_keys)
        edges = torch.sort(self.query_index * num_keys + self.key_index).values
        pairs = query * num_keys + key
        if self.num_edges == 0:
            return torch.zeros_like(pairs, dtype=torch.bool)
        place = torch.searchsorted(edges, pairs).clamp(max=self.num_edges - 1)
        return edges[place] == pairs

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str | None = None) -> Spans:
        """Each pair on its own; duplicates fall together. Cost: a sort of the edges."""
        self._require_sizes(num_queries, num_keys)
        pairs = torch.unique(self.query_index * num_keys + self.key_index).to(device)
        key = pairs % max(num_keys, 1)
        return Spans.of(pairs // max(num_keys, 1), key, key)

    def is_simple(self) -> bool:
        """Whether no edge is there twice."""
        return torch.unique(self.query_index * self.num_keys + self.key_index).numel() == self.num_edges

    def to_dense(
        self,
        num_queries: int | None = None,
        num_keys: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The pairs as a boolean matrix `(num_queries, num_keys)`; duplicates fall together."""
        self._require_sizes(num_queries, num_keys)
        pairs = torch.zeros(self.num_queries, self.num_keys, dtype=torch.bool, device=self.device)
        pairs[self.query_index, self.key_index] = True
        return pairs.to(device)

    def to_graph(
        self,
        num_queries: int | None = None,
        num_keys: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Graph:
        """This graph, on the device."""
        self._require_sizes(num_queries, num_keys)
        return self if device is None else self.to(device)

    def to(self, device: torch.device | str) -> Graph:
        """This graph with its tensors on the device; itself where they are there already."""
        if self.device == torch.device(device):
            return self
        moved: list[Any] = [None if part is None else part.to(device) for part in _parts(self)]
        return Graph(*moved)

    def _require_sizes(self, num_queries: int | None, num_keys: int | None) -> None:
        asked = (self.num_queries if num_queries is None else num_queries,)
        asked += (self.num_keys if num_keys is None else num_keys,)
        if asked != (self.num_queries, self.num_keys):
            raise DimensionMismatchError(
                argument="(num_queries, num_keys)",
                expected=f"({self.num_queries}, {self.num_keys}), the graph's own",
                actual=asked,
            )


def _require_count(argument: str, count: int | None) -> int:
    if count is None:
        raise GraphStructureError(
            argument=argument,
            expected="a number of nodes",
            actual=None,
            hint="give num_nodes, or num_queries and num_keys: isolated nodes cannot be read off the edges",
        )
    # Above 2^59 the size of the offsets in bytes is no int64.
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 2**59:
        raise GraphStructureError(argument=argument, expected="an int >= 0, up to 2^59", actual=repr(count))
    return count


def _require_range(argument: str, index: Tensor, count: int) -> None:
    if index.numel() == 0:
        return
    low, high = index.aminmax()
    if low < 0 or high >= count:
        edge = int(((index < 0) | (index >= count)).nonzero()[0])
        raise GraphStructureError(
            argument=argument,
            expected=f"indices from 0 to {count - 1} ({count} nodes)",
            actual=f"{int(index[edge])} at edge {edge}",
        )


def _compressed_rows(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets `(num_rows + 1,)`, the column of each slot and the edge of each slot; ties in edge order."""
    if rows.device.type == "cpu" and _native.available():
        return _native.compressed_rows(rows, columns, num_rows, num_columns)
    edges = torch.argsort(rows, stable=True)
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=num_rows), dim=0, out=offsets[1:])
    return offsets, columns[edges], edges


def _parts(graph: Graph) -> list[Any]:
    """The fields, in order; `values` may be None."""
    return [getattr(graph, item.name) for item in fields(graph)]


def _named_parts(graph: Graph) -> tuple[list[tuple[_pytree.KeyEntry, Any]], Any]:
    """The fields with their names, for torch.export, which names its inputs."""
    named: list[tuple[Any, Any]] = [
        (_pytree.GetAttrKey(item.name), getattr(graph, item.name)) for item in fields(graph)
    ]
    return named, None


_pytree.register_pytree_node(
    Graph,
    lambda graph: (_parts(graph), None),
    lambda parts, _: Graph(*parts),
    serialized_type_name="anyattention.Graph",
    flatten_with_keys_fn=_named_parts,
)
