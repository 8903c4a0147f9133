"""A Graph's arrays, as operators take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from weakref import WeakKeyDictionary

from torch import Tensor

from anyattention.ambient import Moment, is_compiling, moment_of, shielded
from anyattention.native.structures import Indices, Part
from anyattention.patterns import Graph

__all__ = ["GraphArrays", "arrays_of"]


_kept: WeakKeyDictionary[Graph, GraphArrays] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class GraphArrays(Part):
    """The edges as compressed rows, one for each query, their transpose, and the ends of each edge; see `Graph`."""

    query_offsets: Annotated[Tensor, Indices("num_queries+1")]
    keys_by_query: Annotated[Tensor, Indices("num_edges")]
    edges_by_query: Annotated[Tensor, Indices("num_edges")]
    key_offsets: Annotated[Tensor, Indices("num_keys+1")]
    queries_by_key: Annotated[Tensor, Indices("num_edges")]
    edges_by_key: Annotated[Tensor, Indices("num_edges")]
    query_index: Annotated[Tensor, Indices("num_edges")]
    key_index: Annotated[Tensor, Indices("num_edges")]

    @property
    def transposed(self) -> GraphArrays:
        """The same edges, queries and keys exchanged."""
        return GraphArrays(
            query_offsets=self.key_offsets,
            keys_by_query=self.queries_by_key,
            edges_by_query=self.edges_by_key,
            key_offsets=self.query_offsets,
            queries_by_key=self.keys_by_query,
            edges_by_key=self.edges_by_query,
            query_index=self.key_index,
            key_index=self.query_index,
        )

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return self.query_index.shape[0]


def arrays_of(graph: Graph) -> GraphArrays:
    """A Graph as operators take it; kept while the Graph lives, whose fields never change."""
    arrays = None if is_compiling() else _kept.get(graph)
    if arrays is not None:
        return arrays
    if moment_of((graph.edge_index,)) is not Moment.PLAIN:
        return _made(graph)
    with shielded():
        arrays = _kept[graph] = _made(graph)
    return arrays


def _made(graph: Graph) -> GraphArrays:
    key_index, query_index = graph.edge_index
    return GraphArrays(
        graph.query_offsets,
        graph.keys_by_query,
        graph.edges_by_query,
        graph.key_offsets,
        graph.queries_by_key,
        graph.edges_by_key,
        query_index,
        key_index,
    )
