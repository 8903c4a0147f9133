"""SampledGraph: what was drawn around some seeds, as a Graph for each layer and as one for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyattention._checks import allocation_failures_named
from anyattention.ambient import lasting
from anyattention.errors import GraphStructureError
from anyattention.native.compressed_rows import CompressedRows
from anyattention.native.neighbour_sampling import NeighbourRows
from anyattention.patterns.sampling import (
    Drawn,
    draw_seed,
    neighbour_rows,
    require_fanouts,
    require_seeds,
    walk,
)

if TYPE_CHECKING:
    from anyattention.patterns.graph import Graph

__all__ = ["SampledGraph", "rows_of", "sample_graph", "sample_rows"]

_ONLY = ("", "", "")


@dataclass(frozen=True, eq=False, repr=False)
class SampledGraph:
    """What was drawn around some seeds: its nodes, and a Graph for each layer.

    `Graph.sample` makes one. With the features of its nodes, layers run one after the other:

        x = features[sampled.nodes]
        for layer, block in zip(layers, sampled.blocks):
            x = layer((x, x[:block.num_queries]), block).output

    and x has a row for each seed in the end. `joint()` is for layers that all run over one graph.

    Attributes:
        nodes: `(nodes,)` int64, their ids in the whole graph, each once: the seeds, as they came, then the others in
            the order in which they were found.
        blocks: a Graph for each layer, in the order in which layers run: that of the outermost hop first. Its
            queries are the first `num_queries` of its keys, and those are the first of `nodes`.
        edges: for each block `(edges,)` int64, the position of its edges in the whole graph, for edge features.

    Example:
        >>> from anyattention import Graph
        >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 3], [0, 1, 2]]), num_nodes=4)
        >>> sampled = graph.sample(torch.tensor([0]), [-1, -1])
        >>> sampled.nodes
        tensor([0, 1, 2])
        >>> sampled.blocks
        (Graph(num_queries=2, num_keys=3, num_edges=2), Graph(num_queries=1, num_keys=2, num_edges=1))
        >>> sampled.edges
        (tensor([0, 1]), tensor([0]))
    """

    nodes: Tensor
    blocks: tuple[Graph, ...]
    edges: tuple[Tensor, ...]

    @property
    def num_seeds(self) -> int:
        """Number of seeds, the first of the nodes."""
        return self.blocks[-1].num_queries

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.nodes.device

    def joint(self) -> Graph:
        """All that was drawn as one square Graph over `nodes`, over which every layer runs.

        Its edges are those of `edges[0]`. The nodes of the last hop have none.

        Example:
            >>> from anyattention import Graph
            >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 3], [0, 1, 2]]), num_nodes=4)
            >>> graph.sample(torch.tensor([0]), [-1, -1]).joint()
            Graph(num_queries=3, num_keys=3, num_edges=2)
        """
        from anyattention.patterns.graph import Graph

        outer = self.blocks[0]
        with lasting(self.nodes):
            ends = outer.query_offsets.new_full((outer.num_keys - outer.num_queries,), outer.num_edges)
            offsets = torch.cat([outer.query_offsets, ends])
        by_key = (outer.key_offsets, outer.queries_by_key, outer.edges_by_key)
        return Graph(outer.edge_index, offsets, outer.keys_by_query, outer.edges_by_query, *by_key)

    def to(self, device: torch.device | str) -> SampledGraph:
        """This, with its tensors on the device; itself where they are there already."""
        if self.device == torch.device(device):
            return self
        with lasting(self.nodes):
            packed, sizes = self._packed()
            return _unpacked(packed.to(device), sizes)

    def pin_memory(self) -> SampledGraph:
        """This, in pinned memory, from which a copy to an accelerator is faster."""
        with lasting(self.nodes):
            packed, sizes = self._packed()
            return _unpacked(packed.pin_memory(), sizes)

    def __repr__(self) -> str:
        edges = ", ".join(str(block.num_edges) for block in self.blocks)
        return f"SampledGraph(num_seeds={self.num_seeds}, num_nodes={len(self.nodes)}, num_edges=({edges}))"

    def _packed(self) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """All arrays as one, since a tensor costs more to send than its numbers; and the sizes of the blocks."""
        outer = self.blocks[0]
        arrays = [self.nodes, self.edges[0], outer.edge_index.flatten(), outer.query_offsets]
        for block in self.blocks:
            arrays += [block.key_offsets, block.queries_by_key, block.edges_by_key]
        return torch.cat(arrays), [(block.num_queries, block.num_keys, block.num_edges) for block in self.blocks]

    def __reduce__(self) -> tuple[Any, ...]:
        return _checked, self._packed()


def sample_graph(
    graph: Graph, seeds: Tensor, fanouts: Sequence[int], weights: Tensor | None, generator: torch.Generator | None
) -> SampledGraph:
    """`Graph.sample`."""
    rows = rows_of(graph, weights)
    seeds = require_seeds("seeds", seeds, graph.num_queries)
    return sample_rows(rows, seeds, require_fanouts("fanouts", fanouts), draw_seed(generator))


def rows_of(graph: Graph, weights: Tensor | None) -> NeighbourRows:
    """What `sample_rows` draws from.

    Raises:
        GraphStructureError: queries and keys are different sets.
    """
    if graph.num_queries != graph.num_keys:
        raise GraphStructureError(
            argument="graph",
            expected="as many queries as keys, which are the same nodes",
            actual=f"{graph.num_queries} queries and {graph.num_keys} keys",
        )
    rows = CompressedRows(graph.query_offsets, graph.keys_by_query, graph.edges_by_query)
    return neighbour_rows(rows, graph.num_keys, weights, "weights")


def sample_rows(rows: NeighbourRows, seeds: Tensor, fanouts: Sequence[int], seed: int) -> SampledGraph:
    """`Graph.sample` of what was checked, with a seed that was drawn."""
    with lasting(rows.offsets), allocation_failures_named():
        found, drawn = walk({_ONLY: rows}, {"": seeds}, {"": rows.num_rows}, {_ONLY: fanouts}, seed)
        nodes, counts, edges = found[""].nodes, found[""].counts, drawn[_ONLY]
        sizes = [(*pair, num_edges) for pair, num_edges in zip(pairwise(counts), edges.counts, strict=True)]
        # The outermost hop first.
        return _assembled(nodes, edges, sizes[::-1])


def _assembled(nodes: Tensor, drawn: Drawn, sizes: list[tuple[int, int, int]]) -> SampledGraph:
    blocks = []
    for num_queries, num_keys, num_edges in sizes:
        by_key = drawn.by_key(num_edges, num_queries, num_keys)
        blocks.append(_block(drawn.edge_index, drawn.offsets, num_queries, num_edges, by_key))
    return SampledGraph(nodes, tuple(blocks), tuple([drawn.edges[:num_edges] for *_, num_edges in sizes]))


def _block(
    edge_index: Tensor, offsets: Tensor, num_queries: int, num_edges: int, by_key: tuple[Tensor, Tensor, Tensor]
) -> Graph:
    """The first edges, which are there by query, as a Graph."""
    from anyattention.patterns.graph import Graph

    edge_index = edge_index[:, :num_edges].contiguous()
    slots = torch.arange(num_edges, device=edge_index.device)
    return Graph(edge_index, offsets[: num_queries + 1], edge_index[0], slots, *by_key)


def _unpacked(packed: Tensor, sizes: list[tuple[int, int, int]]) -> SampledGraph:
    _, num_keys, num_edges = sizes[0]
    nodes, edges, *arrays = packed.split(_lengths(sizes))
    edge_index = packed[num_keys + num_edges :][: 2 * num_edges].view(2, num_edges)
    offsets, *by_key = arrays[2:]
    blocks = [
        _block(edge_index, offsets, queries, count, (by_key[3 * place], by_key[3 * place + 1], by_key[3 * place + 2]))
        for place, (queries, _, count) in enumerate(sizes)
    ]
    return SampledGraph(nodes, tuple(blocks), tuple([edges[:count] for *_, count in sizes]))


def _checked(packed: Tensor, sizes: list[tuple[int, int, int]]) -> SampledGraph:
    """What another process has sent, or a file holds.

    Raises:
        GraphStructureError: an index leads outside of the arrays, or the sizes are not theirs.
    """
    _require_sizes(packed, sizes)
    sampled = _unpacked(packed, sizes)
    for place, block in enumerate(sampled.blocks):
        for name, offsets in (("query_offsets", block.query_offsets), ("key_offsets", block.key_offsets)):
            if offsets[0] != 0 or offsets[-1] != block.num_edges or (offsets[1:] < offsets[:-1]).any():
                raise GraphStructureError(
                    argument=f"blocks[{place}].{name}",
                    expected=f"offsets that rise from 0 to {block.num_edges}, the number of edges",
                    actual=f"offsets from {int(offsets[0])} to {int(offsets[-1])}",
                )
        ranges = (
            ("key_index", block.key_index, block.num_keys),
            ("query_index", block.query_index, block.num_queries),
            ("queries_by_key", block.queries_by_key, block.num_queries),
            ("edges_by_key", block.edges_by_key, block.num_edges),
        )
        for name, index, count in ranges:
            low, high = index.aminmax() if len(index) else (0, -1)
            if low < 0 or high >= count:
                raise GraphStructureError(
                    argument=f"blocks[{place}].{name}",
                    expected=f"indices from 0 to {count - 1}",
                    actual=f"indices from {int(low)} to {int(high)}",
                )
    return sampled


def _require_sizes(packed: object, sizes: object) -> None:
    """That these are the blocks' numbers of queries, keys and edges, each block inside the one before."""
    fits = isinstance(packed, Tensor) and packed.dtype == torch.int64 and packed.ndim == 1
    try:
        found = [(int(queries), int(keys), int(edges)) for queries, keys, edges in sizes]  # pyright: ignore[reportGeneralTypeIssues]
    except (TypeError, ValueError):
        found = []
    inside = all(
        queries == inner_keys and edges >= inner_edges
        for (queries, _, edges), (_, inner_keys, inner_edges) in pairwise(found)
    )
    fits = fits and inside and all(0 <= queries <= keys and edges >= 0 for queries, keys, edges in found)
    if not found or not fits or len(packed) != sum(_lengths(found)):  # pyright: ignore[reportArgumentType]
        raise GraphStructureError(
            argument="state",
            expected="int64 numbers, and the numbers of queries, keys and edges of each block",
            actual=f"{type(packed).__name__} and {sizes}",
        )


def _lengths(sizes: list[tuple[int, int, int]]) -> list[int]:
    """How the numbers that are sent are split."""
    num_queries, num_keys, num_edges = sizes[0]
    lengths = [num_keys, num_edges, num_edges, num_edges, num_queries + 1]
    for _, keys, edges in sizes:
        lengths += [keys + 1, edges, edges]
    return lengths
