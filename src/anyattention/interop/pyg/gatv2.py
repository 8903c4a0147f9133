"""`torch_geometric.nn.GATv2Conv` on this package's kernels."""

from __future__ import annotations

from typing import Any

import torch_geometric.nn as parent
from torch import Tensor

from anyattention import Dynamic, EdgeFeatures, attend
from anyattention.interop.pyg.layer import (
    argument_types,
    attention_arguments,
    columns,
    edge_weight,
    edges_out,
    explanation,
    finished,
    graph_and_features,
    pair_of,
    weights_refusal,
    with_heads,
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
        if _refusal(self, *given) is not None:
            return super().forward(*given)
        arguments = _arguments(self, *given)
        result = attend(**arguments)
        output = finished(self, result.output, pair_of(x)[1])
        if not return_attention_weights:
            return output
        return output, (edges_out(self, edge_index, arguments["pattern"]), result.weights)

    def explain_forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        return_attention_weights: Any = None,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments; see `GATConv.explain_forward`."""
        given = (x, edge_index, edge_attr, return_attention_weights)
        return explanation(_refusal(self, *given), lambda: _arguments(self, *given))


def _refusal(layer: Any, x: Any, edge_index: Any, edge_attr: Any, needs_weights: Any) -> str | None:
    if edge_attr is not None and layer.lin_edge is None:
        return "edge_attr is given to a layer without edge_dim"
    refusal = call_refusal(layer, GATv2Conv, pair_of(x), edge_index, columns(edge_attr), [layer.lin_edge])
    return refusal or weights_refusal(layer, needs_weights)


def _arguments(layer: Any, x: Any, edge_index: Tensor, edge_attr: Tensor | None, needs_weights: Any) -> dict[str, Any]:
    """The arguments of `attend`."""
    source, target = pair_of(x)
    graph, edge_attr = graph_and_features(layer, edge_index, edge_attr, (source.shape[0], target.shape[0]))
    key = with_heads(layer, layer.lin_l(source))
    # The parent's condition: whatever stands in lin_r's place is not called.
    is_one = isinstance(x, Tensor) and layer.share_weights
    query = key if is_one else with_heads(layer, layer.lin_r(target))
    features = None if edge_attr is None else EdgeFeatures(columns(edge_attr), edge_weight(layer))
    score = Dynamic(layer.att[0], layer.negative_slope)
    return attention_arguments(layer, (query, key, key), graph, score, features, needs_weights)
