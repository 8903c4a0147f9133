"""The score Dynamic on the kernels, with and without edge features: against a sum over all channels of all edges."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from anyattention import EdgeFeatures, attend, explain
from anyattention.errors import InvalidInputError
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.dynamic import DynamicDot, DynamicSums, _dynamic_dot, _dynamic_sums, dynamic_scores
from anyattention.patterns import Graph
from anyattention.scores import Dynamic
from cases import random_graph

pytestmark = pytest.mark.usefixtures("native")

_SLOPE = 0.3


def make_inputs(
    graph: Graph,
    width: int,
    heads: int = 4,
    key_heads: int = 2,
    *,
    num_features: int = 3,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Query, key and vector, then weight and features where there are any."""
    shapes = [(2, 5, heads, width), (2, 7, key_heads, width), (heads, width)]
    if num_features:
        shapes += [(heads, width, num_features), (graph.num_edges, num_features)]
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def fused(graph: Graph, query: Tensor, key: Tensor, vector: Tensor, *edges: Tensor) -> Tensor:
    weight, features = edges or (None, None)
    return dynamic_scores(query, key, vector, weight, features, arrays_of(graph), _SLOPE)


def naive(graph: Graph, query: Tensor, key: Tensor, vector: Tensor, *edges: Tensor) -> Tensor:
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    channels = query[:, graph.query_index] + key[:, graph.key_index]
    if edges:
        channels = channels + torch.einsum("hdp,ep->ehd", *edges)
    return (F.leaky_relu(channels, _SLOPE) * vector).sum(-1)


def derivatives(scores: Tensor, inputs: list[Tensor], order: int) -> list[Tensor]:
    """The scores, and the derivatives of a random loss of the derivatives before; the losses are the same at each call.

    The sine keeps what is linear in an input from vanishing at the next derivative; large numbers would lose it digits.
    """
    generator = torch.Generator().manual_seed(1)
    found, last = [scores], [scores]
    for _ in range(order):
        cotangents = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in last]
        waves = [(each / each.detach().abs().sum().clamp(min=1.0)).sin() for each in last]
        last = list(torch.autograd.grad(waves, inputs, cotangents, create_graph=True))
        found += last
    return found


@pytest.mark.pairwise
@pytest.mark.parametrize("num_features", [0, 1, 3])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 3), (6, 2), (6, 1)])
@pytest.mark.parametrize("width", [1, 3, 7, 8, 16, 40])
def test_three_derivatives_against_all_channels(width: int, heads: int, key_heads: int, num_features: int) -> None:
    graph = random_graph()
    inputs = make_inputs(graph, width, heads, key_heads, num_features=num_features)
    actual = derivatives(fused(graph, *inputs), inputs, 3)
    expected = derivatives(naive(graph, *inputs), inputs, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [7, 8, 16, 32, 64])
def test_float32(width: int) -> None:
    graph = random_graph()
    inputs = make_inputs(graph, width, dtype=torch.float32)
    actual = derivatives(fused(graph, *inputs), inputs, 2)
    expected = derivatives(naive(graph, *inputs), inputs, 2)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("num_features", [0, 2])
def test_finite_differences(num_features: int) -> None:
    graph = random_graph(num_edges=9)
    inputs = make_inputs(graph, 3, num_features=num_features)
    assert gradcheck(lambda *given: fused(graph, *given), inputs)
    assert gradgradcheck(lambda *given: fused(graph, *given), inputs)


