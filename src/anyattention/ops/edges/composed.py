"""Attention over edges written in the primitives: differentiable to any order, and no channel per edge.

Axes: B batch, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyattention.ambient import is_transformed
from anyattention.ops.arguments import Scaling
from anyattention.ops.edges.arrays import GraphArrays
from anyattention.ops.edges.operators import edge_spread, edge_sum, edge_total
from anyattention.ops.edges.plain import largest_by_query
from anyattention.ops.edges.products import GraphProducts
from anyattention.scores import Score

__all__ = ["EdgeAttention", "recorded_gradients"]

_DIFFERENTIABLE = ("query", "key", "value", "vector", "term", "bias")


@dataclass(frozen=True, eq=False)
class EdgeAttention:
    """Attention over the edges of a graph, after dropout was drawn.

    Attributes:
        graph: the edges.
        score: the score's type, and `vector`, `negative_slope` its operands.
        query, key, value: `(B, N, H, D)`, `(B, M, G, D)`, `(B, M, G, C)`; a value of None is the key.
        term, bias: `(B, E, H)`, added to the raw score and to the score; -inf in the bias hides the edge.
        kept: `(B, E, H)`, the factors of dropout.
        scaling: what is between the raw score and the bias.
        normalize: softmax, or a sigmoid of each edge.
    """

    graph: GraphArrays
    score: type[Score]
    query: Tensor
    key: Tensor
    value: Tensor | None
    vector: Tensor | None
    term: Tensor | None
    bias: Tensor | None
    kept: Tensor | None
    scaling: Scaling
    negative_slope: float
    normalize: bool

    def scores(self) -> Tensor:
        """The score `(B, E, H)` of each edge; -inf on hidden edges."""
        hidden = None if self.bias is None else self.bias == -torch.inf
        score = self.score.of_operands(self.vector, self.negative_slope)
        raw = score.raw_of_edges(GraphProducts(self.graph), self.query, self.key, self.term)
        if hidden is not None:
            # A gradient of 0 through NaN would be NaN.
            raw = torch.where(hidden, 0.0, raw)
        scores = self.scaling.of(raw)
        return scores if hidden is None or self.bias is None else torch.where(hidden, -torch.inf, scores + self.bias)

    def results(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Output `(B, N, H, C)`, log of the sum `(B, N, H)` relative to a row's largest score, a constant, and weights.

        The weights `(B, E, H)` are those before dropout.
        """
        scores, log_sum = self.scores(), None
        hidden = scores == -torch.inf
        if self.normalize:
            # Not the kernel's: large scores, summed up in another order, are others by their rounding.
            largest = largest_by_query(scores, self.graph.query_index, self.query.shape[-3])
            shift = torch.where(largest == -torch.inf, 0.0, largest)
            terms = torch.where(hidden, 0.0, torch.exp(scores - edge_spread(shift, self.graph)))
            total = edge_total(terms, self.graph)
            total = torch.where(total == 0, 1.0, total)
            weights = terms / edge_spread(total, self.graph)
            log_sum = total.log()
        else:
            weights = torch.where(hidden, 0.0, torch.sigmoid(scores))
        value = self.key if self.value is None else self.value
        return edge_sum(weights if self.kept is None else weights * self.kept, value, self.graph), log_sum, weights

    def gradients(self, by: Sequence[Tensor | None], needs: frozenset[str]) -> Mapping[str, Tensor | None]:
        """The gradients, by name, of the results times `by`, which autograd differentiates again."""
        names = [name for name in _DIFFERENTIABLE if name in needs]
        asked = [n for n, each in enumerate(by) if each is not None and (n != 1 or self.normalize)]
        cotangents = [each for n in asked if (each := by[n]) is not None]

        def results(*inputs: Tensor) -> tuple[Tensor, ...]:
            found = replace(self, **dict(zip(names, inputs, strict=True))).results()
            return tuple([x for n in asked if (x := found[n]) is not None])

        return dict(
            zip(names, recorded_gradients(results, [getattr(self, name) for name in names], cotangents), strict=True)
        )


def recorded_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients, by the inputs, of a function's results times cotangents, which autograd differentiates again."""
    if is_transformed():
        # A transform does not see what autograd records around it.
        return torch.func.vjp(function, *[x.view_as(x) for x in inputs])[1](tuple(cotangents))
    # One input may be computed from another (the term from the query): a node of its own for each keeps them apart.
    own = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
    pairs = [(x, each) for x, each in zip(function(*own), cotangents, strict=True) if x.requires_grad]
    return torch.autograd.grad(
        [x for x, _ in pairs], own, [each for _, each in pairs], create_graph=True, allow_unused=True
    )
