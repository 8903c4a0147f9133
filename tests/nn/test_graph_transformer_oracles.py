"""nn.GraphTransformerLayer against PyTorch Geometric's GPSConv and a loop over the edges, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric import nn as pyg
from transformer_layers import (
    ALLOWED,
    EDGE_INDEX,
    GRAPH,
    SIZES,
    assert_same_with_gradients,
    expander,
    layer_of,
    random,
)

from anyattention.nn import GraphTransformerLayer

pytestmark = pytest.mark.usefixtures("native")


def softmax_over_edges(layer: GraphTransformerLayer, rows: Tensor, edge_index: Tensor, features: Tensor) -> Tensor:
    """The "dot" attention of GraphAttention and its output projection, edge by edge."""
    part = layer.graph_attention
    query, key, value = (
        module(rows).unflatten(-1, (2, 3))
        for module in (part.query_projection, part.key_projection, part.value_projection)
    )
    weight = part.edge_weight if hasattr(part, "edge_weight") else rows.new_zeros(2, 3, features.shape[1])
    output = []
    for node in range(len(rows)):
        edges = [edge for edge in range(edge_index.shape[1]) if edge_index[1, edge] == node]
        if not edges:
            output.append(rows.new_zeros(6))
            continue
        more = [torch.einsum("hdf,f->hd", weight, features[edge]) for edge in edges]
        keys = torch.stack([key[edge_index[0, edge]] + each for edge, each in zip(edges, more, strict=True)])
        values = torch.stack([value[edge_index[0, edge]] + each for edge, each in zip(edges, more, strict=True)])
        weights = torch.softmax((keys * query[node]).sum(-1) / math.sqrt(3), dim=0)
        output.append((weights.unsqueeze(-1) * values).sum(0).flatten())
    return layer.graph_projection(torch.stack(output))


def softmax_over_all(layer: GraphTransformerLayer, rows: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    part = layer.all_attention
    query, key, value = (
        module(rows).unflatten(-1, (2, 3))
        for module in (part.query_projection, part.key_projection, part.value_projection)
    )
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(3) + bias
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
    return part.output_projection(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))


def whole(layer: GraphTransformerLayer, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    def norm(rows: Tensor, by: Any) -> Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * by.weight + by.bias

    hidden = x + attention(norm(x, layer.attention_norm))
    first, last = layer.feed_forward[0], layer.feed_forward[3]
    inside = norm(hidden, layer.feed_forward_norm) @ first.weight.T + first.bias
    inside = 0.5 * inside * (1 + torch.erf(inside / math.sqrt(2)))
    return hidden + inside @ last.weight.T + last.bias


class TestBruteForce:
    @pytest.mark.parametrize("edge_dim", [None, 2])
    def test_graph(self, edge_dim: int | None) -> None:
        layer, x = layer_of("graph", edge_dim=edge_dim), random(9, 6).requires_grad_()
        features = random(10, edge_dim or 1).requires_grad_()
        found = layer(x, GRAPH, features if edge_dim else None).output
        expected = whole(layer, x, lambda rows: softmax_over_edges(layer, rows, EDGE_INDEX, features))
        assert_same_with_gradients(layer, found, expected, [x, features])

    @pytest.mark.parametrize("largest", [None, 2])
    def test_all(self, largest: int | None) -> None:
        layer, x = layer_of("all", max_distance=largest), random(9, 6).requires_grad_()
        distances = torch.randint(-1, 6, (9, 9))
        found = layer(x, sizes=SIZES, distances=None if largest is None else distances).output
        bias = torch.zeros(2, 9, 9, dtype=torch.float64)
        if largest is not None:
            rows = [[[3 if d < 0 or d > 2 else d for d in row] for row in distances.tolist()]]
            bias = torch.stack([head[torch.tensor(rows[0])] for head in layer.distance_bias])
        expected = whole(layer, x, lambda rows: softmax_over_all(layer, rows, ALLOWED, bias))
        assert_same_with_gradients(layer, found, expected, [x])

    @pytest.mark.parametrize("edge_dim", [None, 2])
    def test_expander(self, edge_dim: int | None) -> None:
        made = expander(virtual=2)
        layer, x = layer_of("expander", edge_dim=edge_dim), random(13, 6).requires_grad_()
        edge_attr = random(10, 2).requires_grad_()
        found = layer(x, made, edge_attr if edge_dim else None).output
        counts = made.edge_counts
        kinds = [edge_attr if edge_dim else random(10, 2) * 0, *(random(count, 2) * 0 for count in counts[1:])]
        ones = torch.zeros(sum(counts), 3, dtype=torch.float64)
        for kind, place in ((0, counts[0]), (1, sum(counts[:2])), (2, sum(counts[:3]))):
            ones[place : place + counts[kind + 1], kind] = 1
        features = torch.cat([torch.cat(kinds), ones], dim=1)[:, 0 if edge_dim else 2 :]
        edges = made.graph.edge_index
        expected = whole(layer, x, lambda rows: softmax_over_edges(layer, rows, edges, features))
        assert_same_with_gradients(layer, found, expected, [x, *([edge_attr] if edge_dim else [])])

    def test_graph_and_all(self) -> None:
        layer, x = layer_of("graph + all"), random(9, 6).requires_grad_()
        found = layer(x, EDGE_INDEX, batch=torch.tensor([0] * 6 + [1] * 3)).output
        zero = torch.zeros(10, 1, dtype=torch.float64)
        expected = whole(
            layer,
            x,
            lambda rows: (
                softmax_over_edges(layer, rows, EDGE_INDEX, zero) + softmax_over_all(layer, rows, ALLOWED, zero[0])
            ),
        )
        assert_same_with_gradients(layer, found, expected, [x])


@pytest.mark.parametrize("sizes", [(5,), (2, 5, 3), (1, 7)])
def test_all_is_the_layer_of_gps_without_its_norms(sizes: tuple[int, ...]) -> None:
    """GPSConv over dense batches; ours as a function of its weights, so that one backward gives both gradients."""
    theirs = pyg.GPSConv(6, None, heads=2, norm=None).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ours = GraphTransformerLayer(6, 2, attention="all", activation="relu", dtype=torch.float64).eval()
    ours.attention_norm = ours.feed_forward_norm = nn.Identity()
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = random(sum(sizes), 6).requires_grad_()
    weights, biases = theirs.attn.in_proj_weight.chunk(3), theirs.attn.in_proj_bias.chunk(3)
    names = ("query", "key", "value")
    parts = {f"all_attention.{name}_projection.weight": each for name, each in zip(names, weights, strict=True)}
    parts |= {f"all_attention.{name}_projection.bias": each for name, each in zip(names, biases, strict=True)}
    parts |= {f"all_attention.output_projection.{name}": x for name, x in theirs.attn.out_proj.named_parameters()}
    parts |= {f"feed_forward.{name}": x for name, x in theirs.mlp.named_parameters()}
    assert parts.keys() == dict(ours.named_parameters()).keys()
    found = functional_call(ours, parts, (x,), {"batch": batch}).output
    expected = theirs(x, torch.zeros(2, 0, dtype=torch.int64), batch)
    assert_same_with_gradients(theirs, found, expected, [x])
