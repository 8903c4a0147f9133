"""Graph attention inside torch.compile(fullgraph=True), forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import EdgeFeatures, attend
from anyattention.patterns import Graph
from anyattention.scores import Additive, Dot, Dynamic


def make_call(score: str, **settings: Any) -> Callable[..., tuple[Tensor, ...]]:
    def call(graph: Graph, query: Tensor, key: Tensor, value: Tensor, vector: Tensor, *edges: Tensor) -> Any:
        result = attend(
            query,
            key,
            value,
            graph,
            score={"dot": Dot(), "additive": Additive()}.get(score) or Dynamic(vector),
            bias=edges[0],
            mask=edges[0] > -1.0,
            edges=EdgeFeatures(*edges[1:]),
            return_weights="heads",
            **settings,
        )
        return result.output, result.weights, *([] if result.logsumexp is None else [result.logsumexp.exp()])

    return call


def make_inputs(score: str, num_queries: int, num_keys: int, num_edges: int) -> tuple[Graph, list[Tensor]]:
    edge_index = torch.stack([torch.randint(num_keys, (num_edges,)), torch.randint(num_queries, (num_edges,))])
    graph = Graph.from_edge_index(edge_index, num_queries=num_queries, num_keys=num_keys)
    head_dim = 1 if score == "additive" else 5
    shapes = [(num_queries, 3, head_dim), (num_keys, 3, head_dim), (num_keys, 3, 2), (3, head_dim), (num_edges, 3)]
    shapes += [(num_edges, 2), (3, head_dim, 2), (3, 2, 2)]
    return graph, [torch.randn(*shape).requires_grad_() for shape in shapes]


def assert_compiles(score: str, *sizes: tuple[int, int, int], backend: str = "aot_eager", **settings: Any) -> None:
    """Each size (queries, keys, edges) gives what it gives uncompiled, in values and gradients."""
    torch.compiler.reset()
    call = make_call(score, **settings)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for size in sizes:
        graph, inputs = make_inputs(score, *size)
        torch.manual_seed(9)
        expected = call(graph, *inputs)
        torch.manual_seed(9)
        actual = compiled(graph, *inputs)
        cotangents = [torch.randn_like(each) for each in expected]
        leaves = [leaf for position, leaf in enumerate(inputs) if position != 3 or score == "dynamic"]
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
