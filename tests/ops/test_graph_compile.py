"""Graph attention inside torch.compile(fullgraph=True), forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention.patterns import Graph
from cases import Call, make_call, random_graph


def calls(score: str, **settings: Any) -> Callable[..., tuple[Tensor, ...]]:
    """A function of a graph and of every differentiable argument."""

    def call(graph: Graph, tensors: dict[str, Tensor]) -> Any:
        given = Call(tensors, {"pattern": graph, "mask": tensors["bias"] > -1.0, **settings}, score)
        result = given.attend(return_weights="heads")
        return result.output, result.weights, *([] if result.logsumexp is None else [result.logsumexp.exp()])

    return call


def assert_compiles(score: str, *sizes: tuple[int, int, int], backend: str = "aot_eager", **settings: Any) -> None:
    """Each size (queries, keys, edges) gives what it gives uncompiled, in values and gradients."""
    torch.compiler.reset()
    call = calls(score, **settings)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for size in sizes:
        graph = random_graph(*size)
        given = make_call(graph, score, width=5, value_dim=2, bias="eh", features="kv", dtype=torch.float32)
        inputs = given.tensors
        torch.manual_seed(9)
        expected = call(graph, inputs)
        torch.manual_seed(9)
        actual = compiled(graph, inputs)
        cotangents = [torch.randn_like(each) for each in expected]
        leaves = list(inputs.values())
        theirs = torch.autograd.grad(expected, leaves, cotangents)
        ours = torch.autograd.grad(actual, leaves, cotangents)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("score", "aggregation", "normalize"), [("dot", "sum", True), ("additive", "mean", True), ("dynamic", "max", False)]
)
def test_every_score_and_aggregation_traces_whole(score: str, aggregation: str, normalize: bool) -> None:
    assert_compiles(score, (5, 7, 20), aggregation=aggregation, normalize=normalize)


def test_another_size_and_dropout_take_the_same_numbers() -> None:
    assert_compiles("dot", (5, 7, 20), (11, 3, 13), dropout=0.4, return_logsumexp=True)


@pytest.mark.exhaustive
def test_the_default_compiler_runs_it() -> None:
    assert_compiles("dynamic", (5, 7, 20), backend="inductor", softcap=3.0)
