"""`torch_geometric.nn.GATConv` on this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch_geometric.nn as parent
from torch import Tensor

from anyattention import Additive, EdgeFeatures
from anyattention.interop.pyg.edge_lists import declared_sizes, features_of
from anyattention.interop.pyg.layer import (
    argument_types,
    attended,
    attention_arguments,
    columns,
    edges_and_weights,
    explanation,
    finished,
    graph_and_features,
    has_lazy_widths,
    pair_of,
    take_widths,
    with_heads,
    with_widths,
    without_autocast,
)
from anyattention.interop.pyg.refusals import call_refusal
from anyattention.ops.dispatch import Explanation
from anyattention.ops.linear_maps import folded, linear_maps

__all__ = ["GATConv"]


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
        >>> layer.explain_forward((x, x), edge_index.short()).refusals[0][1]
        'edge_index is torch.int16 of shape (2, 2), not int64 or int32 of shape (2, edges)'
    """

    # The plain method, which explainers need; without it PyTorch Geometric takes the parent's generated one for it.
    propagate = parent.MessagePassing.propagate
    propagate_type = argument_types(parent.GATConv, "propagate")
    edge_updater_type = argument_types(parent.GATConv, "edge_updater")

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
        if has_lazy_widths(self):
            take_widths(_inputs(self, x, edge_attr))
        if _refusal(self, *given) is not None:
            return super().forward(*given)
        arguments = _arguments(self, *given)
        result = attended(arguments, weights_after_dropout=True)
        output = finished(self, result.output, pair_of(x)[1])
        if not return_attention_weights:
            return output
        assert result.weights is not None
        return output, edges_and_weights(self, edge_index, arguments["pattern"], result.weights)

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
        layer = with_widths(self, lambda layer: _inputs(layer, x, edge_attr))
        return explanation(_refusal(layer, *given), lambda: _arguments(layer, *given))


def _inputs(layer: Any, x: Any, edge_attr: Any) -> list[tuple[Any, Any]]:
    """What each projection is called with, in the parent's order."""
    source, target = pair_of(x)
    nodes = [(layer.lin, source)] if layer.lin is not None else [(layer.lin_src, source), (layer.lin_dst, target)]
    return [(layer.res, target), *nodes, (layer.lin_edge, columns(edge_attr))]


def _refusal(layer: Any, x: Any, edge_index: Any, edge_attr: Any, size: Any, needs_weights: Any) -> str | None:
    source, target = pair_of(x)
    edge_attr = _read_features(layer, edge_index, edge_attr)
    # Without the targets' features the sources' terms alone are the score.
    nodes = [source] if target is None else [source, target]
    folded = [layer.lin, layer.lin_src, layer.lin_dst, layer.lin_edge]
    unread = ["lin_dst", "res"] if target is None else []
    if edge_attr is None:
        unread.append("lin_edge")
    return (
        call_refusal(layer, GATConv, nodes, edge_index, columns(edge_attr), folded, unread)
        or _width_refusal(layer, source)
        or _size_refusal(size, nodes, edge_index)
    )


def _width_refusal(layer: Any, source: Tensor) -> str | None:
    width = (layer.lin_src if layer.lin is None else layer.lin).weight.shape[1]
    return None if source.shape[1] == width else f"x has {source.shape[1]} features, not {width}"


def _size_refusal(size: Any, nodes: list[Any], edge_index: Tensor) -> str | None:
    num_targets = declared_sizes(edge_index)[1]
    if len(nodes) == 1 and num_targets is not None and num_targets != _sizes(nodes[0], None, size)[1]:
        return f"edge_index says {num_targets} targets"
    if size is None:
        return None
    fits = len(size) == 2 and all(type(count) is int for count in size)
    if not fits or any(count != features.shape[0] for count, features in zip(size, nodes, strict=False)):
        return f"size={size} for {' and '.join(str(features.shape[0]) for features in nodes)} nodes"
    return None


def _arguments(
    layer: Any, x: Any, edge_index: Tensor, edge_attr: Tensor | None, size: Any, needs_weights: Any
) -> dict[str, Any]:
    """The arguments of `attend`."""
    source, target = pair_of(x)
    sizes = _sizes(source, target, size)
    graph, edge_attr = graph_and_features(
        layer, edge_index, _read_features(layer, edge_index, edge_attr), sizes, needs_weights
    )
    value, key, query = _nodes(layer, source, target, sizes[1])
    features = None
    if edge_attr is not None:
        with without_autocast():
            features = EdgeFeatures(columns(edge_attr), folded(layer.lin_edge.weight, layer.att_edge[0])[:, None])
    score = Additive(layer.negative_slope)
    return attention_arguments(layer, (query, key, value), graph, score, features, needs_weights)


def _nodes(layer: Any, source: Tensor, target: Tensor | None, num_targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """The values `(sources, heads, channels)`, and the terms of keys and queries `(nodes, heads, 1)`.

    The attention vectors go into the projection: no (nodes, heads, channels) product for a number per head, and one
    product for all. Weights may be read: `_refusal` leaves projections that are no plain ones to the parent.
    """
    projection = layer.lin_src if layer.lin is None else layer.lin
    target_projection = layer.lin_dst if layer.lin is None else layer.lin
    is_cast = torch.is_autocast_enabled("cpu")
    # Not under autocast: the parent's products with the attention vectors are in float32.
    with without_autocast():
        value, terms = None, [folded(projection.weight, layer.att_src[0])]
        if target is not None:
            terms.append(folded(target_projection.weight, layer.att_dst[0]))
        own = terms if target is source else terms[:1]
        if is_cast:
            key, *query = linear_maps(source.to(terms[0].dtype), own)
        else:
            value, key, *query = linear_maps(source, [projection.weight, *own])
        if target is None:
            query = [key.new_zeros(num_targets, layer.heads)]
        elif target is not source:
            query = linear_maps(target.to(terms[1].dtype), terms[1:])
    value = with_heads(layer, projection(source) if value is None else value)
    return value, key.unsqueeze(-1), query[0].unsqueeze(-1)


def _sizes(source: Tensor, target: Tensor | None, size: Any) -> tuple[int, int]:
    """The numbers of sources and targets."""
    return size or (source.shape[0], (source if target is None else target).shape[0])


def _read_features(layer: Any, edge_index: Any, edge_attr: Any) -> Any:
    """The edge features that GAT reads: none without a projection for them."""
    return None if layer.lin_edge is None else features_of(edge_index, edge_attr)
