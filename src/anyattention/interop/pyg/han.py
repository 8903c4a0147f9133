"""`torch_geometric.nn.HANConv` on this package's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as parent
from torch import Tensor

from anyattention import Additive
from anyattention.interop.pyg.layer import argument_types, attended, attention_arguments, explanation
from anyattention.interop.pyg.typed import materialised, projection_of, typed_graph, typed_refusal
from anyattention.nn.relation_rows import RelationMap, joint_rows, rows_by_target, weighted_relations
from anyattention.ops.dispatch import Explanation
from anyattention.patterns import HeterogeneousGraph

__all__ = ["HANConv"]


class HANConv(parent.HANConv):
    """`torch_geometric.nn.HANConv` on this package's kernels; its arguments, parameters and results.

        score = LeakyReLU(a_src_r . W x_j + a_dst_r . W x_i),  z_r,i = ReLU(sum over j of softmax(score) W x_j)
        output_i = sum over r of softmax(mean over i of q . tanh(W_k z_r,i)) z_r,i

    All relations are one pass over the edges.

    The parent's forward runs a call that this one cannot; see `explain_forward`. Dropout draws other numbers than the
    parent's, with the same distribution.

    Cost: O(nodes x relations of their type x in_channels x out_channels + edges x out_channels) time; memory
    O(nodes x relations of their type x out_channels + edges x heads).

    Source: Wang et al., 2019.

    Example:
        >>> layer = HANConv(3, 8, (["a", "b"], [("a", "to", "b")]), heads=2)
        >>> x = {"a": torch.ones(2, 3), "b": torch.ones(3, 3)}
        >>> layer(x, {("a", "to", "b"): torch.tensor([[0, 1], [2, 2]])})["b"].shape
        torch.Size([3, 8])
    """

    # See GATConv.
    propagate = parent.MessagePassing.propagate
    propagate_type = argument_types(parent.HANConv, "propagate")

    @property
    def edge_types(self) -> list[tuple[str, str, str]]:
        """The relations of the metadata."""
        return self.metadata[1]

    def forward(
        self,
        x_dict: dict[str, Tensor],
        edge_index_dict: dict[tuple[str, str, str], Any],
        return_semantic_attention_weights: bool = False,
    ) -> Any:
        """As the parent's forward."""
        if _refusal(self, x_dict, edge_index_dict) is not None:
            return super().forward(x_dict, edge_index_dict, return_semantic_attention_weights)
        graph, arguments = _arguments(self, x_dict, edge_index_dict)
        outputs: dict[str, Tensor | None] = dict.fromkeys(x_dict)
        weights: dict[str, Tensor | None] = dict.fromkeys(x_dict)
        rows = F.relu(attended(arguments).output.flatten(1))
        for node_type, own in rows_by_target(graph, rows, by_relation=True).items():
            outputs[node_type], weights[node_type] = weighted_relations(own, self.k_lin, self.q[0])
            if own.numel() == 0:
                weights[node_type] = None
        return (outputs, weights) if return_semantic_attention_weights else outputs

    def explain_forward(
        self,
        x_dict: dict[str, Tensor],
        edge_index_dict: dict[tuple[str, str, str], Any],
        return_semantic_attention_weights: bool = False,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments; see `GATConv.explain_forward`."""
        return explanation(
            _refusal(self, x_dict, edge_index_dict), lambda: _arguments(self, x_dict, edge_index_dict)[1]
        )


def _refusal(layer: Any, x_dict: Any, edge_index_dict: Any) -> str | None:
    return typed_refusal(layer, HANConv, x_dict, edge_index_dict, {})


def _arguments(layer: Any, x_dict: Any, edge_index_dict: Any) -> tuple[HeterogeneousGraph, dict[str, Any]]:
    """The graph, and the arguments of `attend`."""
    materialised(layer, lambda: [layer.proj[node_type](x) for node_type, x in x_dict.items()])
    graph = typed_graph(layer, x_dict, edge_index_dict, by_relation=True)
    heads = layer.heads
    score = Additive(layer.negative_slope)
    if not graph.relations:
        nothing = layer.q.new_zeros(0, heads, 1)
        return graph, attention_arguments(layer, (nothing, nothing, nothing), graph.joint(), score, None, False)
    projections = {node_type: projection_of(layer.proj[node_type], x) for node_type, x in x_dict.items()}

    def vectors(parameters: Mapping[str, Tensor], relations: tuple[tuple[str, str, str], ...]) -> Tensor:
        return torch.cat([parameters["__".join(relation)] for relation in relations])[..., None]

    keys, queries = {}, {}
    for node_type, projection in projections.items():
        outgoing, incoming = graph.outgoing(node_type), graph.incoming(node_type)
        if outgoing:
            term = RelationMap(projection, heads, len(outgoing), vectors(layer.lin_src, outgoing))
            keys[node_type] = [RelationMap(projection, heads, len(outgoing)), term]
        if incoming:
            queries[node_type] = [RelationMap(projection, heads, len(incoming), vectors(layer.lin_dst, incoming))]
    value, key = joint_rows(graph, 0, x_dict, keys)
    (query,) = joint_rows(graph, 2, x_dict, queries)
    joint = graph.joint(by_relation=True)
    return graph, attention_arguments(layer, (query, key, value), joint, score, None, False)
