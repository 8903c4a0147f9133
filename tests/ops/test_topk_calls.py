"""Top-k attention's arguments: what is refused and why, and calls that are compiled, traced or transformed."""

import warnings
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from anyattention import Additive, Causal, Pattern, Strided, TopK, Window, attend, explain
from anyattention.errors import (
    IndexRangeError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    UnsupportedError,
)
from anyattention.native.compressed_rows import compressed_rows
from anyattention.ops.topk.operators import TopkIndices, topk_indices
from anyattention.patterns import Graph


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_k_is_at_least_1(k: Any) -> None:
    with pytest.raises(InvalidConfigError, match="k: expected an int >= 1"):
        TopK(k)


def test_bad_input() -> None:
    x = torch.ones(1, 3, 1, 1)
    with pytest.raises(InvalidConfigError, match="among: expected a pattern or None, got 3"):
        TopK(2, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="score=Additive: TopK chooses by Dot"):
        attend(x, x, x, TopK(2), score=Additive())
    with pytest.raises(UnsupportedError, match="the pattern TopK has only aggregation='sum'"):
        attend(x, x, x, TopK(2), aggregation="mean")
    with pytest.raises(InvalidMaskError, match="mask: expected rank 1, 2 or 4, got rank 3"):
        attend(x, x, x, TopK(2), mask=torch.ones(1, 3, 3, dtype=torch.bool))
    with pytest.raises(InvalidInputError, match="implementation: expected one of 'cpu', 'reference', got 'torch'"):
        attend(x, x, x, TopK(2), implementation="torch")


@pytest.mark.parametrize(
    ("reason", "sizes", "dtype", "pattern", "settings"),
    [
        ("there are no keys", (3, 0), torch.float32, TopK(2), {}),
        ("in float32, and the query is torch.float64", (3, 5), torch.float64, TopK(2), {}),
        ("several runs of keys", (5, 5), torch.float32, Strided(2, 0) & TopK(2), {}),
        ("with a bias it changes", (3, 5), torch.float32, TopK(2), {"bias": torch.zeros(5), "softcap": 2.0}),
    ],
)
def test_what_the_kernels_refuse(
    reason: str, sizes: tuple[int, int], dtype: torch.dtype, pattern: TopK, settings: Any, native: ModuleType
) -> None:
    query, key = (torch.randn(1, length, 2, 4, dtype=dtype) for length in sizes)
    explanation = explain(query, key, key, pattern, **settings)
    assert explanation.implementation == "reference"
    assert reason in str(explanation)
    with pytest.raises(UnsupportedError, match=reason):
        attend(query, key, key, pattern, implementation="cpu", **settings)
    assert attend(query, key, key, pattern, **settings).output.shape == query.shape


def test_the_kernel_refuses_what_does_not_fit(native: ModuleType) -> None:
    x, numbers = torch.ones(1, 3, 1, 2), torch.zeros(3, dtype=torch.int64)
    call = TopkIndices(x, x, None, None, None, None, 1.0, 2)
    with pytest.raises(InvalidInputError, match=r"key: expected torch\.float32 on cpu, \(batch=1, .*head_dim=2\), got"):
        topk_indices(replace(call, key=x.double()))
    with pytest.raises(InvalidInputError, match=r"query: expected torch\.float32, got torch\.float64"):
        topk_indices(replace(call, query=x.double(), key=x.double()))
    with pytest.raises(InvalidInputError, match=r"key_ends: expected torch\.int64 on cpu, \(num_queries=3\), got .*2"):
        topk_indices(replace(call, key_begins=numbers, key_ends=numbers[:2]))
    with pytest.raises(
        InvalidInputError, match=r"key_begins: expected torch\.int64 on cpu, .* got torch\.int32 on cpu"
    ):
        topk_indices(replace(call, key_begins=numbers.int(), key_ends=numbers))
    with pytest.raises(InvalidInputError, match=r"mask: expected torch\.bool on cpu"):
        topk_indices(replace(call, mask=torch.ones(1, 1, 1, 3)))
    with pytest.raises(InvalidInputError, match="topk_indices: invalid argument"):
        topk_indices(replace(call, key_begins=numbers))
    with pytest.raises(InvalidInputError, match="topk_indices: invalid argument"):
        topk_indices(replace(call, k=0))
    with pytest.raises(IndexRangeError, match="name a place that does not exist"):
        topk_indices(replace(call, key_begins=numbers, key_ends=numbers + 4))


