"""A constant added to all scores of a row changes nothing but by the rounding of the scores.

The oracle takes the scores as they are rounded into float64, and differentiates as if they were exact. Products are of
multiples of 1/2, so that raw scores are exact in any order of summation: each implementation rounds to the same scores.

Axes: B batch, one entry for each constant; L queries, S keys, H heads, D head_dim, E pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import (
    Additive,
    Causal,
    Dot,
    Dynamic,
    Fixed,
    Graph,
    RelativeBias,
    Strided,
    TopK,
    Window,
    attend,
    edge_softmax,
    explain,
    merge,
)
from anyattention.errors import UnsupportedError
from oracle import pairs_of

pytestmark = pytest.mark.usefixtures("native")

_SINGLE = (0.0, 30.0, -1e4, 1e6, -1e6, 1e8, -1e9, 1e9, 3e38, -3e38, torch.finfo(torch.float32).min)
_DOUBLE = (0.0, -1e6, 1e12, -1e17, 1e17, 1e300, -1e300)
_HEADS, _WIDTH, _SLOPE = 2, 4, 0.25
_OFFSETS = {torch.float32: _SINGLE, torch.float64: _DOUBLE}
_GRAPH_SCORES = ("dot", "additive", "dynamic")


@dataclass(frozen=True)
class Rows:
    """Rows whose scores share a constant in each batch entry.

    Attributes:
        pattern: who attends to whom.
        score: "dot", "additive" or "dynamic".
        tensors: query, key, value and bias, which is `(B, 1, 1, S)`; the vector too, where there is one.
    """

    pattern: Any
    score: str
    tensors: dict[str, Tensor]

    @property
    def lengths(self) -> tuple[int, int]:
        return self.tensors["query"].shape[1], self.tensors["key"].shape[1]

    def arguments(self, implementation: str | None, **asked: Any) -> dict[str, Any]:
        """The arguments of `attend`, with new leaves by their names."""
        leaves = {name: x.clone().requires_grad_() for name, x in self.tensors.items()}
        bias = leaves["bias"]
        if isinstance(self.pattern, Graph):
            bias = bias[:, 0, 0, :, None][:, self.pattern.key_index].expand(-1, -1, _HEADS)
        elif implementation == "torch":
            bias = bias.detach()
        score = Dot() if self.score == "dot" else Additive(_SLOPE)
        if self.score == "dynamic":
            score = Dynamic(leaves["vector"], _SLOPE)
        given = {name: leaves[name] for name in ("query", "key", "value")}
        given |= {"pattern": self.pattern, "bias": bias, "score": score}
        return given | {"implementation": implementation, "leaves": leaves} | asked


def rows(pattern: Any, num_queries: int, num_keys: int, *, equal: bool, score: str = "dot", **to: Any) -> Rows:
    """Scores that are equal but for the constant, or some units apart."""
    dtype = to.get("dtype", torch.float32)
    constants = torch.tensor(_OFFSETS[dtype], dtype=dtype)

    def halves(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape).to(dtype) / 2

    batch, width = len(constants), 1 if score == "additive" else _WIDTH
    query = halves(batch, num_queries, _HEADS, width)
    key = halves(batch, num_keys, _HEADS, width)
    bias = constants[:, None, None, None] + torch.zeros(num_keys, dtype=dtype)
    if equal:
        key = key[:, :1].expand(key.shape) if num_keys else key
    # About 1, so that little cancels in an output: a float32 sum of 100,000 terms rounds to a part of their sizes.
    value = 1 + torch.randn(batch, num_keys, _HEADS, 3, dtype=dtype)
    tensors = {"query": query, "key": key, "value": value, "bias": bias}
    if score == "dynamic":
        tensors["vector"] = halves(_HEADS, width)
    return Rows(pattern, score, tensors)


def oracle(
    given: Rows, chosen: Tensor | None = None, *, with_constants: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results by name, in float64, and the leaves that they are of; weights are those of the pairs `(B, E, H)`.

    `chosen` are the keys `(B, L, H, k)` of a selection, checked to have the largest scores.
    """
    dtype = given.tensors["query"].dtype
    leaves = {name: x.double().requires_grad_() for name, x in given.tensors.items()}
    query, key, value = (leaves[name].transpose(1, 2) for name in ("query", "key", "value"))
    if given.score == "dot":
        raw = query @ key.mT / _WIDTH**0.5
    else:
        total = query[..., :, None, :] + key[..., None, :, :]
        total = torch.where(total > 0, total, _SLOPE * total)
        raw = (total if given.score == "additive" else leaves["vector"][:, None, None] * total).sum(-1)
    scores = raw
    if with_constants:
        scores = raw + leaves["bias"]
        rounded = raw.to(dtype) + leaves["bias"].to(dtype)
        scores = scores + (rounded.double() - scores).detach()
    i, j = pairs_of(given.pattern, *given.lengths)
    allowed = torch.zeros(given.lengths, dtype=torch.bool).index_put((i, j), torch.tensor(True))
    if chosen is not None:
        places = torch.where(chosen < 0, given.lengths[1], chosen).transpose(1, 2)
        allowed = torch.zeros(*scores.shape[:3], given.lengths[1] + 1, dtype=torch.bool)
        allowed = allowed.scatter(3, places, torch.tensor(True).expand(places.shape))[..., :-1]
        assert (allowed.sum(-1) == min(given.pattern.k, given.lengths[1])).all()
        worst = torch.where(allowed, scores, torch.inf).amin(-1)
        assert (torch.where(allowed, -torch.inf, scores).amax(-1) <= worst).all()
    shown = torch.where(allowed, scores, -torch.inf)
    largest = shown.detach().amax(-1)
    weights = shown.softmax(-1)
    log_sum = (shown - largest[..., None]).logsumexp(-1)
    results = {"output": (weights @ value).transpose(1, 2), "largest": largest.transpose(1, 2)}
    results |= {"log_sum": log_sum.transpose(1, 2), "weights": weights[:, :, i, j].transpose(1, 2)}
    return results, leaves


