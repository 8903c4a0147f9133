"""The arrays of a Graph: checked, made from neighbours, and joined to a block-diagonal one.

A Graph outlives the moment it is made in, and so its arrays are made under `lasting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils import _pytree

from anyattention._checks import describe_shape, no_graph, plain, require_dense, require_device, require_number
from anyattention.ambient import is_compiling, is_readable, lasting
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError
from anyattention.native.compressed_rows import compressed_rows

if TYPE_CHECKING:
    from anyattention.geometry.neighbours import Neighbours
    from anyattention.patterns.edges import EdgePattern
    from anyattention.patterns.graph import Graph

__all__ = [
    "all_pairs_arrays",
    "edges_as_keys_arrays",
    "fields_of",
    "joined_arrays",
    "joined_radius",
    "lacks_loop",
    "loops_added",
    "moved_arrays",
    "named_fields_of",
    "neighbour_arrays",
    "own_edges",
    "require_edge_index",
    "require_edge_numbers",
    "require_nodes",
    "require_one_set",
    "require_sizes",
    "require_values_and_shifts",
    "row_arrays",
    "sorted_arrays",
]


def fields_of(graph: Graph) -> list[Any]:
    """The tensors, in the order of the fields; `values` and `shifts` may be None."""
    return [tensor for _, tensor in named_fields_of(graph)]


def named_fields_of(graph: Graph) -> list[tuple[Any, Any]]:
    """The tensors with their names, for torch.export, which names its inputs."""
    names = [item.name for item in fields(graph) if item.name != "search_radius"]
    return [(_pytree.GetAttrKey(name), getattr(graph, name)) for name in names]


def require_edge_index(edge_index: Tensor) -> None:
    """Raise unless it is an int64 `(2, edges)` tensor with data."""
    require_dense("edge_index", edge_index)
    if edge_index.device.type == "meta":
        raise InvalidInputError(argument="edge_index", expected="a device with data", actual=edge_index.device)
    if edge_index.dtype != torch.int64:
        raise InvalidInputError(argument="edge_index", expected="torch.int64", actual=edge_index.dtype)
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise DimensionMismatchError(argument="edge_index", expected="(2, edges)", actual=describe_shape(edge_index))


def require_nodes(
    edge_index: Tensor, num_nodes: int | None, num_queries: int | None, num_keys: int | None
) -> tuple[int, int]:
    """The numbers of queries and keys, which every edge fits."""
    if num_nodes is not None:
        if num_queries is not None or num_keys is not None:
            raise GraphStructureError(
                argument="num_nodes", expected="None beside num_queries and num_keys", actual=num_nodes
            )
        num_queries = num_keys = num_nodes
    queries = _require_count("num_queries", num_queries)
    keys = _require_count("num_keys", num_keys)
    _require_range("source (key)", edge_index[0], keys)
    _require_range("target (query)", edge_index[1], queries)
    return queries, keys


def require_edge_numbers(argument: str, numbers: Tensor, edge_index: Tensor, *more: str) -> None:
    """Raise unless the tensor has the edges first and as many further axes as are named."""
    require_dense(argument, numbers)
    require_device(argument, numbers, edge_index.device, "edge_index")
    if numbers.ndim != 1 + len(more) or numbers.shape[0] != edge_index.shape[1]:
        expected = ", ".join([f"edges={edge_index.shape[1]}", *more])
        raise DimensionMismatchError(
            argument=argument,
            expected=f"({expected})" if more else f"({expected},)",
            actual=describe_shape(numbers),
        )


def require_values_and_shifts(values: Tensor | None, shifts: Tensor | None, edge_index: Tensor) -> None:
    """Raise unless what there is of these fits the edges."""
    if values is not None:
        require_edge_numbers("values", values, edge_index)
    if shifts is not None:
        require_edge_numbers("shifts", shifts, edge_index, "dim")
        if shifts.dtype != torch.int64:
            raise InvalidInputError(argument="shifts", expected="torch.int64", actual=shifts.dtype)


@lasting()
def neighbour_arrays(found: Neighbours, num_keys: int, device: torch.device) -> list[Any]:
    """A Graph's fields. The edges are sorted already, so that rows need no sort and share the edges' memory."""
    keys, queries = found.edge_index
    if found.reverse is None:
        by_key = compressed_rows(keys, queries, num_keys, len(found.query_offsets) - 1)
    else:
        by_key = (found.query_offsets, keys, found.reverse)
    slots = torch.arange(len(keys), device=keys.device)
    parts: list[Any] = [found.edge_index, found.query_offsets, keys, slots, *by_key, None, found.shifts]
    return parts if device.type == "cpu" else [None if part is None else part.to(device) for part in parts]


def require_one_set(graph: object) -> None:
    """Raise unless it is a Graph whose queries and keys are the same nodes, so far as their numbers tell."""
    from anyattention.patterns.graph import Graph

    if not isinstance(graph, Graph):
        raise no_graph("graph", graph)
    if graph.num_queries != graph.num_keys:
        raise GraphStructureError(
            argument="graph",
            expected="as many queries as keys",
            actual=f"{graph.num_queries} queries and {graph.num_keys} keys",
        )


def require_sizes(graph: EdgePattern, num_queries: int | None, num_keys: int | None) -> None:
    """That a caller's numbers of queries and keys, where given, are the graph's own."""
    asked = (graph.num_queries if num_queries is None else num_queries,)
    asked += (graph.num_keys if num_keys is None else num_keys,)
    if asked != (graph.num_queries, graph.num_keys):
        raise DimensionMismatchError(
            argument="(num_queries, num_keys)",
            expected=f"({graph.num_queries}, {graph.num_keys}), the graph's own",
            actual=asked,
        )


def own_edges(edge_index: Tensor) -> Tensor:
    """A copy of a caller's edges, which the caller may change."""
    with lasting(edge_index):
        return edge_index.clone(memory_format=torch.contiguous_format)


