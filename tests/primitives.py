"""The primitives of edges, and the same in plain PyTorch: what tests of transforms and of traces share.

The oracle is dense: products with the matrices that say which query and which key an edge has.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from anyattention import Graph
from anyattention.ops.edges import operators
from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.ops.edges.dynamic import dynamic_scores

GRAPH = Graph.from_edge_index(
    torch.tensor([[0, 1, 3, 3, 0, 4, 4, 0], [0, 0, 2, 2, 3, 3, 0, 2]]), num_queries=4, num_keys=5
)
_QUERIES = torch.nn.functional.one_hot(GRAPH.query_index, 4).double()
_KEYS = torch.nn.functional.one_hot(GRAPH.key_index, 5).double()
ARRAYS = [field.name for field in fields(GraphArrays)]
_SLOPE = 0.3


def at_queries(x: Tensor) -> Tensor:
    return torch.einsum("en,bn...->be...", _QUERIES, x)


def at_keys(x: Tensor) -> Tensor:
    """Of the two key heads, each for two heads in a row."""
    return torch.einsum("em,bm...->be...", _KEYS, x).repeat_interleave(2, dim=2)


def to_queries(x: Tensor) -> Tensor:
    return torch.einsum("en,be...->bn...", _QUERIES, x)


def plain_softmax(scores: Tensor) -> Tensor:
    terms = scores.exp()
    return terms / at_queries(to_queries(terms))


def plain_scores(query: Tensor, key: Tensor, vector: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    channels = at_queries(query) + at_keys(key) + torch.einsum("hdp,ep->ehd", weight, features)
    return torch.einsum("behd,hd->beh", torch.where(channels > 0, channels, _SLOPE * channels), vector)


class Case(NamedTuple):
    """A primitive: of a graph's arrays and some tensors; the same in plain PyTorch; the tensors' shapes."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def of(self, graph: GraphArrays) -> Callable[..., Tensor]:
        return lambda *x: self.ours(graph, *x)


CASES = {
    "edge_dot": Case(
        lambda graph, query, key: operators.edge_dot(query, key, graph),
        lambda query, key: (at_queries(query) * at_keys(key)).sum(-1),
        ((2, 4, 4, 3), (2, 5, 2, 3)),
    ),
    "edge_sum": Case(
        lambda graph, weights, key: operators.edge_sum(weights, key, graph),
        lambda weights, key: to_queries(weights[..., None] * at_keys(key)),
        ((2, 8, 4), (2, 5, 2, 3)),
    ),
    "edge_total": Case(lambda graph, x: operators.edge_total(x, graph), to_queries, ((2, 8, 4),)),
    "edge_spread": Case(lambda graph, x: operators.edge_spread(x, graph), at_queries, ((2, 4, 4),)),
    "edge_softmax": Case(lambda graph, x: operators.edge_softmax(x, graph), plain_softmax, ((2, 8, 4),)),
    "dynamic_dot": Case(
        lambda graph, *x: dynamic_scores(*x, graph, _SLOPE),
        plain_scores,
        ((2, 4, 4, 3), (2, 5, 2, 3), (4, 3), (4, 3, 2), (8, 2)),
    ),
}
each_primitive = pytest.mark.parametrize("name", list(CASES))


def inputs_of(case: Case, *leading: int) -> tuple[Tensor, ...]:
    return tuple([torch.randn(*leading, *shape, dtype=torch.float64) for shape in case.shapes])


def every(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.shapes)))


def leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs]


Rule = Callable[[Callable[..., Tensor]], Any]


def assert_agrees(case: Case, rule: Rule) -> None:
    """What the rule makes of the primitive is what it makes of plain PyTorch."""
    torch.testing.assert_close(rule(case.of(arrays_of(GRAPH))), rule(case.plain), rtol=1e-10, atol=1e-10)


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A number; the sine keeps what is linear from vanishing at the second derivative."""

    def loss(*inputs: Tensor) -> Tensor:
        found = function(*inputs).sin()
        waves = torch.arange(found.numel(), dtype=found.dtype, device=found.device).cos().view(found.shape)
        return (found * waves).sum()

    return loss


def first_of(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The gradients by a backward."""
    return lambda *inputs: torch.autograd.grad(loss_of(function)(*inputs), inputs)


def second_of(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The gradients of gradients, by two backwards."""

    def second(*inputs: Tensor) -> Any:
        found = torch.autograd.grad(loss_of(function)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(each.sin().sum() for each in found), inputs)

    return second
