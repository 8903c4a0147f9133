"""What a layer made of its last edges, kept as long as the tensors that they came in are alive and unchanged.

Nothing is stored in the layer, so its state_dict, its copies and its pickles know nothing of it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyattention._checks import Relation
from anyattention.ambient import lasting
from anyattention.interop.pyg.edge_lists import contents_of, edge_list_of, is_matrix, looped_matrix_edges
from anyattention.patterns import Graph, HeterogeneousGraph

__all__ = ["Making", "PreparedGraph", "prepared_graph", "prepared_types", "remembered"]

_NUM_OF_PROGRAMS = 32

Making = Callable[[], tuple[Any, Sequence[Tensor] | None]]
"""Makes something of edges; also returns copies of the edges' contents that it keeps anyway, where it does."""


@dataclass(frozen=True, eq=False)
class _Made:
    """Something that was made of edges.

    Attributes:
        what: it.
        sources: the caller's edges, weakly.
        contents: what these held; see `contents_of`.
        settings: what it was made with besides.
    """

    what: Any
    sources: tuple[weakref.ref[Tensor], ...]
    contents: tuple[Tensor, ...]
    settings: Hashable


class _Memory:
    """The last thing of one layer; one assignment replaces it, so threads need no lock."""

    __slots__ = ("__weakref__", "held")

    def __init__(self) -> None:
        self.held: tuple[tuple[weakref.ref[Tensor], ...], _Made] | None = None

    def hold(self, edges: Sequence[Tensor], made: _Made) -> None:
        own = weakref.ref(self)

        def forget(watch: weakref.ref[Tensor]) -> None:
            memory = own()
            if memory is not None and memory.held is not None and any(each is watch for each in memory.held[0]):
                memory.held = None

        self.held = (tuple([weakref.ref(each, forget) for each in edges]), made)


_memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()
# Layers of one model share their edges; what is made of them lives in their memories, not here.
_shared: weakref.WeakValueDictionary[Hashable, _Made] = weakref.WeakValueDictionary()
_of_programs: dict[Hashable, _Memory] = {}
_lock = threading.Lock()


def remembered(layer: nn.Module | None, edges: Sequence[Tensor], settings: Hashable, make: Making) -> Any:
    """What is made of edges: the layer's last where they are the same, another layer's, or a new one.

    They are the same where the tensors hold the same edges as before: they are compared, since PyTorch does not see
    each change in place, such as one through a numpy array that shares the memory.

    Args:
        layer: whose memory it is. None for compiled programs, which do not say what layer asks: the last ones of all
            are kept.
        edges: in each form that `contents_of` reads.
        settings: what it is made with besides.
        make: makes it, of tensors that last.
    """
    if layer is None:
        return _of_all_programs(edges, settings, make)
    memory = _memories.get(layer)
    if memory is None:
        memory = _memories.setdefault(layer, _Memory())
    held = memory.held
    own = None if held is None else held[1]
    if own is not None and _is_current(own, edges, settings):
        return own.what
    made = _shared_or_made(edges, settings, make, own)
    memory.hold(edges, made)
    return made.what


def _of_all_programs(edges: Sequence[Tensor], settings: Hashable, make: Making) -> Any:
    made = _shared_or_made(edges, settings, make, None)
    key = (tuple(map(id, edges)), settings)
    with _lock:
        # Forgotten with the edges too: then an entry is there, and holds nothing.
        memory = _of_programs.pop(key, None) or _Memory()
        _of_programs[key] = memory
        memory.hold(edges, made)
        while len(_of_programs) > _NUM_OF_PROGRAMS:
            _of_programs.pop(next(iter(_of_programs)))
    return made.what


def _shared_or_made(edges: Sequence[Tensor], settings: Hashable, make: Making, other: _Made | None) -> _Made:
    """What a layer holds, which is not this other thing, or a new one."""
    key = (tuple(map(id, edges)), settings)
    made = _shared.get(key)
    # The id of a tensor that is gone may have been given to this one.
    if made is None or made is other or not _is_current(made, edges, settings):
        contents = [part for each in edges for part in contents_of(each)]
        with lasting(*contents):
            what, held = make()
            held = [part.clone() for part in contents] if held is None else held
        made = _Made(what, tuple(map(weakref.ref, edges)), tuple(held), settings)
        _shared[key] = made
    return made


