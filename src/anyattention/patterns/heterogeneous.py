"""HeterogeneousGraph: nodes and edges of several types, and the one Graph that all of its edges make together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import Relation, allocation_failures_named, require_device, require_relation
from anyattention.ambient import Moment, lasting, moment_of
from anyattention.errors import AttentionError, GraphStructureError, InvalidInputError
from anyattention.patterns.graph import Graph
from anyattention.patterns.graph_arrays import own_edges, require_edge_index, require_nodes
from anyattention.patterns.heterogeneous_pytree import register_with_pytree
from anyattention.patterns.sampled_heterogeneous import (
    SampledHeterogeneousGraph,
    require_typed_fanouts,
    require_typed_seeds,
    sample_typed_rows,
    typed_rows_of,
)
from anyattention.patterns.sampling import draw_seed

__all__ = ["HeterogeneousGraph"]


@dataclass(frozen=True, eq=False, repr=False)
class HeterogeneousGraph:
    """Nodes and edges of several types: an edge list for each relation (type of sources, name, type of targets).

    Build one with `from_edge_index` or `from_data`; the constructor itself checks nothing. Its tensors must not be
    changed.

    Attributes:
        num_nodes: the number of nodes of each type; the order of the types is its order.
        edge_index: `(2, edges)` int64 of each relation, row 0 = source = key, row 1 = target = query; each end is
            counted within its type.
        num_queries: of each type how many nodes attend, the first ones, and no edge ends in another; all of them unless
            the graph is a block of a sample.

    Example:
        >>> graph = HeterogeneousGraph.from_edge_index(
        ...     {("author", "writes", "paper"): torch.tensor([[0, 1, 1], [0, 0, 2]])}, {"author": 2, "paper": 3}
        ... )
        >>> graph
        HeterogeneousGraph(author=2, paper=3, author-writes-paper=3)
        >>> graph["author", "writes", "paper"]
        Graph(num_queries=3, num_keys=2, num_edges=3)
    """

    num_nodes: Mapping[str, int]
    edge_index: Mapping[Relation, Tensor]
    num_queries: Mapping[str, int] = None  # pyright: ignore[reportAssignmentType]  # those of num_nodes
    # By whether relations have targets of their own.
    _joined: dict[bool, Graph] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # What was joined would not follow a change.
        all_attend = self.num_queries is None or self.num_queries is self.num_nodes
        object.__setattr__(self, "num_nodes", MappingProxyType(dict(self.num_nodes)))
        object.__setattr__(self, "edge_index", MappingProxyType(dict(self.edge_index)))
        queries = self.num_nodes if all_attend else MappingProxyType(dict(self.num_queries))
        object.__setattr__(self, "num_queries", queries)

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Mapping[Relation, Tensor],
        num_nodes: Mapping[str, int],
        *,
        num_queries: Mapping[str, int] | None = None,
    ) -> HeterogeneousGraph:
        """A HeterogeneousGraph from an edge list for each relation.

        Args:
            edge_index: `(2, edges)` int64 for each (type of sources, name, type of targets), as in PyTorch Geometric's
                `edge_index_dict`. Copies are kept. A relation may have no edges.
            num_nodes: the number of nodes of each type, 0 too. It is never read off the edges.
            num_queries: of each type how many of its nodes attend, the first ones; None for all.

        Raises:
            GraphStructureError: an index outside its range, a type without a number, no relation as key, or no
                number of nodes.
            InvalidInputError: an edge list is no int64 tensor, or lies on another device than the first.
            DimensionMismatchError: an edge list is not `(2, edges)`.

        Example:
            >>> HeterogeneousGraph.from_edge_index({("a", "to", "a"): torch.tensor([[0], [1]])}, {"a": 2})
            HeterogeneousGraph(a=2, a-to-a=1)
        """
        counts = _read_counts("num_nodes", num_nodes)
        queries = counts if num_queries is None else _read_queries(num_queries, counts)
        if not isinstance(edge_index, Mapping):
            raise InvalidInputError(
                argument="edge_index",
                expected="a dictionary of edge lists, by relation",
                actual=type(edge_index).__name__,
            )
        lists: dict[Relation, Tensor] = {}
        for key, edges in edge_index.items():
            relation = require_relation("edge_index", key, GraphStructureError)
            for node_type in (relation[0], relation[2]):
                if node_type not in counts:
                    raise GraphStructureError(
                        argument=f"edge_index[{relation}]",
                        expected="node types of num_nodes: " + ", ".join(map(repr, counts)),
                        actual=repr(node_type),
                    )
            try:
                require_edge_index(edges)
                require_nodes(edges, None, queries[relation[2]], counts[relation[0]])
            except AttentionError as fault:
                raise type(fault)(
                    f"edge_index[{relation}]: {fault}",
                    argument=f"edge_index[{relation}]",
                    expected=fault.expected,
                    actual=fault.actual,
                ) from None
            if lists:
                require_device(
                    f"edge_index[{relation}]", edges, next(iter(lists.values())).device, "the first relation"
                )
            with allocation_failures_named():
                lists[relation] = own_edges(edges)
        graph = cls(counts, lists, queries)
        if max(graph.joint_sizes(by_relation=True)) > 2**59:
            raise GraphStructureError(
                argument="num_nodes",
                expected="at most 2^59 nodes, each counted for each of its relations",
                actual=max(graph.joint_sizes(by_relation=True)),
            )
        return graph

    @classmethod
    def from_data(cls, data: Any) -> HeterogeneousGraph:
        """The HeterogeneousGraph of a PyTorch Geometric `HeteroData`, with its `num_nodes` and `edge_index` by type.

        Raises:
            InvalidInputError: another object, or a type of nodes that does not say how many they are.
            GraphStructureError, DimensionMismatchError: as `from_edge_index`.
        """
        if not hasattr(data, "node_types") or not hasattr(data, "edge_types"):
            raise InvalidInputError(argument="data", expected="a HeteroData", actual=type(data).__name__)
        edges = {relation: data[relation].get("edge_index") for relation in data.edge_types}
        for relation, each in edges.items():
            if each is None:
                raise InvalidInputError(
                    argument="data",
                    expected="an edge_index of each relation",
                    actual=f"none of {relation}",
                    hint="Graph.from_adjacency(adj_t).edge_index is that of a matrix adj_t",
                )
        counts = {node_type: data[node_type].num_nodes for node_type in data.node_types}
        return cls.from_edge_index(edges, counts)

    @property
    def node_types(self) -> tuple[str, ...]:
        """The types of nodes, in order."""
        return tuple(self.num_nodes)

    @property
    def relations(self) -> tuple[Relation, ...]:
        """The relations, in order."""
        return tuple(self.edge_index)

    @property
    def num_edges(self) -> int:
        """Number of edges of all relations."""
        return sum(edges.shape[1] for edges in self.edge_index.values())

    @property
    def device(self) -> torch.device:
        """Where the edge lists are."""
        return next((edges.device for edges in self.edge_index.values()), torch.device("cpu"))

    def outgoing(self, node_type: str) -> tuple[Relation, ...]:
        """The relations whose sources are nodes of a type."""
        return tuple(relation for relation in self.edge_index if relation[0] == node_type)

    def incoming(self, node_type: str) -> tuple[Relation, ...]:
        """The relations whose targets are nodes of a type."""
        return tuple(relation for relation in self.edge_index if relation[2] == node_type)

    def __getitem__(self, relation: Relation) -> Graph:
        """The Graph of one relation; sorted in each call."""
        relation = require_relation("relation", relation, GraphStructureError)
        if relation not in self.edge_index:
            raise GraphStructureError(
                argument="relation", expected="one of " + ", ".join(map(str, self.edge_index)), actual=str(relation)
            )
        source, _, target = relation
        return Graph.of_known(self.edge_index[relation], self.num_queries[target], self.num_nodes[source])

    def joint(self, *, by_relation: bool = False) -> Graph:
        """All edges as one Graph, whose edges are those of the relations one after the other.

        Its keys are a row for each source node and relation: type after type, in each node after node, in each the
        relations of `outgoing(type)`. Its queries are the first `num_queries` nodes, type after type, of the types that
        have `incoming` relations; or, by relation, a row for each of them and relation, as for the sources.

        Cost: two counting sorts, once; kept.

        Example:
            >>> edges = torch.tensor([[0], [1]])
            >>> relations = {("a", "to", "b"): edges, ("a", "of", "b"): edges}
            >>> graph = HeterogeneousGraph.from_edge_index(relations, {"a": 2, "b": 2})
            >>> graph.joint().edge_index
            tensor([[0, 1],
                    [1, 1]])
            >>> graph.joint(by_relation=True).edge_index
            tensor([[0, 1],
                    [2, 3]])
        """
        if by_relation in self._joined:
            return self._joined[by_relation]
        graph = _joint(self, by_relation)
        # What is made under a mode or a transform is no Graph to keep.
        if moment_of(self.edge_index.values()) is Moment.PLAIN:
            self._joined[by_relation] = graph
        return graph

    def with_joint(self, joint: Graph, *, by_relation: bool = False) -> HeterogeneousGraph:
        """This graph, whose `joint(by_relation=by_relation)` is known to be one."""
        known = HeterogeneousGraph(self.num_nodes, self.edge_index, self.num_queries)
        known._joined[by_relation] = joint
        return known

    def joint_sizes(self, *, by_relation: bool = False) -> tuple[int, int]:
        """The numbers of queries and keys of `joint(by_relation=by_relation)`."""
        return _places(self, 2, by_relation)[1], _places(self, 0, True)[1]

    def by_relation(self, numbers: Tensor, dim: int = 0) -> dict[Relation, Tensor]:
        """What `joint()` has for each edge along an axis, as views by relation, in the caller's edge order."""
        sizes = [edges.shape[1] for edges in self.edge_index.values()]
        return dict(zip(self.edge_index, numbers.split(sizes, dim), strict=True))

    def with_reverse(self, prefix: str = "rev_") -> HeterogeneousGraph:
        """This graph, and for each relation (a, name, b) its edges the other way round, as (b, prefix + name, a).

        All nodes attend in it.

        Raises:
            GraphStructureError: there is such a relation already, or the prefix is no string.

        Example:
            >>> edges = {("a", "to", "b"): torch.tensor([[0], [2]])}
            >>> graph = HeterogeneousGraph.from_edge_index(edges, {"a": 1, "b": 3})
            >>> graph.with_reverse().relations
            (('a', 'to', 'b'), ('b', 'rev_to', 'a'))
        """
        if not isinstance(prefix, str):
            raise GraphStructureError(argument="prefix", expected="a string", actual=repr(prefix))
        edges = dict(self.edge_index)
        for (source, name, target), each in self.edge_index.items():
            reverse = (target, prefix + name, source)
            if reverse in edges:
                raise GraphStructureError(argument="prefix", expected="one that makes new names", actual=str(reverse))
            with lasting(each):
                edges[reverse] = each.flip(0)
        return HeterogeneousGraph(self.num_nodes, edges)

    def sample(
        self,
        seeds: Mapping[str, Tensor],
        fanouts: Sequence[int] | Mapping[Relation, Sequence[int]],
        *,
        weights: Mapping[Relation, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> SampledHeterogeneousGraph:
        """Nodes with some of their neighbours, these with some of theirs, and so on, as in `Graph.sample`.

        Each node that is found draws once among its edges of each relation that ends in its type.

        Args:
            seeds: `(seeds,)` integers of some types, each node once.
            fanouts: for each hop, from the seeds on, the most edges of a node in each relation; -1 for all. Or such a
                list for each relation that is followed.
            weights: `(edges,)` of some relations, as in `Graph.sample`.
            generator: gives one number, on which all draws depend; else PyTorch's own.

        Raises:
            GraphStructureError, InvalidInputError, DimensionMismatchError, UnsupportedError: as in `Graph.sample`, and
                for types and relations that are none of the graph's.

        Cost: a counting sort of all edges in each call, then as `Graph.sample`. A `NeighborLoader` sorts them once.

        Example:
            >>> edges = {("a", "to", "b"): torch.tensor([[0, 1, 2], [0, 0, 1]])}
            >>> graph = HeterogeneousGraph.from_edge_index(edges, {"a": 3, "b": 2})
            >>> graph.sample({"b": torch.tensor([1])}, [2])
            SampledHeterogeneousGraph(a=1, b=1, num_edges=(1,))
        """
        rows = typed_rows_of(self, weights)
        given = require_typed_seeds(seeds, self.num_nodes)
        wanted = require_typed_fanouts(fanouts, self.relations)
        return sample_typed_rows(rows, self.num_nodes, given, wanted, draw_seed(generator))

    def to(self, device: torch.device | str) -> HeterogeneousGraph:
        """This graph with its tensors on the device; itself where they are there already."""
        if self.device == torch.device(device):
            return self
        with lasting(*self.edge_index.values()):
            edges = {key: each.to(device) for key, each in self.edge_index.items()}
            return HeterogeneousGraph(self.num_nodes, edges, self.num_queries)

    def __repr__(self) -> str:
        nodes = [f"{node_type}={count}" for node_type, count in self.num_nodes.items()]
        edges = [f"{'-'.join(relation)}={each.shape[1]}" for relation, each in self.edge_index.items()]
        return f"HeterogeneousGraph({', '.join(nodes + edges)})"

    def __getstate__(self) -> dict[str, Any]:
        counts = {"num_nodes": dict(self.num_nodes), "num_queries": dict(self.num_queries)}
        return {**counts, "edge_index": dict(self.edge_index)}

    def __setstate__(self, state: Any) -> None:
        # A file can hold anything, and kernels read what the arrays say.
        if not isinstance(state, dict) or state.keys() != {"num_nodes", "num_queries", "edge_index"}:
            raise GraphStructureError(
                argument="state", expected="num_nodes, num_queries and edge_index", actual=type(state).__name__
            )
        given = (state["edge_index"], state["num_nodes"])
        checked = HeterogeneousGraph.from_edge_index(*given, num_queries=state["num_queries"])
        vars(self).update(vars(checked))


def _read_counts(argument: str, num_nodes: object) -> dict[str, int]:
    if not isinstance(num_nodes, Mapping):
        raise GraphStructureError(
            argument=argument,
            expected="a dictionary of numbers of nodes, by type",
            actual=type(num_nodes).__name__,
            hint="isolated nodes cannot be read off the edges",
        )
    nothing = torch.empty(2, 0, dtype=torch.int64, device="cpu")
    counts = {}
    for node_type, count in num_nodes.items():
        if not isinstance(node_type, str):
            raise GraphStructureError(argument=argument, expected="types named by strings", actual=repr(node_type))
        try:
            counts[node_type], _ = require_nodes(nothing, None, count, 0)
        except GraphStructureError as fault:
            name = f"{argument}[{node_type!r}]"
            raise GraphStructureError(argument=name, expected="an int >= 0, up to 2^59", actual=repr(count)) from fault
    return counts


def _read_queries(num_queries: object, counts: dict[str, int]) -> dict[str, int]:
    queries = _read_counts("num_queries", num_queries)
    if queries.keys() != counts.keys() or any(queries[each] > count for each, count in counts.items()):
        expected = ", ".join(f"{node_type!r}: {count} at most" for node_type, count in counts.items())
        raise GraphStructureError(argument="num_queries", expected=expected or "no types", actual=str(queries))
    return counts if queries == counts else {node_type: queries[node_type] for node_type in counts}


def _joint(graph: HeterogeneousGraph, by_relation: bool) -> Graph:
    keys, num_keys = _places(graph, 0, True)
    queries, num_queries = _places(graph, 2, by_relation)
    device = graph.device
    with lasting(*graph.edge_index.values()), allocation_failures_named():
        parts = [torch.empty(2, 0, dtype=torch.int64, device=device)]
        for relation, edges in graph.edge_index.items():
            (key, keys_apart), (query, queries_apart) = keys[relation], queries[relation]
            parts.append(torch.stack([edges[0] * keys_apart + key, edges[1] * queries_apart + query]))
        joined = torch.cat(parts, dim=1)
    return Graph.of_known(joined, num_queries, num_keys)


def _places(graph: HeterogeneousGraph, end: int, by_relation: bool) -> tuple[dict[Relation, tuple[int, int]], int]:
    """For each relation the row of its first node at an end, and the rows from node to node; and the number of rows."""
    places, first = {}, 0
    for node_type, count in (graph.num_queries if end == 2 else graph.num_nodes).items():
        relations = [relation for relation in graph.edge_index if relation[end] == node_type]
        apart = len(relations) if by_relation else min(len(relations), 1)
        for slot, relation in enumerate(relations):
            places[relation] = (first + slot * by_relation, apart)
        first += count * apart
    return places, first


register_with_pytree(HeterogeneousGraph)
