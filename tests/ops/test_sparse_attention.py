"""`attend` over sparse patterns: dense attention under the pattern's matrix, in float64, is the oracle."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import (
    Additive,
    Blocks,
    Causal,
    Documents,
    Dot,
    Dynamic,
    EdgeFeatures,
    Fixed,
    Full,
    Global,
    Graph,
    Pattern,
    RandomBlocks,
    RelativeBias,
    Strided,
    TopK,
    Window,
    attend,
    explain,
    native,
)
from anyattention.errors import (
    DimensionMismatchError,
    InvalidInputError,
    InvalidMaskError,
    UnsupportedError,
)
from anyattention.output import AttentionResult

Inputs = tuple[Tensor, Tensor, Tensor]  # query, key, value

_HEADS, _HEAD_DIM, _VALUE_DIM = 3, 5, 2
_BLOCKS = torch.tensor([[True, False, True, False], [False, False, False, False], [True, True, False, True]])

# Between them: rows of every kind, queries without keys, steps, runs, two lengths and both corners.
_PATTERNS: list[tuple[Pattern, int, int]] = [
    (Window(2, 1), 7, 7),
    (Window(1, 0, "bottom_right"), 4, 9),
    (Window(0, 1, "top_left"), 9, 4),
    (Strided(3, 1), 7, 7),
    (Strided(2, 0) & Causal(), 8, 8),
    (Fixed(3, 1) & Causal(), 8, 8),
    (Global((2, 5)), 7, 7),
    (RandomBlocks(1, seed=4, size=2), 7, 6),
    (Documents((3, 0, 4)), 7, 7),
    (Blocks(_BLOCKS, 3), 8, 11),
    (Window(1, 1) | Global(1) | RandomBlocks(1, size=2), 9, 9),
    (Documents((3, 4)) & Causal(), 7, 7),
    (Causal() & Full(), 5, 5),
    (Graph.from_edge_index(torch.tensor([[0, 3, 1], [2, 2, 0]]), num_nodes=4) | Window(0, 0), 4, 4),
    (Global(0), 3, 3),
    (Window(1, 1), 1, 1),
]

each_pattern = pytest.mark.parametrize(
    ("pattern", "num_queries", "num_keys"), _PATTERNS, ids=[str(pattern) for pattern, _, _ in _PATTERNS]
)


def leaves(num_queries: int, num_keys: int, batch: int = 2, key_heads: int = _HEADS) -> Inputs:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True)

    key = leaf(num_keys, key_heads, _HEAD_DIM)
    return leaf(num_queries, _HEADS, _HEAD_DIM), key, leaf(num_keys, key_heads, _VALUE_DIM)


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    query, key, value = (each.detach().to(dtype) for each in inputs)
    return query, key, value


def spoiled(inputs: Inputs, place: int, number: float) -> Inputs:
    """Leaves with another key and value at one place."""
    query, key, value = (each.detach().clone() for each in inputs)
    key[:, place], value[:, place] = number, number
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def both(inputs: Inputs, pattern: Pattern, mask: Tensor | None = None, **settings: Any) -> list[AttentionResult]:
    """The result over the pattern, and of dense attention with the pattern as a mask."""
    query, key, value = inputs
    pairs = pattern.to_dense(query.shape[1], key.shape[1])
    settings |= {"return_weights": "heads", "return_logsumexp": True}
    sparse = attend(query, key, value, pattern, mask=mask, **settings)
    repeats = query.shape[2] // key.shape[2]
    key, value = (each.repeat_interleave(repeats, 2) for each in (key, value))
    settings |= {"implementation": "reference"}
    dense = attend(query, key, value, mask=pairs if mask is None else pairs & mask, **settings)
    return [sparse, dense]


def at_pairs(weights: Tensor, pattern: Pattern) -> Tensor:
    """Dense weights `(batch, heads, queries, keys)` as `(batch, edges, heads)`."""
    graph = pattern.to_graph(weights.shape[2], weights.shape[3])
    return weights[:, :, graph.query_index, graph.key_index].transpose(1, 2)


def loss(result: AttentionResult, weights: Tensor) -> Tensor:
    """A random combination of the output, the weights and the finite logsumexp."""
    assert result.logsumexp is not None
    logsumexp = torch.where(result.logsumexp > -torch.inf, result.logsumexp, 0.0)
    total = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    for part in (result.output, logsumexp, weights):
        total = total + (part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum()
    return total


def require_equal(inputs: Inputs, pattern: Pattern, mask: Tensor | None = None, **settings: Any) -> None:
    """Output, logsumexp, weights and gradients of each implementation; settings' tensors are differentiated too."""
    kernels = ("cpu", "graph") if native.available() else ()
    for implementation in (*kernels, "reference"):
        if implementation == "cpu" and not isinstance(settings.get("score", Dot()), Dot):
            continue
        sparse, dense = both(inputs, pattern, mask, implementation=implementation, **settings)
        torch.testing.assert_close(sparse.output, dense.output)
        torch.testing.assert_close(sparse.logsumexp, dense.logsumexp)
        assert sparse.weights is not None
        assert dense.weights is not None
        expected = at_pairs(dense.weights, pattern)
        torch.testing.assert_close(sparse.weights, expected)
        numbers = [x.numbers if isinstance(x, RelativeBias) else x for x in settings.values()]
        wanted = [*inputs, *(x for x in numbers if isinstance(x, Tensor) and x.requires_grad)]
        found = torch.autograd.grad(loss(sparse, sparse.weights), wanted)
        torch.testing.assert_close(found, torch.autograd.grad(loss(dense, expected), wanted))


