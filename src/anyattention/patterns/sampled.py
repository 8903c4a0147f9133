"""SampledGraph: what was drawn around some seeds, as a Graph for each layer and as one for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyattention._checks import allocation_failures_named
from anyattention.ambient import lasting, shielded
from anyattention.errors import GraphStructureError
from anyattention.native.compressed_rows import CompressedRows, compressed_rows
from anyattention.native.neighbour_sampling import NeighbourRows
from anyattention.patterns.graph_arrays import fields_of
from anyattention.patterns.sampling import (
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
_INT32_MAX = 2**31 - 1


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
            blocks = tuple([block.to(device) for block in self.blocks])
            return SampledGraph(self.nodes.to(device), blocks, tuple([edges.to(device) for edges in self.edges]))

    def pin_memory(self) -> SampledGraph:
        """This, in pinned memory, from which a copy to an accelerator is faster."""
        from anyattention.patterns.graph import Graph

        blocks = []
        for block in self.blocks:
            arrays: list[Any] = [None if x is None else x.pin_memory() for x in fields_of(block)]
            blocks.append(Graph(*arrays))
        edges = tuple([edges.pin_memory() for edges in self.edges])
        return SampledGraph(self.nodes.pin_memory(), tuple(blocks), edges)

    def __repr__(self) -> str:
        edges = tuple([block.num_edges for block in self.blocks])
        return f"SampledGraph(num_seeds={self.num_seeds}, num_nodes={len(self.nodes)}, num_edges={edges})"

    def __reduce__(self) -> tuple[Any, ...]:
        # What all else follows from, as one array in the least dtype: from workers it comes through a pipe, faster than
        # a loader's tensors through fresh pages of shared memory, of which there may be few.
        outer = self.blocks[0]
        packed = torch.cat([self.nodes, self.edges[0], outer.keys_by_query, outer.query_offsets]).cpu()
        if len(packed) and packed.max() <= _INT32_MAX:
            packed = packed.to(torch.int32)
        sizes = [(block.num_queries, block.num_keys, block.num_edges) for block in self.blocks]
        return _unpacked, (packed.numpy(), sizes, str(self.device))


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
    with shielded(), allocation_failures_named():
        found, drawn = walk({_ONLY: rows}, {"": seeds}, {"": rows.num_rows}, {_ONLY: fanouts}, seed)
        nodes, counts, edges = found[""].nodes, found[""].counts, drawn[_ONLY]
        sizes = [(*pair, num_edges) for pair, num_edges in zip(pairwise(counts), edges.counts, strict=True)]
        # The outermost hop first.
        return _assembled(nodes, edges.edges, edges.edge_index, edges.offsets, sizes[::-1])


def _assembled(
    nodes: Tensor, edges: Tensor, edge_index: Tensor, offsets: Tensor, sizes: Sequence[tuple[int, int, int]]
) -> SampledGraph:
    """Of edges by query the first so many for each block, from its numbers of queries, keys and edges."""
    from anyattention.patterns.graph import Graph

    blocks, slots = [], torch.arange(len(edges), device="cpu")
    for num_queries, num_keys, num_edges in sizes:
        ends = edge_index[:, :num_edges].contiguous()
        by_key = compressed_rows(ends[0], ends[1], num_keys, num_queries)
        blocks.append(Graph(ends, offsets[: num_queries + 1], ends[0], slots[:num_edges], *by_key))
    return SampledGraph(nodes, tuple(blocks), tuple([edges[:num_edges] for *_, num_edges in sizes]))


def _unpacked(numbers: Any, sizes: Any, device: str) -> SampledGraph:
    """What another process has sent, or a file holds.

    Raises:
        GraphStructureError: an index leads outside of the arrays, or the sizes are not theirs.
    """
    with lasting(), allocation_failures_named():
        packed, (num_queries, num_keys, num_edges) = _require_sizes(numbers, sizes)
        nodes, edges, keys, offsets = packed.split([num_keys, num_edges, num_edges, num_queries + 1])
        offsets = offsets.to(torch.int64)
        lengths = offsets.diff()
        if offsets[0] != 0 or (lengths < 0).any() or any(offsets[queries] != count for queries, _, count in sizes):
            raise GraphStructureError(
                argument="query_offsets",
                expected=f"offsets that rise from 0, of blocks of queries, keys and edges {sizes}",
                actual=f"offsets from {int(offsets[0])} to {int(offsets[-1])}",
            )
        edge_index = torch.empty(2, num_edges, dtype=torch.int64, device="cpu")
        edge_index[0] = keys
        edge_index[1] = torch.repeat_interleave(lengths, output_size=num_edges)
        sampled = _assembled(nodes.to(torch.int64), edges.to(torch.int64), edge_index, offsets, sizes)
    return sampled.to(device)


def _require_sizes(numbers: Any, sizes: Any) -> tuple[Tensor, tuple[int, int, int]]:
    """The numbers, and how many queries, keys and edges the outermost block has.

    Raises:
        GraphStructureError: a block is not inside the one before, or there are too few numbers or too many.
    """
    try:
        packed = torch.from_numpy(numbers)
        num_queries, num_keys, num_edges = sizes[0]
        fits = packed.dtype in (torch.int32, torch.int64)
        fits = fits and packed.shape == (num_keys + 2 * num_edges + num_queries + 1,)
        fits = fits and all(0 <= queries <= keys and edges >= 0 for queries, keys, edges in sizes)
        fits = fits and all(
            queries == inner_keys and edges >= inner_edges
            for (queries, _, edges), (_, inner_keys, inner_edges) in pairwise(sizes)
        )
        if fits:
            return packed, (num_queries, num_keys, num_edges)
    except (TypeError, ValueError, IndexError, KeyError):
        pass
    raise GraphStructureError(
        argument="state",
        expected="integers, and the numbers of queries, keys and edges of each block",
        actual=f"{type(numbers).__name__} and {sizes}",
    )
