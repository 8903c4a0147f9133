"""SampledHeterogeneousGraph: what was drawn around seeds of several types, as a HeterogeneousGraph for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyattention._checks import Relation, allocation_failures_named, require_relation
from anyattention.ambient import lasting, shielded
from anyattention.errors import GraphStructureError, InvalidInputError
from anyattention.native.compressed_rows import compressed_rows
from anyattention.native.neighbour_sampling import NeighbourRows
from anyattention.patterns.sampling import neighbour_rows, require_fanouts, require_seeds, walk

if TYPE_CHECKING:
    from anyattention.patterns.heterogeneous import HeterogeneousGraph

__all__ = [
    "SampledHeterogeneousGraph",
    "require_typed_fanouts",
    "require_typed_seeds",
    "sample_typed_rows",
    "typed_rows_of",
]

TypedRows = Mapping[Relation, NeighbourRows]
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class SampledHeterogeneousGraph:
    """What was drawn around seeds of several types: its nodes, and a HeterogeneousGraph for each layer.

    `HeterogeneousGraph.sample` makes one. With the features of its nodes, layers run one after the other:

        x = {kind: features[kind][ids] for kind, ids in sampled.nodes.items()}
        for place, (layer, block) in enumerate(zip(layers, sampled.blocks)):
            x = sampled.queries_of({**x, **layer(x, block).output}, place)

    and x has a row for each seed of each type in the end. `joint()` is for layers that all run over one graph.

    Attributes:
        nodes: `(nodes,)` int64 of each type, their ids in the whole graph, each once: the seeds, as they came, then the
            others in the order in which they were found.
        blocks: a HeterogeneousGraph for each layer, in the order in which layers run: that of the outermost hop first.
            Its nodes are the first of `nodes`, and the first of these attend: the next block's nodes.
        edges: for each block `(edges,)` int64 of each relation, the position of its edges in the whole graph.

    Example:
        >>> from anyattention import HeterogeneousGraph
        >>> writes, cites = torch.tensor([[0, 1, 1], [0, 0, 2]]), torch.tensor([[2], [0]])
        >>> relations = {("author", "writes", "paper"): writes, ("paper", "cites", "paper"): cites}
        >>> graph = HeterogeneousGraph.from_edge_index(relations, {"author": 2, "paper": 3})
        >>> sampled = graph.sample({"paper": torch.tensor([0])}, [-1, 1])
        >>> sampled.nodes
        {'author': tensor([0, 1]), 'paper': tensor([0, 2])}
        >>> sampled.blocks[0]
        HeterogeneousGraph(author=2, paper=2, author-writes-paper=3, paper-cites-paper=1)
        >>> sampled.blocks[1]
        HeterogeneousGraph(author=2, paper=2, author-writes-paper=2, paper-cites-paper=1)
        >>> sampled.num_seeds["paper"], sampled.blocks[0].num_queries["paper"]
        (1, 2)
    """

    nodes: Mapping[str, Tensor]
    blocks: tuple[HeterogeneousGraph, ...]
    edges: tuple[Mapping[Relation, Tensor], ...]

    @property
    def num_seeds(self) -> Mapping[str, int]:
        """Number of seeds of each type, the first of its nodes."""
        return self.blocks[-1].num_queries

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next((nodes.device for nodes in self.nodes.values()), torch.device("cpu"))

    def queries_of(self, x: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
        """Of rows of the nodes of a block by type, those that the next layer reads, or the seeds' after the last."""
        return {kind: rows[: self.blocks[place].num_queries[kind]] for kind, rows in x.items()}

    def joint(self) -> HeterogeneousGraph:
        """All that was drawn as one graph over `nodes`, over which every layer runs.

        Its edges are those of `edges[0]`. The nodes of the last hop have none.
        """
        from anyattention.patterns.heterogeneous import HeterogeneousGraph

        return HeterogeneousGraph(self.blocks[0].num_nodes, self.blocks[0].edge_index)

    def to(self, device: torch.device | str) -> SampledHeterogeneousGraph:
        """This, with its tensors on the device; itself where they are there already."""
        if self.device == torch.device(device):
            return self
        with lasting(*self.nodes.values()):
            nodes = {kind: ids.to(device) for kind, ids in self.nodes.items()}
            edges = tuple([{relation: each.to(device) for relation, each in by.items()} for by in self.edges])
        return SampledHeterogeneousGraph(nodes, tuple([block.to(device) for block in self.blocks]), edges)

    def pin_memory(self) -> SampledHeterogeneousGraph:
        """This, in pinned memory, from which a copy to an accelerator is faster."""
        from anyattention.patterns.heterogeneous import HeterogeneousGraph

        blocks = []
        for block in self.blocks:
            pinned = {key: each.pin_memory() for key, each in block.edge_index.items()}
            blocks.append(HeterogeneousGraph(block.num_nodes, pinned, block.num_queries))
        nodes = {kind: ids.pin_memory() for kind, ids in self.nodes.items()}
        edges = tuple([{relation: each.pin_memory() for relation, each in by.items()} for by in self.edges])
        return SampledHeterogeneousGraph(nodes, tuple(blocks), edges)

    def __repr__(self) -> str:
        nodes = ", ".join(f"{kind}={len(ids)}" for kind, ids in self.nodes.items())
        edges = tuple([block.num_edges for block in self.blocks])
        return f"SampledHeterogeneousGraph({nodes}, num_edges={edges})"

    def __reduce__(self) -> tuple[Any, ...]:
        # As one array in the least dtype; see SampledGraph.
        outer = self.blocks[0]
        arrays = [*self.nodes.values(), *self.edges[0].values(), *map(torch.flatten, outer.edge_index.values())]
        packed = torch.cat([torch.empty(0, dtype=torch.int64, device=self.device), *arrays]).cpu()
        if len(packed) and packed.max() <= _INT32_MAX:
            packed = packed.to(torch.int32)
        counts = [dict(block.num_nodes) for block in self.blocks] + [dict(self.num_seeds)]
        num_edges = [{relation: len(each) for relation, each in edges.items()} for edges in self.edges]
        return _unpacked, (packed.numpy(), counts, num_edges, str(self.device))


