"""The maximum over each query's edges on the compiled kernels: against a loop and the reference, and its promises."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import explain
from anyattention.errors import InvalidInputError
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.operators import edge_argmax
from anyattention.patterns import Graph
from cases import make_call, random_graph

pytestmark = pytest.mark.usefixtures("native")

_FEATURES = [
    ("dot", "kv"),
    ("dot", "v"),
    ("dot", ""),
    ("additive", "kv"),
    ("dynamic", "kv"),
    ("dynamic", "v"),
    ("dynamic", ""),
]


def largest_edges(
    weights: Tensor, columns: Tensor, features: Tensor | None, feature_weight: Tensor | None, graph: Graph
) -> Tensor:
    """What `edge_argmax` finds, by a loop over the edges in the caller's order."""
    batch, num_edges, heads = weights.shape
    width, group = columns.shape[3], heads // columns.shape[2]
    found = torch.full((batch, graph.num_queries, heads, width), -1)
    largest = torch.zeros(found.shape, dtype=torch.float64)
    for b in range(batch):
        for e in range(num_edges):
            key, query = graph.edge_index[:, e].tolist()
            for h in range(heads):
                if weights[b, e, h] == -math.inf:
                    continue
                values = columns[b, key, h // group]
                if features is not None and feature_weight is not None:
                    values = values + feature_weight[h] @ features[e]
                for c, message in enumerate((weights[b, e, h] * values).tolist()):
                    at = (b, query, h, c)
                    before = largest[at].item()
                    if found[at] < 0 or message > before or (math.isnan(message) and not math.isnan(before)):
                        found[at], largest[at] = e, message
    return found


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("edge_dim", [None, 0, 2])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(1, 1, 1), (3, 3, 5), (4, 2, 8), (6, 1, 17)])
def test_the_largest_edge(
    heads: int, key_heads: int, width: int, edge_dim: int | None, odd: bool, dtype: torch.dtype
) -> None:
    graph = random_graph(5, 4, 37)

    def integers(*shape: int) -> Tensor:
        # Small ones: every order of summation is exact, and ties are frequent.
        return torch.randint(-2, 3, shape).to(dtype)

    weights, columns = integers(2, 37, heads), integers(2, 4, key_heads, width)
    weights[torch.rand(weights.shape) < 0.2] = -math.inf
    weights[1, :, 0] = -math.inf
    if odd:
        for number in (math.nan, math.inf, -math.inf):
            columns[torch.rand(columns.shape) < 0.05] = number
        weights[torch.rand(weights.shape) < 0.05] = math.nan
    features = None if edge_dim is None else integers(37, edge_dim)
    feature_weight = None if edge_dim is None else integers(heads, width, edge_dim)
    found = edge_argmax(weights, columns, features, feature_weight, arrays_of(graph))
    assert torch.equal(found, largest_edges(weights, columns, features, feature_weight, graph))


@pytest.mark.parametrize("position", [0, 2047, 2048, 5000])
@pytest.mark.parametrize("message", [1.0, math.nan, math.inf])
def test_the_first_of_equal_edges_across_the_pieces_of_a_long_row(position: int, message: float) -> None:
    index = torch.arange(6_000)
    graph = Graph.from_edge_index(torch.stack([index, index * 0]), num_queries=1, num_keys=6_000)
    columns = torch.zeros(1, 6_000, 1, 3)
    columns[:, position] = columns[:, 5_500] = message
    arrays = arrays_of(graph)
    weights = torch.ones(1, 6_000, 1)
    assert (edge_argmax(weights, columns, None, None, arrays) == position).all()
    # The first piece may be hidden as a whole.
    weights[:, :2_048] = -math.inf
    first = position if position >= 2_048 else 5_500
    assert (edge_argmax(weights, columns, None, None, arrays) == first).all()


def make_run(
    graph: Graph, score: str, features: str = "", *, heads: int = 4, key_heads: int = 4, **settings: Any
) -> tuple[Any, list[Tensor]]:
    """A function of every differentiable argument and of an implementation, and the arguments."""
    sizes: dict[str, Any] = {"heads": heads, "key_heads": key_heads, "width": 3, "value_dim": 5}
    call = make_call(graph, score, bias="beh", features=features, aggregation="max", **sizes, **settings)

    def run(*tensors: Tensor, implementation: str | None = "cpu") -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():
            # The same dropout at every call.
            torch.manual_seed(7)
            assert implementation != "cpu" or explain(**call.arguments()).implementation == "cpu"
        result = call.with_tensors(tensors).run(implementation)
        if result.logsumexp is None:
            return result.output, result.weights
        return result.output, result.weights, result.logsumexp.masked_fill(result.logsumexp == -math.inf, 0.0)

    return run, call.leaves


