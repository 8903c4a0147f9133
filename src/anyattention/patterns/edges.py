"""The pairs of a pattern that lists them as edges: how many there are, which, as a matrix, and where they lead."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.geometry.displacement import edge_displacements
from anyattention.patterns.base import Pattern
from anyattention.patterns.graph_arrays import require_sizes
from anyattention.patterns.spans import Spans

__all__ = ["EdgePattern"]


class EdgePattern(Pattern):
    """A pattern whose pairs are listed as edges, between a number of queries and keys of its own; abstract.

    Example:
        >>> from anyattention import Graph
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [2, 2]]), num_nodes=3)
        >>> isinstance(graph, EdgePattern), graph.is_simple()
        (True, True)
    """

    edge_index: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    shifts: Tensor | None

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
        sizes = f"num_queries={self.num_queries}, num_keys={self.num_keys}, num_edges={self.num_edges}"
        return f"{type(self).__name__}({sizes})"

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where there is an edge. Cost: a sort of the edges."""
        require_sizes(self, num_queries, num_keys)
        edges = torch.sort(self.query_index * num_keys + self.key_index).values
        pairs = query * num_keys + key
        if self.num_edges == 0:
            return torch.zeros_like(pairs, dtype=torch.bool)
        place = torch.searchsorted(edges, pairs).clamp(max=self.num_edges - 1)
        return edges[place] == pairs

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """Each pair on its own; duplicates fall together. Cost: a sort of the edges."""
        require_sizes(self, num_queries, num_keys)
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
        require_sizes(self, num_queries, num_keys)
        pairs = torch.zeros(self.num_queries, self.num_keys, dtype=torch.bool, device=self.device)
        pairs[self.query_index, self.key_index] = True
        return pairs.to(device)

    def displacements(
        self,
        positions: Tensor,
        cell: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Tensor:
        """From query to key, for each edge: (x_key - x_query) + shift @ cell.

        Differentiable to any order in positions, queries and cell, so that forces and the stress come of it.

        Args:
            positions: `(num_keys, dim)`, floating; cell: `(dim, dim)` or `(clouds, dim, dim)`, where the graph has
                shifts; queries: `(num_queries, dim)`, where they are other points; batch: `(num_keys,)` int64, the
                cloud of each of positions, where there are several cells.

        Returns:
            `(edges, dim)`, in the caller's edge order.

        Raises:
            DimensionMismatchError, InvalidInputError, GraphStructureError: tensors that do not fit the graph.

        Example:
            >>> from anyattention import Graph
            >>> points, cell = torch.tensor([[1.0], [9.0]]), torch.tensor([[10.0]])
            >>> Graph.radius(points, 3.0, cell=cell).displacements(points, cell)
            tensor([[-2.],
                    [ 2.]])
        """
        sizes = (self.num_queries, self.num_keys)
        return edge_displacements(self.edge_index, *sizes, positions, self.shifts, cell, queries, batch)
