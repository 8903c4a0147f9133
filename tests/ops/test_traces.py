"""The primitives of edges, and what is made of them, under all that PyTorch traces and compiles with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from primitives import (
    ARRAYS,
    CASES,
    GRAPH,
    Case,
    Rule,
    each_primitive,
    every,
    first_of,
    inputs_of,
    leaves,
    loss_of,
    second_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from anyattention import Causal, Graph, Pattern, TopK, Window, attend, edge_dot, edge_softmax, edge_sum
from anyattention.ambient import is_compiling, is_differentiated_again
from anyattention.ops.edges.arrays import GraphArrays, arrays_of

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


class OnGraph(torch.nn.Module):
    """A function of a graph's arrays and tensors, for tracers that want all tensors as inputs."""

    def __init__(self, case: Case, rule: Rule) -> None:
        super().__init__()
        self.case, self.rule = case, rule

    def forward(self, arrays: list[Tensor], *inputs: Tensor) -> Any:
        return self.rule(self.case.of(GraphArrays(*arrays)))(*inputs)


def arrays() -> list[Tensor]:
    return [getattr(arrays_of(GRAPH), name) for name in ARRAYS]


@each_primitive
class TestTraces:
    @pytest.mark.parametrize("mode", ["real", pytest.param("fake", marks=pytest.mark.exhaustive), "symbolic"])
    @pytest.mark.parametrize("rule", [lambda f: f, first_of, second_of], ids=["call", "backward", "two backwards"])
    def test_make_fx(self, case: Case, rule: Rule, mode: str) -> None:
        traced = make_fx(OnGraph(case, rule), tracing_mode=mode)(arrays(), *leaves(inputs_of(case)))
        assert "anyattention" in traced.code
        # Other numbers, so that nothing was taken for a constant.
        other = leaves(inputs_of(case))
        torch.testing.assert_close(traced(arrays(), *other), rule(case.plain)(*other), rtol=1e-10, atol=1e-10)

    def test_make_fx_of_transforms(self, case: Case) -> None:
        t = inputs_of(case)
        rules: list[Rule] = [
            lambda each: grad(loss_of(each), every(case)),
            lambda each: jacrev(jacrev(loss_of(each), every(case)[-1]), every(case)[-1]),
            lambda each: lambda *y: jvp(each, y, t),
        ]
        for rule in rules:
            traced = make_fx(rule(case.of(arrays_of(GRAPH))))(*inputs_of(case))
            other = inputs_of(case)
            torch.testing.assert_close(traced(*other), rule(case.plain)(*other), rtol=1e-10, atol=1e-10)
        traced = make_fx(vmap(case.of(arrays_of(GRAPH))))(*inputs_of(case, 3))
        many = inputs_of(case, 3)
        torch.testing.assert_close(traced(*many), vmap(case.plain)(*many), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, case: Case, name: str, strict: bool) -> None:
        program = torch.export.export(OnGraph(case, lambda f: f), (arrays(), *inputs_of(case)), strict=strict)
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert f"anyattention.{name}.default" in called
        assert not any("functorch" in target for target in called)
        other = inputs_of(case)
        torch.testing.assert_close(program.module()(arrays(), *other), case.plain(*other), rtol=1e-10, atol=1e-10)

    def test_fake_tensors(self, case: Case) -> None:
        x, graph = inputs_of(case), arrays()
        expected = [each.shape for each in (case.plain(*x), *x, *x)]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(each).requires_grad_() for each in x]
            function = case.of(GraphArrays(*map(mode.from_tensor, graph)))
            found = [function(*fakes), *first_of(function)(*fakes), *second_of(function)(*fakes)]
        assert [each.shape for each in found] == expected
        assert {each.dtype for each in found} == {torch.float64}

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_whole(self, case: Case, dynamic: bool) -> None:
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *x: case.ours(GraphArrays(*x[:8]), *x[8:]), fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        x = inputs_of(case)
        cotangent = torch.randn_like(case.plain(*x))

        def backward(function: Callable[..., Tensor]) -> Any:
            own = leaves(x)
            result = function(*own)
            return result, torch.autograd.grad(result, own, cotangent)

        found = backward(lambda *own: compiled(*arrays(), *own))
        torch.testing.assert_close(found, backward(case.plain), rtol=1e-10, atol=1e-10)

    def test_a_second_derivative_of_what_was_compiled_raises(self, case: Case) -> None:
        torch.compiler.reset()
        own = leaves(inputs_of(case))
        compiled = torch.compile(case.of(arrays_of(GRAPH)), fullgraph=True, backend="aot_eager")
        result = compiled(*own).sin()
        with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
            second_of(lambda *_: result)(*own)