def moved_arrays(graph: Graph, device: torch.device | str) -> list[Any]:
    """The fields on another device."""
    *arrays, values, shifts = fields_of(graph)
    with lasting(graph.edge_index):
        moved = [x.to(device) for x in arrays]
        shifts = None if shifts is None else shifts.to(device)
    # Outside: they keep the derivatives of the moment.
    return [*moved, None if values is None else values.to(device), shifts]


def sorted_arrays(edge_index: Tensor, num_queries: int, num_keys: int) -> list[Tensor]:
    """The edges by query and by key, as the fields of a Graph."""
    with lasting(edge_index):
        # Kernels read both rows; a transposed list of pairs would have them interleaved.
        edge_index = edge_index.contiguous()
        if not is_compiling() and edge_index.is_inference():
            edge_index = edge_index.clone()
        keys, queries = edge_index[0], edge_index[1]
        by_query = compressed_rows(queries, keys, num_queries, num_keys)
        return [edge_index, *by_query, *compressed_rows(keys, queries, num_keys, num_queries)]


def edges_as_keys_arrays(graph: Graph) -> list[Tensor]:
    """The same queries and edges, each edge from a key of its own."""
    with lasting(graph.edge_index):
        edges = torch.arange(graph.num_edges, device=graph.device)
        offsets = torch.arange(graph.num_edges + 1, device=graph.device)
        by_query = (graph.query_offsets, graph.edges_by_query, graph.edges_by_query)
        return [torch.stack([edges, graph.query_index]), *by_query, offsets, graph.query_index, edges]


def row_arrays(keys: Tensor, num_keys: int) -> list[Any]:
    """A Graph's fields, of the keys `(num_queries, k)` of each query."""
    num_queries, k = keys.shape
    with lasting(keys):
        edges = torch.arange(num_queries * k, device=keys.device)
        offsets = torch.arange(num_queries + 1, device=keys.device) * k
        queries = torch.arange(num_queries, device=keys.device).repeat_interleave(k)
        edge_index = torch.stack([keys.flatten(), queries])
        by_key = compressed_rows(edge_index[0], queries, num_keys, num_queries)
        return [edge_index, offsets, edge_index[0], edges, *by_key]


@lasting()
def all_pairs_arrays(num_queries: int, num_keys: int, device: torch.device | str) -> list[Any]:
    """A Graph's fields, of every pair."""
    queries, keys = torch.arange(num_queries, device=device), torch.arange(num_keys, device=device)
    edges = torch.arange(num_queries * num_keys, device=device)
    key_index = keys.repeat(num_queries)
    by_query = [torch.arange(num_queries + 1, device=device) * num_keys, key_index, edges]
    key_offsets = torch.arange(num_keys + 1, device=device) * num_queries
    by_key = [key_offsets, queries.repeat(num_keys), edges.view(num_queries, num_keys).T.reshape(-1)]
    return [torch.stack([key_index, queries.repeat_interleave(num_keys)]), *by_query, *by_key]


def lacks_loop(graph: Graph) -> Tensor:
    """`(nodes,)` boolean: which nodes have no edge to themselves; one to an image of the node is none."""
    with lasting(graph.edge_index):
        missing = torch.ones(graph.num_queries, dtype=torch.bool, device=graph.device)
        is_loop = graph.key_index == graph.query_index
        if graph.shifts is not None:
            is_loop &= (graph.shifts == 0).all(1)
        missing[graph.key_index[is_loop]] = False
        return missing


