"""Many derivatives at once are those taken one after the other: of every public operation and module."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from subjects import REFUSED_FORWARD, REFUSED_MAPPED, REFUSED_TRANSFORMED, SUBJECTS, Subject
from torch import Tensor
from torch.autograd import functional

from anyattention.errors import UnsupportedError

pytestmark = [
    pytest.mark.usefixtures("native"),
    # PyTorch's own, of operators for which its older vmap has a loop.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
each_subject = pytest.mark.parametrize("name", list(SUBJECTS))
_COUNT = 3


@pytest.fixture
def subject(name: str) -> Subject:
    return SUBJECTS[name]()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def stacked(each: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple([None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)])


def backward(subject: Subject, **settings: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients by cotangents, of one plain forward."""
    x = subject.leaves()
    results = subject(*x)
    settings = {"retain_graph": True, "allow_unused": True} | settings
    return lambda *by, **more: torch.autograd.grad(results, x, by, **settings, **more)


@each_subject
class TestCotangents:
    @pytest.mark.parametrize("create_graph", [False, True])
    def test_is_grads_batched(self, subject: Subject, create_graph: bool) -> None:
        pull, many = backward(subject, create_graph=create_graph), subject.cotangents(_COUNT)
        each = stacked([pull(*[by[n] for by in many]) for n in range(_COUNT)])
        close(pull(*many, is_grads_batched=True), each)

    def test_is_grads_batched_of_gradients(self, subject: Subject) -> None:
        x = subject.leaves()
        first = torch.autograd.grad(subject.loss(*x), x, create_graph=True, allow_unused=True, materialize_grads=True)
        results = [each.sin() for each in first if each.requires_grad]
        many = [torch.randn(_COUNT, *each.shape, dtype=each.dtype) for each in results]
        settings = {"retain_graph": True, "allow_unused": True}
        found = torch.autograd.grad(results, x, many, is_grads_batched=True, **settings)
        close(
            found, stacked([torch.autograd.grad(results, x, [y[n] for y in many], **settings) for n in range(_COUNT)])
        )

    def test_derivatives_of_is_grads_batched(self, subject: Subject) -> None:
        """A batch of gradients is differentiated again, beside a term that has a derivative whatever they have."""
        many = subject.cotangents(_COUNT)

        def again(is_batched: bool) -> tuple[torch.Tensor, ...]:
            x = tuple([each.detach().requires_grad_() for each in subject.inputs])
            outputs = subject(*x)
            settings = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
            if is_batched:
                found = torch.autograd.grad(outputs, x, many, is_grads_batched=True, **settings)
            else:
                rows = zip(*many, strict=True)
                each = [torch.autograd.grad(outputs, x, list(row), **settings) for row in rows]
                found = tuple(map(torch.stack, zip(*each, strict=True)))
            total = sum(part.square().sum() for part in found) + sum(part.pow(3).sum() for part in x)
            return torch.autograd.grad(total, x)

        torch.testing.assert_close(again(True), again(False))

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_vmap_of_a_backward(self, subject: Subject, create_graph: bool) -> None:
        settings = {"create_graph": create_graph, "materialize_grads": True}
        pull, many = backward(subject, **settings), subject.cotangents(_COUNT)
        each = stacked([pull(*[by[n] for by in many]) for n in range(_COUNT)])
        close(torch.vmap(pull)(*many), each)
        twice = [torch.stack([by, -2 * by]) for by in many]
        close(torch.vmap(torch.vmap(pull))(*twice), tuple([torch.stack([x, -2 * x]) for x in each]))

    def test_vmap_of_a_vjp(self, name: str, subject: Subject) -> None:
        if name in REFUSED_TRANSFORMED:
            return
        pull, many = torch.func.vjp(subject, *subject.inputs)[1], subject.cotangents(_COUNT)
        each = stacked([pull(tuple([by[n] for by in many])) for n in range(_COUNT)])
        close(torch.vmap(pull)(many), each)
        plain = backward(subject, materialize_grads=True)
        close(each, stacked([plain(*[by[n] for by in many]) for n in range(_COUNT)]))


