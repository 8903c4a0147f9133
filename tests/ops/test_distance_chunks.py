"""Functions in chunks of rows are the functions, to their second derivatives, and keep nothing in between."""

import pytest
import torch

from anyattention.nn import DistanceAttention, EquivariantAttention
from anyattention.ops.points import chunks
from cases import random_graph

_F64 = torch.float64


def _function(rows, weight, scale):
    length = rows.square().sum(-1, keepdim=True)
    return torch.sin(length @ weight) * scale, length.exp() + 0 * scale


@pytest.fixture(
    params=[3, 13, *(pytest.param(rows, marks=pytest.mark.exhaustive) for rows in (1, 4))], ids="{} rows".format
)
def of_a_few_rows(request, monkeypatch):
    monkeypatch.setattr(chunks, "_ROWS", request.param)


def _inputs():
    return [torch.randn(shape, dtype=_F64, requires_grad=True) for shape in ((13, 2), (1, 5), ())]


@pytest.mark.usefixtures("of_a_few_rows")
def test_values_and_derivatives():
    inputs = _inputs()
    for one, other in zip(chunks.in_chunks(_function, *inputs), _function(*inputs), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda *inputs: chunks.in_chunks(_function, *inputs), inputs)
    assert torch.autograd.gradgradcheck(lambda *inputs: chunks.in_chunks(_function, *inputs), inputs)


@pytest.mark.usefixtures("of_a_few_rows")
def test_third_derivative_of_one_result():
    rows, *shared = _inputs()

    def third(call):
        value = call(_function, rows, *shared)[0].sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, rows, create_graph=True)
            value = gradient.square().sum()
        return value

    torch.testing.assert_close(third(chunks.in_chunks), third(lambda function, *inputs: function(*inputs)))


@pytest.mark.usefixtures("of_a_few_rows")
def test_under_transforms_it_is_the_function():
    inputs = _inputs()
    tangents = tuple(torch.randn_like(each) for each in inputs)
    found = torch.func.jvp(lambda *inputs: chunks.in_chunks(_function, *inputs), tuple(inputs), tangents)
    expected = torch.func.jvp(_function, tuple(inputs), tangents)
    torch.testing.assert_close(found, expected)


def test_nothing_of_the_way_is_kept(monkeypatch):
    monkeypatch.setattr(chunks, "_ROWS", 4)
    inputs, kept = _inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunks.in_chunks(_function, *inputs)
    assert [each.data_ptr() for each in kept] == [each.data_ptr() for each in inputs]


@pytest.mark.parametrize("kind", [DistanceAttention, EquivariantAttention])
@pytest.mark.parametrize("settings", [{}, {"radius": 2.0}, {"radial_range": 2.0, "radial_basis": "bessel"}], ids=str)
def test_layers_in_chunks(kind, settings, monkeypatch):
    module = kind(6, 2, dropout=0.0, dtype=_F64, **settings)
    x, p = torch.randn(2, 7, 6, dtype=_F64), torch.randn(2, 7, 3, dtype=_F64, requires_grad=True)
    graph = random_graph(7, 7, 30)

    def outcome():
        output = module(x, p, graph=graph).output
        (forces,) = torch.autograd.grad(output.sin().sum(), p, create_graph=True)
        found = torch.autograd.grad(forces.square().sum(), [p, *module.parameters()], allow_unused=True)
        return [output, forces, *(each for each in found if each is not None)]

    whole = outcome()
    monkeypatch.setattr(chunks, "_ROWS", 7)
    torch.testing.assert_close(outcome(), whole)
    # Under autocast distances keep their digits, the backward pass included.
    rows, *shared = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(each.isfinite().all() for each in outcome())
        wide = chunks.in_chunks(_function, rows, *shared)
    torch.testing.assert_close(wide, _function(rows, *shared))
