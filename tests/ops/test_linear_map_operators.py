"""Linear maps as operators: what a compiled program has of them, and what it computes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from anyattention import Graph, native
from anyattention.errors import InvalidInputError
from anyattention.nn import GraphAttention
from anyattention.ops.linear_map_operators import LinearMap, LinearMapByWeight, linear_map, linear_map_by_weight
from anyattention.ops.linear_maps import linear_maps

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_map_and_its_gradient_by_the_weight(has_bias: bool, dtype: torch.dtype) -> None:
    x, weight, grad = (torch.randn(*shape, dtype=dtype) for shape in ((29, 11), (13, 11), (29, 13)))
    bias = torch.randn(13, dtype=dtype) if has_bias else None
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(linear_map(LinearMap(x, weight, bias)), F.linear(x, weight, bias), **tolerance)
    torch.testing.assert_close(linear_map_by_weight(LinearMapByWeight(grad, x)), grad.T @ x, **tolerance)


@pytest.mark.parametrize("other", [torch.randn(28, 11), torch.randn(29, 11).double(), torch.randn(29, 11).half()])
def test_rows_that_do_not_fit(other: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"^x: expected torch\.float32 on cpu, 29 rows, got torch"):
        linear_map_by_weight(LinearMapByWeight(torch.randn(29, 13), other))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_compiled_layers_multiply_by_the_kernels(score: str) -> None:
    layer = GraphAttention(16, 2, in_features=9, score=score, dropout=0.0)
    graph = Graph.from_edge_index(torch.randint(23, (2, 57)), 23)
    x = torch.randn(23, 9, requires_grad=True)

    def gradients(call: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x, graph).output.square().sum(), [x, *layer.parameters()])

    compiled = torch.compile(layer, fullgraph=True)
    found, programs = run_and_get_code(gradients, compiled)
    for mine, plain in zip(found, gradients(layer), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    has_them = any("anyattention.linear_map." in program for program in programs)
    assert has_them == native.multiplies_fast()


def test_autocast_and_halves_stay_with_pytorch() -> None:
    weight = nn.Parameter(torch.randn(16, 9))

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_maps(x, [weight])[0]

    x = torch.randn(5, 9)
    assert torch.compile(call, fullgraph=True)(x).dtype is torch.bfloat16
