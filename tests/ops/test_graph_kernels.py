"""What holds of the compiled kernels of graph attention in particular: sizes, key heads, dropout, long rows, bits."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import EdgeFeatures, attend, edge_dot, edge_softmax, edge_sum, explain
from anyattention.errors import DimensionMismatchError
from anyattention.patterns import Graph
from anyattention.scores import Dynamic
from cases import SCORES, make_call, random_graph

pytestmark = pytest.mark.usefixtures("native")


def arguments_of(
    graph: Graph, score: str, heads: int, width: int, *, value_dim: int | None = None, **settings: Any
) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments of `attend`, and the leaves among them."""
    value_dim = width if value_dim is None else value_dim
    call = make_call(graph, score, heads=heads, width=width, value_dim=value_dim, **settings)
    return call.arguments(), call.leaves


def run(arguments: dict[str, Any], implementation: str, *, weights: bool = True) -> list[Tensor]:
    """Output, logsumexp and weights by one implementation, which `explain` names."""
    given = arguments | {"implementation": implementation, "return_weights": "heads" if weights else False}
    given["return_logsumexp"] = arguments.get("normalize", True)
    assert explain(**given).implementation == implementation
    if implementation == "cpu":
        # Nor does the choice left to the table take another.
        assert explain(**(given | {"implementation": None})).implementation == "cpu"
    return [part for part in attend(**given)[:3] if part is not None]


def assert_equals_reference(arguments: dict[str, Any], leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    """Results and gradients of a random loss on all of them; the seed of dropout is the same."""
    state = torch.random.get_rng_state()
    actual = run(arguments, "cpu")
    torch.random.set_rng_state(state)
    expected = run(arguments, "reference")
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    # A cotangent of logsumexp at a query without edges meets the derivative of a constant.
    cotangents = [torch.randn_like(part) for part in expected]
    ours = torch.autograd.grad(actual, leaves, cotangents)
    theirs = torch.autograd.grad(expected, leaves, cotangents)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 3, 7, 8, 16, 32, 40, 64])
@pytest.mark.parametrize("score", SCORES)
def test_every_width_and_number_of_heads(score: str, width: int) -> None:
    graph = random_graph(11, 13, 97)
    for heads, dtype in product((1, 3, 4, 7, 8), (torch.float64, torch.float32)):
        bias = torch.randn(97, heads, dtype=dtype)
        arguments, leaves = arguments_of(graph, score, heads, width, dtype=dtype, bias=bias)
        assert_equals_reference(arguments, leaves, 1e-10 if dtype == torch.float64 else 3e-4)


@pytest.mark.parametrize("heads", [16, 32, 40, 64])
@pytest.mark.parametrize("score", SCORES)
def test_many_heads(score: str, heads: int) -> None:
    arguments, leaves = arguments_of(random_graph(5, 7, 31), score, heads, 3, batch=2, softcap=1.5)
    assert_equals_reference(arguments, leaves)


@pytest.mark.parametrize(("width", "value_dim"), [(8, 3), (3, 16), (16, 8), (1, 64)])
@pytest.mark.parametrize("score", ["dot", "dynamic"])
def test_value_dim_of_its_own(score: str, width: int, value_dim: int) -> None:
    arguments, leaves = arguments_of(random_graph(5, 7, 31), score, 3, width, value_dim=value_dim, normalize=False)
    assert_equals_reference(arguments, leaves)


