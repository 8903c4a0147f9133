"""Forward derivatives of every public operation and module are those that its backward gives, or a typed error."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from subjects import MODULES, OPERATIONS, REFUSED_FORWARD, REFUSED_TRANSFORMED, SUBJECTS, Subject
from torch import Tensor
from torch.autograd import forward_ad

import anyattention
from anyattention import nn
from anyattention.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("native")
each_subject = pytest.mark.parametrize("name", list(SUBJECTS))


@pytest.fixture
def subject(name: str) -> Subject:
    return SUBJECTS[name]()


def test_every_public_operation_and_module_is_here() -> None:
    others = {"AttentionModule", "KeyValueCache", "explain"}
    for public, subjects in ((nn.__all__, MODULES), (anyattention.ops.__all__, {**OPERATIONS, "attend": None})):
        assert {*public} - others == {name.split(",")[0] for name in subjects} & {*public}


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def product(some: Sequence[Tensor | None], others: Sequence[Tensor]) -> Tensor:
    parts = [(x * y).sum() for x, y in zip(some, others, strict=True) if x is not None]
    return sum(parts[1:], parts[0])


def is_refused(name: str, refused: Mapping[str, str], call: Any) -> bool:
    """Whether the committed list has the name; then the call raises as it says."""
    if name not in refused:
        return False
    with pytest.raises(UnsupportedError, match=refused[name]):
        call()
    return True


def pulled(subject: Subject, cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients by a plain backward, zeros where there are none."""
    x = subject.leaves()
    return torch.autograd.grad(subject(*x), x, cotangents, allow_unused=True, materialize_grads=True)


def tangents_of(duals: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tangents of dual tensors, zeros where there are none."""
    found = [None if x is None else forward_ad.unpack_dual(x).tangent for x in duals]
    return tuple([torch.zeros_like(x) if tangent is None else tangent for tangent, x in zip(found, like, strict=True)])


def curvature(subject: Subject, directions: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The Hessian of the loss times directions, by two backwards."""
    x = subject.leaves()
    first = torch.autograd.grad(subject.loss(*x), x, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.autograd.grad(product(first, directions), x, allow_unused=True, materialize_grads=True)


def places_of(subject: Subject) -> list[tuple[int, ...]]:
    """Each input alone, and all of them."""
    return [(place,) for place in subject.every] + [subject.every]


@each_subject
class TestFirst:
    def test_of_torch_func(self, name: str, subject: Subject) -> None:
        if is_refused(name, REFUSED_FORWARD, lambda: torch.func.jvp(subject, subject.inputs, subject.inputs)):
            return
        directions, cotangents = subject.directions(), subject.cotangents()
        gradients = pulled(subject, cotangents)
        for places in places_of(subject):
            function, x = subject.among(*places)
            t = tuple([directions[place] for place in places])
            result, tangent = torch.func.jvp(function, x, t)
            close(result, subject(*subject.inputs))
            close(product(tangent, cotangents), product(t, [gradients[place] for place in places]))

    def test_of_dual_tensors(self, name: str, subject: Subject) -> None:
        directions, cotangents = subject.directions(), subject.cotangents()
        gradients = pulled(subject, cotangents)
        with forward_ad.dual_level():
            for places in places_of(subject):
                x = list(subject.inputs)
                for place in places:
                    x[place] = forward_ad.make_dual(x[place], directions[place])
                if is_refused(name, REFUSED_FORWARD, lambda x=x: subject(*x)):
                    return
                tangent = tangents_of(subject(*x), cotangents)
                expected = product([directions[place] for place in places], [gradients[place] for place in places])
                close(product(tangent, cotangents), expected)

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_of_a_backward_by_its_cotangents(self, subject: Subject, create_graph: bool) -> None:
        """A backward is linear in them; the forward was a plain one."""
        directions = subject.cotangents()
        with forward_ad.dual_level():
            by = [forward_ad.make_dual(x, t) for x, t in zip(subject.cotangents(), directions, strict=True)]
            x = subject.leaves()
            found = torch.autograd.grad(subject(*x), x, by, allow_unused=True, create_graph=create_graph)
            assert create_graph or not any(each.requires_grad for each in found if each is not None)
            close(tangents_of(found, x), pulled(subject, directions))

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_of_a_backward_inside_torch_func(self, subject: Subject, create_graph: bool) -> None:
        x, directions = subject.leaves(), subject.cotangents()
        results = subject(*x)

        def backward(*by: Tensor) -> tuple[Tensor, ...]:
            settings = {"retain_graph": True, "create_graph": create_graph}
            return torch.autograd.grad(results, x, by, allow_unused=True, materialize_grads=True, **settings)

        close(torch.func.jvp(backward, subject.cotangents(), directions)[1], pulled(subject, directions))


@each_subject
class TestSecond:
    def test_dual_tensors_through_a_backward(self, name: str, subject: Subject) -> None:
        if name in REFUSED_FORWARD:
            return
        directions, x = subject.directions(), subject.leaves()
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(each, t) for each, t in zip(x, directions, strict=True)]
            found = torch.autograd.grad(subject.loss(*duals), x, allow_unused=True)
            close(tangents_of(found, x), curvature(subject, directions))

    def test_transforms_in_each_order(self, name: str, subject: Subject) -> None:
        directions, gradient = subject.directions(), torch.func.grad(subject.loss, subject.every)
        if is_refused(name, REFUSED_TRANSFORMED, lambda: gradient(*subject.inputs)):
            return
        expected = curvature(subject, directions)
        close(torch.func.vjp(gradient, *subject.inputs)[1](directions), expected)
        if name in REFUSED_FORWARD:
            return
        close(torch.func.jvp(gradient, subject.inputs, directions)[1], expected)

        def slope(*inputs: Tensor) -> Tensor:
            return torch.func.jvp(subject.loss, inputs, directions)[1]

        close(torch.func.grad(slope, subject.every)(*subject.inputs), expected)
