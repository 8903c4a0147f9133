"""PyTorch Geometric's attention layers on this package's kernels: change one import, keep the weights.

Each class is PyTorch Geometric's own with another `forward`. What that forward cannot run, the parent's does;
`layer.explain_forward(...)` says which, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import Additive, Dot, Dynamic, EdgeFeatures, Graph, attend, explain
from anyattention.errors import MissingExtraError
from anyattention.interop.remembered import prepared_graph
from anyattention.ops.dispatch import Explanation

try:
    import torch_geometric.nn as parent
except ModuleNotFoundError as missing:
    # What torch_geometric itself lacks is not ours to explain away.
    if missing.name is None or missing.name.split(".")[0] != "torch_geometric":
        raise
    raise MissingExtraError(
        "anyattention.interop.pyg needs torch_geometric",
        argument="torch_geometric",
        hint="Install it with: pip install 'anyattention[pyg]'",
    ) from missing
from torch_geometric.inspector import Inspector
from torch_geometric.utils import add_self_loops

from anyattention.interop.refusals import call_refusal

__all__ = ["GATConv", "GATv2Conv", "TransformerConv"]


def _argument_types(layer: type, method: str) -> dict[str, type]:
    """The types of a layer's own arguments of `propagate` or `edge_updater`.

    PyTorch Geometric reads them from the class's source text, and keeps that text by the class's name, which ours
    share with their parents.
    """
    found = Inspector(layer).get_params_from_method_call(method, exclude=[0, "edge_index", "size"])
    return {name: parameter.type for name, parameter in found.items()}


class GATConv(parent.GATConv):
    """`torch_geometric.nn.GATConv` on this package's kernels; its arguments, parameters and results.

    With h = W x in each head:

        score = LeakyReLU(att_src . h_j + att_dst . h_i + att_edge . W_e e)
        output_i = sum over j of softmax(score) h_j

    The parent's forward runs a call that this one cannot; see `explain_forward`. Dropout draws other numbers than the
    parent's, with the same distribution.

    Cost: O(nodes x in_channels x out_channels + edges x out_channels) time, memory O(edges x heads).

    Source: Velickovic et al., 2018.

    Example:
        >>> layer = GATConv(3, 4, heads=2)
        >>> x, edge_index = torch.ones(3, 3), torch.tensor([[0, 1], [2, 2]])
        >>> layer(x, edge_index).shape
        torch.Size([3, 8])
        >>> layer.explain_forward((x, x), edge_index.int()).refusals[0][1]
        'edge_index is torch.int32 of shape (2, 2), not int64 of shape (2, edges)'
    """

    # The plain method, which explainers need; without it PyTorch Geometric takes the parent's generated one for it.
    propagate = parent.MessagePassing.propagate
    propagate_type = _argument_types(parent.GATConv, "propagate")
    edge_updater_type = _argument_types(parent.GATConv, "edge_updater")

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: Any = None,
    ) -> Any:
        """As the parent's forward."""
        given = (x, edge_index, edge_attr, size, return_attention_weights)
        if _gat_refusal(self, *given) is not None:
            return super().forward(*given)
        arguments = _gat_arguments(self, *given)
        result = attend(**arguments)
        output = _finished(self, result.output, _pair(x)[1])
        if not return_attention_weights:
            return output
        return output, (_edges_out(self, edge_index, arguments["pattern"]), result.weights)

    def explain_forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: Any = None,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments, and why each faster one does not.

        Args: as `forward`.

        Returns:
            Explanation; its implementation is "torch_geometric" where the parent's forward runs.
        """
        given = (x, edge_index, edge_attr, size, return_attention_weights)
        return _explanation(_gat_refusal(self, *given), lambda: _gat_arguments(self, *given))


class GATv2Conv(parent.GATv2Conv):
    """`torch_geometric.nn.GATv2Conv` on this package's kernels; its arguments, parameters and results.

        score = att . LeakyReLU(W_l x_j + W_r x_i + W_e e),  output_i = sum over j of softmax(score) W_l x_j

    The parent's forward runs a call that this one cannot; see `explain_forward`. Dropout draws other numbers than the
    parent's, with the same distribution.

    Cost: O(nodes x in_channels x out_channels + edges x out_channels) time; memory O(edges x heads).

    Source: Brody et al., 2022.

    Example:
        >>> layer = GATv2Conv(3, 4, heads=2)
        >>> layer(torch.ones(3, 3), torch.tensor([[0, 1], [2, 2]])).shape
        torch.Size([3, 8])
    """

    # See GATConv.
    propagate = parent.MessagePassing.propagate
    propagate_type = _argument_types(parent.GATv2Conv, "propagate")
    edge_updater_type = _argument_types(parent.GATv2Conv, "edge_updater")

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        return_attention_weights: Any = None,
    ) -> Any:
        """As the parent's forward."""
        given = (x, edge_index, edge_attr, return_attention_weights)
        if _gatv2_refusal(self, *given) is not None:
            return super().forward(*given)
        arguments = _gatv2_arguments(self, *given)
        result = attend(**arguments)
        output = _finished(self, result.output, _pair(x)[1])
        if not return_attention_weights:
            return output
        return output, (_edges_out(self, edge_index, arguments["pattern"]), result.weights)

    def explain_forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        return_attention_weights: Any = None,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments; see `GATConv.explain_forward`."""
        given = (x, edge_index, edge_attr, return_attention_weights)
        return _explanation(_gatv2_refusal(self, *given), lambda: _gatv2_arguments(self, *given))


class TransformerConv(parent.TransformerConv):
    """`torch_geometric.nn.TransformerConv` on this package's kernels; its arguments, parameters and results.

        score = (W_q x_i) . (W_k x_j + W_e e) / sqrt(out_channels)
        output_i = sum over j of softmax(score) (W_v x_j + W_e e)  (and the skip connection, gated with `beta`)

    The parent's forward runs a call that this one cannot; see `explain_forward`. Dropout draws other numbers than the
    parent's, with the same distribution.

    Cost: O(nodes x in_channels x out_channels + edges x out_channels) time; memory O(edges x heads).

    Source: Shi et al., 2021.

    Example:
        >>> layer = TransformerConv(3, 4, heads=2)
        >>> layer(torch.ones(3, 3), torch.tensor([[0, 1], [2, 2]])).shape
        torch.Size([3, 8])
    """

    # See GATConv.
    propagate = parent.MessagePassing.propagate
    propagate_type = _argument_types(parent.TransformerConv, "propagate")

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        return_attention_weights: Any = None,
    ) -> Any:
        """As the parent's forward."""
        given = (x, edge_index, edge_attr, return_attention_weights)
        if _transformer_refusal(self, *given) is not None:
            return super().forward(*given)
        result = attend(**_transformer_arguments(self, *given))
        output = _joined(self, result.output)
        if self.root_weight:
            skip = self.lin_skip(_pair(x)[1])
            if self.lin_beta is None:
                output = output + skip
            else:
                beta: Any = self.lin_beta
                gate = beta(torch.cat([output, skip, output - skip], dim=-1)).sigmoid()
                output = torch.lerp(output, skip, gate)
        return output if result.weights is None else (output, (edge_index, result.weights))

    def explain_forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        return_attention_weights: Any = None,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments; see `GATConv.explain_forward`."""
        given = (x, edge_index, edge_attr, return_attention_weights)
        return _explanation(_transformer_refusal(self, *given), lambda: _transformer_arguments(self, *given))


def _gat_refusal(layer: Any, x: Any, edge_index: Any, edge_attr: Any, size: Any, needs_weights: Any) -> str | None:
    source, target = _pair(x)
    # Without the targets' features the sources' terms alone are the score.
    nodes = [source] if target is None else [source, target]
    folded = [layer.lin, layer.lin_src, layer.lin_dst, layer.lin_edge]
    return (
        call_refusal(layer, GATConv, nodes, edge_index, _gat_columns(layer, edge_attr), folded)
        or _size_refusal(size, nodes)
        or _weights_refusal(layer, needs_weights)
    )


def _gatv2_refusal(layer: Any, x: Any, edge_index: Any, edge_attr: Any, needs_weights: Any) -> str | None:
    if edge_attr is not None and layer.lin_edge is None:
        return "edge_attr is given to a layer without edge_dim"
    refusal = call_refusal(layer, GATv2Conv, _pair(x), edge_index, _columns(edge_attr), [layer.lin_edge])
    return refusal or _weights_refusal(layer, needs_weights)


def _transformer_refusal(layer: Any, x: Any, edge_index: Any, edge_attr: Any, needs_weights: Any) -> str | None:
    if (edge_attr is None) != (layer.lin_edge is None):
        return "edge_attr and edge_dim go together"
    return call_refusal(layer, TransformerConv, _pair(x), edge_index, edge_attr, [layer.lin_edge])


def _size_refusal(size: Any, nodes: list[Any]) -> str | None:
    if size is None:
        return None
    fits = len(size) == 2 and all(type(count) is int for count in size)
    if not fits or any(count != features.shape[0] for count, features in zip(size, nodes, strict=False)):
        return f"size={size} for {' and '.join(str(features.shape[0]) for features in nodes)} nodes"
    return None


def _weights_refusal(layer: Any, needs_weights: Any) -> str | None:
    if needs_weights and layer.training and layer.dropout > 0:
        return "weights after dropout are asked for, and ours are those before it"
    return None


def _gat_arguments(
    layer: Any, x: Any, edge_index: Tensor, edge_attr: Tensor | None, size: Any, needs_weights: Any
) -> dict[str, Any]:
    """The arguments of `attend`."""
    source, target = _pair(x)
    sizes = size or (source.shape[0], (source if target is None else target).shape[0])
    graph, edge_attr = _graph_and_features(layer, edge_index, None if layer.lin_edge is None else edge_attr, sizes)
    projection = layer.lin_src if layer.lin is None else layer.lin
    target_projection = layer.lin_dst if layer.lin is None else layer.lin
    value = _heads(layer, projection(source))
    # The attention vectors go into the projection: no (nodes, heads, channels) product for a number per head.
    key_weight = _folded(layer, projection, layer.att_src)
    if target is None:
        key = F.linear(source, key_weight)
        query = key.new_zeros(sizes[1], layer.heads)
    elif target is source:
        both = torch.cat([key_weight, _folded(layer, target_projection, layer.att_dst)])
        key, query = F.linear(source, both).chunk(2, dim=-1)
    else:
        key = F.linear(source, key_weight)
        query = F.linear(target, _folded(layer, target_projection, layer.att_dst))
    features = None
    if edge_attr is not None:
        edge_weight = _folded(layer, layer.lin_edge, layer.att_edge)
        features = EdgeFeatures(_columns(edge_attr), edge_weight[:, None])
    score = Additive(layer.negative_slope)
    return _arguments(layer, (query[..., None], key[..., None], value), graph, score, features, needs_weights)


def _gatv2_arguments(
    layer: Any, x: Any, edge_index: Tensor, edge_attr: Tensor | None, needs_weights: Any
) -> dict[str, Any]:
    """The arguments of `attend`."""
    source, target = _pair(x)
    graph, edge_attr = _graph_and_features(layer, edge_index, edge_attr, (source.shape[0], target.shape[0]))
    key = _heads(layer, layer.lin_l(source))
    # The parent's condition: whatever stands in lin_r's place is not called.
    is_one = isinstance(x, Tensor) and layer.share_weights
    query = key if is_one else _heads(layer, layer.lin_r(target))
    features = None if edge_attr is None else EdgeFeatures(_columns(edge_attr), _edge_weight(layer))
    score = Dynamic(layer.att[0], layer.negative_slope)
    return _arguments(layer, (query, key, key), graph, score, features, needs_weights)


def _transformer_arguments(
    layer: Any, x: Any, edge_index: Tensor, edge_attr: Tensor | None, needs_weights: Any
) -> dict[str, Any]:
    """The arguments of `attend`."""
    source, target = _pair(x)
    graph = prepared_graph(layer, edge_index, source.shape[0], target.shape[0], None).graph
    query = _heads(layer, layer.lin_query(target))
    key, value = _heads(layer, layer.lin_key(source)), _heads(layer, layer.lin_value(source))
    features = None
    if edge_attr is not None:
        weight = _edge_weight(layer)
        features = EdgeFeatures(edge_attr, weight, weight)
    # The parent's condition: False asks for weights too.
    needs_weights = isinstance(needs_weights, bool)
    return _arguments(layer, (query, key, value), graph, Dot(), features, needs_weights)


def _arguments(
    layer: Any,
    rows: tuple[Tensor, Tensor, Tensor],
    graph: Graph,
    score: Additive | Dynamic | Dot,
    features: EdgeFeatures | None,
    needs_weights: Any,
) -> dict[str, Any]:
    return {
        **dict(zip(("query", "key", "value"), rows, strict=True)),
        "pattern": graph,
        "score": score,
        "edges": features,
        "dropout": float(layer.dropout) if layer.training else 0.0,
        "return_weights": "heads" if needs_weights else False,
    }


def _graph_and_features(
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


def _edges_out(layer: Any, edge_index: Tensor, graph: Graph) -> Tensor:
    """The edges that weights belong to: the caller's tensor, or a new one with the self-loops."""
    # Whoever gets it may change it, and the Graph is used again.
    return graph.edge_index.clone() if layer.add_self_loops else edge_index