class TestKeyHeads:
    @pytest.mark.pairwise
    @pytest.mark.parametrize("batch", [None, 2])
    @pytest.mark.parametrize(("heads", "key_heads"), [(6, 1), (6, 2), (6, 3), (8, 4)])
    @pytest.mark.parametrize("score", SCORES)
    def test_equal_the_reference_and_repeated_heads(
        self, score: str, heads: int, key_heads: int, batch: int | None
    ) -> None:
        graph = random_graph(5, 7, 31)
        mask = torch.rand(31, heads) < 0.7
        arguments, leaves = arguments_of(graph, score, heads, 8, key_heads=key_heads, batch=batch, mask=mask)
        assert_equals_reference(arguments, leaves)
        group = heads // key_heads
        repeated = {name: arguments[name].repeat_interleave(group, dim=-2) for name in ("key", "value")}
        actual, expected = run(arguments, "cpu"), run(arguments | repeated, "cpu")
        cotangents = [torch.randn_like(part) for part in expected]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        ours = torch.autograd.grad(actual, leaves, cotangents)
        theirs = torch.autograd.grad(expected, leaves, cotangents)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("aggregation", ["sum", "mean", "max"])
    @pytest.mark.parametrize("score", SCORES)
    def test_with_edge_features(self, score: str, aggregation: str) -> None:
        graph = random_graph(5, 7, 31)
        arguments, _ = arguments_of(graph, score, 6, 4, key_heads=2, aggregation=aggregation)
        head_dim = arguments["query"].shape[-1]
        shapes = ((31, 2), (6, head_dim, 2), (6, 4, 2))
        arguments["edges"] = EdgeFeatures(*(torch.randn(*shape, dtype=torch.float64) for shape in shapes))
        repeated = {name: arguments[name].repeat_interleave(3, dim=-2) for name in ("key", "value")}
        expected = attend(**(arguments | repeated), implementation="reference").output
        for implementation in ("reference", None):
            output = attend(**arguments, implementation=implementation).output
            torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("score", SCORES)
    def test_second_derivatives(self, score: str) -> None:
        arguments, leaves = arguments_of(random_graph(3, 4, 7), score, 4, 2, key_heads=2)

        def output(*tensors: Tensor) -> Tensor:
            given = arguments | dict(zip(("query", "key", "value"), tensors, strict=False))
            if score == "dynamic":
                given["score"] = Dynamic(tensors[3])
            return attend(**given, implementation="cpu").output

        assert torch.autograd.gradcheck(output, leaves)
        assert torch.autograd.gradgradcheck(output, leaves, fast_mode=True)

    @pytest.mark.parametrize("key_heads", [4, 12, 5])
    def test_that_do_not_divide_are_refused(self, key_heads: int) -> None:
        arguments, _ = arguments_of(random_graph(3, 4, 7), "dot", 6, 2, key_heads=key_heads)
        for entry in (attend, explain):
            with pytest.raises(DimensionMismatchError, match=r"key: expected a number .* divides heads=6, got \(4, "):
                entry(**arguments)

    def test_of_key_and_value_are_one_number(self) -> None:
        arguments, _ = arguments_of(random_graph(3, 4, 7), "dot", 6, 2, key_heads=3)
        arguments["value"] = arguments["value"][:, :2]
        with pytest.raises(DimensionMismatchError, match=r"value: .*key_heads=3.*key_heads is 3 in key"):
            attend(**arguments)


class TestDropout:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("score", SCORES)
    def test_drops_what_the_reference_drops(self, score: str, normalize: bool) -> None:
        graph = random_graph(11, 13, 197)
        arguments, leaves = arguments_of(graph, score, 3, 5, batch=2, dropout=0.4, normalize=normalize)
        assert_equals_reference(arguments, leaves)

    def test_keeps_the_pattern_of_the_seed(self) -> None:
        # Each edge has a query of its own, so that the output is its keep factor.
        index = torch.arange(1_000)
        graph = Graph.from_edge_index(torch.stack([index % 7, index]), num_queries=1_000, num_keys=7)
        ones = [torch.ones(rows, 3, 1) for rows in (1_000, 7, 7)]
        found = []
        for implementation in ("cpu", "reference"):
            torch.manual_seed(11)
            found.append(attend(*ones, graph, dropout=0.3, implementation=implementation).output)
        assert torch.equal(found[0] == 0, found[1] == 0)
        assert found[0].unique().numel() == 2
        assert 0.25 < float((found[0] == 0).float().mean()) < 0.35

    @pytest.mark.exhaustive
    def test_the_mean_over_seeds_is_no_dropout(self) -> None:
        graph = random_graph(5, 7, 40)
        arguments, leaves = arguments_of(graph, "dot", 2, 3)
        expected = run(arguments, "cpu", weights=False)[0]
        cotangent = torch.randn_like(expected)
        expected_gradient = torch.autograd.grad(expected, leaves[2], cotangent)[0]
        outputs, gradients = [], []
        for seed in range(2_000):
            torch.manual_seed(seed)
            output = attend(**arguments, dropout=0.5, implementation="cpu").output
            outputs.append(output.detach())
            gradients.append(torch.autograd.grad(output, leaves[2], cotangent)[0])
        for samples, exact in ((outputs, expected), (gradients, expected_gradient)):
            stacked = torch.stack(samples)
            error = stacked.std(0) / math.sqrt(len(samples))
            assert float(error.max()) > 0
            assert ((stacked.mean(0) - exact).abs() <= 4 * error + 1e-12).all()


