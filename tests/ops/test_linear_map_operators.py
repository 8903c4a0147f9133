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
    with pytest.raises(
        InvalidInputError, match=r"^x: expected torch\.float32 on cpu, a row for each of grad's \(29, 13\), got torch"
    ):
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


@pytest.mark.parametrize("has_bias", [False, True])
def test_forward_derivatives(has_bias: bool) -> None:
    given = [torch.randn(7, 5), torch.randn(3, 5), *([torch.randn(3)] if has_bias else [])]
    tangents = [torch.randn_like(each) for each in given]

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_map(LinearMap(x, weight, bias))

    for n in range(len(given)):
        parts = [t if n == place else torch.zeros_like(t) for place, t in enumerate(tangents)]
        found = torch.func.jvp(call, tuple(given), tuple(parts))
        expected = torch.func.jvp(F.linear, tuple(given), tuple(parts))
        torch.testing.assert_close(found, expected)
    found = torch.func.jvp(call, tuple(given), tuple(tangents))
    torch.testing.assert_close(found, torch.func.jvp(F.linear, tuple(given), tuple(tangents)))


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_transforms_inside_a_compiled_function(score: str) -> None:
    layer = GraphAttention(16, 2, in_features=9, score=score, dropout=0.0)
    graph = Graph.from_edge_index(torch.randint(23, (2, 57)), 23)
    x, tangent = torch.randn(23, 9), torch.randn(23, 9)

    def forward(x: Tensor, tangent: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: layer(x, graph).output, (x,), (tangent,))[1]

    def backward(x: Tensor, tangent: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x, graph).output.square().sum())(x)

    for call in (forward, backward):
        # Not inductor, which fails over the scatters of the reference.
        found = torch.compile(call, backend="aot_eager")(x, tangent)
        torch.testing.assert_close(found, call(x, tangent), rtol=1e-4, atol=1e-5)


def test_a_forward_derivative_around_a_compiled_map_of_frozen_weights() -> None:
    weight = torch.randn(16, 9)
    compiled = torch.compile(lambda x: linear_maps(x, [weight])[0], fullgraph=True, backend="aot_eager")
    x, tangent = torch.randn(5, 9), torch.randn(5, 9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(compiled(dual)).tangent
    torch.testing.assert_close(found, tangent @ weight.T)


def test_rows_of_a_number_that_the_compiler_does_not_know() -> None:
    weight, bias = nn.Parameter(torch.randn(16, 9)), nn.Parameter(torch.randn(16))

    def call(x: Tensor) -> Tensor:
        return linear_maps(x[x[:, 0] > 0], [weight], [bias])[0]

    x = torch.randn(31, 9)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(call, fullgraph=True)(x)
    torch.testing.assert_close(found, call(x))