def random_like(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Random cotangents; `randn_like` would follow strides, which no two implementations share."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(each.shape, dtype=each.dtype, generator=generator) for each in tensors]


def assert_equals_reference(run: Any, leaves: list[Tensor]) -> None:
    """Results, and gradients of first and second order."""
    found = []
    for implementation in ("cpu", "reference"):
        results = run(*leaves, implementation=implementation)
        first = torch.autograd.grad(results, leaves, random_like(results, 1), create_graph=True)
        second = torch.autograd.grad(first, leaves, random_like(first, 2))
        # Without a graph the first gradient goes another way, and so do results without gradients.
        results = run(*leaves, implementation=implementation)
        alone = torch.autograd.grad(results, leaves, random_like(results, 1))
        with torch.no_grad():
            found.append([*results, *first, *second, *alone, *run(*leaves, implementation=implementation)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


class TestAgainstTheReference:
    @pytest.mark.pairwise
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("batch", [None, 2])
    @pytest.mark.parametrize(("score", "features"), _FEATURES)
    def test_every_score_and_feature(self, score: str, features: str, batch: int | None, normalize: bool) -> None:
        mask = torch.rand(31, 4) < 0.7
        settings: dict[str, Any] = {"normalize": normalize, "mask": mask, "dropout": 0.3, "softcap": 2.0}
        assert_equals_reference(*make_run(random_graph(6, 7, 31), score, features, batch=batch, **settings))
        assert_equals_reference(*make_run(random_graph(6, 7, 31), score, features, batch=batch, normalize=normalize))

    @pytest.mark.parametrize("features", ["", "kv"])
    @pytest.mark.parametrize(("heads", "key_heads"), [(6, 1), (6, 2), (8, 4)])
    def test_key_heads(self, heads: int, key_heads: int, features: str) -> None:
        call = make_run(random_graph(6, 7, 31), "dot", features, heads=heads, key_heads=key_heads, batch=2)
        assert_equals_reference(*call)

    @pytest.mark.parametrize("features", ["", "kv"])
    @pytest.mark.parametrize("sizes", [(3, 4, 0), (2, 1, 0), (7, 2, 1)])
    def test_few_edges(self, sizes: tuple[int, int, int], features: str) -> None:
        assert_equals_reference(*make_run(random_graph(*sizes), "dot", features))

    def test_a_long_row(self) -> None:
        assert_equals_reference(*make_run(random_graph(9, 70, 5_003, hub=0.9), "additive", "kv", dropout=0.2))


@pytest.mark.parametrize(
    ("score", "features"),
    [pytest.param(*each, marks=[] if each[1] == "kv" else pytest.mark.exhaustive) for each in _FEATURES],
)
def test_derivatives_against_finite_differences(score: str, features: str) -> None:
    mask = torch.rand(9, 2) < 0.8
    run, leaves = make_run(random_graph(4, 3, 9), score, features, heads=2, key_heads=1, mask=mask, dropout=0.2)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("features", ["", "v"])
def test_third_derivatives(features: str) -> None:
    run, leaves = make_run(random_graph(3, 4, 7), "dot", features, heads=2, key_heads=2)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*tensors)[0].square().sum(), tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, leaves, fast_mode=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["value", "features", "value_weight"])
def test_no_poison_reaches_a_query_without_edges_nor_what_hides_it(name: str, poison: float) -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 0, 2], [0, 0, 3, 3]]), num_queries=4, num_keys=3)
    # Edge 0 is hidden, and what stands at the beginning of every array is taken by nobody.
    mask = torch.tensor([False, True, False, True])
    run, leaves = make_run(graph, "dot", "kv", mask=mask)
    position = {"value": 2, "features": 4, "value_weight": 6}[name]
    with torch.no_grad():
        leaves[position][0] = poison
    output = run(*leaves)[0]
    shown = slice(1, None) if name == "value_weight" else slice(None)
    assert not output[[1, 2]].any()
    assert output[:, shown].isfinite().all()
    if name != "value_weight":
        # That one is used, and shows in its own head, where a gradient of 0 meets it.
        gradients = torch.autograd.grad(output.sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("repeats", [1, pytest.param(7, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("features", ["", "kv"])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_the_same_bits_on_any_number_of_threads(score: str, features: str, repeats: int) -> None:
    run, leaves = make_run(random_graph(900, 700, 30_011, hub=0.1), score, features, dtype=torch.float32, dropout=0.1)
    before, expected = torch.get_num_threads(), []
    try:
        for count in (2, 1, 3, *[2] * repeats):
            torch.set_num_threads(count)
            results = run(*leaves)
            gradients = torch.autograd.grad(results, leaves, random_like(results, 5))
            found = [*results, *gradients]
            expected = expected or found
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("features", [pytest.param("", marks=pytest.mark.exhaustive), "kv"])
def test_compiles_whole(features: str) -> None:
    torch.compiler.reset()
    for num_edges in (20, 33):
        run, leaves = make_run(random_graph(5, 7, num_edges), "dot", features, batch=2, key_heads=2)
        actual, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves)
        torch.testing.assert_close(actual, expected)
        cotangents = random_like(expected, 3)
        ours, theirs = (torch.autograd.grad(each, leaves, cotangents) for each in (actual, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("features", ["none", "value"])
@pytest.mark.parametrize(("score", "order"), [("dot", "first"), ("additive", "first"), ("dot", "second")])
def test_no_edge_keeps_a_channel(peak_of_a_step: Callable[..., float], score: str, order: str, features: str) -> None:
    taken = peak_of_a_step(score, "max", features, order)
    # In tensors of one number per edge and head: one of edges x heads x channels would be 128 of them.
    assert taken < (32 if order == "first" else 64)


def test_sizes_and_dtypes_are_checked() -> None:
    graph = random_graph(5, 7, 11)
    arrays = arrays_of(graph)
    weights, columns, features, weight = (torch.ones(*s) for s in ((1, 11, 4), (1, 7, 2, 3), (11, 2), (4, 3, 2)))
    for given, name in (
        ((weights[:, :5], columns, None, None), "weights"),
        ((weights.half(), columns.half(), None, None), "weights"),
        ((weights, columns.double(), None, None), "value"),
        ((weights, columns, features[:5], weight), "features"),
        ((weights, columns, features, weight[..., :1]), "feature_weight"),
        ((weights, columns, features, weight[:3]), "feature_weight"),
    ):
        with pytest.raises(InvalidInputError, match=f"{name}: expected "):
            edge_argmax(*given, arrays)
