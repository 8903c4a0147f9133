"""What the layers have in common: their edges, their heads, and the arguments of `attend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.inspector import Inspector
from torch_geometric.utils import add_self_loops

from anyattention import Additive, Dot, Dynamic, EdgeFeatures, Graph, explain
from anyattention.interop.pyg.remembered import prepared_graph
from anyattention.ops.dispatch import Explanation
from anyattention.ops.linear_maps import add_bias

__all__ = [
    "argument_types",
    "attention_arguments",
    "columns",
    "edge_weight",
    "edges_out",
    "explanation",
    "finished",
    "graph_and_features",
    "joined_heads",
    "pair_of",
    "weights_refusal",
    "with_heads",
]


def argument_types(layer: type, method: str) -> dict[str, type]:
    """The types of a layer's own arguments of `propagate` or `edge_updater`.

    PyTorch Geometric reads them from the class's source text, and keeps that text by the class's name, which ours
    share with their parents.
    """
    found = Inspector(layer).get_params_from_method_call(method, exclude=[0, "edge_index", "size"])
    return {name: parameter.type for name, parameter in found.items()}


def explanation(refusal: str | None, arguments: Callable[[], dict[str, Any]]) -> Explanation:
    """What runs a call: the parent's forward for a reason, else what `attend` chooses for its arguments."""
    if refusal is not None:
        return Explanation("torch_geometric", (("anyattention", refusal),))
    with torch.no_grad():
        return explain(**arguments())


def attention_arguments(
    layer: Any,
    rows: tuple[Tensor, Tensor, Tensor],
    graph: Graph,
    score: Additive | Dynamic | Dot,
    features: EdgeFeatures | None,
    needs_weights: Any,
) -> dict[str, Any]:
    """The arguments of `attend`, of query, key and value with heads."""
    return {
        **dict(zip(("query", "key", "value"), rows, strict=True)),
        "pattern": graph,
        "score": score,
        "edges": features,
        "dropout": float(layer.dropout) if layer.training else 0.0,
        "return_weights": "heads" if needs_weights else False,
    }


def weights_refusal(layer: Any, needs_weights: Any) -> str | None:
    """Why weights cannot be returned as the parent does; None where they can."""
    if needs_weights and layer.training and layer.dropout > 0:
        return "weights after dropout are asked for, and ours are those before it"
    return None


def graph_and_features(
    layer: Any, edge_index: Tensor, edge_attr: Tensor | None, sizes: tuple[int, int]
) -> tuple[Graph, Tensor | None]:
    """The Graph and its edges' features, with the self-loops that the layer adds."""
    if not layer.add_self_loops:
        return prepared_graph(layer, edge_index, *sizes, None).graph, edge_attr
    num_loops = min(sizes)
    prepared = prepared_graph(layer, edge_index, *sizes, num_loops)
    if edge_attr is not None:
        kept = edge_attr if prepared.kept is None else edge_attr[prepared.kept]
        own = prepared.graph.edge_index[:, : prepared.graph.num_edges - num_loops]
        # PyTorch Geometric's own function fills in the features of the loops.
        _, edge_attr = add_self_loops(own, kept, fill_value=layer.fill_value, num_nodes=num_loops)
    return prepared.graph, edge_attr


def edges_out(layer: Any, edge_index: Tensor, graph: Graph) -> Tensor:
    """The edges that weights belong to: the caller's tensor, or a new one with the self-loops."""
    # Whoever gets it may change it, and the Graph is used again.
    return graph.edge_index.clone() if layer.add_self_loops else edge_index


def finished(layer: Any, output: Tensor, target: Tensor | None) -> Tensor:
    """The heads joined, the residual and the bias."""
    output = joined_heads(layer, output)
    if layer.res is not None and target is not None:
        output = output + layer.res(target)
    bias = layer.bias
    return output if bias is None else add_bias(output, bias)


def joined_heads(layer: Any, output: Tensor) -> Tensor:
    """The heads side by side, or their mean."""
    return output.flatten(1) if layer.concat else output.mean(dim=1)


def pair_of(x: Any) -> tuple[Any, Any]:
    """Source and target features; anything else twice, for the parent to refuse."""
    return (x[0], x[1]) if isinstance(x, tuple | list) and len(x) == 2 else (x, x)


def columns(edge_attr: Any) -> Any:
    """Edge features of one axis as a column."""
    return edge_attr.view(-1, 1) if isinstance(edge_attr, Tensor) and edge_attr.ndim == 1 else edge_attr


def with_heads(layer: Any, rows: Tensor) -> Tensor:
    """Rows `(nodes, heads * channels)` as `(nodes, heads, channels)`."""
    return rows.unflatten(-1, (layer.heads, layer.out_channels))


def edge_weight(layer: Any) -> Tensor:
    """The projection of edge features, `(heads, channels, edge_dim)`."""
    return layer.lin_edge.weight.unflatten(0, (layer.heads, layer.out_channels))
