"""The pairs of a pattern that lists them as edges: how many there are, which, and as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

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
