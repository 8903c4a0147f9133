"""The Graph that a layer built last, kept as long as the edge list it was built from is alive and unchanged.

Nothing is stored in the layer, so its state_dict, its copies and its pickles know nothing of it.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyattention.ambient import lasting
from anyattention.interop.pyg.edge_lists import contents_of, edge_list_of, is_matrix, looped_matrix_edges
from anyattention.patterns import Graph

__all__ = ["PreparedGraph", "graph_of_programs", "prepared_graph"]

_Sizes = tuple[int, int, int | None]


@dataclass(frozen=True, eq=False)
class PreparedGraph:
    """A Graph with what it was built from.

    Attributes:
        graph: the pairs, self-loops included where they were asked for.
        kept: boolean `(edges,)`, the caller's edges that are in it; None where all are.
        source: the caller's edges, weakly.
        contents: what these held; see `contents_of`.
        sizes: numbers of sources, of targets and of self-loops.
    """

    graph: Graph
    kept: Tensor | None
    source: weakref.ref[Tensor]
    contents: tuple[Tensor, ...]
    sizes: _Sizes


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
_shared: weakref.WeakValueDictionary[tuple[int, _Sizes], PreparedGraph] = weakref.WeakValueDictionary()

_NUM_OF_PROGRAMS = 32
_of_programs: dict[tuple[int, _Sizes], _Memory] = {}
_lock = threading.Lock()


def prepared_graph(
    layer: nn.Module, edge_index: Tensor, num_sources: int, num_targets: int, num_loops: int | None
) -> PreparedGraph:
    """The Graph of an edge list: the layer's last one where it is the same, another layer's, or a new one.

    It is the same where the tensor holds the same edges as before: they are compared, since PyTorch does not see each
    change in place, such as one through a numpy array that shares the memory.

    Args:
        layer: whose memory it is.
        edge_index: `(2, edges)` integers; row 0 = source = key, row 1 = target = query. Or an EdgeIndex, or a sparse
            matrix with a row for each target.
        num_sources, num_targets: numbers of nodes.
        num_loops: replace the self-loops by one on each of the first nodes; None leaves the edges as they are.

    Raises:
        GraphStructureError: an edge names a node that is not there.
    """
    sizes = (num_sources, num_targets, num_loops)
    memory = _memories.get(layer)
    if memory is None:
        memory = _memories.setdefault(layer, _Memory())
    held = memory.held
    own = None if held is None else held[1]
    if own is not None and _is_current(own, edge_index, sizes):
        return own
    prepared = _shared_graph(edge_index, sizes, own)
    memory.hold(edge_index, prepared)
    return prepared


def graph_of_programs(edge_index: Tensor, num_sources: int, num_targets: int, num_loops: int | None) -> PreparedGraph:
    """As `prepared_graph`, for compiled programs, which do not say what layer asks: the last ones of all are kept."""
    sizes = (num_sources, num_targets, num_loops)
    prepared = _shared_graph(edge_index, sizes, None)
    with _lock:
        # Forgotten with the edge list too: then an entry is there, and holds nothing.
        memory = _of_programs.pop((id(edge_index), sizes), None) or _Memory()
        _of_programs[id(edge_index), sizes] = memory
        memory.hold(edge_index, prepared)
        while len(_of_programs) > _NUM_OF_PROGRAMS:
            _of_programs.pop(next(iter(_of_programs)))
    return prepared


def _shared_graph(edge_index: Tensor, sizes: _Sizes, other: PreparedGraph | None) -> PreparedGraph:
    """The Graph of an edge list that a layer holds, which is not this other one, or a new one."""
    prepared = _shared.get((id(edge_index), sizes))
    # The id of a tensor that is gone may have been given to this one.
    if prepared is None or prepared is other or not _is_current(prepared, edge_index, sizes):
        prepared = _prepare(edge_index, sizes)
        _shared[id(edge_index), sizes] = prepared
    return prepared


def _is_current(prepared: PreparedGraph, edge_index: Tensor, sizes: _Sizes) -> bool:
    if prepared.source() is not edge_index or prepared.sizes != sizes:
        return False
    found = contents_of(edge_index)
    return len(found) == len(prepared.contents) and all(map(_are_equal, prepared.contents, found))


def _are_equal(before: Tensor, now: Tensor) -> bool:
    return before.dtype is now.dtype and torch.equal(before, now)


def _prepare(edge_index: Tensor, sizes: _Sizes) -> PreparedGraph:
    num_sources, num_targets, num_loops = sizes
    contents = contents_of(edge_index)
    # Layers share it: it must serve training where an evaluation came first.
    with lasting(*contents):
        kept = None
        if num_loops is None:
            edges = edge_list_of(edge_index)
        elif is_matrix(edge_index):
            edges = looped_matrix_edges(edge_index, num_loops)
        else:
            edges, kept = _looped(edge_list_of(edge_index), num_loops)
        graph = Graph.from_edge_index(edges, num_queries=num_targets, num_keys=num_sources)
        if contents[0].dtype is torch.int64 and kept is None and not is_matrix(edge_index):
            # The Graph's own copy serves, but where it lacks edges.
            held = (graph.edge_index[:, : edge_index.shape[1]],)
        else:
            held = tuple([each.clone() for each in contents])
        return PreparedGraph(graph, kept, weakref.ref(edge_index), held, sizes)


def _looped(edges: Tensor, num_loops: int) -> tuple[Tensor, Tensor | None]:
    """Edges, their self-loops replaced by one on each of the first nodes, and which were kept if not all."""
    kept = None
    is_proper = edges[0] != edges[1]
    if not is_proper.all():
        edges, kept = edges[:, is_proper], is_proper
    loops = torch.arange(num_loops, device=edges.device).expand(2, -1)
    return torch.cat([edges, loops], dim=1), kept
