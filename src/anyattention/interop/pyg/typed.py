"""What the layers over several types have in common: the graph remembered, what they read, and their refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch_geometric.nn import Linear

from anyattention._checks import Relation
from anyattention.ambient import is_compiling
from anyattention.interop.pyg.compiled import named_joint_graph
from anyattention.interop.pyg.edge_lists import edges_refusal
from anyattention.interop.pyg.refusals import layer_refusal, moment_refusal
from anyattention.interop.pyg.remembered import prepared_types
from anyattention.nn.bare import is_untouched
from anyattention.nn.relation_rows import Projection
from anyattention.patterns import HeterogeneousGraph

__all__ = ["materialised", "projection_of", "typed_graph", "typed_refusal"]

# As it was before anybody put another in its place.
_LINEAR_FORWARD = Linear.forward


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
        refusal = moment_refusal(edges) or edges_refusal(edges, False)
        if refusal is not None:
            return f"{relation}: {refusal}"
        if relation not in layer.edge_types or not {relation[0], relation[2]} <= x_dict.keys():
            return f"{relation} is not in the metadata, or has no features"
    return None


def materialised(layer: nn.Module, widths: Callable[[], Any]) -> None:
    """Have a layer whose widths come from its first call take them."""
    if any(isinstance(parameter, UninitializedParameter) for parameter in layer.parameters()):
        # Weights of an inference could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            widths()


def projection_of(linear: Any, x: Tensor) -> Projection:
    """A PyTorch Geometric Linear's: the weight of one that nobody touched is read, any other is called."""
    is_read = is_untouched(linear, Linear, _LINEAR_FORWARD) and type(linear.weight) in (nn.Parameter, Tensor)
    return Projection(linear.weight, linear.bias) if is_read else Projection(None, rows=linear(x))


def typed_graph(
    layer: nn.Module, x: Mapping[str, Tensor], edges: Mapping[Relation, Tensor], *, by_relation: bool = False
) -> HeterogeneousGraph:
    """The graph of these edges, remembered, with its `joint(by_relation=by_relation)`.

    Raises:
        GraphStructureError: an edge names a node that is not there.
    """
    counts = {node_type: features.shape[0] for node_type, features in x.items()}
    if not is_compiling():
        return prepared_types(layer, edges, counts)
    graph = HeterogeneousGraph(counts, dict(edges))
    return graph.with_joint(named_joint_graph(graph, by_relation), by_relation=by_relation) if edges else graph
