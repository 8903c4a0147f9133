"""One compilation for all lengths of a pattern of positions: counted, and the same numbers as without."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from anyattention import (
    Additive,
    Causal,
    Fixed,
    Global,
    Pattern,
    RandomBlocks,
    RelativeBias,
    Strided,
    TopK,
    Window,
    attend,
    nn,
)
from anyattention.errors import DimensionMismatchError
from anyattention.ops.runs import runs_of
from anyattention.ops.runs.parts import pairs_of
from anyattention.ops.sparse.edges import _graph_fields, _pattern_edges
from anyattention.patterns.spelling import words_of

pytestmark = pytest.mark.usefixtures("native")

LENGTHS = (20, 21, 33, 47, 31, 22, 50, 29, 39, 63)
exhaustive = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    counters.clear()


def heads(length: int, num_keys: int | None = None, dims: Sequence[int] = (8, 8, 8)) -> list[Tensor]:
    lengths = (length, num_keys or length, num_keys or length)
    return [torch.randn(3, n, 2, width, requires_grad=True) for n, width in zip(lengths, dims, strict=True)]


def features(length: int) -> list[Tensor]:
    return [torch.randn(3, length, 16, requires_grad=True)]


def outcome(call: Callable[..., Any], inputs: list[Tensor]) -> Any:
    """Results, and gradients by random cotangents that do not depend on how the results lie."""
    torch.manual_seed(9)
    results = [x for x in call(*inputs)[:3] if x is not None]
    return results, torch.autograd.grad(results, inputs, [torch.randn(x.shape) for x in results])


def compilations(
    call: Callable[..., Any],
    make: Callable[[int], list[Tensor]],
    lengths: Sequence[int] = LENGTHS,
    *,
    dynamic: bool | None = True,
    backend: str = "aot_eager",
) -> int:
    """How often a call is compiled whole over some lengths; its bits are those of the call without."""
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in lengths:
        inputs = make(length)
        torch.testing.assert_close(outcome(compiled, inputs), outcome(call, inputs), rtol=0, atol=0)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "pattern",
    [
        Window(2, 2),
        *[
            pytest.param(pattern, marks=exhaustive)
            for pattern in (
                Causal(),
                Strided(5, 1) & Causal(),
                Fixed(8, 2),
                Window(2, 2) | Global((0, 5)),
                RandomBlocks(2, seed=3, size=4) | Window(1, 0),
            )
        ],
    ],
    ids=str,
)
def test_ten_lengths_of_a_pattern_are_one(pattern: Pattern) -> None:
    assert compilations(lambda *x: attend(*x, pattern), heads) == 1


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.MultiHeadAttention(16, 2, dropout=0.0, pattern=Window(2, 2)),
        pytest.param(lambda: nn.SparseAttention(16, 2, causal=True), marks=exhaustive),
        pytest.param(lambda: nn.ScaledDotProductAttention(16, 2, pattern=Window(2, 2)), marks=exhaustive),
    ],
    ids=["MultiHeadAttention", "SparseAttention", "ScaledDotProductAttention"],
)
def test_ten_lengths_of_a_module_are_one(module: Callable[[], torch.nn.Module]) -> None:
    assert compilations(module(), features) == 1


def test_a_length_that_is_found_to_change_is_compiled_once_more() -> None:
    assert compilations(lambda *x: attend(*x, Window(2, 2)), heads, dynamic=None) == 2


@exhaustive
def test_the_default_compiler_runs_it() -> None:
    call: Callable[..., Any] = lambda *x: attend(*x, Window(3, 0), return_weights=True)  # noqa: E731
    assert compilations(call, heads, LENGTHS[:3], backend="inductor") == 1


@pytest.mark.parametrize("align", ["top_left", pytest.param("bottom_right", marks=exhaustive)])
@pytest.mark.parametrize("pattern", [pytest.param(Causal, marks=exhaustive), lambda align: Window(3, 1, align)])
def test_two_lengths(pattern: Callable[[Any], Pattern], align: str) -> None:
    assert compilations(lambda *x: attend(*x, pattern(align)), lambda n: heads(n, 2 * n + 1), LENGTHS[:4]) == 1


_BIAS = RelativeBias(torch.randn(2, 9), -4)


@pytest.mark.parametrize(
    ("pattern", "settings", "dims"),
    [
        (Window(3, 3) | Global((0, 5)) & Causal(), {"return_weights": "heads", "return_logsumexp": True}, (8, 8, 8)),
        # In order, which a pattern with steps is not by itself.
        (Strided(5, 1), {"dropout": 0.3}, (8, 8, 8)),
        *[
            pytest.param(Window(3, 1), settings, dims, marks=exhaustive)
            for settings, dims in (
                ({"dropout": 0.3, "softcap": 2.0}, (8, 8, 8)),
                ({"implementation": "graph", "bias": _BIAS}, (8, 8, 8)),
                ({"implementation": "reference", "return_weights": True, "dropout": 0.3}, (8, 8, 8)),
                ({"sinks": torch.zeros(2), "return_weights": True}, (8, 8, 8)),
                ({"bias": _BIAS}, (8, 8, 8)),
                ({"score": Additive(0.2)}, (1, 1, 8)),
            )
        ],
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pattern) else str(list(value)),
)
def test_settings(pattern: Pattern, settings: dict[str, Any], dims: Sequence[int]) -> None:
    def make(length: int) -> list[Tensor]:
        return heads(length, dims=dims)

    assert compilations(lambda *x: attend(*x, pattern, **settings), make, LENGTHS[:4]) == 1


@exhaustive
@pytest.mark.parametrize("implementation", ["cpu", "graph", "reference"])
def test_a_mask_of_any_length(implementation: str) -> None:
    def call(*x: Tensor) -> Any:
        mask = torch.arange(x[0].shape[1]) % 3 > 0
        return attend(*x, Window(2, 2), mask=mask, return_weights=True, implementation=implementation)

    assert compilations(call, heads, LENGTHS[:4]) == 1


def test_calls_that_are_not_compiled_have_no_part_in_it() -> None:
    # The calls that dense attention keeps, read by the compiled one, had it compiled anew.
    def call(*x: Tensor) -> Any:
        return attend(*x, Causal())

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS[:4]:
        compiled(*heads(length))
        call(*heads(length + 100))
    assert counters["stats"]["unique_graphs"] == 1


def test_two_lengths_without_an_alignment_raise_as_in_a_plain_call() -> None:
    compiled = torch.compile(lambda *x: attend(*x, Window(2, 2)), fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in (heads(7, 9), heads(6, 11)):
        with pytest.raises(DimensionMismatchError, match="expected as many queries as keys, or an alignment, got"):
            compiled(*inputs)


@pytest.mark.parametrize("pattern", [Strided(4, 1), Fixed(5, 2) & Causal(), Window(1, 0)], ids=str)
def test_parts_in_order_have_the_same_pairs(pattern: Pattern) -> None:
    (part,) = parts = runs_of(pattern, 23, 23, in_order=True)
    assert part.query_order.numel() == part.key_order.numel() == 0
    allowed = torch.zeros(23, 23, dtype=torch.bool)
    allowed[pairs_of(parts)] = True
    assert torch.equal(allowed, pattern.to_dense(23, 23))
    assert part.num_pairs == int(allowed.sum())


def test_the_choice_is_that_of_a_usual_length() -> None:
    class Attend(torch.nn.Module):
        def __init__(self, pattern: Pattern | TopK) -> None:
            super().__init__()
            self.pattern = pattern

        def forward(self, x: Tensor) -> Tensor:
            return attend(x, x, x, self.pattern).output

    length = torch.export.Dim("length")
    for pattern, operators in (
        (Window(2, 2), {"run_attention"}),
        (Strided(97, 0) | Strided(89, 0), {"pattern_edges", "graph_attention"}),
    ):
        program = torch.export.export(Attend(pattern), (torch.randn(2, 9, 2, 8),), dynamic_shapes=({1: length},))
        called = {str(node.target) for node in program.graph.nodes if "anyattention" in str(node.target)}
        assert called == {f"anyattention.{name}.default" for name in operators}


class TestPatternEdges:
    """The operator that makes a pattern's Graph where the call runs."""

    def test_gives_the_arrays_of_the_graph(self) -> None:
        pattern = Window(1, 2) & Causal()
        found = _pattern_edges(words_of(pattern), 7, 7, torch.device("cpu"))
        graph = pattern.to_graph(7, 7)
        expected = (
            graph.edge_index, graph.query_offsets, graph.keys_by_query, graph.edges_by_query,
            graph.key_offsets, graph.queries_by_key, graph.edges_by_key,
        )  # fmt: skip
        torch.testing.assert_close(found, expected)

    def test_writing_to_them_does_not_change_those_that_are_kept(self) -> None:
        device = torch.device("cpu")
        for x in _pattern_edges(words_of(Window(1, 2)), 7, 7, device):
            x.fill_(-1)
        assert all((x >= 0).all() for x in _graph_fields(Window(1, 2), 7, 7, device) if isinstance(x, Tensor))

    def test_pytorch_finds_nothing_wrong(self) -> None:
        torch.library.opcheck(_pattern_edges, (words_of(Window(1, 2)), 7, 7, torch.device("cpu")))