@each_pattern
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_dense_attention_under_a_mask(pattern: Pattern, num_queries: int, num_keys: int, batch: int) -> None:
    inputs = leaves(num_queries, num_keys, batch)
    assert explain(*inputs, pattern).implementation == ("cpu" if native.available() else "reference")
    require_equal(inputs, pattern)
    mean = attend(*inputs, pattern, return_weights="mean").weights
    assert mean is not None
    heads = attend(*inputs, pattern, return_weights="heads").weights
    assert heads is not None
    torch.testing.assert_close(mean, heads.mean(-1))


@pytest.mark.parametrize("implementation", ["cpu", "graph", "reference"])
def test_every_implementation_may_be_forced(native, implementation: str) -> None:
    pattern, inputs = Window(2, 1) | Global(1), leaves(7, 7)
    forced = attend(*inputs, pattern, implementation=implementation).output
    torch.testing.assert_close(forced, both(inputs, pattern)[1].output)
    assert explain(*inputs, pattern, implementation=implementation).implementation == implementation


@pytest.mark.parametrize("score", [Dot(), Additive(0.1), "dynamic"], ids=str)
@pytest.mark.parametrize("settings", [{"scale": 0.7}, {"softcap": 1.5}], ids=str)
def test_scores_and_settings(score: Any, settings: dict[str, Any]) -> None:
    pattern, inputs = Strided(3, 1) & Causal(), leaves(7, 7)
    if score == "dynamic":
        score = Dynamic(torch.randn(_HEADS, _HEAD_DIM, dtype=torch.float64))
    if isinstance(score, Additive):
        query, key, value = inputs
        inputs = query[..., :1].detach().requires_grad_(), key[..., :1].detach().requires_grad_(), value
    require_equal(inputs, pattern, score=score, **settings)


