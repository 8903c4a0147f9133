"""The kernel of distance scores against their definition in PyTorch, and its derivatives."""

import importlib
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from anyattention.ops.points import DistanceSettings, distance_terms

# The package has a function of the module's name.
terms = importlib.import_module("anyattention.ops.points.distance_terms")

_SETTINGS = {
    "decay alone": (DistanceSettings(None, None, "gaussian", 1e-6), 3, 0),
    "radius alone": (DistanceSettings(2.0, None, "gaussian", 1e-6), 3, 0),
    "scores": (DistanceSettings(2.0, 2.0, "gaussian", 1e-6), 3, 3),
    "scores and gates": (DistanceSettings(2.0, 1.7, "gaussian", 1e-6), 4, 8),
    "no radius": (DistanceSettings(None, 2.5, "gaussian", 1e-6), 1, 2),
}


@pytest.fixture
def kernel_alone(native, monkeypatch):
    """Fails where the definition runs in the kernel's place."""

    def refuse(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(terms, "in_chunks", refuse)


def _inputs(case, rows, dtype, num_radial=5, dim=3):
    settings, heads, outputs = _SETTINGS[case]
    displacement = torch.randn(rows, dim, dtype=dtype)
    weight = torch.randn(outputs, num_radial, dtype=dtype) if outputs else None
    shared = [torch.rand(heads, dtype=dtype), *([] if weight is None else [weight])]
    return settings, [x.requires_grad_() for x in (displacement, *shared)]


def _call(settings, displacement, decay, weight=None):
    return distance_terms(displacement, decay, weight, settings)


@pytest.mark.pairwise
@pytest.mark.usefixtures("kernel_alone")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 4999])
@pytest.mark.parametrize("case", _SETTINGS)
def test_values_and_gradients(case, rows, dtype, tolerance):
    torch.manual_seed(0)
    settings, inputs = _inputs(case, rows, dtype)
    found, (expected,) = _call(settings, *inputs), terms.reference(settings, *inputs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    # A score that is hidden gets no gradient from the softmax.
    cotangent = torch.where(expected.isfinite(), torch.randn_like(expected), 0.0)
    ours, theirs = (torch.autograd.grad(each, inputs, cotangent) for each in (found, expected))
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, math.sqrt(rows)))


@pytest.mark.usefixtures("kernel_alone")
@pytest.mark.parametrize(("dim", "num_radial"), [(1, 1), (2, 2), (5, 16)])
def test_other_dimensions_and_numbers(dim, num_radial):
    torch.manual_seed(0)
    settings, inputs = _inputs("scores and gates", 70, torch.float64, num_radial, dim)
    found, (expected,) = _call(settings, *inputs), terms.reference(settings, *inputs)
    torch.testing.assert_close(found, expected)
    cotangent = torch.where(expected.isfinite(), torch.randn_like(expected), 0.0)
    ours, theirs = (torch.autograd.grad(each, inputs, cotangent) for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("kernel_alone")
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for(wanted):
    torch.manual_seed(0)
    settings, inputs = _inputs("no radius", 70, torch.float64)
    whole = torch.autograd.grad(_call(settings, *inputs).sin().sum(), inputs)
    alone = [x.detach().requires_grad_(number == wanted) for number, x in enumerate(inputs)]
    (found,) = torch.autograd.grad(_call(settings, *alone).sin().sum(), alone[wanted])
    assert torch.equal(found, whole[wanted])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("case", _SETTINGS)
def test_derivatives_of_both_orders(case):
    torch.manual_seed(0)
    settings, (displacement, *shared) = _inputs(case, 6, torch.float64)
    with torch.no_grad():
        # Inside of the radius: beyond it scores are infinite.
        displacement.mul_(1.2 / displacement.norm(dim=1, keepdim=True))
    assert gradcheck(lambda *inputs: _call(settings, *inputs), [displacement, *shared])
    assert gradgradcheck(lambda *inputs: _call(settings, *inputs), [displacement, *shared])


@pytest.mark.usefixtures("kernel_alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_at_one_place_and_at_the_radius(dtype):
    settings, inputs = _inputs("scores and gates", 3, dtype)
    with torch.no_grad():
        inputs[0].copy_(torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 0.0, 0.0]]))
    found = _call(settings, *inputs)
    assert found[0].isfinite().all()
    assert (found[1:, :4] == -torch.inf).all()
    assert found[1:, 4:].isfinite().all()
    cotangent = torch.where(found.isfinite(), 1.0, 0.0)
    gradients = torch.autograd.grad(found, inputs, cotangent)
    assert all(each.isfinite().all() for each in gradients)
    assert not gradients[0][0].any()


@pytest.mark.usefixtures("kernel_alone")
def test_a_nan_shows_in_its_own_row():
    settings, inputs = _inputs("scores and gates", 70, torch.float32)
    with torch.no_grad():
        inputs[0][:, 0] = 0.1
        inputs[0][65, 1] = math.nan
    found = _call(settings, *inputs).isnan().any(1)
    assert found.nonzero().flatten().tolist() == [65]


@pytest.mark.usefixtures("kernel_alone")
def test_threads_change_no_bit():
    settings, inputs = _inputs("scores and gates", 30_000, torch.float32)
    with torch.no_grad():
        inputs[0].mul_(0.3)
    cotangent = torch.randn(30_000, 8)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found = _call(settings, *inputs)
            results.append([found, *torch.autograd.grad(found, inputs, torch.where(found.isfinite(), cotangent, 0.0))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("native")
def test_not_contiguous():
    settings, (displacement, decay, weight) = _inputs("no radius", 5, torch.float64)
    turned = [x.detach().T.contiguous().T.requires_grad_() for x in (displacement, weight)]
    assert not any(x.is_contiguous() for x in turned)
    found = _call(settings, turned[0], decay, turned[1])
    torch.testing.assert_close(found, _call(settings, displacement, decay, weight), rtol=0, atol=0)
    assert gradgradcheck(lambda *inputs: _call(settings, *inputs), [turned[0], decay, turned[1]])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("case", _SETTINGS)
def test_second_derivatives_without_rows(case):
    settings, inputs = _inputs(case, 0, torch.float64)
    gradients = torch.autograd.grad(_call(settings, *inputs).sum(), inputs, create_graph=True)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    total = sum(x.square().sum() for x in gradients)
    if total.requires_grad:
        seconds = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        assert not any(x.any() for x in seconds)


def test_without_kernels_and_for_another_basis_the_definition_runs(native, monkeypatch):
    settings, inputs = _inputs("scores", 9, torch.float64)
    expected = _call(settings, *inputs)
    monkeypatch.setattr("anyattention.native.available", lambda: False)
    torch.testing.assert_close(_call(settings, *inputs), expected)
    monkeypatch.undo()
    bessel = settings._replace(radial_basis="bessel")
    torch.testing.assert_close(_call(bessel, *inputs), terms.reference(bessel, *inputs)[0])
