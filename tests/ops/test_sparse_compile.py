"""Attention over patterns of positions inside torch.compile(fullgraph=True), forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Blocks, Causal, Documents, Fixed, Global, Pattern, RandomBlocks, Strided, Window, attend, nn
from anyattention.ops.runs import traced
from anyattention.patterns import Full

LENGTH = 40


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def leaves(length: int = LENGTH, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, length, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


def assert_same(compiled: Callable[..., Any], call: Callable[..., Any], inputs: list[Tensor]) -> None:
    """The same results, and the same gradients by random cotangents."""
    found = []
    for function in (compiled, call):
        torch.manual_seed(9)
        results = [x for x in function(*inputs)[:3] if x is not None]
        cotangents = [torch.randn_like(x) for x in results]
        found.append((results, torch.autograd.grad(results, inputs, cotangents)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def compile_whole(call: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, **{"backend": "aot_eager", **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"return_logsumexp": True},  # tiles
        {"return_weights": "heads", "softcap": 2.0},  # the graph
        {"dropout": 0.3, "mask": torch.arange(LENGTH) % 3 > 0},
        {"implementation": "reference"},
    ],
    ids=str,
)
def test_a_pattern_made_inside_the_traced_function(settings: dict[str, Any]) -> None:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attend(query, key, value, (Window(3, 3) | Global((0, 5))) & Causal(), **settings)

    assert_same(compile_whole(call), call, leaves())


@pytest.mark.parametrize(
    "pattern",
    [Strided(5, 1) & Causal(), Fixed(8, 2), RandomBlocks(2, seed=3, size=4) | Window(1, 0), Documents((7, 0, 33))],
    ids=str,
)
def test_a_pattern_from_outside(pattern: Pattern) -> None:
    def call(*inputs: Tensor) -> Any:
        return attend(*inputs, pattern)

    assert_same(compile_whole(call), call, leaves())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.exhaustive)], ids=str)
def test_another_pattern_and_another_length_are_another_trace(dtype: torch.dtype) -> None:
    def call(*inputs: Any) -> Any:
        return attend(*inputs)

    compiled = compile_whole(call, dynamic=True)
    for pattern in (Window(3, 3), Window(3, 2), Window(3, 2) | Global(1), Strided(3, 2), Window(3, 2)):
        for length in (LENGTH, 33):
            inputs = leaves(length, dtype)
            assert_same(lambda *x: compiled(*x, pattern), lambda *x: call(*x, pattern), inputs)  # noqa: B023  # called now


def test_a_pattern_of_equal_settings_is_the_same_trace() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: attend(*x), fullgraph=True, backend=counter)
    inputs = leaves()
    for _ in range(3):
        compiled(*inputs, Window(3, 3) & Causal())
    assert counter.frame_count == 1


def test_layers_share_a_pattern_or_have_their_own() -> None:
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings: dict[str, Any] = {"dropout": 0.0, "causal": True}
            self.layers = torch.nn.ModuleList(
                [
                    nn.SparseAttention(16, 2, sparsity_pattern="strided", block_size=5, local_window=2, **settings),
                    nn.SparseAttention(16, 2, sparsity_pattern="strided", block_size=5, local_window=2, **settings),
                    nn.MultiHeadAttention(16, 2, pattern=Window(3, 3), **settings),
                ]
            )

        def forward(self, x: Tensor) -> list[Tensor]:
            for layer in self.layers:
                x = x + layer(x).output
            return [x]

    stack = Stack()
    x = torch.randn(2, LENGTH, 16, requires_grad=True)
    assert_same(compile_whole(stack), stack, [x])


@pytest.mark.exhaustive
def test_the_default_compiler_runs_it() -> None:
    def call(*inputs: Tensor) -> Any:
        return attend(*inputs, Window(3, 0), return_logsumexp=True)

    assert_same(compile_whole(call, backend="inductor"), call, leaves())


@dataclass(frozen=True)
class FirstKeys(Full):
    """A pattern of a user's own, with a default."""

    count: int = 2

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        return (key < self.count).expand(torch.broadcast_shapes(query.shape, key.shape))

    def spans(self, num_queries: int, num_keys: int, *, device: Any = None) -> Any:
        return Full().spans(num_queries, min(num_keys, self.count), device=device)


def test_a_pattern_of_ones_own() -> None:
    def call(*inputs: Tensor) -> Any:
        return attend(*inputs, FirstKeys(3) & Causal())

    assert_same(compile_whole(call), call, leaves())


def test_a_pattern_that_holds_a_tensor_is_refused_whole_and_run_in_parts() -> None:
    pattern = Blocks(torch.eye(LENGTH // 4) > 0, 4) | Window(1, 1)

    def call(*inputs: Tensor) -> Any:
        return attend(*inputs, pattern)

    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match=r"pattern: expected a pattern of numbers under torch\.compile, got Blocks\. Give pattern\.to_graph\(num",
    ):
        compile_whole(call)(*leaves())
    torch.compiler.reset()
    assert_same(torch.compile(call, backend="aot_eager"), call, leaves())


def test_settings_give_the_pattern_back() -> None:
    for pattern in (Full(), Window(3, 2, "top_left") & Causal(), Documents((3, 4)) | Global((1, 5)), FirstKeys(7)):
        assert traced._made_of(traced._settings_of(pattern)) == pattern