@pytest.mark.parametrize(
    "shape",
    [(9,), (7, 9), (7, 1), (1, 9), (2, 1, 1, 9), (1, 3, 7, 9), (2, 3, 7, 9), (2, 3, 1, 1), (1, 1, 1, 1), (2, 1, 7, 1)],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_and_biases_broadcast(shape: tuple[int, ...], batch: int) -> None:
    if len(shape) == 4:
        shape = (min(shape[0], batch), *shape[1:])
    pattern, inputs = Window(2, 3, "bottom_right") | Global(1, "bottom_right"), leaves(7, 9, batch)
    mask = torch.rand(shape) < 0.7
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    require_equal(inputs, pattern, mask)
    require_equal(inputs, pattern, bias=bias)
    require_equal(inputs, pattern, mask, bias=bias)


@each_pattern
@pytest.mark.parametrize("heads", [1, _HEADS])
def test_a_bias_by_distance(pattern: Pattern, num_queries: int, num_keys: int, heads: int) -> None:
    inputs, numbers = leaves(num_queries, num_keys), torch.randn(heads, 5, dtype=torch.float64, requires_grad=True)
    for first, align in ((-2, "top_left"), (-3, "bottom_right")):
        bias = RelativeBias(numbers, first, align)
        require_equal(inputs, pattern, torch.rand(num_keys) < 0.8, bias=bias, softcap=2.0)


def test_second_derivatives_by_a_bias_by_distance() -> None:
    inputs, numbers = leaves(4, 4, batch=1), torch.randn(_HEADS, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 4) < 0.8

    def run(query: Tensor, key: Tensor, value: Tensor, numbers: Tensor) -> Tensor:
        bias = RelativeBias(numbers, -2)
        return attend(query, key, value, Window(2, 1), mask=mask, bias=bias, softcap=3.0).output

    assert torch.autograd.gradcheck(run, (*inputs, numbers))
    assert torch.autograd.gradgradcheck(run, (*inputs, numbers))


def test_a_bias_of_minus_infinity_hides_a_pair() -> None:
    pattern, inputs = Window(2, 2), leaves(7, 7)
    mask = torch.rand(7, 7) < 0.6
    hidden = attend(*inputs, pattern, bias=torch.zeros(7, 7, dtype=torch.float64).masked_fill(~mask, -torch.inf))
    torch.testing.assert_close(hidden.output, attend(*inputs, pattern, mask=mask).output)


@pytest.mark.parametrize("key_heads", [1, 3])
def test_fewer_key_heads(key_heads: int) -> None:
    require_equal(leaves(7, 7, key_heads=key_heads), Window(2, 1) | Global(2))


@pytest.mark.parametrize(
    "pattern",
    [Window(1, 0) | Global(1), pytest.param(Documents((2, 0, 3)) & Causal(), marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_derivatives_to_the_second_order(pattern: Pattern) -> None:
    inputs = leaves(5, 5, batch=1)

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = attend(query, key, value, pattern, return_weights="heads", return_logsumexp=True)
        assert result.weights is not None
        assert result.logsumexp is not None
        return result.output, result.weights, result.logsumexp

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_second_derivatives_equal_those_of_dense_attention() -> None:
    pattern, inputs = Strided(2, 1) & Causal(), leaves(7, 7)
    found = []
    for result in both(inputs, pattern):
        gradients = torch.autograd.grad(loss(result, torch.zeros(1)), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum((each**2).sum() for each in gradients), inputs))  # pyright: ignore
    torch.testing.assert_close(found[0], found[1])


# Promises


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_hidden_key_does_not_leak(number: float) -> None:
    """Key 6 is seen by the queries 5 to 7 alone; for the others it is not there."""
    pattern, inputs = Window(1, 1), leaves(9, 9)
    expected = attend(*inputs, pattern).output
    broken = spoiled(inputs, 6, number)
    output = attend(*broken, pattern).output
    others = [0, 1, 2, 3, 4, 8]
    assert torch.equal(output[:, others], expected[:, others])
    assert output[:, 5:8].isnan().any(-1).all()
    by_query, *by_keys = torch.autograd.grad(output[:, others].square().sum(), broken)
    assert by_query[:, others].isfinite().all()
    for gradient in by_keys:
        assert gradient[:, :4].isfinite().all()
        assert gradient[:, :4].abs().min() > 0


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_key_that_is_masked_for_all_does_not_leak(number: float) -> None:
    pattern, inputs, mask = Window(1, 1), leaves(9, 9), torch.arange(9) != 6
    expected = attend(*inputs, pattern, mask=mask).output
    broken = spoiled(inputs, 6, number)
    output = attend(*broken, pattern, mask=mask).output
    assert torch.equal(output, expected)
    cotangent = torch.randn_like(output)
    found = torch.autograd.grad(output, broken, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    assert all(map(torch.equal, found, wanted))


def test_a_query_without_keys_gets_zero() -> None:
    pattern, inputs = Blocks(_BLOCKS, 3), leaves(8, 11)
    result = attend(*inputs, pattern, return_logsumexp=True)
    assert result.logsumexp is not None
    assert (result.output[:, 3:6] == 0).all()
    assert (result.logsumexp[:, 3:6] == -torch.inf).all()
    assert result.output[:, :3].abs().min() > 0
    gradients = torch.autograd.grad(result.output[:, 3:6].sum(), inputs)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 0), (0, 3), (3, 0)])
def test_empty_sequences(num_queries: int, num_keys: int) -> None:
    inputs = leaves(num_queries, num_keys)
    result = attend(*inputs, Window(1, 1, "top_left"), return_weights="heads", return_logsumexp=True)
    assert result.output.shape == (2, num_queries, _HEADS, _VALUE_DIM)
    assert (result.output == 0).all()
    assert result.weights is not None
    assert result.weights.shape == (2, 0, _HEADS)


@pytest.mark.parametrize(
    ("pattern", "length", "masked"),
    [
        (Window(3, 2), 9, False),
        (Window(70, 3) | Global((0, 150)), 200, True),
        (Documents((130, 0, 71)) & Causal(), 201, False),
    ],
    ids=str,
)
def test_dropout_is_that_of_the_graph(pattern: Pattern, length: int, masked: bool) -> None:
    """The same pairs are dropped, in the derivatives too, and beyond one tile of keys."""
    mask = torch.rand(length) < 0.8 if masked else None
    inputs, found = leaves(length, length), []
    bias = RelativeBias(torch.randn(_HEADS, 9, dtype=torch.float64, requires_grad=True), -4)
    graph = pattern.to_graph(length, length)
    at_edges = bias.at(graph.query_index, graph.key_index, length, length).T
    for each in (pattern, graph):
        given = {"bias": bias, "mask": mask}
        if each is graph:
            given = {"bias": at_edges, "mask": None if mask is None else mask[graph.key_index]}
        torch.manual_seed(7)
        output = attend(*inputs, each, dropout=0.4, **given).output
        wanted = [*inputs, bias.numbers]
        generator = torch.Generator().manual_seed(5)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        first = torch.autograd.grad(output, wanted, cotangent, retain_graph=True)
        again = torch.autograd.grad(output, wanted, cotangent, create_graph=True)
        second = torch.autograd.grad(sum((x**2).sum() for x in again), wanted)  # pyright: ignore
        found.append([output, *first, *again, *second])
    torch.testing.assert_close(found[0], found[1])
    assert explain(*inputs, pattern, dropout=0.4).implementation == explain(*inputs, pattern).implementation
    assert not torch.equal(found[0][0], attend(*inputs, pattern).output)


def test_same_bits_as_the_graph_of_the_pairs() -> None:
    for pattern, num_queries, num_keys in _PATTERNS:
        inputs = leaves(num_queries, num_keys)
        graph = pattern.to_graph(num_queries, num_keys)
        over_edges = attend(*inputs, pattern, implementation="graph" if native.available() else "reference").output
        assert torch.equal(over_edges, attend(*inputs, graph).output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    inputs = converted(leaves(9, 9), dtype)
    output = attend(*inputs, Window(2, 2)).output
    assert output.dtype == dtype
    exact = attend(*converted(inputs, torch.float64), Window(2, 2)).output
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=tolerance)


def test_autocast() -> None:
    inputs = converted(leaves(9, 9), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attend(*inputs, Window(2, 2)).output
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), attend(*inputs, Window(2, 2)).output, atol=3e-2, rtol=3e-2)


