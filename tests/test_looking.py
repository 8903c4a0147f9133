"""Weights of any pattern as a matrix, which implementation a module runs, and what an error about memory says."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattention
from anyattention import Causal, Documents, Fixed, Global, Graph, Strided, TopK, Window, attend, explain
from anyattention.errors import InvalidInputError, OutOfMemoryError, UnsupportedError
from anyattention.nn import GraphAttention, MultiHeadAttention, ScaledDotProductAttention, SparseAttention

BATCH, LENGTH, HEADS = 2, 7, 3
PATTERNS = [
    None,
    Causal(),
    Window(2, 1),
    Strided(2, 1) & Causal(),
    Fixed(3, 1),
    Global(1) | Window(1, 1),
    Documents((3, 4)),
    Graph.from_adjacency(torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.4),
]


def rows() -> list[Tensor]:
    return [torch.randn(BATCH, LENGTH, HEADS, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def expected_weights(query: Tensor, key: Tensor, pattern: Any) -> Tensor:
    """By a softmax over all pairs; rows without any are 0."""
    scores = torch.einsum("blhd,bshd->bhls", query, key) / 2
    if pattern is not None:
        scores = scores.masked_fill(~pattern.to_dense(LENGTH, LENGTH), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("sinks", [False, True])
def test_weights_of_any_pattern_as_a_matrix(pattern: Any, implementation: Any, sinks: bool) -> None:
    query, key, value = rows()
    more: Any = {"implementation": implementation}
    if sinks:
        more["sinks"] = torch.full((HEADS,), -torch.inf, dtype=torch.float64)
    expected = expected_weights(query, key, pattern)
    by_head = attend(query, key, value, pattern, return_weights="heads", **more).to_dense()
    mean = attend(query, key, value, pattern, return_weights=True, **more).to_dense()
    torch.testing.assert_close(by_head, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean, expected.mean(1), rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(x, (query, key), cotangent) for x in (by_head, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("asked_for", [True, "heads"])
def test_those_of_a_selection(asked_for: Any) -> None:
    query, key, value = rows()
    result = attend(query, key, value, Causal() & TopK(3), return_weights=asked_for)
    scores = torch.einsum("blhd,bshd->bhls", query, key) / 2
    scores = scores.masked_fill(~Causal().to_dense(LENGTH, LENGTH), -torch.inf)
    least = scores.topk(3, -1).values[..., -1:]
    expected = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
    torch.testing.assert_close(result.to_dense(), expected, rtol=1e-10, atol=1e-10)


def test_a_selection_among_no_keys() -> None:
    keys = torch.randn(2, 0, 3, 4)
    result = attend(torch.randn(2, 5, 3, 4), keys, keys, TopK(3), return_weights=True)
    assert result.to_dense().shape == (2, 3, 5, 0)


def test_graphs_without_batch_and_edges_twice() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 2, 2, 0]]), num_queries=4, num_keys=3)
    query, key = torch.randn(4, 2, 5), torch.randn(3, 2, 5)
    for asked_for in (True, "heads"):
        result = attend(query, key, key, graph, return_weights=asked_for)
        found = result.to_dense()
        assert found.shape == ((4, 3) if asked_for is True else (2, 4, 3))
        expected = torch.zeros(4, 3)
        expected[1, 0] = expected[2, 1] = expected[0, 2] = 1.0
        torch.testing.assert_close(found, expected.expand_as(found))


def test_modules_look_the_same_way() -> None:
    x = torch.randn(2, LENGTH, 12)
    for module in (
        MultiHeadAttention(12, 3, pattern=Window(1, 1)),
        ScaledDotProductAttention(12, 3, causal=True),
        SparseAttention(12, 3, sparsity_pattern="top_k", top_k=2),
        SparseAttention(12, 3, local_window=2),
    ):
        mean = module(x, return_weights=True).to_dense()
        heads = module(x, return_weights="heads").to_dense()
        assert (mean.shape, heads.shape) == ((2, LENGTH, LENGTH), (2, 3, LENGTH, LENGTH))
        torch.testing.assert_close(heads.mean(1), mean)
        torch.testing.assert_close(mean.sum(-1), torch.ones(2, LENGTH))
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 2]])
    found = GraphAttention(12, 3).graph_forward(x[0], edge_index).to_dense()
    assert found.shape[-2:] == (LENGTH, LENGTH)
    assert set(map(tuple, found.nonzero()[:, -2:].tolist())) == {(1, 0), (2, 1), (2, 2)}


def test_weights_that_were_not_returned_say_so() -> None:
    query, key, value = rows()
    with pytest.raises(InvalidInputError, match=r"^weights: expected weights, got None. ask for them: return_weights="):
        attend(query, key, value, Window(1, 1)).to_dense()
    result = attend(query, key, value, Window(1, 1), return_weights=True)
    copies = [result._replace(weights=x) for x in (result.weights.detach(), result.weights.clone())]
    for other in copies:
        with pytest.raises(InvalidInputError, match=r"^weights: expected the very tensor that was returned"):
            other.to_dense()


def test_a_matrix_that_does_not_fit_in_memory() -> None:
    length = 3_000_000
    x = torch.zeros(1, length, 1, 1)
    result = attend(x, x, x, Window(1, 0), return_weights=True)
    with pytest.raises(OutOfMemoryError, match=r"the matrix of all pairs' weights would take .* GiB"):
        result.to_dense()


def test_weights_that_do_not_fit_in_memory_name_what_spares_them() -> None:
    x = torch.zeros(1, 3_000_000, 1, 1)
    with pytest.raises(OutOfMemoryError, match=r"would take .* GiB.*return_weights=False spares the weights$"):
        attend(x, x, x, return_weights=True)
    module = MultiHeadAttention(1, 1)
    with pytest.raises(OutOfMemoryError, match=r"return_weights=False spares the weights$"):
        module(x[..., 0])


def test_an_allocator_that_fails_names_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")

    query, key, value = rows()
    monkeypatch.setattr(sys.modules["anyattention.ops.attend"], "_run", fails)
    with pytest.raises(OutOfMemoryError, match=r"memory ran out: .*4096 bytes. return_weights=False spares") as caught:
        attend(query, key, value, return_weights=True)
    assert caught.value.size == 4096
    with pytest.raises(OutOfMemoryError, match=r"memory ran out: .*4096 bytes$"):
        attend(query, key, value)


def test_explain_takes_a_module_and_its_arguments() -> None:
    x = torch.randn(2, LENGTH, 12)
    for module in (MultiHeadAttention(12, 3), ScaledDotProductAttention(12, 3), SparseAttention(12, 3)):
        assert explain(module, x).implementation == "cpu"  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert module.explain_forward(x, mask=torch.ones(LENGTH, dtype=torch.bool)).implementation == "cpu"
    module = MultiHeadAttention(12, 3, pattern=Window(1, 1), implementation="reference")
    assert explain(module, x).implementation == "reference"
    with pytest.raises(
        InvalidInputError, match=r"^query: expected a torch.Tensor, or a module that has explain_forward"
    ):
        explain(torch.nn.Linear(2, 2), x)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_a_module_hands_on_the_implementation() -> None:
    x = torch.randn(2, LENGTH, 12)
    cpu, reference = (MultiHeadAttention(12, 3, implementation=name) for name in ("cpu", "reference"))
    reference.load_state_dict(cpu.state_dict())
    torch.testing.assert_close(cpu.eval()(x).output, reference.eval()(x).output)
    with pytest.raises(UnsupportedError):
        MultiHeadAttention(12, 3, implementation="cpu").to("meta")(x.to("meta"))
    with pytest.raises(InvalidInputError, match=r"^implementation: "):
        MultiHeadAttention(12, 3, implementation="fast")(x)


@pytest.mark.parametrize("cap", [1.0, 30.0])
@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention, SparseAttention])
def test_softcap_bounds_the_scores(kind: Any, cap: float) -> None:
    x = 3 * torch.randn(2, LENGTH, 12)
    module = kind(12, 3, softcap=cap).eval()
    seen: list[Any] = []
    attend_with = anyattention.nn.projected.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyattention.nn.projected, "attend", lambda **given: seen.append(given) or attend_with(**given))
        output = module(x).output
    (given,) = seen
    scores = cap * torch.tanh(torch.einsum("blhd,bshd->bhls", given["query"], given["key"]) / 2 / cap)
    heads = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), given["value"]).flatten(-2)
    expected = heads if kind is ScaledDotProductAttention else module.output_projection(heads)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
