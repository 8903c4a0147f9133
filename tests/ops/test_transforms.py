"""The primitives of edges under all that PyTorch differentiates, maps, traces and compiles with, against plain PyTorch.

The oracle is dense: products with the matrices that say which query and which key an edge has.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from anyattention import Causal, Graph, Pattern, TopK, Window, attend, edge_dot, edge_softmax, edge_sum
from anyattention.ambient import is_compiling, is_differentiated_again
from anyattention.ops.edges import operators
from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.ops.edges.dynamic import dynamic_scores

pytestmark = pytest.mark.usefixtures("native")

_GRAPH = Graph.from_edge_index(
    torch.tensor([[0, 1, 3, 3, 0, 4, 4, 0], [0, 0, 2, 2, 3, 3, 0, 2]]), num_queries=4, num_keys=5
)
_QUERIES = torch.nn.functional.one_hot(_GRAPH.query_index, 4).double()
_KEYS = torch.nn.functional.one_hot(_GRAPH.key_index, 5).double()
_ARRAYS = [field.name for field in fields(GraphArrays)]
_SLOPE = 0.3


def at_queries(x: Tensor) -> Tensor:
    return torch.einsum("en,bn...->be...", _QUERIES, x)


def at_keys(x: Tensor) -> Tensor:
    """Of the two key heads, each for two heads in a row."""
    return torch.einsum("em,bm...->be...", _KEYS, x).repeat_interleave(2, dim=2)


def to_queries(x: Tensor) -> Tensor:
    return torch.einsum("en,be...->bn...", _QUERIES, x)


def plain_softmax(scores: Tensor) -> Tensor:
    terms = scores.exp()
    return terms / at_queries(to_queries(terms))


def plain_scores(query: Tensor, key: Tensor, vector: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    channels = at_queries(query) + at_keys(key) + torch.einsum("hdp,ep->ehd", weight, features)
    return torch.einsum("behd,hd->beh", torch.where(channels > 0, channels, _SLOPE * channels), vector)


class Case(NamedTuple):
    """A primitive: of a graph's arrays and some tensors; the same in plain PyTorch; the tensors' shapes."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def of(self, graph: GraphArrays) -> Callable[..., Tensor]:
        return lambda *x: self.ours(graph, *x)


_CASES = {
    "edge_dot": Case(
        lambda graph, query, key: operators.edge_dot(query, key, graph),
        lambda query, key: (at_queries(query) * at_keys(key)).sum(-1),
        ((2, 4, 4, 3), (2, 5, 2, 3)),
    ),
    "edge_sum": Case(
        lambda graph, weights, key: operators.edge_sum(weights, key, graph),
        lambda weights, key: to_queries(weights[..., None] * at_keys(key)),
        ((2, 8, 4), (2, 5, 2, 3)),
    ),
    "edge_total": Case(lambda graph, x: operators.edge_total(x, graph), to_queries, ((2, 8, 4),)),
    "edge_spread": Case(lambda graph, x: operators.edge_spread(x, graph), at_queries, ((2, 4, 4),)),
    "edge_softmax": Case(lambda graph, x: operators.edge_softmax(x, graph), plain_softmax, ((2, 8, 4),)),
    "dynamic_dot": Case(
        lambda graph, *x: dynamic_scores(*x, graph, _SLOPE),
        plain_scores,
        ((2, 4, 4, 3), (2, 5, 2, 3), (4, 3), (4, 3, 2), (8, 2)),
    ),
}
each_primitive = pytest.mark.parametrize("name", list(_CASES))


@pytest.fixture
def case(name: str) -> Case:
    return _CASES[name]


def inputs_of(case: Case, *leading: int) -> tuple[Tensor, ...]:
    return tuple([torch.randn(*leading, *shape, dtype=torch.float64) for shape in case.shapes])


def every(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.shapes)))


def leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs]


Rule = Callable[[Callable[..., Tensor]], Any]