def loops_added(graph: Graph, fill: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The edges, their values and their shifts, with i -> i added for each node that has no such edge."""
    if graph.num_queries != graph.num_keys:
        raise GraphStructureError(
            argument="graph",
            expected="as many queries as keys for self-loops",
            actual=f"{graph.num_queries} queries and {graph.num_keys} keys",
        )
    values, shifts = graph.values, graph.shifts
    fill = require_number("fill", fill) if values is None else _require_held("fill", fill, values.dtype)
    with lasting(graph.edge_index):
        loops = lacks_loop(graph).nonzero().T.expand(2, -1)
        edge_index = torch.cat([graph.edge_index, loops], dim=1)
        if shifts is not None:
            shifts = torch.cat([shifts, shifts.new_zeros(loops.shape[1], shifts.shape[1])])
    # Outside: they keep the derivatives of the moment.
    if values is not None:
        values = torch.cat([values, values.new_full((loops.shape[1],), fill)])
    return edge_index, values, shifts


def _require_held(argument: str, number: float, dtype: torch.dtype) -> float:
    """The number, which a tensor of the dtype can hold: whole and in range, but for rounding."""
    number = require_number(argument, number)
    if dtype.is_floating_point or dtype.is_complex:
        is_held = abs(number) <= torch.finfo(dtype).max
    else:
        low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        is_held = low <= number <= high and number == int(number)
    if not is_held:
        raise InvalidInputError(
            argument=argument, expected=f"a number that {dtype}, the values' dtype, holds", actual=number
        )
    return number


def joined_arrays(graphs: Sequence[Graph]) -> list[Any]:
    """The fields of the block-diagonal Graph of any number of graphs."""
    from anyattention.patterns.graph import Graph

    if not isinstance(graphs, list | tuple):
        raise InvalidInputError(argument="graphs", expected="a list of Graphs", actual=type(graphs).__name__)
    if not graphs:
        return all_pairs_arrays(0, 0, "cpu")
    for position, graph in enumerate(graphs):
        if not isinstance(graph, Graph):
            raise no_graph(f"graphs[{position}]", graph)
        if graph.device != graphs[0].device:
            raise InvalidInputError(
                argument=f"graphs[{position}]",
                expected=f"device {graphs[0].device}, as graphs[0]",
                actual=graph.device,
            )
    with lasting(*[graph.edge_index for graph in graphs]):
        joined, shifts = _joined(graphs), _joined_shifts(graphs)
    # Outside: they keep the derivatives of the moment.
    values = [graph.values for graph in graphs if graph.values is not None]
    return [*joined, torch.cat(values) if len(values) == len(graphs) else None, shifts]


def joined_radius(graphs: Sequence[Graph]) -> float | None:
    """The least radius that one of the graphs is known to have all pairs of."""
    return min((graph.search_radius for graph in graphs if graph.search_radius is not None), default=None)


def _joined(graphs: Sequence[Graph]) -> list[Tensor]:
    edges, queries, keys = 0, 0, 0
    parts: list[tuple[Tensor, ...]] = []
    for graph in graphs:
        shift = torch.tensor([[keys], [queries]], dtype=torch.int64, device=graph.device)
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
    return [torch.cat(part, dim=-1) for part in zip(*parts, strict=True)]


def _joined_shifts(graphs: Sequence[Graph]) -> Tensor | None:
    """The shifts of all edges: 0 in a graph that has none, where another has some."""
    dims = {graph.shifts.shape[1] for graph in graphs if graph.shifts is not None}
    if not dims:
        return None
    if len(dims) > 1:
        raise GraphStructureError(
            argument="graphs", expected="shifts of one dimension", actual=f"dimensions {sorted(dims)}"
        )
    dim = dims.pop()
    return torch.cat(
        [graph.edge_index.new_zeros(graph.num_edges, dim) if graph.shifts is None else graph.shifts for graph in graphs]
    )


def _require_count(argument: str, count: int | None) -> int:
    if count is None:
        raise GraphStructureError(
            argument=argument,
            expected="a number of nodes",
            actual=None,
            hint="give num_nodes, or num_queries and num_keys: isolated nodes cannot be read off the edges",
        )
    count = plain(count)
    # Above 2^59 the size of the offsets in bytes is no int64.
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 2**59:
        raise GraphStructureError(argument=argument, expected="an int >= 0, up to 2^59", actual=repr(count))
    return count


def _require_range(argument: str, index: Tensor, count: int) -> None:
    # torch.compile leaves its trace for this; others cannot, and the kernels compare each index.
    if index.numel() == 0 or not (is_dynamo_compiling() or is_readable(index)):
        return
    low, high = index.aminmax()
    if low < 0 or high >= count:
        edge = int(((index < 0) | (index >= count)).nonzero()[0])
        raise GraphStructureError(
            argument=argument,
            expected=f"indices from 0 to {count - 1} ({count} nodes)",
            actual=f"{int(index[edge])} at edge {edge}",
        )
