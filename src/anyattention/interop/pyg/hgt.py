"""`torch_geometric.nn.HGTConv` on this package's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as parent
from torch import Tensor
from torch_geometric.nn.dense import HeteroDictLinear, HeteroLinear

from anyattention import Dot
from anyattention.interop.pyg.layer import argument_types, attended, attention_arguments, explanation
from anyattention.interop.pyg.typed import materialised, projection_of, typed_graph, typed_refusal
from anyattention.nn.bare import is_untouched
from anyattention.nn.relation_rows import Projection, RelationMap, joint_rows, rows_by_target
from anyattention.ops.dispatch import Explanation
from anyattention.patterns import HeterogeneousGraph

__all__ = ["HGTConv"]

# As they were before anybody put others in their place.
_MATRICES_FORWARD, _PROJECTIONS_FORWARD = HeteroLinear.forward, HeteroDictLinear.forward


class HGTConv(parent.HGTConv):
    """`torch_geometric.nn.HGTConv` on this package's kernels; its arguments, parameters and results.

        score = prior_r (W_q x_i) . (A_r W_k x_j) / sqrt(channels of a head)
        output_i = sum over r and j of softmax(score) M_r W_v x_j

    then GELU, a projection and the gated skip connection of the node's type. All relations are one pass over the edges.

    The parent's forward runs a call that this one cannot; see `explain_forward`. Where `edge_index_dict` is in another
    order than the metadata, the parent multiplies by other relations' matrices; this one does not.

    Cost: O(nodes x relations of their type x in_channels x out_channels + edges x out_channels) time; memory
    O(nodes x relations of their type x out_channels + edges x heads).

    Source: Hu et al., 2020.

    Example:
        >>> layer = HGTConv(3, 8, (["a", "b"], [("a", "to", "b")]), heads=2)
        >>> x = {"a": torch.ones(2, 3), "b": torch.ones(3, 3)}
        >>> layer(x, {("a", "to", "b"): torch.tensor([[0, 1], [2, 2]])})["b"].shape
        torch.Size([3, 8])
    """

    # See GATConv.
    propagate = parent.MessagePassing.propagate
    propagate_type = argument_types(parent.HGTConv, "propagate")

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[tuple[str, str, str], Any]) -> Any:
        """As the parent's forward."""
        if _refusal(self, x_dict, edge_index_dict) is not None:
            return super().forward(x_dict, edge_index_dict)
        graph, arguments = _arguments(self, x_dict, edge_index_dict)
        outputs = _by_type(self, x_dict, graph, arguments)
        projected = self.out_lin({node_type: F.gelu(output) for node_type, output in outputs.items()})
        for node_type in outputs:
            output, x = projected[node_type], x_dict[node_type]
            if output.shape[-1] == x.shape[-1]:
                gate: Any = self.skip[node_type].sigmoid()
                output = gate * output + (1 - gate) * x
            outputs[node_type] = output
        return outputs

    def explain_forward(
        self, x_dict: dict[str, Tensor], edge_index_dict: dict[tuple[str, str, str], Any]
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments; see `GATConv.explain_forward`."""
        return explanation(
            _refusal(self, x_dict, edge_index_dict), lambda: _arguments(self, x_dict, edge_index_dict)[1]
        )


def _refusal(layer: Any, x_dict: Any, edge_index_dict: Any) -> str | None:
    matrices = {
        "k_rel": (layer.k_rel, HeteroLinear, _MATRICES_FORWARD),
        "v_rel": (layer.v_rel, HeteroLinear, _MATRICES_FORWARD),
    }
    return typed_refusal(layer, HGTConv, x_dict, edge_index_dict, matrices)


def _arguments(layer: Any, x_dict: Any, edge_index_dict: Any) -> tuple[HeterogeneousGraph, dict[str, Any]]:
    """The graph, and the arguments of `attend`."""
    materialised(layer, lambda: layer.kqv_lin(x_dict))
    graph = typed_graph(layer, x_dict, edge_index_dict)
    heads, width = layer.heads, layer.out_channels // layer.heads
    if not graph.relations:
        nothing = next(iter(layer.out_lin.parameters())).new_zeros(0, heads, width)
        return graph, attention_arguments(layer, (nothing, nothing, nothing), graph.joint(), Dot(), None, False)
    parts = _projections(layer, x_dict)
    keys = {each: _keys(layer, graph, each, parts) for each in x_dict if graph.outgoing(each)}
    key, value = joint_rows(graph, 0, x_dict, keys)
    (query,) = joint_rows(graph, 2, x_dict, {each: [RelationMap(parts[each][1], heads, 1)] for each in parts})
    return graph, attention_arguments(layer, (query, key, value), graph.joint(), Dot(), None, False)


def _projections(layer: Any, x_dict: Mapping[str, Tensor]) -> dict[str, list[Projection]]:
    """Those of key, query and value of each type."""
    linears = layer.kqv_lin
    if is_untouched(linears, HeteroDictLinear, _PROJECTIONS_FORWARD):
        found = {
            node_type: projection_of(linear, x_dict[node_type])
            for node_type, linear in linears.lins.items()
            if node_type in x_dict
        }
    else:
        found = {node_type: Projection(None, rows=rows) for node_type, rows in linears(x_dict).items()}
    thirds: dict[str, list[Projection]] = {}
    for node_type, projection in found.items():
        weight, bias, rows = projection.weight, projection.bias, projection.rows
        weights = [None] * 3 if weight is None else weight.chunk(3)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        columns = [None] * 3 if rows is None else rows.chunk(3, dim=-1)
        thirds[node_type] = [Projection(*parts) for parts in zip(weights, biases, columns, strict=True)]
    return thirds


def _keys(
    layer: Any, graph: HeterogeneousGraph, node_type: str, parts: Mapping[str, list[Projection]]
) -> list[RelationMap]:
    """Key and value of a type of sources."""
    heads, relations = layer.heads, graph.outgoing(node_type)
    places = [layer.edge_types_map[relation] for relation in relations]
    count = len(layer.edge_types)
    # Not weight[:, places]: compiled, PyTorch 2.13's backward of that is wrong on two threads.
    by_key, by_value = (
        torch.stack([each.weight.unflatten(0, (heads, count))[:, place] for place in places])
        for each in (layer.k_rel, layer.v_rel)
    )
    priors = torch.cat([layer.p_rel["__".join(relation)] for relation in relations])
    key, _, value = parts[node_type]
    return [
        RelationMap(key, heads, len(relations), by_key * priors[..., None, None]),
        RelationMap(value, heads, len(relations), by_value),
    ]


def _by_type(
    layer: Any, x_dict: Mapping[str, Tensor], graph: HeterogeneousGraph, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """The output of each type that may be a target; 0 where no relation leads there."""
    rows = attended(arguments).output.flatten(1)
    found = rows_by_target(graph, rows)
    return {
        node_type: found[node_type] if node_type in found else rows.new_zeros(x.shape[0], layer.out_channels)
        for node_type, x in x_dict.items()
        if node_type in layer.dst_node_types
    }
