"""The Graph that a layer built last, kept as long as the edge list it was built from is alive and unchanged.

Nothing is stored in the layer, so its state_dict, its copies and its pickles know nothing of it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyattention.patterns import Graph

__all__ = ["PreparedGraph", "prepared_graph"]


@dataclass(frozen=True, eq=False)
class PreparedGraph:
    """A Graph with what it was built from.

    Attributes:
        graph: the pairs, self-loops included where they were asked for.
        kept: boolean `(edges,)`, the caller's edges that are in it; None where all are.
        source: the caller's edge list, weakly.
        state: what else the Graph depends on.
    """

    graph: Graph
    kept: Tensor | None
    source: weakref.ref[Tensor]
    state: tuple[Any, ...]


class _Memory:
    """The last Graph of one layer; one assignment replaces it, so threads need no lock."""

    __slots__ = ("__weakref__", "held")

    def __init__(self) -> None:
        self.held: tuple[weakref.ref[Tensor], PreparedGraph] | None = None

    def hold(self, edge_index: Tensor, prepared: PreparedGraph) -> None:
        own = weakref.ref(self)

        def forget(watch: weakref.ref[Tensor]) -> None:
            memory = own()
            if memory is not None and memory.held is not None and memory.held[0] is watch:
                memory.held = None

        self.held = (weakref.ref(edge_index, forget), prepared)


_memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()
# Layers of one model share an edge list; the Graph lives in their memories, not here.
_shared: weakref.WeakValueDictionary[tuple[Any, ...], PreparedGraph] = weakref.WeakValueDictionary()


def prepared_graph(
    layer: nn.Module, edge_index: Tensor, num_sources: int, num_targets: int, num_loops: int | None
) -> PreparedGraph:
    """The Graph of an edge list: the layer's last one where it is the same, another layer's, or a new one.

    A tensor that was changed in place counts as another one. A change that PyTorch does not see, such as through a
    numpy array that shares its memory, goes unnoticed.

    Args:
        layer: whose memory it is.
        edge_index: `(2, edges)` int64; row 0 = source = key, row 1 = target = query.
        num_sources, num_targets: numbers of nodes.
        num_loops: replace the self-loops by one on each of the first nodes; None leaves the edges as they are.

    Raises:
        GraphStructureError: an edge names a node that is not there.
    """
    if edge_index.is_inference():
        # It has no version that would tell of changes.
        return _prepare(edge_index, (num_sources, num_targets, num_loops))
    state = (num_sources, num_targets, num_loops, edge_index._version, edge_index.data_ptr())
    state += (tuple(edge_index.shape), edge_index.stride())
    memory = _memories.get(layer)
    if memory is None:
        memory = _memories.setdefault(layer, _Memory())
    held = memory.held
    if held is not None and _is_current(held[1], edge_index, state):
        return held[1]
    prepared = _shared.get((id(edge_index), state))
    # The id of a tensor that is gone may have been given to this one.
    if prepared is None or not _is_current(prepared, edge_index, state):
        prepared = _prepare(edge_index, state)
        _shared[id(edge_index), state] = prepared
    memory.hold(edge_index, prepared)
    return prepared


def _is_current(prepared: PreparedGraph, edge_index: Tensor, state: tuple[Any, ...]) -> bool:
    return prepared.source() is edge_index and prepared.state == state


def _prepare(edge_index: Tensor, state: tuple[Any, ...]) -> PreparedGraph:
    num_sources, num_targets, num_loops = state[:3]
    # An alias: the Graph must not keep the caller's tensor object alive, whose end it waits for.
    edges, kept = edge_index.detach(), None
    if num_loops is not None:
        is_proper = edges[0] != edges[1]
        if not is_proper.all():
            edges, kept = edges[:, is_proper], is_proper
        loops = torch.arange(num_loops, device=edges.device).expand(2, -1)
        edges = torch.cat([edges, loops], dim=1)
    graph = Graph.from_edge_index(edges, num_queries=num_targets, num_keys=num_sources)
    return PreparedGraph(graph, kept, weakref.ref(edge_index), state)
