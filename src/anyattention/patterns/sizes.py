"""How many nodes each graph of a batch has, from a list of numbers or from the graph of each node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyattention._checks import describe_shape, plain, require_dense
from anyattention.ambient import is_readable, shielded, values_of
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from anyattention.patterns.graph import Graph

__all__ = ["Sizes", "graph_sizes", "require_edges_within"]

Sizes = Sequence[int] | Tensor


def graph_sizes(num_nodes: int, sizes: Sizes | None = None, batch: Tensor | None = None) -> tuple[int, ...]:
    """The number of nodes of each graph; without either argument all nodes are of one graph.

    Args:
        num_nodes: of all graphs together.
        sizes: the number of each, which add up to it; 0 too.
        batch: `(nodes,)` int64, the graph of each node, from 0 and never falling: PyTorch Geometric's.

    Raises:
        InvalidInputError, DimensionMismatchError: both are given, or one does not fit the nodes.
        GraphStructureError: a batch that falls.
        UnsupportedError: the numbers of batch cannot be read here, as where a compiler or vmap hides them.

    Example:
        >>> graph_sizes(5, batch=torch.tensor([0, 0, 2, 2, 2]))
        (2, 0, 3)
    """
    if sizes is not None and batch is not None:
        raise InvalidInputError(argument="batch", expected="None beside sizes", actual="a tensor")
    if batch is not None:
        return _sizes_of_batch(batch, num_nodes)
    if sizes is None:
        return (num_nodes,)
    listed = sizes.tolist() if isinstance(sizes, Tensor) else plain(sizes)
    is_list = isinstance(listed, list | tuple)
    if not is_list or not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in listed):
        raise InvalidInputError(
            argument="sizes", expected="the number of nodes of each graph, ints of at least 0", actual=repr(sizes)
        )
    if sum(listed) != num_nodes:
        raise DimensionMismatchError(
            argument="sizes", expected=f"numbers that add up to the {num_nodes} nodes", actual=f"{sum(listed)}"
        )
    return tuple(listed)


def require_edges_within(graph: Graph, sizes: tuple[int, ...]) -> None:
    """Raise unless both ends of each edge are of one of the graphs that have so many nodes."""
    counts = torch.tensor(sizes, dtype=torch.int64, device=graph.device)
    of_node = torch.arange(len(sizes), device=graph.device).repeat_interleave(counts)
    crosses = of_node[graph.key_index] != of_node[graph.query_index]
    if crosses.any():
        edge = int(crosses.nonzero()[0])
        ends = graph.edge_index[:, edge].tolist()
        raise GraphStructureError(
            argument="graph",
            expected="edges within each graph of the batch",
            actual=f"edge {edge} from node {ends[0]} to node {ends[1]} of another graph",
        )


def _sizes_of_batch(batch: Tensor, num_nodes: int) -> tuple[int, ...]:
    require_dense("batch", batch)
    if batch.dtype != torch.int64:
        raise InvalidInputError(argument="batch", expected="torch.int64", actual=batch.dtype)
    if batch.shape != (num_nodes,):
        raise DimensionMismatchError(
            argument="batch", expected=f"({num_nodes},), a graph for each node", actual=describe_shape(batch)
        )
    if not is_readable(batch):
        raise UnsupportedError(
            "batch cannot be read here: give sizes, the number of nodes of each graph", argument="batch"
        )
    with shielded():
        numbers = values_of(batch).cpu()
        if numbers.numel() and (numbers[0] < 0 or (numbers.diff() < 0).any()):
            raise GraphStructureError(
                argument="batch",
                expected="graph numbers from 0 that never fall from one node to the next",
                actual=f"{numbers[:8].tolist()}" + (" ..." if len(numbers) > 8 else ""),
            )
        return tuple(torch.bincount(numbers).tolist())