def assert_close(found: Tensor, expected: Tensor, what: str, tolerance: float, size: int) -> None:
    """To a part of the largest number of the same batch entry, or of what cancels in it."""
    found, expected = found.double().nan_to_num(torch.inf), expected.detach()
    by_entry = expected.flatten(1).abs().amax(1) if expected.ndim > 1 else expected.abs().amax()
    error = (found - expected).flatten(1).abs().amax(1) if expected.ndim > 1 else (found - expected).abs().amax()
    assert (error <= tolerance * (by_entry + 0.1 / size)).all(), f"{what}: off by {error} beside {by_entry}"


def tolerance_of(implementation: str, dtype: torch.dtype, size: int) -> float:
    """What rounding explains of results; the reference's sums are PyTorch's: one term after the other, each rounded."""
    rounding = 3e-5 if dtype == torch.float32 else 1e-9
    return max(rounding, size * torch.finfo(dtype).eps / 2) if implementation == "reference" else rounding


def combination(results: Sequence[Tensor]) -> Tensor:
    """A random combination of results."""
    generator = torch.Generator().manual_seed(3)
    total: Any = 0.0
    for x in results:
        total = total + (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) * x).sum()
    return total


def check(given: Rows, implementation: str, *, weights: bool, second: bool) -> None:
    """Results and gradients against the oracle; second derivatives where they are cheap."""
    dtype, size = given.tensors["query"].dtype, given.lengths[1]
    tolerance = tolerance_of(implementation, dtype, size)
    arguments = given.arguments(implementation, return_logsumexp=True, return_weights="heads" if weights else False)
    leaves = arguments.pop("leaves")
    assert explain(**arguments).implementation == implementation
    result = attend(**arguments)
    # PyTorch's kernel gets the bias relative to its largest number, which the constants are not part of.
    expected, exact = oracle(given, result.indices, with_constants=implementation != "torch")
    largest, log_sum = result.normalizer
    found = {"output": result.output, "log_sum": log_sum}
    if weights:
        found["weights"] = at_pairs(result.weights, given, result.indices)
    if implementation == "torch":
        # It does not tell the largest score, but both together.
        expected["log_sum"] = expected["largest"] + expected["log_sum"]
        found["log_sum"] = (largest.double() - given.tensors["bias"][:, :, :, 0].double()) + log_sum.double()
    else:
        assert torch.equal(largest.double(), expected["largest"]), "largest"
    torch.testing.assert_close(result.logsumexp, largest + log_sum, rtol=0, atol=0)
    for name, x in found.items():
        assert_close(x, expected[name], name, tolerance, size)
    used = [name for name in leaves if arguments["bias"].requires_grad or name != "bias"]
    totals = [combination([each[name] for name in found]) for each in (found, expected)]
    first = [
        torch.autograd.grad(total, [of[name] for name in used], create_graph=second)
        for total, of in zip(totals, (leaves, exact), strict=True)
    ]
    for name, x, y in zip(used, *first, strict=True):
        assert_close(x, y, f"gradient of {name}", 10 * tolerance, size)
    if second:
        again = [
            torch.autograd.grad(combination(x), [of[name] for name in used], allow_unused=True, materialize_grads=True)
            for x, of in zip(first, (leaves, exact), strict=True)
        ]
        for name, x, y in zip(used, *again, strict=True):
            assert_close(x, y, f"second derivative by {name}", 100 * tolerance, size)