@pytest.mark.parametrize("without", range(5))
def test_derivatives_by_some_inputs_alone(without: int) -> None:
    graph = random_graph()
    inputs = make_inputs(graph, 3)
    inputs[without].requires_grad_(False)
    used = [each for each in inputs if each.requires_grad]
    actual = derivatives(fused(graph, *inputs), used, 2)
    torch.testing.assert_close(actual, derivatives(naive(graph, *inputs), used, 2), rtol=1e-10, atol=1e-10)
    # The second derivative of one first derivative alone.
    for n in range(len(used)):
        ours, theirs = (derivatives(function(graph, *inputs), used, 1)[n + 1] for function in (fused, naive))
        cotangent = torch.randn_like(theirs)
        seconds = [
            torch.autograd.grad(each, used, cotangent, allow_unused=True, materialize_grads=True)
            for each in (ours, theirs)
        ]
        torch.testing.assert_close(*seconds, rtol=1e-10, atol=1e-10)


def test_not_contiguous() -> None:
    graph = random_graph()
    inputs = [each.detach().transpose(0, -1).contiguous().transpose(0, -1) for each in make_inputs(graph, 5)]
    inputs = [each.requires_grad_() for each in inputs]
    actual = derivatives(fused(graph, *inputs), inputs, 2)
    torch.testing.assert_close(actual, derivatives(naive(graph, *inputs), inputs, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_edges", [0, 1])
def test_few_edges(num_edges: int) -> None:
    graph = random_graph(num_edges=num_edges)
    inputs = make_inputs(graph, 3)
    actual = derivatives(fused(graph, *inputs), inputs, 2)
    torch.testing.assert_close(actual, derivatives(naive(graph, *inputs), inputs, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_on_any_number_of_threads(threads: Any, dtype: torch.dtype) -> None:
    graph = random_graph(num_edges=9_000, hub=0.6)
    inputs = make_inputs(graph, 8, dtype=dtype)
    found = []
    for count in (1, 2, 3):
        threads(count)
        scores = fused(graph, *inputs)
        first = torch.autograd.grad(scores, inputs, torch.ones_like(scores), create_graph=True)
        found.append([scores, *first, *torch.autograd.grad(first, inputs, [each.detach() for each in first])])
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["dynamic_dot", "dynamic_sums"])
@pytest.mark.parametrize("num_features", [0, 2])
def test_the_operators_keep_their_promises_to_pytorch(opcheck: Any, name: str, num_features: int) -> None:
    graph = random_graph()
    query, key, vector, *edges = make_inputs(graph, 3, num_features=num_features)
    weight, features = (
        (edges[0].detach().permute(2, 0, 1).contiguous().requires_grad_(), edges[1]) if edges else (None, None)
    )
    arguments = [query, key, weight, features]
    base = [None if each is None else each.detach() for each in arguments]
    call = DynamicDot(arrays_of(graph), _SLOPE, vector, *arguments, *base)
    if name == "dynamic_dot":
        opcheck(_dynamic_dot, call)
    else:
        numbers = torch.randn(2, 23, 4, dtype=torch.float64).requires_grad_()
        opcheck(_dynamic_sums, DynamicSums(call, numbers, (True, True, True, bool(edges), bool(edges))))


def test_numbers_of_another_size_or_dtype() -> None:
    graph = random_graph()
    inputs = [each.detach() for each in make_inputs(graph, 3)]
    names = ("query", "key", "vector", "weight", "features")
    wrong: list[tuple[str, Tensor]] = [(name, inputs[n].float()) for n, name in enumerate(names) if n > 0]
    wrong += [("query", inputs[0][:, :3]), ("key", inputs[1][..., :2]), ("vector", inputs[2][:3])]
    wrong += [("weight", inputs[3][..., :2]), ("features", inputs[4][:5])]
    for name, tensor in wrong:
        given = dict(zip(names, inputs, strict=True)) | {name: tensor}
        with pytest.raises(InvalidInputError, match=": expected "):
            fused(graph, *given.values())


class TestAttend:
    """Whole calls with edge features inside the score, against the reference."""

    def arguments(self, graph: Graph, inputs: list[Tensor], **settings: Any) -> dict[str, Any]:
        query, key, value, vector, features, key_weight, *value_weight = inputs
        edges = EdgeFeatures(features, key_weight, *value_weight)
        given = {"query": query, "key": key, "value": value, "pattern": graph, "score": Dynamic(vector, _SLOPE)}
        return given | {"edges": edges, "return_weights": "heads"} | settings

    def inputs(self, width: int, *, batch: tuple[int, ...] = (2,), value_weight: bool = False) -> list[Tensor]:
        shapes = [(*batch, 5, 4, width), (*batch, 7, 2, width), (*batch, 7, 2, 3), (4, width), (23, 2), (4, width, 2)]
        shapes += [(4, 3, 2)] * value_weight
        return [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def results(self, arguments: dict[str, Any], implementation: str) -> list[Tensor]:
        torch.manual_seed(7)
        given = arguments | {"implementation": implementation, "return_logsumexp": arguments.get("normalize", True)}
        assert explain(**given).implementation == implementation
        return [part for part in attend(**given)[:3] if part is not None]

    @pytest.mark.pairwise
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"normalize": False, "softcap": 1.5},
            {"dropout": 0.4, "aggregation": "mean", "scale": 0.7},
        ],
    )
    @pytest.mark.parametrize("hides", [False, True])
    @pytest.mark.parametrize("value_weight", [False, True])
    @pytest.mark.parametrize("batch", [(), (2,)])
    @pytest.mark.parametrize("width", [1, 7, 8])
    def test_equals_the_reference(
        self, width: int, batch: tuple[int, ...], value_weight: bool, hides: bool, settings: dict[str, Any]
    ) -> None:
        graph = random_graph()
        inputs = self.inputs(width, batch=batch, value_weight=value_weight)
        bias = torch.randn(23, 4, dtype=torch.float64)
        masks = {"bias": bias, "mask": torch.rand(23, 4) < 0.7} if hides else {}
        arguments = self.arguments(graph, inputs, **masks, **settings)
        found = []
        for implementation in ("cpu", "reference"):
            results = self.results(arguments, implementation)
            generator = torch.Generator().manual_seed(3)
            cotangents = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in results]
            found.append([*results, *torch.autograd.grad(results, inputs, cotangents)])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_finite_differences(self, normalize: bool) -> None:
        graph = random_graph()
        mask = torch.rand(23, 4) < 0.7

        def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            arguments = self.arguments(graph, list(inputs), mask=mask, normalize=normalize)
            result = attend(**arguments, implementation="cpu")
            assert result.weights is not None
            return result.output, result.weights

        inputs = self.inputs(3)
        assert gradcheck(call, inputs)
        assert gradgradcheck(call, inputs, fast_mode=True)

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_what_hidden_edges_hold_changes_no_derivative(self, poison: float) -> None:
        # Key 6 and the features of its edges are hidden from all.
        graph = random_graph()
        mask = graph.key_index != 6
        clean = self.inputs(3, value_weight=True)
        found = []
        for number in (0.0, poison):
            inputs = [each.detach().clone() for each in clean]
            inputs[1][:, 6] = inputs[2][:, 6] = number
            inputs[4][~mask] = number
            inputs = [each.requires_grad_() for each in inputs]
            results = self.results(self.arguments(graph, inputs, mask=mask), "cpu")
            generator = torch.Generator().manual_seed(3)
            cotangents = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in results]
            first = torch.autograd.grad(results, inputs, cotangents, create_graph=True)
            cotangents = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in first]
            found.append([*results, *first, *torch.autograd.grad(first, inputs, cotangents)])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.isnan().any()

    def test_compiles(self) -> None:
        torch.compiler.reset()
        graph = random_graph()

        def call(*inputs: Tensor) -> Tensor:
            return attend(**self.arguments(graph, list(inputs))).output

        inputs = self.inputs(3, value_weight=True)
        cotangent = torch.randn(2, 5, 4, 3, dtype=torch.float64)
        expected = torch.autograd.grad(call(*inputs), inputs, cotangent)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(*inputs), inputs, cotangent)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