def _explanation(refusal: str | None, arguments: Callable[[], dict[str, Any]]) -> Explanation:
    if refusal is not None:
        return Explanation("torch_geometric", (("anyattention", refusal),))
    with torch.no_grad():
        return explain(**arguments())


def _finished(layer: Any, output: Tensor, target: Tensor | None) -> Tensor:
    """The heads joined, the residual and the bias."""
    output = _joined(layer, output)
    if layer.res is not None and target is not None:
        output = output + layer.res(target)
    bias = layer.bias
    return output if bias is None else output + bias


def _joined(layer: Any, output: Tensor) -> Tensor:
    return output.flatten(1) if layer.concat else output.mean(dim=1)


def _pair(x: Any) -> tuple[Any, Any]:
    """Source and target features; anything else twice, for the parent to refuse."""
    return (x[0], x[1]) if isinstance(x, tuple | list) and len(x) == 2 else (x, x)


def _columns(edge_attr: Any) -> Any:
    """Edge features of one axis as a column."""
    return edge_attr.view(-1, 1) if isinstance(edge_attr, Tensor) and edge_attr.ndim == 1 else edge_attr


def _gat_columns(layer: Any, edge_attr: Any) -> Any:
    """The edge features that GAT reads: none without a projection for them."""
    return None if layer.lin_edge is None else _columns(edge_attr)


def _heads(layer: Any, rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (layer.heads, layer.out_channels))


def _edge_weight(layer: Any) -> Tensor:
    """The projection of edge features, `(heads, channels, edge_dim)`."""
    return layer.lin_edge.weight.unflatten(0, (layer.heads, layer.out_channels))


def _folded(layer: Any, linear: Any, vector: Tensor) -> Tensor:
    """`(heads, in_channels)`: what a projection and an attention vector `(1, heads, channels)` make of a row."""
    weight = linear.weight.unflatten(0, (layer.heads, layer.out_channels))
    return torch.einsum("hc,hci->hi", vector[0], weight)