@each_subject
class TestJacobians:
    """Of all inputs, moved along a few directions."""

    def test_of_autograd(self, name: str, subject: Subject) -> None:
        few = subject.along(2)
        expected = functional.jacobian(few, few.inputs)
        close(functional.jacobian(few, few.inputs, vectorize=True), expected)
        if name not in REFUSED_FORWARD:
            close(functional.jacobian(few, few.inputs, vectorize=True, strategy="forward-mode"), expected)

    def test_of_torch_func(self, name: str, subject: Subject) -> None:
        few = subject.along(2)
        expected = functional.jacobian(few, few.inputs)
        if name not in REFUSED_TRANSFORMED:
            close(torch.func.jacrev(few, few.every)(*few.inputs), expected)
        if name not in REFUSED_FORWARD:
            close(torch.func.jacfwd(few, few.every)(*few.inputs), expected)


@each_subject
class TestHessians:
    def test_of_autograd(self, name: str, subject: Subject) -> None:
        few = subject.along(2)
        expected = functional.hessian(few.loss, few.inputs)
        close(functional.hessian(few.loss, few.inputs, vectorize=True), expected)
        if name not in REFUSED_FORWARD:
            settings = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
            close(functional.hessian(few.loss, few.inputs, **settings), expected)

    def test_of_torch_func(self, name: str, subject: Subject) -> None:
        few, func = subject.along(2), torch.func
        expected = functional.hessian(few.loss, few.inputs)
        if name not in REFUSED_TRANSFORMED:
            close(func.jacrev(func.jacrev(few.loss, few.every), few.every)(*few.inputs), expected)
        if name not in REFUSED_FORWARD:
            close(func.hessian(few.loss, few.every)(*few.inputs), expected)
            close(func.jacfwd(func.jacfwd(few.loss, few.every), few.every)(*few.inputs), expected)


@each_subject
class TestPerSample:
    def test_gradients(self, name: str, subject: Subject) -> None:
        gradient = torch.func.grad(subject.loss, subject.every)
        many = [x + 0.3 * each for x, each in zip(subject.inputs, subject.directions(_COUNT), strict=True)]
        if name in REFUSED_MAPPED:
            with pytest.raises(UnsupportedError, match=REFUSED_MAPPED[name]):
                torch.vmap(gradient)(*many)
            return
        close(torch.vmap(gradient)(*many), stacked([gradient(*[x[n] for x in many]) for n in range(_COUNT)]))

    @pytest.mark.exhaustive
    def test_gradients_of_samples_in_one_input(self, name: str, subject: Subject) -> None:
        gradient = torch.func.grad(subject.loss, subject.every)
        for place in subject.every if name not in REFUSED_MAPPED else ():
            given = list(subject.inputs)
            given[place] = given[place] + 0.3 * torch.randn(_COUNT, *given[place].shape, dtype=given[place].dtype)
            dims = tuple([0 if each == place else None for each in subject.every])
            each_given = [
                [x if dim is None else x[n] for x, dim in zip(given, dims, strict=True)] for n in range(_COUNT)
            ]
            close(torch.vmap(gradient, in_dims=dims)(*given), stacked([gradient(*each) for each in each_given]))

    def test_results_and_forward_derivatives(self, name: str, subject: Subject) -> None:
        if name in REFUSED_MAPPED:
            return
        many = [x + 0.3 * each for x, each in zip(subject.inputs, subject.directions(_COUNT), strict=True)]
        close(torch.vmap(subject)(*many), stacked([subject(*[x[n] for x in many]) for n in range(_COUNT)]))
        directions = subject.directions()

        def along(*inputs: Tensor) -> tuple[Tensor, ...]:
            return torch.func.jvp(subject, inputs, directions)[1]

        close(torch.vmap(along)(*many), stacked([along(*[x[n] for x in many]) for n in range(_COUNT)]))
