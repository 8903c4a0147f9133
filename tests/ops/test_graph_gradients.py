"""First and second derivatives of graph attention against finite differences, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from anyattention.patterns import Graph
from cases import AGGREGATIONS, SCORES, make_call


def graph_with_empty_rows() -> Graph:
    """Queries 1 and 3 alone, a duplicate edge, key 0 unused."""
    return Graph.from_edge_index(torch.tensor([[1, 2, 2, 1, 2], [0, 0, 2, 2, 2]]), num_queries=4, num_keys=3)


def call(score: str, *, batch: int | None = None, **settings: Any) -> tuple[Any, list[Tensor]]:
    """A function of every differentiable argument at once, and the arguments."""
    sizes: dict[str, Any] = {"batch": batch, "heads": 2, "width": 3, "value_dim": 2}
    given = make_call(graph_with_empty_rows(), score, bias="beh", features="kv", **sizes, **settings)

    def run(*tensors: Tensor) -> Any:
        result = given.with_tensors(tensors).run()
        if result.logsumexp is None:
            return result.output, result.weights
        finite = result.logsumexp.isfinite().detach()
        return result.output, result.weights, torch.where(finite, result.logsumexp, 0.0)

    return run, given.leaves


@pytest.mark.pairwise
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_first_and_second_derivatives(score: str, aggregation: str, normalize: bool) -> None:
    run, inputs = call(score, aggregation=aggregation, normalize=normalize, softcap=2.5)
    assert gradcheck(run, inputs)
    # The fast mode multiplies the Jacobian by random vectors from both sides.
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("score", SCORES)
def test_every_entry_of_the_second_derivative(score: str) -> None:
    run, inputs = call(score)
    assert gradgradcheck(run, inputs)


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_derivatives_with_a_mask_and_a_batch(score: str, aggregation: str) -> None:
    # Query 0 keeps one edge in head 0 and none in head 1; query 2 keeps all.
    mask = torch.tensor([[True, False], [False, False], [True, True], [True, True], [True, True]])
    run, inputs = call(score, batch=2, aggregation=aggregation, mask=mask)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_derivatives_with_dropout(aggregation: str) -> None:
    run, inputs = call("dynamic", aggregation=aggregation, dropout=0.3)

    def seeded(*arguments: Tensor) -> Any:
        torch.manual_seed(4)
        return run(*arguments)

    assert gradcheck(seeded, inputs)
    assert gradgradcheck(seeded, inputs, fast_mode=True)
