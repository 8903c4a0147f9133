"""`torch_geometric.nn.GATv2Conv` on this package's kernels."""

from __future__ import annotations

from typing import Any

import torch_geometric.nn as parent
from torch import Tensor

from anyattention import Dynamic, EdgeFeatures
from anyattention.interop.pyg.edge_lists import features_of
from anyattention.interop.pyg.layer import (
    argument_types,
    attended,
    attention_arguments,
    columns,
    edge_weight,
    edges_and_weights,
    explanation,
    finished,
    graph_and_features,
    has_lazy_widths,
    pair_of,
    take_widths,
    with_heads,
    with_widths,
)
from anyattention.interop.pyg.refusals import call_refusal
from anyattention.ops.dispatch import Explanation

__all__ = ["GATv2Conv"]


class GATv2Conv(parent.GATv2Conv):
    """`torch_geometric.nn.GATv2Conv` on this package's kernels; its arguments, parameters and results.

        score = att . LeakyReLU(W_l x_j + W_r x_i + W_e e),  output_i = sum over j of softmax(score) W_l x_j

    The parent's forward runs a call that this one cannot; see `explain_forward`. Dropout draws other numbers than the
    parent's, with the same distribution.

    Cost: O(nodes x in_channels x out_channels + edges x out_channels) time; memory O(edges x heads).

    Source: Brody et al., 2022.

    Example:
        >>> import torch
        >>> layer = GATv2Conv(3, 4, heads=2)
        >>> layer(torch.ones(3, 3), torch.tensor([[0, 1], [2, 2]])).shape
        torch.Size([3, 8])
    """

    # See GATConv.
    propagate = parent.MessagePassing.propagate
    propagate_type = argument_types(parent.GATv2Conv, "propagate")
    edge_updater_type = argument_types(parent.GATv2Conv, "edge_updater")

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        return_attention_weights: Any = None,
    ) -> Any:
        """As the parent's forward."""
        given = (x, edge_index, edge_attr, return_attention_weights)
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
        return_attention_weights: Any = None,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments; see `GATConv.explain_forward`."""
        given = (x, edge_index, edge_attr, return_attention_weights)
        layer = with_widths(self, lambda layer: _inputs(layer, x, edge_attr))
        return explanation(_refusal(layer, *given), lambda: _arguments(layer, *given))


def _inputs(layer: Any, x: Any, edge_attr: Any) -> list[tuple[Any, Any]]:
    """What each projection is called with, in the parent's order."""
    source, target = pair_of(x)
    # The parent's condition: whatever stands in lin_r's place is not called.
    right = None if isinstance(x, Tensor) and layer.share_weights else layer.lin_r
    return [(layer.res, target), (layer.lin_l, source), (right, target), (layer.lin_edge, columns(edge_attr))]


def _refusal(layer: Any, x: Any, edge_index: Any, edge_attr: Any, needs_weights: Any) -> str | None:
    edge_attr = features_of(edge_index, edge_attr)
    if edge_attr is not None and layer.lin_edge is None:
        return "edge_attr is given to a layer without edge_dim"
    unread = ["lin_edge"] if edge_attr is None else []
    return call_refusal(layer, GATv2Conv, pair_of(x), edge_index, columns(edge_attr), [layer.lin_edge], unread)


def _arguments(layer: Any, x: Any, edge_index: Tensor, edge_attr: Tensor | None, needs_weights: Any) -> dict[str, Any]:
    """The arguments of `attend`."""
    source, target = pair_of(x)
    edge_attr = features_of(edge_index, edge_attr)
    graph, edge_attr = graph_and_features(
        layer, edge_index, edge_attr, (source.shape[0], target.shape[0]), needs_weights
    )
    key = with_heads(layer, layer.lin_l(source))
    # As in `_inputs`.
    is_one = isinstance(x, Tensor) and layer.share_weights
    query = key if is_one else with_heads(layer, layer.lin_r(target))
    features = None if edge_attr is None else EdgeFeatures(columns(edge_attr), edge_weight(layer))
    score = Dynamic(layer.att[0], layer.negative_slope)
    return attention_arguments(layer, (query, key, key), graph, score, features, needs_weights)
