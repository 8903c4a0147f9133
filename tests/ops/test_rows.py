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


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch, native: Any) -> list[str]:
    """The kernels' products on any processor; the names of those that ran."""
    ran: list[str] = []
    run = module.native.run

    def spy(function: str, *arguments: Any) -> None:
        ran.append(function)
        run(function, *arguments)

    monkeypatch.setattr(module.native, "multiplies_fast", lambda: True)
    monkeypatch.setattr(module.native, "run", spy)
    return ran


def assert_near(ours: Any, theirs: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol, check_dtype=False)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("widths", [(7, 3), (64,), (13, 96, 8, 8), (128, 128)])
@pytest.mark.parametrize("rows", [0, 1, 7, 97, 2503])
def test_own_products(own_products: list[str], rows: int, widths: tuple[int, ...], with_bias: bool) -> None:
    # A row that begins where another ends is read too.
    wide = torch.randn(rows, 30)
    x = wide[:, 4:23].requires_grad_()
    weights = [torch.randn(width, 19, requires_grad=True) for width in widths]
    biases = [torch.randn(width, requires_grad=True) if with_bias else None for width in widths]
    ours = linear_maps(x, weights, biases)
    leaves = [x, *weights, *(bias for bias in biases if bias is not None)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_biases = exact[1 + len(widths) :] or [None] * len(widths)
    theirs = [F.linear(exact[0], exact[1 + n], exact_biases[n]) for n in range(len(widths))]
    assert_near(ours, theirs)
    cotangents = [torch.randn_like(part) for part in ours]
    found = torch.autograd.grad(ours, leaves, cotangents, retain_graph=True)
    expected = torch.autograd.grad(theirs, exact, [each.double() for each in cotangents], retain_graph=True)
    assert_near(found, expected, 1e-6 * (rows + 10))
    assert own_products == ["linear_map", "linear_map", "linear_map_by_matrix"]
    # Of several results one alone is used, through a cotangent that does not lie in rows.
    turned = torch.randn(widths[0], rows).T
    by_x = torch.autograd.grad(ours[0], x, turned)[0]
    assert_near(by_x, torch.autograd.grad(theirs[0], exact[0], turned.double())[0])


def test_own_products_have_one_result_for_any_threads(own_products: list[str]) -> None:
    x, weight, bias = torch.randn(20011, 67), torch.randn(53, 67, requires_grad=True), torch.randn(53)
    bias.requires_grad_()
    x.requires_grad_()
    cotangent = torch.randn(20011, 53)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        (output,) = linear_maps(x, [weight], [bias])
        results.append((output, *torch.autograd.grad(output, [x, weight, bias], cotangent)))
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_own_products_keep_nan_in_its_row(own_products: list[str]) -> None:
    x = torch.randn(11, 19)
    x[5, 3], x[7, 18] = torch.nan, torch.inf
    (output,) = linear_maps(x, [torch.randn(17, 19)])
    assert own_products == ["linear_map"]
    assert output.isfinite().all(1).tolist() == [row not in (5, 7) for row in range(11)]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 19), torch.float32), ((17, 19), torch.float64), ((17, 19), torch.bfloat16)]
)
def test_other_products_are_left_to_pytorch(own_products: list[str], shape: Any, dtype: torch.dtype) -> None:
    x, weight = torch.randn(11, 19, dtype=dtype), torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(linear_maps(x, [weight])[0], F.linear(x, weight))
    assert "linear_map" not in own_products


def test_widths_that_do_not_fit_are_refused(own_products: list[str]) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear_maps(torch.randn(11, 18), [torch.randn(17, 19)])
