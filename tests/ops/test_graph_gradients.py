"""First and second derivatives of graph attention against finite differences, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from anyattention import EdgeFeatures, attend
from anyattention.patterns import Graph
from anyattention.scores import Additive, Dot, Dynamic

_AGGREGATIONS = ("sum", "mean", "max")
_SCORES = ("dot", "additive", "dynamic")


def graph_with_empty_rows() -> Graph:
    """Queries 1 and 3 alone, a duplicate edge, key 0 unused."""
    return Graph.from_edge_index(torch.tensor([[1, 2, 2, 1, 2], [0, 0, 2, 2, 2]]), num_queries=4, num_keys=3)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def call(score: str, *, batch: tuple[int, ...] = (), **settings: Any) -> tuple[Any, list[Tensor]]:
    """A function of every differentiable argument at once, and the arguments."""
    graph, heads = graph_with_empty_rows(), 2
    head_dim, value_dim, edge_dim = (1 if score == "additive" else 3), 2, 2
    inputs = [
        leaf(*batch, 4, heads, head_dim),
        leaf(*batch, 3, heads, head_dim),
        leaf(*batch, 3, heads, value_dim),
        leaf(heads, head_dim),
        leaf(*batch, 5, heads) if batch else leaf(5, heads),
        leaf(5, edge_dim),
        leaf(heads, head_dim, edge_dim),
        leaf(heads, value_dim, edge_dim),
    ]
    if score != "dynamic":
        inputs[3].requires_grad_(False)

    def run(query: Tensor, key: Tensor, value: Tensor, vector: Tensor, bias: Tensor, *edges: Tensor) -> Any:
        normalize = settings.get("normalize", True)
        result = attend(
            query,
            key,
            value,
            graph,
            score={"dot": Dot(), "additive": Additive()}.get(score) or Dynamic(vector),
            bias=bias,
            edges=EdgeFeatures(*edges),
            return_weights="heads",
            return_logsumexp=normalize,
            **settings,
        )
        if result.logsumexp is None:
            return result.output, result.weights
        finite = result.logsumexp.isfinite().detach()
        return result.output, result.weights, torch.where(finite, result.logsumexp, 0.0)

    return run, inputs


@pytest.mark.pairwise
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("aggregation", _AGGREGATIONS)
@pytest.mark.parametrize("score", _SCORES)
def test_first_and_second_derivatives(score: str, aggregation: str, normalize: bool) -> None:
    run, inputs = call(score, aggregation=aggregation, normalize=normalize, softcap=2.5)
    assert gradcheck(run, inputs)
    # The fast mode multiplies the Jacobian by random vectors from both sides.
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("score", _SCORES)
def test_every_entry_of_the_second_derivative(score: str) -> None:
    run, inputs = call(score)
    assert gradgradcheck(run, inputs)


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", _AGGREGATIONS)
@pytest.mark.parametrize("score", _SCORES)
def test_derivatives_with_a_mask_and_a_batch(score: str, aggregation: str) -> None:
    # Query 0 keeps one edge in head 0 and none in head 1; query 2 keeps all.
    mask = torch.tensor([[True, False], [False, False], [True, True], [True, True], [True, True]])
    run, inputs = call(score, batch=(2,), aggregation=aggregation, mask=mask)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("aggregation", _AGGREGATIONS)
def test_derivatives_with_dropout(aggregation: str) -> None:
    run, inputs = call("dynamic", aggregation=aggregation, dropout=0.3)

    def seeded(*arguments: Tensor) -> Any:
        torch.manual_seed(4)
        return run(*arguments)

    assert gradcheck(seeded, inputs)
    assert gradgradcheck(seeded, inputs, fast_mode=True)
