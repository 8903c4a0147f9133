"""What the layers over several types have in common: the graph remembered, what they read, and their refusals."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch_geometric.nn import Linear

from anyattention.ambient import is_compiling, lasting
from anyattention.interop.pyg.refusals import layer_refusal
from anyattention.nn.bare import is_untouched
from anyattention.nn.relation_rows import Projection
from anyattention.patterns import HeterogeneousGraph
from anyattention.patterns.heterogeneous import Relation

__all__ = ["materialised", "projection_of", "typed_graph", "typed_refusal"]

# As it was before anybody put another in its place.
_LINEAR_FORWARD = Linear.forward

_Remembered = tuple[dict[Relation, weakref.ref[Tensor]], HeterogeneousGraph]
_memories: weakref.WeakKeyDictionary[nn.Module, _Remembered] = weakref.WeakKeyDictionary()


def typed_refusal(
    layer: Any, ours: type, x_dict: Any, edge_index_dict: Any, parts: Mapping[str, tuple[nn.Module, type, Any]]
) -> str | None:
    """Why the parent's forward runs a call; None where ours does.

    Args:
        layer: a layer of class `ours`, or of a subclass.
        parts: by name the modules that are read without a call, with their class and its forward.
    """
    refusal = layer_refusal(layer, ours)
    if refusal is not None:
        return refusal
    for name, (part, kind, forward) in parts.items():
        if not is_untouched(part, kind, forward):
            return f"{name} has hooks or is another module"
    if not isinstance(x_dict, Mapping) or not all(type(x) in (Tensor, nn.Parameter) for x in x_dict.values()):
        return "x_dict is no dictionary of plain tensors"
    for relation, edges in edge_index_dict.items():
        if type(edges) is not Tensor or edges.layout != torch.strided or edges.dtype not in (torch.int64, torch.int32):
            return f"edge_index of {relation} is no plain list of integers"
        if edges.ndim != 2 or edges.shape[0] != 2:
            return f"edge_index of {relation} has the shape {tuple(edges.shape)}"
        if relation not in layer.edge_types or not {relation[0], relation[2]} <= x_dict.keys():
            return f"{relation} is not in the metadata, or has no features"
    return None


def materialised(layer: nn.Module, widths: Callable[[], Any]) -> None:
    """Have a layer whose widths come from its first call take them."""
    if any(isinstance(parameter, UninitializedParameter) for parameter in layer.parameters()):
        with torch.no_grad():
            widths()


def projection_of(linear: Any, x: Tensor) -> Projection:
    """A PyTorch Geometric Linear's: the weight of one that nobody touched is read, any other is called."""
    is_read = is_untouched(linear, Linear, _LINEAR_FORWARD) and type(linear.weight) in (nn.Parameter, Tensor)
    return Projection(linear.weight, linear.bias) if is_read else Projection(None, rows=linear(x))


def typed_graph(layer: nn.Module, x: Mapping[str, Tensor], edges: Mapping[Relation, Tensor]) -> HeterogeneousGraph:
    """The graph of these edges: the layer's last one where the tensors are the same and hold the same edges.

    Raises:
        GraphStructureError: an edge names a node that is not there.
    """
    counts = {kind: features.shape[0] for kind, features in x.items()}
    if is_compiling():
        return _built(edges, counts)
    remembered = _memories.get(layer)
    if remembered is not None:
        sources, graph = remembered
        is_asked_for = graph.num_nodes == counts and list(sources) == list(edges)
        if is_asked_for and all(
            sources[relation]() is each and torch.equal(graph.edge_index[relation], each)
            for relation, each in edges.items()
        ):
            return graph
    graph = _built(edges, counts)
    _remember(layer, edges, graph)
    return graph


def _remember(layer: nn.Module, edges: Mapping[Relation, Tensor], graph: HeterogeneousGraph) -> None:
    """Keep the graph as long as the layer and its edge lists are there, and no other takes its place."""
    owner = weakref.ref(layer)

    def forget(source: weakref.ref[Tensor]) -> None:
        layer = owner()
        held = None if layer is None else _memories.get(layer)
        if layer is not None and held is not None and source in held[0].values():
            _memories.pop(layer, None)

    _memories[layer] = ({relation: weakref.ref(each, forget) for relation, each in edges.items()}, graph)


def _built(edges: Mapping[Relation, Tensor], counts: Mapping[str, int]) -> HeterogeneousGraph:
    # It may serve training where an evaluation came first.
    with lasting(*edges.values()):
        wide = {relation: each.long() for relation, each in edges.items()}
        return HeterogeneousGraph.from_edge_index(wide, counts)