def test_inference_mode_leaves_nothing_behind() -> None:
    pattern, inputs = Window(2, 2) | Global(3), leaves(11, 11)
    with torch.inference_mode():
        attend(*inputs, pattern)
    require_equal(inputs, pattern)


# Explanations and refusals


def test_explain_names_the_kernels_and_the_edges(native) -> None:
    inputs, pattern = leaves(7, 7), Window(1, 0)
    explanation = explain(*inputs, pattern, score=Dynamic(torch.zeros(_HEADS, _HEAD_DIM, dtype=torch.float64)))
    assert explanation.implementation == "graph"
    assert explanation.notes == (f"{pattern} as a Graph of 13 edges",)
    assert (
        str(explanation)
        == f"runs: graph\nnot cpu: tiles are products, and the score is Dynamic\n{pattern} as a Graph of 13 edges"
    )


_X = torch.ones(2, 5, 3, 7)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"edges": EdgeFeatures(torch.ones(13, 2))},
            InvalidInputError,
            "edges: expected None with the pattern Window, got EdgeFeatures",
        ),
        (
            {"mask": torch.ones(2, 5, 5, dtype=torch.bool)},
            InvalidMaskError,
            r"mask: expected rank 1, 2 or 4, got rank 3, \(2, 5, 5\)",
        ),
        ({"mask": torch.ones(5, 5)}, InvalidMaskError, "mask: expected a torch.bool tensor.*got torch.float32"),
        ({"mask": torch.ones(13, dtype=torch.bool)}, InvalidMaskError, r"mask: expected a shape that broadcasts"),
        ({"mask": torch.ones(5, dtype=torch.bool, device="meta")}, InvalidInputError, "mask: expected device cpu"),
        ({"bias": torch.ones(2, 5, 5)}, DimensionMismatchError, "bias: expected rank 1, 2 or 4, got rank 3"),
        ({"bias": torch.ones(13)}, DimensionMismatchError, "bias: expected a shape that broadcasts"),
        ({"aggregation": "mean"}, UnsupportedError, "aggregation='mean'.*the pattern Window has only .*'sum'"),
        ({"normalize": False}, UnsupportedError, "normalize=False: the pattern Window has only .*normalize=True"),
        (
            {"implementation": "torch"},
            InvalidInputError,
            "implementation: expected one of 'cpu', 'graph', 'reference', got",
        ),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else None,
)
def test_refusals(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    for call in (attend, explain):
        with pytest.raises(error, match=match):
            call(_X, _X, _X, Window(1, 1), **settings)


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ([(5, 3, 7)] * 3, r"query: expected \(batch, query_length, heads, head_dim\), got \(5, 3, 7\)"),
        ([(2, 5, 3, 7), (1, 5, 3, 7), (2, 5, 3, 7)], r"key: expected \(batch=2, .*got \(1, 5, 3, 7\)"),
        (
            [(2, 5, 3, 7), (2, 5, 2, 7), (2, 5, 2, 7)],
            r"key: expected a number of key_heads that divides heads=3, got \(2, 5, 2, 7\)",
        ),
        ([(2, 5, 3, 7), (2, 5, 3, 7), (2, 4, 3, 7)], r"value: expected \(batch=2, key_length=5, .*got \(2, 4, 3, 7\)"),
        ([(2, 4, 3, 7), (2, 5, 3, 7), (2, 5, 3, 7)], "Window: expected as many queries as keys, or an alignment"),
    ],
)
def test_shapes_that_do_not_fit(shapes: list[tuple[int, ...]], match: str) -> None:
    query, key, value = map(torch.ones, shapes)
    with pytest.raises(DimensionMismatchError, match=match):
        attend(query, key, value, Window(1, 1))


