"""NeighborSampler: this package's neighbour sampling under PyTorch Geometric's own loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch_geometric.data import Data, HeteroData
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    HeteroSamplerOutput,
    NegativeSampling,
    NodeSamplerInput,
    NumNeighbors,
    SamplerOutput,
)
from torch_geometric.sampler.base import SubgraphType
from torch_geometric.sampler.neighbor_sampler import edge_sample, node_sample

from anyattention._checks import Relation, allocation_failures_named
from anyattention.ambient import shielded
from anyattention.errors import AttentionError, InvalidInputError, UnsupportedError
from anyattention.native.compressed_rows import compressed_rows
from anyattention.native.neighbour_sampling import NeighbourRows
from anyattention.patterns.graph_arrays import require_edge_index, require_nodes
from anyattention.patterns.sampling import (
    draw_seed,
    mixed_seed,
    neighbour_rows,
    require_fanouts,
    require_seeds,
    walk,
)

__all__ = ["NeighborSampler"]

_ONLY: Relation = ("", "", "")


class NeighborSampler(BaseSampler):
    """PyTorch Geometric's `NeighborSampler` without pyg-lib and torch-sparse, for its `NodeLoader` and `LinkLoader`.

    Each node that is found draws among its edges once, without replacement, as in `Graph.sample`. The nodes of what is
    sampled are the seeds, as they came, and then the others in the order in which they were found.

    Args:
        data: a Data or HeteroData with `edge_index`, and the numbers of its nodes. Its edges are read once.
        num_neighbors: for each hop, the most edges of a node; -1 for all, 0 for none. Or a dictionary of such lists by
            edge type, or PyTorch Geometric's NumNeighbors.
        subgraph_type: "directional", or "bidirectional", where each edge goes both ways.
        weight_attr: the name of an edge attribute, `(edges,)`, finite and >= 0: edges are drawn with odds in
            proportion to it.
        replace, disjoint, time_attr: must keep their defaults.
        generator: gives one number, from which all draws follow; in a loader's workers together with the worker's seed,
            which PyTorch gives anew in each epoch. Without one, PyTorch's own gives a number for each batch.

    Raises:
        InvalidInputError, GraphStructureError, DimensionMismatchError: data, numbers or weights that are none.
        UnsupportedError: drawing with replacement, disjoint subgraphs, times, induced subgraphs, other stores.

    Cost: a counting sort of the edges once; then each batch O(nodes and edges that are found).

    Example:
        >>> from torch_geometric.loader import NodeLoader
        >>> data = Data(edge_index=torch.tensor([[1, 2, 3], [0, 0, 1]]), num_nodes=4)
        >>> loader = NodeLoader(data, NeighborSampler(data, [-1, -1]), torch.tensor([0]))
        >>> for batch in loader:
        ...     print(batch.n_id, batch.e_id, batch.edge_index.tolist())
        tensor([0, 1, 2, 3]) tensor([0, 1, 2]) [[1, 2, 3], [0, 0, 1]]
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: Sequence[int] | Mapping[Relation, Sequence[int]] | NumNeighbors,
        subgraph_type: SubgraphType | str = "directional",
        *,
        replace: bool = False,
        disjoint: bool = False,
        time_attr: str | None = None,
        weight_attr: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _refuse(replace=replace, disjoint=disjoint, time_attr=time_attr)
        self.subgraph_type = _subgraph_type(subgraph_type)
        # Not the generator, of which every worker would hold a copy that draws the same.
        self._seed = None if generator is None else draw_seed(generator)
        self._num_batches = 0
        self.rows: dict[Relation, NeighbourRows] = {}
        if isinstance(data, Data):
            self.num_nodes: Any = _count("data", data)
            self._counts: dict[str, int] = {"": self.num_nodes}
            self.rows[_ONLY] = _rows("data", data, self.num_nodes, self.num_nodes, weight_attr)
        elif isinstance(data, HeteroData):
            self.num_nodes = {kind: _count(f"data[{kind!r}]", data[kind]) for kind in data.node_types}
            self._counts = self.num_nodes
            for relation in data.edge_types:
                source, _, target = relation
                sizes = (self.num_nodes[target], self.num_nodes[source])
                self.rows[relation] = _rows(f"data[{relation}]", data[relation], *sizes, weight_attr)
        else:
            raise UnsupportedError(argument="data", expected="a Data or HeteroData", actual=type(data).__name__)
        self.num_neighbors = num_neighbors

    @property
    def num_neighbors(self) -> Any:
        """PyTorch Geometric's NumNeighbors; it may be set."""
        return self._num_neighbors

    @num_neighbors.setter
    def num_neighbors(self, given: Any) -> None:
        found = given if isinstance(given, NumNeighbors) else NumNeighbors(given)
        self._fanouts = _fanouts(found, list(self.rows))
        self._num_neighbors = found

    # The arguments' names are those of PyTorch Geometric's sampler, not of its base.
    def sample_from_nodes(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: NodeSamplerInput
    ) -> SamplerOutput | HeteroSamplerOutput:
        """What is drawn around nodes, which may be there several times.

        Raises:
            UnsupportedError: nodes with times.
            GraphStructureError: nodes that are not there.
        """
        self._refuse_times(inputs.time)
        return self._finished(node_sample(inputs, self._sample))

    def sample_from_edges(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """What is drawn around the ends of edges, and of others that PyTorch Geometric draws as negative examples.

        Raises:
            UnsupportedError: edges with times.
            GraphStructureError: nodes that are not there.
        """
        self._refuse_times(inputs.time)
        return self._finished(edge_sample(inputs, self._sample, self.num_nodes, False, None, neg_sampling))

    def _sample(self, seed: Tensor | dict[str, Tensor], seed_time: None = None) -> SamplerOutput | HeteroSamplerOutput:
        given = seed if isinstance(seed, dict) else {"": seed}
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        seeds = {kind: require_seeds("seeds", given.get(kind, none), count) for kind, count in self._counts.items()}
        number = self._batch_seed()
        with shielded(), allocation_failures_named():
            found, drawn = walk(self.rows, seeds, self._counts, self._fanouts, number, is_repeated=True)
        nodes = {kind: each.nodes for kind, each in found.items()}
        row = {relation: each.edge_index[0] for relation, each in drawn.items()}
        col = {relation: each.edge_index[1] for relation, each in drawn.items()}
        edge: dict[Any, Any] = {relation: each.edges for relation, each in drawn.items()}
        of_hops = {kind: _steps(each.counts) for kind, each in found.items()}
        edges_of_hops = {relation: _steps(each.counts) for relation, each in drawn.items()}
        if not isinstance(seed, dict):
            arrays = (nodes[""], row[_ONLY], col[_ONLY], edge[_ONLY])
            return SamplerOutput(*arrays, None, of_hops[""], edges_of_hops[_ONLY])
        return HeteroSamplerOutput(nodes, row, col, edge, None, of_hops, edges_of_hops)

    def _batch_seed(self) -> int:
        """The seed of the next batch of this process."""
        if self._seed is None:
            return draw_seed(None)
        self._num_batches += 1
        worker = get_worker_info()
        return mixed_seed(self._seed, self._num_batches, 0 if worker is None else worker.seed)

    def _finished(self, output: SamplerOutput | HeteroSamplerOutput) -> SamplerOutput | HeteroSamplerOutput:
        return output.to_bidirectional() if self.subgraph_type == SubgraphType.bidirectional else output

    def _refuse_times(self, time: Tensor | None) -> None:
        if time is not None:
            raise UnsupportedError(
                argument="time", expected="None, since nothing is sampled by time", actual="a tensor"
            )


def _refuse(**given: Any) -> None:
    """Raise for what of PyTorch Geometric's sampler this one has not."""
    for name, value in given.items():
        if value:
            raise UnsupportedError(argument=name, expected="its default; this sampler has no other", actual=repr(value))


def _subgraph_type(given: SubgraphType | str) -> SubgraphType:
    try:
        found = SubgraphType(given)
    except ValueError:
        found = None
    if found not in (SubgraphType.directional, SubgraphType.bidirectional):
        raise UnsupportedError(
            argument="subgraph_type", expected='"directional" or "bidirectional"', actual=repr(given)
        )
    return found


def _count(argument: str, store: Any) -> int:
    count = store.num_nodes
    if count is None:
        raise InvalidInputError(argument=argument, expected="a number of nodes", actual=None)
    return int(count)


def _rows(argument: str, store: Any, num_queries: int, num_keys: int, weight_attr: str | None) -> NeighbourRows:
    """The edges of a store by target, with their weights in the order of the rows' slots."""
    edge_index = store.get("edge_index")
    if edge_index is None:
        raise UnsupportedError(
            argument=argument,
            expected="an edge_index",
            actual="none",
            hint="Graph.from_adjacency(adj_t).edge_index is that of a matrix adj_t",
        )
    weights = None
    if weight_attr is not None:
        weights = store.get(weight_attr)
        if weights is None:
            raise InvalidInputError(argument=argument, expected=f"an edge attribute {weight_attr!r}", actual="none")
    try:
        require_edge_index(edge_index)
        require_nodes(edge_index, None, num_queries, num_keys)
    except AttentionError as fault:
        raise type(fault)(
            f"{argument}: {fault}", argument=argument, expected=fault.expected, actual=fault.actual
        ) from None
    keys, queries = edge_index
    rows = compressed_rows(queries, keys, num_queries, num_keys)
    return neighbour_rows(rows, num_keys, weights, f"{argument}.{weight_attr}").slot_weights()


def _fanouts(num_neighbors: Any, relations: list[Relation]) -> dict[Relation, tuple[int, ...]]:
    """The numbers of neighbours of each relation, as PyTorch Geometric reads them."""
    try:
        given = num_neighbors.get_values(None if relations == [_ONLY] else relations)
    except (ValueError, AssertionError) as fault:
        message = str(fault) or "numbers of neighbours that are no list and no dictionary"
        raise InvalidInputError(
            argument="num_neighbors",
            expected="a list of numbers for each hop, or one for each edge type",
            actual=message,
        ) from fault
    by_relation = given if isinstance(given, dict) else {_ONLY: given}
    return {relation: require_fanouts("num_neighbors", by_relation.get(relation), at_least=0) for relation in relations}


def _steps(totals: Sequence[int]) -> list[int]:
    """How many each hop has added, and the seeds before, where totals begin with them."""
    return [total - before for before, total in zip([0, *totals], totals, strict=False)]
