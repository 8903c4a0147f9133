"""The state of a Graph that was pickled or copied, checked: no index in it leads outside of the arrays. Its pytree."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from anyattention._checks import (
    allocation_failures_named,
    describe_shape,
    require_dense,
    require_device,
    require_number,
)
from anyattention.ambient import is_readable
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError
from anyattention.patterns.graph_arrays import (
    fields_of,
    named_fields_of,
    require_edge_numbers,
    require_values_and_shifts,
)

__all__ = ["checked_state", "register_with_pytree"]

_INDICES = (
    "edge_index",
    "query_offsets",
    "keys_by_query",
    "edges_by_query",
    "key_offsets",
    "queries_by_key",
    "edges_by_key",
)


def checked_state(kind: type, state: object) -> dict[str, Any]:
    """The fields of a Graph, of class `kind`, by name; those that are absent keep their default.

    Raises:
        GraphStructureError: other fields, or arrays that are not the rows of the edges.
        DimensionMismatchError, InvalidInputError: an array of another shape, dtype or device.

    Cost: O(edges + nodes), without a sort.
    """
    state = _known_fields(kind, state)
    with allocation_failures_named():
        for name in _INDICES:
            state[name] = _index_array(name, state)
        _require_shapes(state)
        if is_readable(*(state[name] for name in _INDICES)):
            keys, queries = state["edge_index"]
            _require_rows("query_offsets", state["keys_by_query"], "edges_by_query", state, queries, keys)
            _require_rows("key_offsets", state["queries_by_key"], "edges_by_key", state, keys, queries)
    if state["search_radius"] is not None:
        state["search_radius"] = float(require_number("search_radius", state["search_radius"], above=0.0))
    return state


def _known_fields(kind: type, state: object) -> dict[str, Any]:
    known = {item.name: item.default for item in fields(kind)}
    given = state if isinstance(state, dict) else None
    if given is None or not {name for name, default in known.items() if default is MISSING} <= given.keys() <= set(
        known
    ):
        raise GraphStructureError(
            argument="state",
            expected="a dictionary of the fields " + ", ".join(known),
            actual=type(state).__name__ if given is None else ", ".join(map(repr, given)),
        )
    return {**known, **given}


def _index_array(name: str, state: dict[str, Any]) -> Tensor:
    array = state[name]
    require_dense(name, array)
    if array.dtype != torch.int64:
        raise InvalidInputError(argument=name, expected="torch.int64", actual=array.dtype)
    require_device(name, array, state["edge_index"].device, "edge_index")
    return array.contiguous()


def _require_shapes(state: dict[str, Any]) -> None:
    edge_index = state["edge_index"]
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise DimensionMismatchError(argument="edge_index", expected="(2, edges)", actual=describe_shape(edge_index))
    for name in ("keys_by_query", "edges_by_query", "queries_by_key", "edges_by_key"):
        require_edge_numbers(name, state[name], edge_index)
    for name in ("query_offsets", "key_offsets"):
        if state[name].ndim != 1 or len(state[name]) == 0:
            raise DimensionMismatchError(argument=name, expected="(nodes + 1,)", actual=describe_shape(state[name]))
    require_values_and_shifts(state["values"], state["shifts"], edge_index)


def _require_rows(
    offsets_name: str, others: Tensor, edges_name: str, state: dict[str, Any], own: Tensor, other: Tensor
) -> None:
    """That each edge stands in one slot, in the row of its own end, beside its other end."""
    offsets, edges, count = state[offsets_name], state[edges_name], len(own)
    sizes = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != count or (sizes < 0).any():
        raise GraphStructureError(
            argument=offsets_name,
            expected=f"offsets that rise from 0 to {count}, the number of edges",
            actual=f"offsets from {int(offsets[0])} to {int(offsets[-1])}",
        )
    is_named = torch.zeros(count, dtype=torch.bool, device=edges.device)
    is_inside = (edges >= 0) & (edges < count)
    is_named[edges[is_inside]] = True
    if not is_named.all():
        raise GraphStructureError(
            argument=edges_name, expected="each edge once", actual=f"{int(is_named.sum())} of {count} edges"
        )
    rows = torch.arange(len(sizes), device=edges.device).repeat_interleave(sizes)
    if not torch.equal(own[edges], rows) or not torch.equal(other[edges], others):
        raise GraphStructureError(
            argument=edges_name, expected="the rows of edge_index, with those of the other side", actual="others"
        )


@dataclass(frozen=True, eq=False)
class _Others:
    """What a Graph has besides tensors. Any two are equal: a traced call takes graphs of other radii too."""

    search_radius: float | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Others)

    def __hash__(self) -> int:
        return hash(_Others)


def register_with_pytree(kind: type) -> None:
    """Have PyTorch take a Graph, of class `kind`, apart into its tensors."""
    _pytree.register_pytree_node(
        kind,
        lambda graph: (fields_of(graph), _Others(graph.search_radius)),
        lambda parts, others: kind(*parts, search_radius=others.search_radius),
        serialized_type_name="anyattention.Graph",
        to_dumpable_context=lambda others: others.search_radius,
        from_dumpable_context=_Others,
        flatten_with_keys_fn=lambda graph: (named_fields_of(graph), _Others(graph.search_radius)),
    )