def _is_current(made: _Made, edges: Sequence[Tensor], settings: Hashable) -> bool:
    if made.settings != settings or len(made.sources) != len(edges):
        return False
    if any(source() is not each for source, each in zip(made.sources, edges, strict=True)):
        return False
    found = [part for each in edges for part in contents_of(each)]
    return len(found) == len(made.contents) and all(map(_are_equal, made.contents, found))


def _are_equal(before: Tensor, now: Tensor) -> bool:
    return before.dtype is now.dtype and torch.equal(before, now)


@dataclass(frozen=True, eq=False)
class PreparedGraph:
    """The Graph of an edge list.

    Attributes:
        graph: the pairs, self-loops included where they were asked for.
        kept: boolean `(edges,)`, the caller's edges that are in it; None where all are.
    """

    graph: Graph
    kept: Tensor | None


def prepared_graph(
    layer: nn.Module | None, edge_index: Tensor, num_sources: int, num_targets: int, num_loops: int | None
) -> PreparedGraph:
    """The Graph of an edge list, remembered.

    Args:
        layer: whose memory it is; None for compiled programs.
        edge_index: `(2, edges)` integers; row 0 = source = key, row 1 = target = query. Or an EdgeIndex, or a sparse
            matrix with a row for each target.
        num_sources, num_targets: numbers of nodes.
        num_loops: replace the self-loops by one on each of the first nodes; None leaves the edges as they are.

    Raises:
        GraphStructureError: an edge names a node that is not there.
    """

    def make() -> tuple[PreparedGraph, Sequence[Tensor] | None]:
        kept = None
        if num_loops is None:
            edges = edge_list_of(edge_index)
        elif is_matrix(edge_index):
            edges = looped_matrix_edges(edge_index, num_loops)
        else:
            edges, kept = _looped(edge_list_of(edge_index), num_loops)
        graph = Graph.from_edge_index(edges, num_queries=num_targets, num_keys=num_sources)
        is_whole = kept is None and not is_matrix(edge_index) and edge_index.dtype is torch.int64
        return PreparedGraph(graph, kept), [graph.edge_index[:, : edge_index.shape[1]]] if is_whole else None

    return remembered(layer, [edge_index], (num_sources, num_targets, num_loops), make)


def prepared_types(
    layer: nn.Module | None, edges: Mapping[Relation, Tensor], num_nodes: Mapping[str, int]
) -> HeterogeneousGraph:
    """The HeterogeneousGraph of an edge list of each relation, remembered.

    Args:
        layer, edges: as `prepared_graph`, by relation.
        num_nodes: of each type.

    Raises:
        GraphStructureError: an edge names a node that is not there.
    """

    def make() -> tuple[HeterogeneousGraph, Sequence[Tensor] | None]:
        lists = {relation: edge_list_of(each) for relation, each in edges.items()}
        graph = HeterogeneousGraph.from_edge_index(lists, num_nodes)
        are_whole = all(not is_matrix(each) and each.dtype is torch.int64 for each in edges.values())
        return graph, list(graph.edge_index.values()) if are_whole else None

    settings = (tuple(edges), tuple(num_nodes.items()))
    return remembered(layer, list(edges.values()), settings, make)


def _looped(edges: Tensor, num_loops: int) -> tuple[Tensor, Tensor | None]:
    """Edges, their self-loops replaced by one on each of the first nodes, and which were kept if not all."""
    kept = None
    is_proper = edges[0] != edges[1]
    if not is_proper.all():
        edges, kept = edges[:, is_proper], is_proper
    loops = torch.arange(num_loops, device=edges.device).expand(2, -1)
    return torch.cat([edges, loops], dim=1), kept