def patterns() -> dict[str, Any]:
    graph = Graph.from_edge_index(torch.randint(5, (2, 11)), num_nodes=5)
    return {"graph": graph, "dense": None, "causal": Causal(), "window": Window(2, 1), "topk": TopK(2)}


class TestPublic:
    """Public functions take the reference where their kernels have no rule."""

    @pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
    @pytest.mark.parametrize("pattern", list(patterns()))
    def test_attend(self, pattern: str, compiled: bool) -> None:
        given: Pattern | TopK | None = patterns()[pattern]
        x = tuple([torch.randn(1, 5, 2, 3, dtype=torch.float64) for _ in range(3)])
        t = tuple([torch.randn_like(each) for each in x])

        def by(implementation: str | None) -> Callable[..., Tensor]:
            return lambda *y: attend(*y, given, implementation=implementation).output

        rules: list[Rule] = [
            lambda each: grad(loss_of(each), (0, 1, 2)),
            lambda each: lambda *y: jvp(each, y, t),
            lambda each: lambda *y: vmap(each)(*(torch.stack([a, b]) for a, b in zip(y, t, strict=True))),
            lambda each: hessian(loss_of(each)),
        ]
        for rule in rules:
            torch.compiler.reset()
            function = rule(by(None))
            if compiled:
                function = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(function(*x), rule(by("reference"))(*x), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_the_primitives(self, compiled: bool) -> None:
        x = (torch.randn(4, 4, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64))
        t = tuple([torch.randn_like(each) for each in x])

        def by(implementation: str | None) -> Callable[..., Tensor]:
            def composed(query: Tensor, key: Tensor) -> Tensor:
                scores = edge_dot(query, key, GRAPH, implementation=implementation)
                weights = edge_softmax(scores, GRAPH, implementation=implementation)
                return edge_sum(weights, key, GRAPH, implementation=implementation)

            return composed

        rules: list[Rule] = [
            lambda each: grad(loss_of(each), (0, 1)),
            lambda each: lambda *y: jvp(each, y, t),
            lambda each: lambda *y: vmap(each)(*(torch.stack([a, b]) for a, b in zip(y, t, strict=True))),
            lambda each: hessian(loss_of(each), (0, 1)),
        ]
        for rule in rules:
            torch.compiler.reset()
            function = rule(by(None))
            if compiled:
                function = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(function(*x), rule(by("reference"))(*x), rtol=1e-10, atol=1e-10)

    def test_dual_tensors_inside_a_compiled_call(self) -> None:
        query, tangent, key = (torch.randn(nodes, 2, 3, dtype=torch.float64) for nodes in (4, 4, 5))

        def along(implementation: str | None = None) -> Any:
            def call(query: Tensor, key: Tensor, tangent: Tensor) -> list[Any]:
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(query, tangent)
                    results = [
                        edge_dot(dual, key, GRAPH, implementation=implementation),
                        attend(dual, key, key, GRAPH, implementation=implementation).output,
                    ]
                    return [forward_ad.unpack_dual(result).tangent for result in results]

            return call

        torch.compiler.reset()
        found = torch.compile(along(), fullgraph=True, backend="aot_eager")(query, key, tangent)
        torch.testing.assert_close(found, along("reference")(query, key, tangent), rtol=1e-10, atol=1e-10)


def test_the_moment_is_told_where_the_compiler_gave_up_on_the_caller() -> None:
    """torch.compile compiles functions by themselves then, in which a question of ours must not be a constant."""
    answers = []

    def outer(x: Tensor) -> Tensor:
        try:
            answers.append((is_compiling(), is_differentiated_again()))
            raise ValueError("out of here")
        finally:
            answers.append((is_compiling(), is_differentiated_again()))

    torch.compiler.reset()
    with pytest.raises(ValueError, match="out of here"):
        torch.compile(outer, backend="eager")(torch.ones(3))
    assert answers == [(False, True)] * 2
