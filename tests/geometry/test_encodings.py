"""Radial bases and the cut-off envelope: values, derivatives, the ends of their range."""

import math

import pytest
import torch

from anyattention.errors import InvalidInputError
from anyattention.geometry import bessel_basis, cutoff_envelope, gaussian_basis, log_cutoff_envelope, safe_distance

_F64 = torch.float64


def test_gaussians_stand_at_even_distances():
    d = torch.rand(11, dtype=_F64) * 5
    basis = gaussian_basis(d, 4.0, 5)
    for k in range(5):
        torch.testing.assert_close(basis[:, k], torch.exp(-((d - k) ** 2) / 2))
    torch.testing.assert_close(gaussian_basis(d, 4.0, 1)[:, 0], torch.exp(-(d**2) / 32))


def test_bessel_functions_vanish_at_the_radius_and_are_orthonormal():
    d = torch.linspace(1e-9, 3.0, 20_001, dtype=_F64)
    basis = bessel_basis(d, 3.0, 5)
    assert basis[-1].abs().max() < 1e-14
    products = torch.trapezoid((basis[:, :, None] * basis[:, None] * (d**2)[:, None, None]).permute(1, 2, 0), d)
    torch.testing.assert_close(products, torch.eye(5, dtype=_F64), atol=1e-6, rtol=0)
    limit = math.sqrt(2 / 3) * torch.arange(1, 6, dtype=_F64) * math.pi / 3
    torch.testing.assert_close(basis[0], limit)


def test_the_envelope_is_that_of_dimenet_with_two_continuous_derivatives():
    d = torch.linspace(0, 2.5, 501, dtype=_F64)
    x = d / 2.5
    torch.testing.assert_close(cutoff_envelope(d, 2.5), 1 - 28 * x**6 + 48 * x**7 - 21 * x**8)
    near = torch.tensor([0.0, 2.5 - 1e-7, 2.5, 2.5 + 1e-7, 4.0], dtype=_F64, requires_grad=True)
    value = cutoff_envelope(near, 2.5)
    (first,) = torch.autograd.grad(value.sum(), near, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), near)
    for derivative in (value - torch.tensor([1.0, 0, 0, 0, 0]), first, second):
        assert derivative.abs().max() < 1e-4
    assert value[1] > 0
    assert (value[2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, _F64])
def test_the_logarithm_keeps_its_digits_up_to_the_radius(dtype):
    d = (2.5 * (1 - torch.logspace(-1, -6, 30, dtype=_F64))).to(dtype)
    left = 1 - d.double() / 2.5
    x = 1 - left
    exact = 3 * left.log() + (1 + 3 * x + 6 * x**2 + 10 * x**3 + 15 * x**4 + 21 * x**5).log()
    # One rounding of x is what the distance from the radius is known to.
    tolerance = 8 * torch.finfo(dtype).eps / float(left.min())
    torch.testing.assert_close(log_cutoff_envelope(d, 2.5).double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, _F64])
def test_all_is_finite_at_distance_zero_and_at_the_radius(order, dtype):
    displacement = torch.tensor([[0.0, 0], [0, 0], [1.5, 2.0], [3, 4], [1e-30, 0]], dtype=dtype, requires_grad=True)
    distance = safe_distance(displacement.square().sum(-1), 1e-6)
    parts = [gaussian_basis(distance, 2.5, 4).sum(), bessel_basis(distance, 2.5, 4).sum()]
    parts += [cutoff_envelope(distance, 2.5).sum(), log_cutoff_envelope(distance, 2.5)[[0, 1, 4]].sum()]
    result = torch.stack(parts).sum()
    for _ in range(order):
        (gradient,) = torch.autograd.grad(result, displacement, create_graph=True)
        assert gradient.isfinite().all()
        assert (gradient[[0, 1, 4]] == 0).all()
        result = gradient.sum()


@pytest.mark.parametrize("basis", [gaussian_basis, bessel_basis])
def test_gradients_of_bases(basis):
    d = (torch.rand(6, dtype=_F64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: basis(d, 1.3, 3), d)
    assert torch.autograd.gradgradcheck(lambda d: basis(d, 1.3, 3), d)
    inside = (torch.rand(6, dtype=_F64) + 0.1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda d: log_cutoff_envelope(d, 1.3), inside)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda d: gaussian_basis(d, 0.0, 3), "radius: expected a finite number above 0"),
        (lambda d: gaussian_basis(d, 1.0, 0), "count: expected an int of at least 1"),
        (lambda d: bessel_basis(d, -1.0, 3), "radius: expected a finite number above 0"),
        (lambda d: bessel_basis(d, 1.0, True), "count: expected an int of at least 1"),
        (lambda d: cutoff_envelope(d, math.nan), "radius: expected a finite number above 0"),
        (lambda d: log_cutoff_envelope(d, 0), "radius: expected a finite number above 0"),
        (lambda d: log_cutoff_envelope(d.long(), 1.0), "distance: expected a floating-point dtype"),
        (lambda d: safe_distance(d, 0.0), "eps: expected a finite number above 0"),
        (lambda d: safe_distance(d.long(), 1e-6), "squared: expected a floating-point dtype"),
    ],
)
def test_bad_numbers_are_refused(call, match):
    with pytest.raises(InvalidInputError, match=f"^{match}"):
        call(torch.ones(3))