def test_a_graph_of_rows_is_the_graph_of_its_edges(native: ModuleType) -> None:
    keys = torch.randint(7, (5, 3))
    graph = Graph.from_rows(keys, 7)
    edges = torch.stack([keys.flatten(), torch.arange(5).repeat_interleave(3)])
    expected = Graph.from_edge_index(edges, num_queries=5, num_keys=7)
    for name in ("edge_index", "query_offsets", "keys_by_query", "edges_by_query", "key_offsets", "queries_by_key"):
        assert torch.equal(getattr(graph, name), getattr(expected, name))


@pytest.mark.parametrize("among", [None, Causal("bottom_right")], ids=str)
def test_compiled_and_traced_calls(among: Pattern | None, native: ModuleType) -> None:
    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Any, Any]:
        result = attend(query, key, value, TopK(3, among), return_weights=True)
        return result.output, result.weights, result.indices

    inputs = [torch.randn(2, 7, 4, 5), torch.randn(2, 11, 2, 5), torch.randn(2, 11, 2, 5)]
    expected = call(*inputs)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
        exported = torch.export.export(_Module(call), tuple(inputs)).module()(*inputs)
    for actual in (compiled, exported):
        assert torch.equal(actual[2], expected[2])
        torch.testing.assert_close(actual[:2], expected[:2])
    with FakeTensorMode() as mode:
        fakes = call(*(mode.from_tensor(x) for x in inputs))
    assert [x.shape for x in fakes] == [x.shape for x in expected]
    mapped = torch.func.vmap(lambda query: call(query[None], inputs[1][:1], inputs[2][:1])[0])(inputs[0])
    torch.testing.assert_close(mapped[0], expected[0][:1])


def test_forward_derivatives_are_the_references(native: ModuleType) -> None:
    query, tangent = torch.randn(2, 1, 5, 2, 3)
    key = torch.randn(1, 7, 2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, tangent)
        assert "no forward derivatives" in str(explain(dual, key, key, TopK(3)))
        found = forward_ad.unpack_dual(attend(dual, key, key, TopK(3)).output).tangent
    _, expected = torch.func.jvp(lambda x: attend(x, key, key, TopK(3)).output, (query,), (tangent,))
    torch.testing.assert_close(found, expected)


class _Module(torch.nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.call(query, key, value)


def test_the_operator_is_registered_well(native: ModuleType, opcheck: Any) -> None:
    query, key = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 2, 3)
    bounds = (torch.zeros(5, dtype=torch.int64), torch.full((5,), 6))
    mask, bias = torch.rand(1, 1, 5, 7) < 0.5, torch.randn(2, 4, 1, 7)
    for arguments in ((None,) * 4, (*bounds, mask, bias)):
        opcheck(topk_indices, TopkIndices(query, key, *arguments, 0.5, 3))


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of export
def test_rows_are_sorted_in_calls_that_are_compiled_and_traced(native: ModuleType) -> None:
    class Sort(torch.nn.Module):
        def forward(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
            return tuple(compressed_rows(rows, columns, 4, 5))

    rows, columns = torch.randint(4, (9,)), torch.randint(5, (9,))
    expected = Sort()(rows, columns)
    torch.compiler.reset()
    compiled = torch.compile(Sort(), fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(Sort(), (rows, columns), dynamic_shapes=({0: torch.export.Dim("edges", min=2)},) * 2)
    for count in (9, 4):
        given = rows[:count], columns[:count]
        for call in (compiled, exported.module(), make_fx(Sort(), tracing_mode="symbolic")(*given)):
            assert all(map(torch.equal, call(*given), Sort()(*given)))
    with FakeTensorMode() as mode:
        fakes = Sort()(mode.from_tensor(rows), mode.from_tensor(columns))
    assert [(x.shape, x.dtype) for x in fakes] == [(x.shape, x.dtype) for x in expected]
    many = torch.randint(4, (3, 9))
    mapped = torch.func.vmap(Sort())(many, columns.expand(3, 9))
    for n, each in enumerate(many):
        assert all(torch.equal(x[n], y) for x, y in zip(mapped, Sort()(each, columns), strict=True))


def test_explain_names_the_kernels(native: ModuleType) -> None:
    x = torch.ones(1, 3, 1, 1)
    assert str(explain(x, x, x, Window(1, 1) & TopK(2))) == "runs: cpu"