def at_pairs(weights: Tensor, given: Rows, indices: Tensor | None) -> Tensor:
    """The weights of the pairs `(B, E, H)`."""
    i, j = pairs_of(given.pattern, *given.lengths)
    if indices is not None:
        shape = (*indices.shape[:3], given.lengths[1])
        spread = weights.new_zeros(shape).scatter_add(3, indices.clamp(min=0), weights)
        return spread[:, i, :, j].movedim(0, 1)
    if weights.shape[-1] == _HEADS and weights.ndim == 3:
        return weights
    return weights[:, :, i, j].transpose(1, 2)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("num_keys", [1, 6, 700, pytest.param(100_000, marks=pytest.mark.exhaustive)])
class TestEveryKey:
    """Two queries that attend to all keys."""

    @pytest.mark.parametrize("implementation", ["cpu", "torch", "reference"])
    def test_dense(self, implementation: str, num_keys: int, equal: bool, dtype: torch.dtype) -> None:
        given = rows(None, 2, num_keys, equal=equal, dtype=dtype)
        check(given, implementation, weights=implementation == "reference", second=num_keys < 100)

    @pytest.mark.parametrize("score", _GRAPH_SCORES)
    @pytest.mark.parametrize("implementation", ["cpu", "reference"])
    def test_graph(self, implementation: str, score: str, num_keys: int, equal: bool, dtype: torch.dtype) -> None:
        given = rows(Graph.all_pairs(2, num_keys), 2, num_keys, equal=equal, score=score, dtype=dtype)
        check(given, implementation, weights=True, second=num_keys < 100)
        # Without gradients a kernel of their own computes the weights.
        arguments = given.arguments(implementation, return_weights="heads")
        arguments.pop("leaves")
        with torch.no_grad():
            weights = attend(**arguments).weights
        tolerance = tolerance_of(implementation, dtype, num_keys)
        assert_close(weights, oracle(given)[0]["weights"], "weights", tolerance, num_keys)

    @pytest.mark.parametrize("implementation", ["cpu", "reference"])
    @pytest.mark.parametrize("k", [1, 5, 900])
    def test_topk(self, k: int, implementation: str, num_keys: int, equal: bool, dtype: torch.dtype) -> None:
        given = rows(TopK(k), 2, num_keys, equal=equal, dtype=dtype)
        if dtype == torch.float64 and implementation == "cpu":
            arguments = given.arguments(implementation)
            arguments.pop("leaves")
            with pytest.raises(UnsupportedError, match="float32"):
                attend(**arguments)
            return
        check(given, implementation, weights=True, second=num_keys < 100)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 60])
@pytest.mark.parametrize("pattern", [Window(3, 2), Strided(4, 3), Fixed(5, 2), Strided(3, 2) & Causal()], ids=repr)
@pytest.mark.parametrize("implementation", ["cpu", "graph", "reference"])
def test_patterns(implementation: str, pattern: Any, length: int, equal: bool, dtype: torch.dtype) -> None:
    given = rows(pattern, length, length, equal=equal, dtype=dtype)
    check(given, implementation, weights=True, second=length < 100)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("implementation", ["cpu", "torch", "reference"])
def test_causal(implementation: str, equal: bool) -> None:
    check(rows(Causal(), 150, 150, equal=equal), implementation, weights=implementation == "reference", second=False)