def test_one_dtype_for_all() -> None:
    with pytest.raises(InvalidInputError, match=r"key: expected torch\.float32, as query, got torch\.float64"):
        attend(_X, _X.double(), _X, Window(1, 1))


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_weights_of_large_scores_and_of_padding(native, size: float) -> None:
    """Far below zero a hidden pair's exponential overflows, and a rounded logsumexp is far from what it is of."""
    query, key, value = converted(leaves(7, 7), torch.float32)
    inputs = (-size * query.abs()).requires_grad_(), (size * key.abs()).requires_grad_(), value.requires_grad_()
    mask = torch.arange(7) < 5
    result = attend(*inputs, Window(2, 2), mask=mask, return_weights="heads", implementation="cpu")
    exact = attend(*converted(inputs, torch.float64), Window(2, 2), mask=mask, return_weights="heads")
    assert result.weights is not None
    assert exact.weights is not None
    torch.testing.assert_close(result.weights.double(), exact.weights, rtol=0, atol=1e-3)
    gradients = torch.autograd.grad(result.weights.square().sum(), inputs[:2])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("cap", [0.3, 50.0, 1e4, 1e8])
def test_softcaps_of_every_size(native, cap: float) -> None:
    inputs = converted(leaves(40, 40), torch.float32)
    exact = converted(inputs, torch.float64)
    for each in (*inputs, *exact):
        each.requires_grad_()
    found = []
    for rows in (inputs, exact):
        output = attend(*rows, Window(9, 9), softcap=cap, implementation="cpu").output
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        found.append([x.double() for x in (output, *torch.autograd.grad(output, rows, cotangent))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=2e-6)
    scores = torch.einsum("blhd,bshd->bhls", exact[0], exact[1]) / _HEAD_DIM**0.5
    capped = (cap * torch.tanh(scores / cap)).masked_fill(~Window(9, 9).to_dense(40, 40), -torch.inf)
    torch.testing.assert_close(found[1][0], torch.einsum("bhls,bshe->blhe", capped.softmax(-1), exact[2]))


@pytest.mark.parametrize("implementation", ["cpu", "graph", "reference"])
def test_no_batch_entry_with_a_mask_or_a_bias(native, implementation: str) -> None:
    rows = torch.ones(0, 5, 2, 3, requires_grad=True)
    given = {"mask": torch.ones(0, 1, 5, 5, dtype=torch.bool), "bias": torch.ones(0, 2, 5, 5)}
    found = attend(rows, rows, rows, Window(1, 1), return_weights=True, implementation=implementation, **given)
    assert (found.output.shape, found.weights.shape) == ((0, 5, 2, 3), (0, 13))
    assert torch.autograd.grad(found.output.sum(), rows)[0].shape == (0, 5, 2, 3)


def test_no_length_with_a_mask_or_a_bias() -> None:
    for num_queries, num_keys in ((0, 0), (0, 3), (3, 0)):
        inputs = leaves(num_queries, num_keys)
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool)
        for pattern in (Window(1, 1, "top_left"), TopK(2)):
            for settings in ({"mask": mask}, {"bias": mask.double()}):
                result = attend(*inputs, pattern, return_weights="heads", **settings)
                assert result.output.shape == (2, num_queries, _HEADS, _VALUE_DIM)
                assert (result.output == 0).all()


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(2, 1), TopK(3), Window(1, 1).to_graph(7, 7)], ids=str)
def test_forward_derivatives_are_those_of_the_reference(pattern: Any) -> None:
    inputs = tuple(x.detach() for x in leaves(7, 7))
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def run(*rows: Tensor) -> Tensor:
        return attend(*rows, pattern).output

    _, found = torch.func.jvp(run, inputs, tangents)
    step = 1e-6
    ahead, behind = (run(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (step, -step))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
