"""`torch_geometric.nn.TransformerConv` on this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch_geometric.nn as parent
from torch import Tensor

from anyattention import Dot, EdgeFeatures
from anyattention.interop.pyg.edge_lists import features_of
from anyattention.interop.pyg.layer import (
    argument_types,
    attended,
    attention_arguments,
    edge_weight,
    explanation,
    graph_of,
    has_lazy_widths,
    joined_heads,
    pair_of,
    take_widths,
    with_heads,
    with_widths,
)
from anyattention.interop.pyg.refusals import call_refusal
from anyattention.ops.dispatch import Explanation

__all__ = ["TransformerConv"]


class TransformerConv(parent.TransformerConv):
    """`torch_geometric.nn.TransformerConv` on this package's kernels; its arguments, parameters and results.

        score = (W_q x_i) . (W_k x_j + W_e e) / sqrt(out_channels)
        output_i = sum over j of softmax(score) (W_v x_j + W_e e)  (and the skip connection, gated with `beta`)

    The parent's forward runs a call that this one cannot; see `explain_forward`. Dropout draws other numbers than the
    parent's, with the same distribution.

    Cost: O(nodes x in_channels x out_channels + edges x out_channels) time; memory O(edges x heads).

    Source: Shi et al., 2021.

    Example:
        >>> import torch
        >>> layer = TransformerConv(3, 4, heads=2)
        >>> layer(torch.ones(3, 3), torch.tensor([[0, 1], [2, 2]])).shape
        torch.Size([3, 8])
    """

    # See GATConv.
    propagate = parent.MessagePassing.propagate
    propagate_type = argument_types(parent.TransformerConv, "propagate")

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
        result = attended(_arguments(self, *given))
        output = joined_heads(self, result.output)
        if self.root_weight:
            skip = self.lin_skip(pair_of(x)[1])
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
        layer = with_widths(self, lambda layer: _inputs(layer, x, edge_attr))
        return explanation(_refusal(layer, *given), lambda: _arguments(layer, *given))


def _inputs(layer: Any, x: Any, edge_attr: Any) -> list[tuple[Any, Any]]:
    """What each projection is called with, in the parent's order."""
    source, target = pair_of(x)
    nodes = [(layer.lin_query, target), (layer.lin_key, source), (layer.lin_value, source)]
    return [*nodes, (layer.lin_edge, edge_attr), (layer.lin_skip if layer.root_weight else None, target)]


def _refusal(layer: Any, x: Any, edge_index: Any, edge_attr: Any, needs_weights: Any) -> str | None:
    edge_attr = features_of(edge_index, edge_attr)
    if (edge_attr is None) != (layer.lin_edge is None):
        return "edge_attr and edge_dim go together"
    return call_refusal(layer, TransformerConv, pair_of(x), edge_index, edge_attr, [layer.lin_edge])


def _arguments(layer: Any, x: Any, edge_index: Tensor, edge_attr: Tensor | None, needs_weights: Any) -> dict[str, Any]:
    """The arguments of `attend`."""
    source, target = pair_of(x)
    edge_attr = features_of(edge_index, edge_attr)
    graph = graph_of(layer, edge_index, source.shape[0], target.shape[0])
    query = with_heads(layer, layer.lin_query(target))
    key, value = with_heads(layer, layer.lin_key(source)), with_heads(layer, layer.lin_value(source))
    features = None
    if edge_attr is not None:
        weight = edge_weight(layer)
        features = EdgeFeatures(edge_attr, weight, weight)
    # The parent's condition: False asks for weights too.
    needs_weights = isinstance(needs_weights, bool)
    return attention_arguments(layer, (query, key, value), graph, Dot(), features, needs_weights)