@pytest.mark.parametrize(("heads", "width"), [(8, 16), (3, 5)])
@pytest.mark.parametrize("score", SCORES)
def test_rows_longer_than_a_piece(score: str, heads: int, width: int) -> None:
    # Query 2 and key 3 have about half of the edges each: more than two pieces of 2048.
    graph = random_graph(50, 70, 10_007, hub=0.5)
    assert int(graph.query_offsets.diff().max()) > 4096 < int(graph.key_offsets.diff().max())
    bias = torch.randn(10_007, heads, dtype=torch.float64)
    bias[torch.rand(10_007, heads) < 0.1] = -torch.inf
    arguments, leaves = arguments_of(graph, score, heads, width, bias=bias, dropout=0.2)
    assert_equals_reference(arguments, leaves)


@pytest.mark.parametrize("length", [2047, 2048, 2049, 4096, 4097])
def test_a_row_of_whole_pieces(length: int) -> None:
    index = torch.arange(length)
    for edge_index, sizes in (
        (torch.stack([index % 5, index * 0]), (3, 5)),
        (torch.stack([index * 0, index % 5]), (5, 3)),
    ):
        graph = Graph.from_edge_index(edge_index, num_queries=sizes[0], num_keys=sizes[1])
        arguments, leaves = arguments_of(graph, "dot", 2, 3)
        assert_equals_reference(arguments, leaves)


@pytest.mark.parametrize("score", SCORES)
def test_a_tenth_of_the_edges_on_one_node(score: str) -> None:
    arguments, leaves = arguments_of(random_graph(900, 700, 30_011, hub=0.1), score, 2, 8)
    assert_equals_reference(arguments, leaves)


def bits(arguments: dict[str, Any], leaves: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    results = run(arguments, "cpu", weights=False)
    return [part.detach() for part in results] + list(torch.autograd.grad(results, leaves, cotangents))


@pytest.mark.parametrize("repeats", [1, pytest.param(47, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("score", SCORES)
def test_the_same_bits_in_every_run_on_any_number_of_threads(score: str, repeats: int, threads: Any) -> None:
    # Many turns of 1024 slots, and rows in pieces: work for every thread.
    graph = random_graph(900, 1_100, 30_011, hub=0.1)
    bias = torch.randn(30_011, 4)
    arguments, leaves = arguments_of(graph, score, 4, 8, dtype=torch.float32, bias=bias, dropout=0.1)
    cotangents = [torch.randn_like(part) for part in run(arguments, "cpu", weights=False)]
    threads(2)
    expected = bits(arguments, leaves, cotangents)
    for count in [1, 3, *[2] * repeats]:
        threads(count)
        actual = bits(arguments, leaves, cotangents)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True)), count


def test_the_primitives_too_have_the_same_bits(threads: Any) -> None:
    graph = random_graph(900, 1_100, 60_013, hub=0.1)
    query, key, scores = torch.randn(900, 4, 8), torch.randn(1_100, 2, 8), torch.randn(60_013, 4)
    found = []
    for count in (2, 1, 3, 2):
        threads(count)
        found.append([edge_dot(query, key, graph), edge_sum(scores, key, graph), edge_softmax(scores, graph)])
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, found[0], strict=True))


def test_a_hidden_edge_does_not_leak_through_a_gradient_that_is_kept() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 3, 2], [0, 0, 0, 2]]), num_nodes=4)
    mask = torch.tensor([True, True, False, True])
    found = []
    for poison in (0.0, math.nan):
        torch.manual_seed(5)
        arguments, leaves = arguments_of(graph, "dot", 2, 3, mask=mask)
        with torch.no_grad():
            arguments["key"][3] = arguments["value"][3] = poison
        results = run(arguments, "cpu")[:1]
        first = torch.autograd.grad(results, leaves, [torch.randn_like(results[0])], create_graph=True)
        second = torch.autograd.grad(first, leaves, [torch.randn_like(each) for each in first])
        found.append([*first, *second])
    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(*found, strict=True))


