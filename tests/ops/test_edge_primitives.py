"""edge_dot, edge_sum and edge_softmax against dense products, a softmax row by row and scipy; their derivatives."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from anyattention import edge_dot, edge_softmax, edge_sum
from anyattention.errors import AttentionError, DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.patterns import Graph


@pytest.fixture(params=["cpu", "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    """A forced implementation never falls back: what a test passes on has run."""
    if request.param == "cpu":
        request.getfixturevalue("native")
    return request.param


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def random_graph(num_queries: int = 5, num_keys: int = 7, num_edges: int = 23) -> Graph:
    """Bipartite, with duplicates; query 1 and key 2 are in no edge."""
    queries = [i for i in range(num_queries) if i != 1]
    keys = [j for j in range(num_keys) if j != 2]
    edge_index = torch.stack([torch.tensor(side)[torch.randint(len(side), (num_edges,))] for side in (keys, queries)])
    return Graph.from_edge_index(edge_index, num_queries=num_queries, num_keys=num_keys)


def dense_products(query: Tensor, key: Tensor, graph: Graph) -> Tensor:
    """Every query times every key, read where there are edges."""
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    products = torch.einsum("...nhd,...mhd->...nmh", query, key)
    return products[..., graph.query_index, graph.key_index, :]


def dense_sums(weights: Tensor, value: Tensor, graph: Graph) -> Tensor:
    """A matrix with the weights of duplicates added up, times the values."""
    value = value.repeat_interleave(weights.shape[-1] // value.shape[-2], dim=-2)
    flat = graph.query_index * graph.num_keys + graph.key_index
    shape = (*weights.shape[:-2], graph.num_queries * graph.num_keys, weights.shape[-1])
    matrix = weights.new_zeros(shape).index_add(-2, flat, weights)
    matrix = matrix.unflatten(-2, (graph.num_queries, graph.num_keys))
    return torch.einsum("...nmh,...mhc->...nhc", matrix, value)


def row_softmax(scores: Tensor, graph: Graph) -> Tensor:
    """PyTorch's softmax over the edges of one query after the other."""
    result = torch.zeros_like(scores)
    for query in graph.query_index.unique():
        own = (graph.query_index == query).nonzero()[:, 0]
        shown = scores.index_select(-2, own)
        hidden = (shown == -torch.inf).all(-2, keepdim=True)
        part = torch.where(hidden, 0.0, torch.where(hidden, 0.0, shown).softmax(-2))
        result = result.index_copy(-2, own, part)
    return result