def assert_agrees(case: Case, rule: Rule) -> None:
    """What the rule makes of the primitive is what it makes of plain PyTorch."""
    torch.testing.assert_close(rule(case.of(arrays_of(_GRAPH))), rule(case.plain), rtol=1e-10, atol=1e-10)


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A number; the sine keeps what is linear from vanishing at the second derivative."""

    def loss(*inputs: Tensor) -> Tensor:
        found = function(*inputs).sin()
        waves = torch.arange(found.numel(), dtype=found.dtype, device=found.device).cos().view(found.shape)
        return (found * waves).sum()

    return loss


def first_of(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The gradients by a backward."""
    return lambda *inputs: torch.autograd.grad(loss_of(function)(*inputs), inputs)


def second_of(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The gradients of gradients, by two backwards."""

    def second(*inputs: Tensor) -> Any:
        found = torch.autograd.grad(loss_of(function)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(each.sin().sum() for each in found), inputs)

    return second


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
            arrays_of(Graph.from_edge_index(_GRAPH.edge_index[:, order], num_queries=4, num_keys=5)) for order in orders
        ]
        stacked = [torch.stack([getattr(graph, name) for graph in graphs]) for name in _ARRAYS]
        x = inputs_of(case)
        found = vmap(lambda *arrays: case.ours(GraphArrays(*arrays), *x))(*stacked)
        expected = torch.stack([case.of(graph)(*x) for graph in graphs])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each_primitive
class TestAutograd:
    def test_finite_differences(self, case: Case) -> None:
        function, x = case.of(arrays_of(_GRAPH)), leaves(inputs_of(case))
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


class OnGraph(torch.nn.Module):
    """A function of a graph's arrays and tensors, for tracers that want all tensors as inputs."""

    def __init__(self, case: Case, rule: Rule) -> None:
        super().__init__()
        self.case, self.rule = case, rule

    def forward(self, arrays: list[Tensor], *inputs: Tensor) -> Any:
        return self.rule(self.case.of(GraphArrays(*arrays)))(*inputs)


def arrays() -> list[Tensor]:
    return [getattr(arrays_of(_GRAPH), name) for name in _ARRAYS]


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
            traced = make_fx(rule(case.of(arrays_of(_GRAPH))))(*inputs_of(case))
            other = inputs_of(case)
            torch.testing.assert_close(traced(*other), rule(case.plain)(*other), rtol=1e-10, atol=1e-10)
        traced = make_fx(vmap(case.of(arrays_of(_GRAPH))))(*inputs_of(case, 3))
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
        compiled = torch.compile(case.of(arrays_of(_GRAPH)), fullgraph=True, backend="aot_eager")
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
                scores = edge_dot(query, key, _GRAPH, implementation=implementation)
                weights = edge_softmax(scores, _GRAPH, implementation=implementation)
                return edge_sum(weights, key, _GRAPH, implementation=implementation)

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

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own, of its loop
    @pytest.mark.parametrize(
        ("pattern", "implementation"), [("graph", "cpu"), ("dense", "torch"), ("dense", "cpu"), ("window", "cpu")]
    )
    def test_attend_with_many_cotangents_at_once(self, pattern: str, implementation: str) -> None:
        given = patterns()[pattern]
        x = [torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        result = attend(*x, given, implementation=implementation, return_logsumexp=True)
        results = [result.output, result.logsumexp]
        many = [torch.randn(3, *each.shape, dtype=torch.float64) for each in results]
        found = torch.autograd.grad(results, x, many, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(results, x, [by[n] for by in many], retain_graph=True) for n in range(3)]
        expected = tuple([torch.stack(parts) for parts in zip(*each, strict=True)])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    def test_dual_tensors_inside_a_compiled_call(self) -> None:
        query, tangent, key = (torch.randn(nodes, 2, 3, dtype=torch.float64) for nodes in (4, 4, 5))

        def along(implementation: str | None = None) -> Any:
            def call(query: Tensor, key: Tensor, tangent: Tensor) -> list[Any]:
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(query, tangent)
                    results = [
                        edge_dot(dual, key, _GRAPH, implementation=implementation),
                        attend(dual, key, key, _GRAPH, implementation=implementation).output,
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
