"""Linear maps of many rows: equal to torch.nn.functional.linear, for small, sparse and large inputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from anyattention.ops import linear_maps as module
from anyattention.ops.linear_maps import add_bias, linear_maps


@pytest.fixture(params=["as it is", "into large pages"])
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, native: Any) -> str:
    if request.param == "into large pages":
        monkeypatch.setattr(module, "_SMALLEST", 0)
    return request.param


def parameters(with_bias: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    weights = [torch.randn(width, 5, dtype=torch.float64, requires_grad=True) for width in (7, 3)]
    biases = [torch.randn(width, dtype=torch.float64, requires_grad=True) if with_bias else None for width in (7, 3)]
    return weights, list(biases)


@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_linear_and_its_derivatives(pages: str, with_bias: bool) -> None:
    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    weights, biases = parameters(with_bias)
    leaves = [x, *weights, *(bias for bias in biases if bias is not None)]
    ours = linear_maps(x, weights, biases)
    theirs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert "_LinearMap" in type(ours[0].grad_fn).__name__
    cotangents = [torch.randn_like(part) for part in theirs]
    found = torch.autograd.grad(ours, leaves, cotangents, retain_graph=True)
    expected = torch.autograd.grad(theirs, leaves, cotangents)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Of two results one may be unused.
    by_x = torch.autograd.grad(ours[1], x, cotangents[1])[0]
    torch.testing.assert_close(by_x, cotangents[1] @ weights[1], rtol=1e-12, atol=1e-12)


def test_second_derivative(pages: str) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weights, biases = parameters(True)

    def run(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_maps(x, [first, second], biases))

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_rows(pages: str) -> None:
    dense = torch.randn(11, 5, dtype=torch.float64) * (torch.rand(11, 5) < 0.3)
    weights, biases = parameters(True)
    ours = linear_maps(dense.to_sparse_csr(), weights, biases)
    theirs = [F.linear(dense, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bias_is_added(pages: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(add_bias(x, bias), x + bias, rtol=0, atol=0)
    assert torch.autograd.gradcheck(add_bias, (x, bias))
    assert torch.autograd.gradgradcheck(add_bias, (x, bias))


def test_fake_tensors(pages: str) -> None:
    """They have no memory to write into."""
    with FakeTensorMode():
        x, weight, bias = torch.empty(11, 5), torch.empty(3, 5), torch.empty(3)
        assert add_bias(linear_maps(x, [weight], [None])[0], bias).shape == (11, 3)