def assert_agrees(actual: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float = 1e-12) -> None:
    """Values and the gradients of a random loss."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(actual, leaves, cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.pairwise
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 3), (6, 2), (6, 1), (8, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("width", [1, 7, 8, 13, 16, 27])
class TestAgainstDense:
    def test_edge_dot(
        self,
        implementation: str,
        width: int,
        dtype: torch.dtype,
        tolerance: float,
        heads: int,
        key_heads: int,
        batch: tuple[int, ...],
    ) -> None:
        graph = random_graph()
        query, key = leaf(*batch, 5, heads, width, dtype=dtype), leaf(*batch, 7, key_heads, width, dtype=dtype)
        actual = edge_dot(query, key, graph, implementation=implementation)
        assert_agrees(actual, dense_products(query, key, graph), [query, key], tolerance)

    def test_edge_sum(
        self,
        implementation: str,
        width: int,
        dtype: torch.dtype,
        tolerance: float,
        heads: int,
        key_heads: int,
        batch: tuple[int, ...],
    ) -> None:
        graph = random_graph()
        weights, value = leaf(*batch, 23, heads, dtype=dtype), leaf(*batch, 7, key_heads, width, dtype=dtype)
        actual = edge_sum(weights, value, graph, implementation=implementation)
        assert_agrees(actual, dense_sums(weights, value, graph), [weights, value], tolerance)
        assert not actual[..., 1, :, :].any()


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_edge_softmax_against_rows(implementation: str, heads: int, batch: tuple[int, ...]) -> None:
    graph = random_graph()
    scores = (10 * torch.randn(*batch, 23, heads, dtype=torch.float64)).requires_grad_()
    actual = edge_softmax(scores, graph, implementation=implementation)
    assert_agrees(actual, row_softmax(scores, graph), [scores])


def test_edge_softmax_hides_minus_infinity(implementation: str) -> None:
    graph = random_graph()
    scores = torch.randn(23, 3, dtype=torch.float64)
    scores[torch.rand(23, 3) < 0.3] = -torch.inf
    scores[graph.query_index == 3, 1] = -torch.inf
    scores.requires_grad_()
    actual = edge_softmax(scores, graph, implementation=implementation)
    torch.testing.assert_close(actual, row_softmax(scores, graph), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(actual, scores, torch.randn_like(actual))
    assert gradient.isfinite().all()
    assert not gradient[scores == -torch.inf].any()


@pytest.mark.parametrize("shift", [-800.0, 800.0])
def test_edge_softmax_of_large_scores(implementation: str, shift: float) -> None:
    graph = random_graph()
    scores = torch.randn(23, 3, dtype=torch.float64)
    expected = edge_softmax(scores, graph, implementation=implementation)
    actual = edge_softmax(scores + shift, graph, implementation=implementation)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)


def test_edge_softmax_beside_which_the_logarithm_of_the_sum_vanishes(implementation: str) -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 0], [0, 0, 0, 1]]), num_nodes=3)
    scores = torch.tensor([3e9, 3e9, 3e9, -3e9])[:, None].expand(4, 8)
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])[:, None].expand(4, 8)
    torch.testing.assert_close(edge_softmax(scores, graph, implementation=implementation), expected)


def test_edge_sum_against_scipy(implementation: str, require: Any) -> None:
    sparse = require("scipy.sparse")
    graph = random_graph(50, 70, 1_001)
    weights, value = torch.randn(1_001, 3, dtype=torch.float64), torch.randn(70, 3, 11, dtype=torch.float64)
    actual = edge_sum(weights, value, graph, implementation=implementation)
    for head in range(3):
        entries = (weights[:, head].numpy(), (graph.query_index.numpy(), graph.key_index.numpy()))
        product = sparse.csr_matrix(entries, shape=(50, 70)) @ value[:, head].numpy()
        torch.testing.assert_close(actual[:, head], torch.from_numpy(product), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 0), (5, 0), (0, 7), (5, 7)])
def test_no_edges(implementation: str, num_queries: int, num_keys: int) -> None:
    empty = torch.empty(2, 0, dtype=torch.int64)
    graph = Graph.from_edge_index(empty, num_queries=num_queries, num_keys=num_keys)
    query, key, weights = leaf(num_queries, 3, 2), leaf(num_keys, 3, 2), leaf(0, 3)
    products = edge_dot(query, key, graph, implementation=implementation)
    sums = edge_sum(weights, key, graph, implementation=implementation)
    assert products.shape == (0, 3)
    assert sums.shape == (num_queries, 3, 2)
    assert edge_softmax(weights, graph, implementation=implementation).shape == (0, 3)
    assert not sums.any()
    for gradient in torch.autograd.grad([products, sums], [query, key], [products, torch.randn_like(sums)]):
        assert not gradient.any()


@pytest.mark.parametrize(("batch", "heads", "width"), [((0,), 3, 2), ((2,), 0, 2), ((2,), 3, 0), ((), 1, 0)])
def test_a_size_of_zero(implementation: str, batch: tuple[int, ...], heads: int, width: int) -> None:
    graph = random_graph()
    query, key, weights = leaf(*batch, 5, heads, width), leaf(*batch, 7, heads, width), leaf(*batch, 23, heads)
    products = edge_dot(query, key, graph, implementation=implementation)
    sums = edge_sum(weights, key, graph, implementation=implementation)
    assert products.shape == (*batch, 23, heads)
    assert sums.shape == (*batch, 5, heads, width)
    assert not products.any()
    assert edge_softmax(weights, graph, implementation=implementation).shape == weights.shape
    cotangents = [torch.randn_like(products), torch.randn_like(sums)]
    gradients = torch.autograd.grad([products, sums], [query, key, weights], cotangents)
    assert not any(gradient.any() for gradient in gradients)


class TestNaN:
    def test_an_unused_node_never_leaks(self, implementation: str) -> None:
        graph = random_graph()
        query, key = leaf(5, 2, 3), leaf(7, 2, 3)
        with torch.no_grad():
            query[1], key[2] = math.nan, math.inf
        for result in (
            edge_dot(query, key, graph, implementation=implementation),
            edge_sum(leaf(23, 2), key, graph, implementation=implementation),
        ):
            assert result.isfinite().all()
            gradients = torch.autograd.grad(result, [query, key], torch.randn_like(result), materialize_grads=True)
            assert all(gradient.isfinite().all() for gradient in gradients)

    @pytest.mark.parametrize("width", [1, 5])
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_an_edge_of_weight_zero_is_not_there(self, implementation: str, poison: float, width: int) -> None:
        graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 1], [0, 0, 0, 2]]), num_nodes=3)
        weights, value = leaf(4, 2), leaf(3, 2, width)
        with torch.no_grad():
            weights[2], value[2] = 0.0, poison
        sums = edge_sum(weights, value, graph, implementation=implementation)
        cotangent = torch.randn_like(sums)
        by_weights, by_value = torch.autograd.grad(sums, [weights, value], cotangent)
        assert sums.isfinite().all()
        assert not by_value[2].any()
        assert not by_weights[2].any()
        finite = value.detach().clone()
        finite[2] = 0.0
        torch.testing.assert_close(sums, dense_sums(weights, finite, graph), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(by_weights, dense_products(cotangent, finite, graph), rtol=1e-12, atol=1e-12)

    def test_the_gradient_of_a_weight_of_zero_is_the_values(self, implementation: str) -> None:
        graph = random_graph()
        weights, value = leaf(23, 2), leaf(7, 2, 3)
        with torch.no_grad():
            weights[::2] = 0.0
        actual = edge_sum(weights, value, graph, implementation=implementation)
        assert_agrees(actual, dense_sums(weights, value, graph), [weights, value])

    def test_a_hidden_edge_through_softmax_and_sum(self, implementation: str) -> None:
        graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [0, 0, 0]]), num_nodes=3)
        scores, value = leaf(3, 1), leaf(3, 1, 5)
        with torch.no_grad():
            scores[1], value[1] = -torch.inf, math.nan
        weights = edge_softmax(scores, graph, implementation=implementation)
        result = edge_sum(weights, value, graph, implementation=implementation)
        gradients = torch.autograd.grad(result, [scores, value], torch.randn_like(result), create_graph=True)
        assert result.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        second = torch.autograd.grad(gradients, [scores, value], [torch.randn_like(each) for each in gradients])
        assert all(gradient.isfinite().all() for gradient in second)

    def test_what_comes_back_to_a_hidden_edge_is_dropped(self, implementation: str) -> None:
        graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [0, 0, 0]]), num_nodes=3)
        scores = torch.tensor([[0.3], [-torch.inf], [0.7]], dtype=torch.float64, requires_grad=True)
        weights = edge_softmax(scores, graph, implementation=implementation)
        clean, poisoned = (torch.tensor([[2.0], [at], [5.0]], dtype=torch.float64) for at in (0.0, math.nan))
        (expected,) = torch.autograd.grad(weights, scores, clean, retain_graph=True)
        (actual,) = torch.autograd.grad(weights, scores, poisoned)
        assert torch.equal(actual, expected)
        assert actual[0] < 0 < actual[2]

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_a_used_one_shows(self, implementation: str, poison: float) -> None:
        graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [0, 0, 1]]), num_nodes=3)
        key, scores = torch.randn(3, 2, 4), torch.randn(3, 2)
        key[1, 0, 2], scores[1, 0] = poison, poison
        products = edge_dot(torch.ones(3, 2, 4), key, graph, implementation=implementation)
        sums = edge_sum(torch.ones(3, 2), key, graph, implementation=implementation)
        weights = edge_softmax(scores, graph, implementation=implementation)
        assert (~products.isfinite()).nonzero().tolist() == [[1, 0]]
        assert (~sums.isfinite()).nonzero().tolist() == [[0, 0, 2]]
        assert weights.isnan().nonzero().tolist() == [[0, 0], [1, 0]]


def compose(query: Tensor, key: Tensor, value: Tensor, graph: Graph, implementation: str | None = None) -> Tensor:
    scores = edge_dot(query, key, graph, implementation=implementation)
    weights = edge_softmax(scores, graph, implementation=implementation)
    return edge_sum(weights, value, graph, implementation=implementation)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_first_second_and_third_derivatives(implementation: str, batch: tuple[int, ...]) -> None:
    graph = random_graph(4, 4, 7)
    inputs = [leaf(*batch, 4, 2, 3), leaf(*batch, 4, 1, 3), leaf(*batch, 4, 2, 2)]
    cotangent = torch.randn(*batch, 4, 2, 2, dtype=torch.float64)

    def run(*arguments: Tensor) -> Tensor:
        return compose(*arguments, graph, implementation)

    def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*arguments), arguments, cotangent, create_graph=True)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=bool(batch))
    assert gradgradcheck(gradients, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rounds_once(implementation: str, dtype: torch.dtype) -> None:
    graph = random_graph(5, 7, 400)
    query, key = torch.randn(5, 2, 16).to(dtype), torch.randn(7, 2, 16).to(dtype)
    weights = torch.randn(400, 2).to(dtype)
    for actual, exact in (
        (
            edge_dot(query, key, graph, implementation=implementation),
            dense_products(query.double(), key.double(), graph),
        ),
        (
            edge_sum(weights, key, graph, implementation=implementation),
            dense_sums(weights.double(), key.double(), graph),
        ),
        (edge_softmax(weights, graph, implementation=implementation), row_softmax(weights.double(), graph)),
    ):
        assert actual.dtype == dtype
        scale = float(exact.abs().max())
        assert float((actual.double() - exact).abs().max()) <= scale * (torch.finfo(dtype).eps / 2 + 1e-5)


def test_not_contiguous(implementation: str) -> None:
    graph = random_graph()
    query = torch.randn(3, 5, 4, dtype=torch.float64).transpose(0, 1).requires_grad_()
    key = torch.randn(1, 3, 4, dtype=torch.float64).expand(7, 3, 4).requires_grad_()
    weights = torch.randn(3, 46, dtype=torch.float64)[:, ::2].T.requires_grad_()
    products = edge_dot(query, key, graph, implementation=implementation)
    assert_agrees(products, dense_products(query, key, graph), [query, key])
    sums = edge_sum(weights, key, graph, implementation=implementation)
    assert_agrees(sums, dense_sums(weights, key, graph), [weights, key])
    assert_agrees(edge_softmax(weights, graph, implementation=implementation), row_softmax(weights, graph), [weights])


def test_autocast(implementation: str) -> None:
    graph = random_graph()
    query, key, weights = torch.randn(5, 3, 4), torch.randn(7, 3, 4), torch.randn(23, 3)
    with torch.autocast("cpu", torch.bfloat16):
        products = edge_dot(query, key, graph, implementation=implementation)
        sums = edge_sum(weights, key.bfloat16(), graph, implementation=implementation)
        softmax = edge_softmax(weights.bfloat16(), graph, implementation=implementation)
        double = edge_dot(query.double(), key.double(), graph, implementation=implementation)
    assert (products.dtype, sums.dtype, softmax.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert double.dtype == torch.float64
    expected = edge_dot(query.bfloat16(), key.bfloat16(), graph, implementation=implementation)
    assert torch.equal(products, expected)


def mark_edges(graph: Graph) -> Graph:
    """The same graph, whose number of edges torch.compile takes for a variable."""
    torch._dynamo.mark_dynamic(graph.edge_index, 1)
    for array in (graph.keys_by_query, graph.edges_by_query, graph.queries_by_key, graph.edges_by_key):
        torch._dynamo.mark_dynamic(array, 0)
    return graph


def test_compiles_once_for_any_number_of_edges(native: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(compose, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_edges in (20, 33, 2, 61):
            graph = mark_edges(random_graph(num_edges=num_edges))
            inputs = [leaf(5, 4, 3), leaf(7, 2, 3), leaf(7, 2, 6)]
            assert_agrees(compiled(*inputs, graph), compose(*inputs, graph), inputs)


_GRAPH = Graph.from_edge_index(torch.tensor([[0, 6, 2], [4, 1, 0]]), num_queries=5, num_keys=7)
_QUERY, _KEY, _WEIGHTS = torch.ones(5, 4, 3), torch.ones(7, 2, 3), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: edge_dot(_KEY, _KEY, _GRAPH), DimensionMismatchError, r"query: expected \(queries=5, .* the graph"),
        (lambda: edge_dot(_QUERY, _QUERY, _GRAPH), DimensionMismatchError, r"key: .*keys=7.*got \(5, 4, 3\)"),
        (lambda: edge_dot(_QUERY, _KEY[..., :2], _GRAPH), DimensionMismatchError, r"key: .*head_dim=3"),
        (lambda: edge_dot(_QUERY, _KEY[None], _GRAPH), DimensionMismatchError, r"key: .*got \(1, 7, 2, 3\)"),
        (lambda: edge_dot(_QUERY[:, :3], _KEY, _GRAPH), DimensionMismatchError, "key: .* divides heads=3"),
        (lambda: edge_dot(_QUERY, _KEY[:, :0], _GRAPH), DimensionMismatchError, "key: .* divides heads=4"),
        (lambda: edge_dot(_QUERY[:, :0], _KEY, _GRAPH), DimensionMismatchError, "key: .* divides heads=0"),
        (lambda: edge_dot(_QUERY, _KEY.double(), _GRAPH), InvalidInputError, r"key: expected torch\.float32"),
        (lambda: edge_dot(_QUERY.long(), _KEY, _GRAPH), InvalidInputError, "query: expected a floating-point dtype"),
        (lambda: edge_dot(_QUERY, _KEY.to("meta"), _GRAPH), InvalidInputError, "key: expected device cpu"),
        (lambda: edge_dot(_QUERY, _KEY, _GRAPH.to("meta")), InvalidInputError, "graph: expected device cpu"),
        (lambda: edge_dot(_QUERY, _KEY, _GRAPH.edge_index), InvalidInputError, "graph: expected a Graph, got Tensor"),
        (
            lambda: edge_dot(_QUERY, _KEY, _GRAPH, implementation="torch"),
            InvalidInputError,
            "one of 'cpu', 'reference'",
        ),
        (lambda: edge_sum(_WEIGHTS[:2], _KEY, _GRAPH), DimensionMismatchError, r"weights: .*edges=3.*got \(2, 4\)"),
        (lambda: edge_sum(_WEIGHTS[:, :3], _KEY, _GRAPH), DimensionMismatchError, "value: .* divides heads=3"),
        (lambda: edge_sum(_WEIGHTS, _QUERY, _GRAPH), DimensionMismatchError, r"value: .*keys=7"),
        (lambda: edge_sum(None, _KEY, _GRAPH), InvalidInputError, r"weights: expected a torch\.Tensor"),
        (lambda: edge_softmax(_WEIGHTS[:, 0], _GRAPH), DimensionMismatchError, r"scores: .*edges=3.*got \(3,\)"),
        (lambda: edge_softmax(_WEIGHTS.T, _GRAPH), DimensionMismatchError, r"scores: .*got \(4, 3\)"),
        (lambda: edge_softmax(_WEIGHTS.to_sparse(), _GRAPH), InvalidInputError, "scores: expected a dense tensor"),
    ],
)
def test_refuses(call: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, AttentionError)


def test_another_device_takes_the_reference(native: Any) -> None:
    graph = _GRAPH.to("meta")
    assert edge_dot(_QUERY.to("meta"), _KEY.to("meta"), graph).shape == (3, 4)
    with pytest.raises(UnsupportedError, match=r"'cpu' cannot run this call: the kernels run on the CPU, .* on meta"):
        edge_dot(_QUERY.to("meta"), _KEY.to("meta"), graph, implementation="cpu")


def test_missing_kernels_take_the_reference(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = edge_dot(_QUERY, _KEY, _GRAPH)
    monkeypatch.setattr("anyattention.native.available", lambda: False)
    assert torch.equal(edge_dot(_QUERY, _KEY, _GRAPH), expected)
    with pytest.raises(UnsupportedError, match="no kernels are compiled"):
        edge_softmax(_WEIGHTS, _GRAPH, implementation="cpu")


@pytest.mark.usefixtures("native")
def test_modes_and_views_with_a_sign_still_meet_the_operator() -> None:
    class Record(TorchDispatchMode):
        names: tuple[str, ...] = ()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names += (str(function),)
            return function(*args, **(kwargs or {}))

    graph, query, key = random_graph(), torch.randn(5, 3, 2), torch.randn(7, 3, 2)
    with Record() as record:
        expected = edge_dot(query, key, graph, implementation="cpu")
    assert "anyattention.edge_dot.default" in record.names
    signed = torch.complex(key, -key).conj().imag  # key, by a view that turns the sign
    assert signed.is_neg()
    torch.testing.assert_close(edge_dot(query, signed, graph, implementation="cpu"), expected)
    with torch.device("meta"):
        again = edge_dot(query, key, graph, implementation="cpu")
    torch.testing.assert_close(again, expected, rtol=0.0, atol=0.0)