class TestExplain:
    def reasons(self, score: str = "dot", **settings: Any) -> tuple[str, dict[str, str]]:
        arguments, _ = arguments_of(random_graph(5, 7, 11), score, 3, 4)
        explanation = explain(**(arguments | settings))
        return explanation.implementation, dict(explanation.refusals)

    @pytest.mark.parametrize("score", SCORES)
    def test_names_the_kernels(self, score: str) -> None:
        assert self.reasons(score) == ("cpu", {})
        assert self.reasons(score, normalize=False, dropout=0.3, softcap=2.0) == ("cpu", {})
        assert self.reasons(score, aggregation="max") == ("cpu", {})

    @pytest.mark.parametrize("score", ["dot", "dynamic"])
    def test_edge_features_run_on_the_kernels(self, score: str) -> None:
        features = [torch.ones(*shape, dtype=torch.float64) for shape in ((11, 2), (3, 4, 2), (3, 4, 2))]
        assert self.reasons(score, edges=EdgeFeatures(*features)) == ("cpu", {})

    def test_other_sizes_and_devices(self) -> None:
        shapes = [(5, 3, 0), (7, 3, 0), (7, 3, 4)]
        query, key, value = (torch.ones(*shape) for shape in shapes)
        graph = random_graph(5, 7, 11)
        found = explain(query, key, value, graph)
        assert found.implementation == "reference"
        assert dict(found.refusals) == {"cpu": "a size is 0"}
        meta = [torch.ones(rows, 3, 4, device="meta") for rows in (5, 7, 7)]
        found = explain(*meta, graph.to("meta"))
        assert found.implementation == "reference"
        assert "the query is on meta" in dict(found.refusals)["cpu"]

    def test_missing_kernels(self, native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("anyattention.native.available", lambda: False)
        assert self.reasons() == ("reference", {"cpu": "no kernels are compiled (see `anyattention info`)"})


@pytest.mark.parametrize("score", SCORES)
def test_third_derivatives(score: str) -> None:
    bias = torch.randn(7, 2, dtype=torch.float64)
    bias[3, 1] = -torch.inf
    arguments, leaves = arguments_of(random_graph(3, 4, 7), score, 2, 2, bias=bias)
    cotangent = torch.randn(3, 2, 2, dtype=torch.float64)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = arguments | dict(zip(("query", "key", "value"), tensors, strict=False))
        if score == "dynamic":
            given["score"] = Dynamic(tensors[3])
        output = attend(**given, implementation="cpu").output
        return torch.autograd.grad(output, tensors, cotangent, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, leaves, fast_mode=True)


class Layer(torch.nn.Module):
    """Attention whose weights are asked for, as a module for torch.export."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, graph: Graph) -> tuple[Tensor, ...]:
        result = attend(query, key, value, graph, bias=bias, return_weights="heads", return_logsumexp=True)
        assert result.weights is not None
        assert result.logsumexp is not None
        return result.output, result.weights, result.logsumexp.exp()


def layer_inputs(num_edges: int) -> tuple[Any, ...]:
    graph = random_graph(5, 7, num_edges)
    return torch.randn(5, 4, 3), torch.randn(7, 2, 3), torch.randn(7, 2, 3), torch.randn(num_edges, 4), graph


def test_exports_with_any_number_of_edges() -> None:
    inputs = layer_inputs(20)
    graph, num_edges = inputs[4], torch.export.Dim("num_edges", min=2)
    shapes = torch.export.ShapesCollection()
    shapes[inputs[3]] = {0: num_edges}
    shapes[graph.edge_index] = {1: num_edges}
    for array in (graph.keys_by_query, graph.edges_by_query, graph.queries_by_key, graph.edges_by_key):
        shapes[array] = {0: num_edges}
    program = torch.export.export(Layer(), inputs, dynamic_shapes=shapes)
    called = {str(node.target) for node in program.graph.nodes if "anyattention" in str(node.target)}
    assert called == {"anyattention.graph_attention.default", "anyattention.graph_attention_weights.default"}
    for size in (20, 2, 33):
        other = layer_inputs(size)
        torch.testing.assert_close(program.module()(*other), Layer()(*other))


def test_compiles_without_gradients() -> None:
    torch.compiler.reset()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    for size in (20, 33):
        inputs = layer_inputs(size)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(*inputs), Layer()(*inputs))
        torch.testing.assert_close(compiled(*inputs), Layer()(*inputs))
