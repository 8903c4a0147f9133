"""The primitives of edges under all that PyTorch differentiates and maps with, against plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from primitives import (
    ARRAYS,
    CASES,
    GRAPH,
    Case,
    assert_agrees,
    each_primitive,
    every,
    first_of,
    inputs_of,
    leaves,
    loss_of,
    second_of,
)
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from anyattention import Graph
from anyattention.ops.edges.arrays import GraphArrays, arrays_of

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


@each_primitive
class TestFunctions:
    """torch.func, one transform and two."""

    def test_grad_and_vjp(self, case: Case) -> None:
        x = inputs_of(case)
        cotangent = torch.randn_like(case.plain(*x))
        assert_agrees(case, lambda each: grad(loss_of(each), every(case))(*x))
        assert_agrees(case, lambda each: vjp(each, *x)[1](cotangent))

    def test_jvp_by_all_and_by_each(self, case: Case) -> None:
        x, t = inputs_of(case), inputs_of(case)
        assert_agrees(case, lambda each: jvp(each, x, t))
        for n in every(case):
            assert_agrees(case, lambda each, n=n: jvp(lambda y: each(*x[:n], y, *x[n + 1 :]), (x[n],), (t[n],)))

    def test_jacobians(self, case: Case) -> None:
        x = inputs_of(case)
        assert_agrees(case, lambda each: jacrev(each, every(case))(*x))
        assert_agrees(case, lambda each: jacfwd(each, every(case))(*x))

    @pytest.mark.parametrize(("outer", "inner"), [(jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)])
    def test_two_transforms(self, case: Case, name: str, outer: Any, inner: Any) -> None:
        x, where = inputs_of(case), every(case)
        if name == "dynamic_dot" and inner is jacfwd:
            where = (2, 4)  # A loop over the directions of each pair.
        assert_agrees(case, lambda each: outer(inner(loss_of(each), where), where)(*x))

    def test_hessian_is_forward_over_reverse(self, case: Case) -> None:
        x = inputs_of(case)
        assert_agrees(case, lambda each: hessian(loss_of(each), every(case))(*x))

    def test_a_forward_derivative_three_deep(self, case: Case) -> None:
        x, t = inputs_of(case), inputs_of(case)

        def along(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *y: jvp(function, y, t)[1]

        assert_agrees(case, lambda each: along(along(along(loss_of(each))))(*x))


@each_primitive
class TestMaps:
    """vmap: folded into the batch where all that is mapped has one, else a loop."""

    def test_of_all(self, case: Case) -> None:
        many = inputs_of(case, 3)
        assert_agrees(case, lambda each: vmap(each)(*many))

    @pytest.mark.parametrize(("dim", "out"), [(1, 0), (-1, 1), (0, -1)])
    def test_along_another_axis(self, case: Case, dim: int, out: int) -> None:
        many = [x.movedim(0, dim) for x in inputs_of(case, 3)]
        assert_agrees(case, lambda each: vmap(each, in_dims=dim, out_dims=out)(*many))

    def test_of_some(self, case: Case) -> None:
        x, many = inputs_of(case), inputs_of(case, 3)
        for n in every(case):
            dims = tuple([0 if k == n else None for k in every(case)])
            given = (*x[:n], many[n], *x[n + 1 :])
            assert_agrees(case, lambda each, dims=dims, given=given: vmap(each, in_dims=dims)(*given))

    def test_within_a_map(self, case: Case) -> None:
        many = inputs_of(case, 2, 3)
        assert_agrees(case, lambda each: vmap(vmap(each), in_dims=1)(*many))

    def test_of_derivatives_and_derivatives_of_it(self, case: Case) -> None:
        many, t = inputs_of(case, 3), inputs_of(case)
        assert_agrees(case, lambda each: vmap(grad(loss_of(each), every(case)))(*many))
        assert_agrees(case, lambda each: grad(loss_of(vmap(each)), every(case))(*many))
        assert_agrees(case, lambda each: vmap(lambda *y: jvp(each, y, t))(*many))

    def test_of_the_graph(self, case: Case) -> None:
        # The same edges in other orders.
        orders = [torch.randperm(8) for _ in range(3)]
        graphs = [
            arrays_of(Graph.from_edge_index(GRAPH.edge_index[:, order], num_queries=4, num_keys=5)) for order in orders
        ]
        stacked = [torch.stack([getattr(graph, name) for graph in graphs]) for name in ARRAYS]
        x = inputs_of(case)
        found = vmap(lambda *arrays: case.ours(GraphArrays(*arrays), *x))(*stacked)
        expected = torch.stack([case.of(graph)(*x) for graph in graphs])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each_primitive
class TestAutograd:
    def test_finite_differences(self, case: Case) -> None:
        function, x = case.of(arrays_of(GRAPH)), leaves(inputs_of(case))
        assert gradcheck(function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(function, x, check_batched_grad=True, check_fwd_over_rev=True)

    def test_dual_tensors(self, case: Case) -> None:
        x, t = inputs_of(case), inputs_of(case)

        def dual(function: Callable[..., Tensor]) -> tuple[Any, Any]:
            with forward_ad.dual_level():
                made = function(*(forward_ad.make_dual(*pair) for pair in zip(x, t, strict=True)))
                found = forward_ad.unpack_dual(made)
                # Without tangents nothing is dual.
                assert forward_ad.unpack_dual(function(*x)).tangent is None
                return found.primal, found.tangent

        assert_agrees(case, dual)

    def test_the_backward_of_a_tangent(self, case: Case) -> None:
        x, t = inputs_of(case), inputs_of(case)

        def backward(function: Callable[..., Tensor]) -> Any:
            own = leaves(x)
            with forward_ad.dual_level():
                made = loss_of(function)(*(forward_ad.make_dual(*pair) for pair in zip(own, t, strict=True)))
                return torch.autograd.grad(forward_ad.unpack_dual(made).tangent, own)

        assert_agrees(case, backward)

    def test_many_cotangents_at_once(self, case: Case) -> None:
        x = inputs_of(case)
        many = torch.randn(3, *case.plain(*x).shape, dtype=torch.float64)
        second = inputs_of(case, 3)

        def batched(function: Callable[..., Tensor]) -> Any:
            own = leaves(x)
            result = function(*own).sin()
            found = torch.autograd.grad(result, own, many, is_grads_batched=True, retain_graph=True)
            first = torch.autograd.grad(result, own, many[0], create_graph=True)
            again = torch.autograd.grad(first, own, second, is_grads_batched=True)
            return found, again

        assert_agrees(case, batched)

    def test_the_functional_derivatives(self, case: Case) -> None:
        x = inputs_of(case)
        functional = torch.autograd.functional
        for settings in ({}, {"strategy": "forward-mode"}):
            assert_agrees(case, lambda each, s=settings: functional.jacobian(each, x, vectorize=True, **s))
        for settings in ({}, {"outer_jacobian_strategy": "forward-mode"}):
            assert_agrees(case, lambda each, s=settings: functional.hessian(loss_of(each), x, vectorize=True, **s))

    def test_saved_tensors_pass_through_hooks(self, case: Case) -> None:
        x = inputs_of(case)
        packed: list[Tensor] = []

        def hooked(function: Callable[..., Tensor]) -> Any:
            def pack(tensor: Tensor) -> tuple[torch.dtype, Any]:
                packed.append(tensor)
                return tensor.dtype, tensor.detach().clone().numpy()

            def unpack(kept: tuple[torch.dtype, Any]) -> Tensor:
                return torch.from_numpy(kept[1]).to(kept[0])

            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return first_of(function)(*leaves(x))

        assert_agrees(case, hooked)
        assert packed

        def cloned(function: Callable[..., Tensor]) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
                return second_of(function)(*leaves(x))

        assert_agrees(case, cloned)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoints(self, case: Case, use_reentrant: bool) -> None:
        x = inputs_of(case)
        cotangent = torch.randn_like(case.plain(*x))

        def checkpointed(function: Callable[..., Tensor]) -> list[Tensor | None]:
            own = leaves(x)
            checkpoint(function, *own, use_reentrant=use_reentrant).backward(cotangent)
            return [each.grad for each in own]

        assert_agrees(case, checkpointed)

    def test_parameters_and_inference_mode(self, case: Case) -> None:
        x = inputs_of(case)
        cotangent = torch.randn_like(case.plain(*x))

        def by_parameters(function: Callable[..., Tensor]) -> Any:
            own = [torch.nn.Parameter(each) for each in x]
            return torch.autograd.grad(function(*own), own, cotangent)

        assert_agrees(case, by_parameters)
        with torch.inference_mode():
            assert_agrees(case, lambda each: each(*x))
