"""Soft caps of any size, rows of a million keys and calls of many heads."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import attend
from anyattention.patterns import Graph, TopK, Window

pytestmark = pytest.mark.usefixtures("native")

_QUERIES, _KEYS, _HEADS = 5, 7, 2
_SOFTCAPS = (1e-45, 1e-40, 1e-38, 1e-25, 1e-19, 1e-10, 0.1, 1.0, 30.0, 1e10, 1e19, 1e25, 1e38, 3.4e38, 3.5e38, 1e39)


def _of_graph(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
    pairs = torch.tensor(list(itertools.product(range(_QUERIES), range(_KEYS)))).T.flip(0)
    graph = Graph.from_edge_index(pairs, num_queries=_QUERIES, num_keys=_KEYS)
    bias = settings.pop("bias", None)
    bias = None if bias is None else bias.flatten()
    output, weights, *_ = attend(query, key, value, graph, bias=bias, **settings)
    return output, None if weights is None else weights.mT.unflatten(-1, (_QUERIES, _KEYS))


def _dense(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
    return attend(query, key, value, **settings)[:2]


def _sparse(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
    settings["return_weights"] = False
    return attend(query, key, value, Window(_KEYS, _KEYS, align="top_left"), **settings)[:2]


def _topk(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
    result = attend(query, key, value, TopK(_KEYS), **settings)
    if result.weights is None or result.indices is None:
        return result.output, None
    return result.output, torch.zeros_like(result.weights).scatter(-1, result.indices, result.weights).transpose(1, 2)


_WAYS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "dense": _dense,
    "graph": _of_graph,
    "sparse": _sparse,
    "topk": _topk,
}


def _expected(query: Tensor, key: Tensor, value: Tensor, softcap: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula in float64, which holds every cap here."""
    scores = torch.einsum("blhd,bshd->bhls", query, key) / query.shape[-1] ** 0.5
    scores = softcap * torch.tanh(scores / softcap)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return torch.einsum("bhls,bshe->blhe", weights, value), weights


@pytest.mark.pairwise
@pytest.mark.parametrize("softcap", _SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("way", _WAYS)
def test_a_softcap_of_any_size(
    way: str, has_bias: bool, implementation: str, dtype: torch.dtype, softcap: float
) -> None:
    if way == "topk" and implementation == "cpu" and (has_bias or dtype == torch.float64):
        implementation = "reference"  # the kernel does not choose such keys
    shapes = [(1, _QUERIES, _HEADS, 3), (1, _KEYS, _HEADS, 3), (1, _KEYS, _HEADS, 4)]
    wide = [torch.randn(*shape, dtype=torch.float64).to(dtype).double().requires_grad_() for shape in shapes]
    # One query has scores of 0, where tanh bends for every cap.
    wide[0].data[:, 2] = 0.0
    bias = torch.randn(_QUERIES, _KEYS, dtype=torch.float64).to(dtype) if has_bias else None
    output, weights = _expected(*wide, softcap, None if bias is None else bias.double())
    by = torch.randn(output.shape, dtype=torch.float64).to(dtype)
    expected = [output, *torch.autograd.grad(output, wide, by.double())]

    inputs = [x.detach().to(dtype).requires_grad_() for x in wide]
    settings: dict[str, Any] = {"softcap": softcap, "bias": bias}
    result, _ = _WAYS[way](*inputs, **settings, implementation=implementation)
    found = [result, *torch.autograd.grad(result, inputs, by, retain_graph=True)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    _, own = _WAYS[way](*inputs, **settings, return_weights="heads")
    if own is not None:
        torch.testing.assert_close(own.double(), weights, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [1e-45, 1e-38, 1e-30, 1.0, 1e30, 3.5e38])
@pytest.mark.parametrize("way", _WAYS)
def test_second_derivatives_under_a_softcap_of_any_size(way: str, softcap: float) -> None:
    shapes = [(1, _QUERIES, _HEADS, 3), (1, _KEYS, _HEADS, 3), (1, _KEYS, _HEADS, 4)]
    inputs = [torch.randn(*shape).requires_grad_() for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    seconds = []
    by = torch.randn(1, _QUERIES, _HEADS, 4), torch.randn(*shapes[0])
    for leaves, output in (
        (inputs, _WAYS[way](*inputs, softcap=softcap)[0]),
        (wide, _expected(*wide, softcap, None)[0]),
    ):
        (first,) = torch.autograd.grad(output, leaves[0], by[0].to(output.dtype), create_graph=True)
        seconds.append(torch.autograd.grad(first, leaves, by[1].to(output.dtype)))
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_sums_over_many_keys_are_made_in_blocks() -> None:
    # Numbers with a common mean: one sum over them all, in float32, is off by 1e-5, and its gradient by 2e-3.
    shapes = (1, 2, 1, 8), (1, 1 << 18, 1, 8), (1, 1 << 18, 1, 8)
    inputs = [torch.randn(shape) + mean for shape, mean in zip(shapes, (0, 1, 1), strict=True)]
    by = torch.randn(shapes[0])
    found: list[list[Tensor]] = []
    for implementation, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = attend(*leaves, implementation=implementation).output
        found.append([output.double(), *(x.double() for x in torch.autograd.grad(output, leaves, by.to(dtype)))])
    errors = [(one - other).abs().max() / other.abs().max() for one, other in zip(*found, strict=True)]
    assert errors[0] < 5e-6
    assert errors[1] < 2e-4
    assert max(errors[2:]) < 5e-6