def typed_rows_of(
    graph: HeterogeneousGraph, weights: Mapping[Relation, Tensor] | None
) -> dict[Relation, NeighbourRows]:
    """What `sample_typed_rows` draws from, of each relation.

    Raises:
        GraphStructureError: the graph has no relations.
        InvalidInputError: weights of no relation of the graph, and as `neighbour_rows`.
    """
    if not graph.relations:
        raise GraphStructureError(argument="graph", expected="a relation at least", actual="none")
    given: dict[Relation, Tensor] = {}
    if weights is not None:
        given = _by_relation("weights", weights, graph.relations)
    found = {}
    for relation, edge_index in graph.edge_index.items():
        source, _, target = relation
        num_keys, num_queries = graph.num_nodes[source], graph.num_nodes[target]
        keys, queries = edge_index
        rows = compressed_rows(queries, keys, num_queries, num_keys)
        found[relation] = neighbour_rows(rows, num_keys, given.get(relation), f"weights[{relation}]")
    return found


def require_typed_seeds(seeds: object, num_nodes: Mapping[str, int]) -> dict[str, Tensor]:
    """The seeds of each type as int64, none where a type has no entry; raise unless they are nodes."""
    if not isinstance(seeds, Mapping):
        raise InvalidInputError(
            argument="seeds", expected="a dictionary of tensors of nodes, by type", actual=type(seeds).__name__
        )
    for kind in seeds:
        if kind not in num_nodes:
            expected = "types of the graph: " + ", ".join(map(repr, num_nodes))
            raise InvalidInputError(argument="seeds", expected=expected, actual=repr(kind))
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    return {
        kind: require_seeds(f"seeds[{kind!r}]", seeds[kind], count) if kind in seeds else none
        for kind, count in num_nodes.items()
    }


def require_typed_fanouts(
    fanouts: object, relations: Sequence[Relation], at_least: int = 1
) -> dict[Relation, tuple[int, ...]]:
    """The fanouts of each relation, one for each hop: 0 for a relation that a dictionary does not name.

    Raises:
        InvalidInputError: they are none, or lists of different lengths.
    """
    if not isinstance(fanouts, Mapping):
        given = require_fanouts("fanouts", fanouts, at_least)
        return dict.fromkeys(relations, given)
    named = {
        relation: require_fanouts(f"fanouts[{relation}]", each, at_least)
        for relation, each in _by_relation("fanouts", fanouts, relations).items()
    }
    lengths = {len(each) for each in named.values()}
    if len(lengths) != 1:
        raise InvalidInputError(
            argument="fanouts",
            expected="as many hops for each relation, and one relation at least",
            actual=f"{sorted(lengths)} hops",
        )
    none = (0,) * lengths.pop()
    return {relation: named.get(relation, none) for relation in relations}


