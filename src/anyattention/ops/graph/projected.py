"""Attention over a graph whose queries, keys and values are linear maps of one tensor: one node of autograd for all.

On a small graph a layer takes as long in autograd, in views and in checks as in the kernels. Beside anything but plain
tensors the maps and `attend` run apart.

Axes: N nodes, I in_features, H heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattention import native
from anyattention._checks import as_out_of_memory
from anyattention.ambient import Moment, is_autocast_enabled, moment_of, without_autocast
from anyattention.native.structures import layout_of
from anyattention.ops.dropout import draw_seed
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.graph.operators import GraphAttention, graph_attention
from anyattention.ops.linear_maps import folded, folded_gradients, joined, linear_maps
from anyattention.ops.linear_products import map_gradients, map_rows
from anyattention.ops.records import versions_of
from anyattention.patterns import Graph
from anyattention.scores import Score

__all__ = ["Projections", "projected_attention", "suits_nodes", "suits_parameters"]

_LAYOUT = layout_of(GraphAttention)


@dataclass(frozen=True, eq=False)
class Projections:
    """What makes the rows of an attention over a graph from x `(N, I)`.

    Attributes:
        columns: the width of a head as "query", "key" and "value", in the order of the weights and then of the vectors;
            without "value" it is the key.
        heads: H.
        weights: `(H x width, I)` each.
        biases: for each weight, or None for all.
        vectors: `(H, C)` each, whose products with the heads of the rows of the only weight are rows of their own.
    """

    columns: Mapping[str, int]
    heads: int
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    vectors: Sequence[Tensor] = ()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weights, biases and vectors."""
        return *self.weights, *self.biases, *self.vectors

    def of(self, tensors: Sequence[Any]) -> Projections:
        """The same with other weights, biases and vectors."""
        count = len(self.weights)
        return Projections(self.columns, self.heads, tensors[:count], tensors[count : 2 * count], tensors[2 * count :])

    @property
    def widths(self) -> list[int]:
        """Of the rows of each column."""
        return [self.heads * width for width in self.columns.values()]

    def fit(self, x: Tensor) -> bool:
        """Whether weights, biases and vectors have the sizes that the columns say."""
        sizes = self.widths[: len(self.weights)]
        for size, weight, bias in zip(sizes, self.weights, self.biases, strict=True):
            if weight.shape != (size, x.shape[1]) or (bias is not None and bias.shape != (size,)):
                return False
        width = next(iter(self.columns.values()))
        return all(vector.shape == (self.heads, width) for vector in self.vectors)

    def joined(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of all rows."""
        if not self.vectors:
            return joined(self.weights, self.biases)
        return joined([*self.weights, folded(self.weights[0], *self.vectors)], (None,))

    def gradients(self, by_weight: Tensor | None, by_bias: Tensor | None) -> list[Tensor | None]:
        """By the tensors, from those by what `joined` gives."""
        none = [None] * len(self.weights)
        if by_weight is None:
            return [*none, *none, *[None] * len(self.vectors)]
        if self.vectors:
            rows = self.weights[0].shape[0]
            more, by_vectors = folded_gradients(by_weight[rows:], self.weights[0], *self.vectors)
            return [by_weight[:rows] + more, None, *by_vectors]
        sizes = [weight.shape[0] for weight in self.weights]
        return [*by_weight.split(sizes), *(none if by_bias is None else by_bias.split(sizes))]

    def by_name(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Rows `(N, H x width)` as `(N, H, width)`, by the names of the columns."""
        each = zip(rows, self.columns.items(), strict=True)
        return {name: row.view(row.shape[0], self.heads, width) for row, (name, width) in each}


def suits_nodes(x: Tensor, graph: Graph) -> bool:
    """Whether `projected_attention` may take x `(N, I)`; before any parameter is read."""
    if x.layout != torch.strided or x.ndim != 2 or not x.is_cpu or moment_of((x,)) is not Moment.PLAIN:
        return False
    if x.dtype not in (torch.float32, torch.float64) or not x.numel() or not graph.edge_index.is_cpu:
        return False
    return native.available() and not is_autocast_enabled(x.device)


def suits_parameters(x: Tensor, score: Score, projections: Projections) -> bool:
    """Whether it may take the parameters too. What does not fit is refused by name where it runs apart."""
    vector = score.operands[0]
    parameters = [each for each in (vector, *projections.tensors) if each is not None]
    if moment_of(parameters) is not Moment.PLAIN:
        return False
    if vector is not None and vector.shape != (projections.heads, projections.columns["key"]):
        return False
    return projections.fit(x) and all(each.is_cpu and each.dtype is x.dtype for each in parameters)


def projected_attention(
    x: Tensor, projections: Projections, graph: Graph, score: Score, *, scale: float, dropout: float, normalize: bool
) -> Tensor:
    """The output `(N, H, C)` of `attend` for rows that are linear maps of x, for nodes and parameters that suit.

    The same numbers, from the same kernels; differentiable to any order.

    Args:
        x: `(N, I)`.
        projections: what makes the rows.
        graph: over N nodes.
        score, scale, dropout, normalize: as of `attend`.
    """
    score_vector, negative_slope = score.operands
    name = type(score).__name__
    seed = draw_seed(x.device) if dropout > 0 else None

    def call(rows: Mapping[str, Tensor], vector: Tensor | None) -> GraphAttention:
        return GraphAttention(
            graph=arrays_of(graph),
            query=rows["query"],
            key=rows["key"],
            value=rows.get("value"),
            vector=vector,
            term=None,
            bias=None,
            seed=seed,
            score=name,
            normalize=normalize,
            scale=scale,
            softcap=0.0,
            negative_slope=negative_slope,
            dropout=dropout,
        )

    try:
        return _ProjectedAttention.apply(call, projections, x, score_vector, *projections.tensors)
    except (MemoryError, RuntimeError) as failure:
        named = as_out_of_memory(failure)
        if named is None or named is failure:
            raise
        raise named from failure


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Any, projections: Projections, x: Tensor, vector: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        weight, bias = projections.joined()
        rows = map_rows(x, weight, bias, projections.widths)
        record = call(projections.by_name(rows), vector)
        output, largest, log_sum = graph_attention(record)
        ctx.call = call
        ctx.projections = projections.of([None] * len(tensors))
        ctx.versions = versions_of(_LAYOUT, record)
        ctx.save_for_backward(x, vector, output, largest, log_sum, weight, *rows, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # The forward ran without it, and what is made anew must be the same.
        with without_autocast(gradients[0].device):
            return _gradients(ctx, gradients)


def _gradients(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    columns = ctx.projections.columns
    x, vector, output, largest, log_sum, weight, *kept = ctx.saved_tensors
    rows, projections = kept[: len(columns)], ctx.projections.of(kept[len(columns) :])
    is_plain = not torch.is_grad_enabled() and moment_of(gradients) is Moment.PLAIN
    if not is_plain:
        # What is differentiated again hangs on x and the parameters.
        weight, bias = projections.joined()
        rows = linear_maps(x, [weight], [bias], projections.widths)
    record = ctx.call(projections.by_name(rows), vector)
    if versions_of(_LAYOUT, record) != ctx.versions:
        raise RuntimeError("graph_attention: arrays of the graph were changed in place since the forward")
    _, _, needs_x, needs_vector, *needs = ctx.needs_input_grad
    names = [*columns, *(["vector"] if needs_vector else [])]
    found = graph_attention.gradients(record, (output, largest, log_sum), (*gradients, None, None), names)
    by_rows = [None if (by := found[name]) is None else by.reshape(by.shape[0], -1) for name in columns]
    has_bias = any(each is not None for each in projections.biases)
    which = needs_x, any(needs), has_bias and any(needs)
    by_x, by_weight, by_bias = map_gradients(by_rows, projections.widths, x, weight, which, is_plain)
    return None, None, by_x, found.get("vector"), *projections.gradients(by_weight, by_bias)