@pytest.mark.parametrize("constant", _SINGLE)
@pytest.mark.parametrize("pattern", [Window(3, 2), Strided(4, 3)], ids=repr)
def test_relative_bias(pattern: Any, constant: float) -> None:
    inputs = [x[:1] for x in rows(pattern, 60, 60, equal=False).tensors.values()][:3]
    numbers = torch.full((_HEADS, 5), constant)
    found = []
    for implementation in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in (*inputs, numbers)]
        bias = RelativeBias(leaves[3], first=-2)
        result = attend(*leaves[:3], pattern, bias=bias, return_logsumexp=True, implementation=implementation)
        assert result.normalizer is not None
        first = torch.autograd.grad(combination([result.output, result.normalizer[1]]), leaves, create_graph=True)
        second = torch.autograd.grad(combination(first), leaves, materialize_grads=True)
        found.append([result.output, *result.normalizer, *first, *second])
    for n, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert_close(ours.flatten(), theirs.double().flatten(), f"result {n}", 1e-3, 1)


@pytest.mark.parametrize("implementation", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("sizes", [[7], [2, 5], [1, 0, 3, 3]])
@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_merge(implementation: str, sizes: list[int], apart: float) -> None:
    """Parts whose scores share a constant, and parts whose constants differ by a rounding step."""
    given = rows(None, 3, 7, equal=False)
    if apart and implementation != "torch":
        given.tensors["bias"][..., 3:] += given.tensors["bias"][..., 3:] * torch.finfo(torch.float32).eps * apart
        given.tensors["bias"].nan_to_num_()
    leaves = {name: x.clone().requires_grad_() for name, x in given.tensors.items()}
    expected, exact = oracle(given, with_constants=implementation != "torch")
    pieces = zip(*(leaves[name].split(sizes, dim=1) for name in ("key", "value")), strict=True)
    biases = leaves["bias"].detach().split(sizes, dim=-1)
    settings: dict[str, Any] = {"return_logsumexp": True}
    parts = [
        attend(leaves["query"], k, v, bias=b, implementation=implementation if k.shape[1] else "reference", **settings)
        for (k, v), b in zip(pieces, biases, strict=True)
    ]
    merged = merge([merge(parts[:1]), *parts[1:]])
    assert merged.normalizer is not None
    largest, log_sum = merged.normalizer
    results = [merged.output, log_sum]
    if implementation == "torch":
        expected["log_sum"] = expected["largest"] + expected["log_sum"]
        results[1] = (largest.double() - given.tensors["bias"][:, :, :, 0].double()) + log_sum.double()
    wanted = [expected["output"], expected["log_sum"]]
    for x, y in zip(results, wanted, strict=True):
        assert_close(x, y, "a result", 3e-5, 7)
    names = ["query", "key", "value"]
    first, second = [], []
    for each, of in ((results, leaves), (wanted, exact)):
        first.append(torch.autograd.grad(combination(each), [of[name] for name in names], create_graph=True))
        second.append(torch.autograd.grad(combination(first[-1]), [of[name] for name in names]))
    for x, y in zip(*first, strict=True):
        assert_close(x, y, "a gradient", 3e-4, 7)
    for x, y in zip(*second, strict=True):
        assert_close(x, y, "a second derivative", 3e-3, 7)


def test_parts_at_both_ends_of_the_range() -> None:
    query, key, value = torch.zeros(1, 2, 1, 4), torch.zeros(1, 6, 1, 4), torch.randn(1, 6, 1, 3)
    ends = (torch.finfo(torch.float32).max, torch.finfo(torch.float32).min)
    parts = [
        attend(query, key[:, :3], value[:, rows], bias=torch.full((2, 3), end), return_logsumexp=True)
        for rows, end in zip((slice(0, 3), slice(3, 6)), ends, strict=True)
    ]
    for order in (parts, parts[::-1]):
        merged = merge(order)
        torch.testing.assert_close(merged.output[0], value[0, :3].mean(0, keepdim=True).expand(2, 1, 3))
    assert (merge(parts[1:]).output == parts[1].output).all()


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_padding_at_the_least_number(implementation: str) -> None:
    """As Hugging Face masks it: padded keys get the least number, and whole rows of padding nothing else."""
    dtype, num_keys = torch.float32, 512
    mask = torch.zeros(2, 1, 4, num_keys)
    mask[0, :, :, 500:] = torch.finfo(dtype).min
    mask[1, :, 2:] = torch.finfo(dtype).min
    query, key = torch.randn(2, 4, 2, 8), torch.randn(2, num_keys, 2, 8)
    value = torch.randn(2, num_keys, 2, 8, requires_grad=True)
    output = attend(query, key, value, bias=mask, implementation=implementation).output
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(output.sum(), value, create_graph=create_graph, retain_graph=True)
        # The weights of each of 4 rows sum to 1 in each of 2 heads, over 8 channels.
        torch.testing.assert_close(found.sum((1, 2, 3)), torch.full((2,), 64.0))
    torch.testing.assert_close(output[1, 2:], value[1].mean(0).expand(2, 2, 8))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("num_keys", [1, 6, 5000])
def test_edge_softmax(implementation: str, num_keys: int) -> None:
    graph = Graph.all_pairs(2, num_keys)
    constants = torch.tensor(_SINGLE)[:, None, None]
    scores = (torch.randint(-8, 9, (1, 2 * num_keys, 1)) / 8 + constants).requires_grad_()
    weights = edge_softmax(scores, graph, implementation=implementation)
    exact = scores.detach().double().requires_grad_()
    expected = exact.unflatten(1, (2, -1)).softmax(2).flatten(1, 2)
    assert_close(weights, expected, "weights", 5e-5, num_keys)
    (ours,), (theirs,) = (torch.autograd.grad(combination([w]), x) for w, x in ((weights, scores), (expected, exact)))
    assert_close(ours, theirs, "gradient", 1e-4, num_keys)


def test_a_row_without_keys() -> None:
    """Output 0, a logarithm of 0 beside a largest score of -inf, and no gradient."""
    query, key = torch.randn(2, 3, 2, 4, requires_grad=True), torch.randn(2, 5, 2, 4, requires_grad=True)
    mask = torch.tensor([True, False, True])[:, None].expand(3, 5)
    graph = Graph.all_pairs(3, 5)
    cases = [(None, mask, name) for name in ("cpu", "torch", "reference")]
    cases += [(Window(9, 9, "top_left"), mask, name) for name in ("cpu", "graph", "reference")]
    cases += [(graph, mask.flatten(), name) for name in ("cpu", "reference")]
    cases += [(TopK(2), mask, name) for name in ("cpu", "reference")]
    for pattern, shown, implementation in cases:
        result = attend(query, key, key, pattern, mask=shown, return_logsumexp=True, implementation=implementation)
        assert result.normalizer is not None
        largest, log_sum = result.normalizer
        assert not largest.requires_grad
        assert (largest[:, 1] == -torch.inf).all()
        assert (log_sum[:, 1] == 0).all()
        assert (result.logsumexp[:, 1] == -torch.inf).all()  # pyright: ignore[reportOptionalSubscript]
        assert (result.output[:, 1] == 0).all()
        for create_graph in (False, True):
            (found,) = torch.autograd.grad(
                combination([result.output, log_sum]), query, create_graph=create_graph, retain_graph=True
            )
            assert (found[:, 1] == 0).all()
            assert found.isfinite().all()


@pytest.mark.parametrize("width", [3, 8, 16])
@pytest.mark.parametrize("pattern", [None, Window(9, 9, "top_left"), Strided(4, 3, "top_left"), "graph", TopK(30)])
def test_products_that_share_a_constant(pattern: Any, width: int) -> None:
    """The constant may be the product itself, in whatever order it is summed up."""
    num_keys = 30
    pattern = Graph.all_pairs(2, num_keys) if pattern == "graph" else pattern
    for constant in (1e6, -1e8, 1e15):
        query = torch.ones(1, 2, _HEADS, width)
        key = torch.full((1, num_keys, _HEADS, width), constant, requires_grad=True)
        value = torch.randn(1, num_keys, _HEADS, width, requires_grad=True)
        settings = {"scale": 1.0, "implementation": "cpu"}
        output = attend(query, key, value, pattern, **settings).output
        for create_graph in (False, True):
            (found,) = torch.autograd.grad(output.sum(), value, create_graph=create_graph, retain_graph=True)
            torch.testing.assert_close(found.sum(), torch.tensor(2.0 * _HEADS * width))
        if isinstance(pattern, Graph):
            with torch.no_grad():
                weights = attend(query, key, value, pattern, return_weights="heads", **settings).weights
            torch.testing.assert_close(weights, torch.full((1, 2 * num_keys, _HEADS), 1 / num_keys))