def sample_typed_rows(
    rows: TypedRows,
    num_nodes: Mapping[str, int],
    seeds: Mapping[str, Tensor],
    fanouts: Mapping[Relation, Sequence[int]],
    seed: int,
) -> SampledHeterogeneousGraph:
    """`HeterogeneousGraph.sample` of what was checked, with a seed that was drawn."""
    with shielded(), allocation_failures_named():
        found, drawn = walk(rows, seeds, num_nodes, fanouts, seed)
        nodes = {kind: each.nodes for kind, each in found.items()}
        num_hops = max(map(len, fanouts.values()), default=0)
        counts = [{kind: each.counts[hop] for kind, each in found.items()} for hop in range(num_hops, -1, -1)]
        num_edges = [
            {relation: each.counts[hop] for relation, each in drawn.items()} for hop in range(num_hops - 1, -1, -1)
        ]
        edges = {relation: each.edges for relation, each in drawn.items()}
        return _assembled(nodes, edges, {key: each.edge_index for key, each in drawn.items()}, counts, num_edges)


def _assembled(
    nodes: Mapping[str, Tensor],
    edges: Mapping[Relation, Tensor],
    edge_index: Mapping[Relation, Tensor],
    counts: Sequence[Mapping[str, int]],
    num_edges: Sequence[Mapping[Relation, int]],
) -> SampledHeterogeneousGraph:
    """Of the edges of each relation the first so many for each block, between the first so many nodes."""
    from anyattention.patterns.heterogeneous import HeterogeneousGraph

    blocks = [
        HeterogeneousGraph(
            known, {key: ends[:, : of_block[key]].contiguous() for key, ends in edge_index.items()}, queries
        )
        for (known, queries), of_block in zip(pairwise(counts), num_edges, strict=True)
    ]
    of_blocks = tuple([{key: each[: of_block[key]] for key, each in edges.items()} for of_block in num_edges])
    return SampledHeterogeneousGraph(nodes, tuple(blocks), of_blocks)


def _unpacked(numbers: Any, counts: Any, num_edges: Any, device: str) -> SampledHeterogeneousGraph:
    """What another process has sent, or a file holds.

    Raises:
        GraphStructureError: an index leads outside of the arrays, or the sizes are not theirs.
    """
    from anyattention.patterns.heterogeneous import HeterogeneousGraph

    try:
        with lasting():
            packed = torch.from_numpy(numbers).to(torch.int64)
            lengths = [*counts[0].values(), *num_edges[0].values(), *[2 * count for count in num_edges[0].values()]]
            parts = packed.split(lengths)
            nodes = dict(zip(counts[0], parts, strict=False))
            edges = dict(zip(num_edges[0], parts[len(nodes) :], strict=False))
            ends = [each.view(2, -1) for each in parts[len(nodes) + len(edges) :]]
            edge_index = dict(zip(edges, ends, strict=True))
            sampled = _assembled(nodes, edges, edge_index, counts, num_edges)
            for block in sampled.blocks:
                HeterogeneousGraph.from_edge_index(block.edge_index, block.num_nodes, num_queries=block.num_queries)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as fault:
        raise GraphStructureError(
            argument="state", expected="integers, and the numbers of nodes and edges of each block", actual=str(fault)
        ) from fault
    return sampled.to(device)


def _by_relation(argument: str, given: object, relations: Sequence[Relation]) -> dict[Relation, Any]:
    """A caller's dictionary by relation of the graph; raise for others."""
    if not isinstance(given, Mapping):
        raise InvalidInputError(argument=argument, expected="a dictionary by relation", actual=type(given).__name__)
    found = {}
    for key, each in given.items():
        relation = require_relation(argument, key, InvalidInputError)
        if relation not in relations:
            expected = "relations of the graph: " + ", ".join(map(str, relations))
            raise InvalidInputError(argument=argument, expected=expected, actual=str(relation))
        found[relation] = each
    return found
