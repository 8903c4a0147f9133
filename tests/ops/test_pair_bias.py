"""A bias of pairs and its gradient in the tile kernels, against softmax written out in float64."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Blocks, Causal, Pattern, RelativeBias, Strided, Window, attend, explain
from anyattention.errors import DimensionMismatchError, InvalidInputError
from anyattention.ops.runs import RunAttention, run_attention, runs_of
from anyattention.ops.runs.operators import RunAttentionBackward, _backward

pytestmark = pytest.mark.usefixtures("native")

_F64 = torch.float64
# Neither is a multiple of a tile, 128 queries or 64 keys, nor of a vector; there are several tiles of both.
_LENGTHS = (150, 201)
_BATCH, _HEADS, _KEY_HEADS = 2, 4, 2
_BLOCKS = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])

_PATTERNS: dict[str, Pattern | None] = {
    "full": None,
    "causal": Causal("top_left"),
    "bottom right": Causal("bottom_right"),
    "window": Window(30, 9, "top_left"),
    "strided": Strided(7, 20, "top_left"),
    "blocks": Blocks(_BLOCKS, 67),
}
_SHAPES = [
    tuple(size if whole else 1 for size, whole in zip((_BATCH, _HEADS, *_LENGTHS), each, strict=True))
    for each in itertools.product((False, True), repeat=4)
]


def rows(lengths: tuple[int, int] = _LENGTHS, batch: int = _BATCH, heads: tuple[int, int] = (4, 2)) -> list[Tensor]:
    sizes = [(lengths[0], heads[0], 5), (lengths[1], heads[1], 5), (lengths[1], heads[1], 3)]
    return [torch.randn(batch, *each, dtype=_F64) for each in sizes]


def expected(
    inputs: Sequence[Tensor],
    pattern: Pattern | None,
    bias: Tensor,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logsumexp and weights `(B, H, L, S)`."""
    query, key, value = inputs
    key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[3] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = (bias == -torch.inf).expand_as(scores)
    if pattern is not None:
        hidden = hidden | ~pattern.to_dense(*scores.shape[2:])
    if mask is not None:
        hidden = hidden | ~mask
    scores = (scores + bias.masked_fill(bias == -torch.inf, 0.0)).masked_fill(hidden, -torch.inf)
    is_empty = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(hidden, 0.0)
    logsumexp = scores.masked_fill(is_empty, 0.0).logsumexp(-1).masked_fill(is_empty[..., 0], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, value), logsumexp.transpose(1, 2), weights


def gradients(found: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Those of a random loss on all that was found, where it is finite."""
    generator = torch.Generator().manual_seed(1)
    by = [torch.randn(x.shape, generator=generator, dtype=_F64).to(x.dtype) for x in found]
    by = [torch.where(x.isfinite(), each, 0.0) for x, each in zip(found, by, strict=True)]
    return [x.detach() for x in torch.autograd.grad(found, leaves, by, retain_graph=True)]


def leaves_of(inputs: Sequence[Tensor], bias: Tensor, dtype: torch.dtype = _F64) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in (*inputs, bias)]


def assert_equal_expected(inputs: Sequence[Tensor], pattern: Pattern | None, bias: Tensor, **settings: Any) -> None:
    """Output, logsumexp and gradients in float64 and, less exactly, in float32."""
    own = leaves_of(inputs, bias)
    theirs = list(expected(own[:3], pattern, own[3], **settings)[:2])
    theirs += gradients(theirs, own)
    for dtype, tolerance in ((_F64, 1e-12), (torch.float32, 1e-5)):
        query, key, value, given = own = leaves_of(inputs, bias, dtype)
        result = attend(query, key, value, pattern, bias=given, return_logsumexp=True, implementation="cpu", **settings)
        assert result.logsumexp is not None
        ours = [result.output, result.logsumexp]
        for one, other in zip([*ours, *gradients(ours, own)], theirs, strict=True):
            finite = other.detach()[other.isfinite()].abs()
            scale = float(finite.max()) if finite.numel() else 1.0
            torch.testing.assert_close(one.to(_F64), other, rtol=tolerance, atol=tolerance * max(scale, 1.0))


def some_pairs(*shape: int) -> Tensor:
    """Most of the pairs; query 3 has no key, and key 2 no query."""
    pairs = torch.rand(*shape) < 0.7
    pairs[..., 3, :] = False
    pairs[..., :, 2] = False
    return pairs


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("name", _PATTERNS)
def test_each_axis_whole_or_one(name: str, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, dtype=_F64)
    assert_equal_expected(rows(), _PATTERNS[name], bias)
    assert_equal_expected(rows(), _PATTERNS[name], bias, mask=some_pairs(_BATCH, 1, *_LENGTHS), softcap=1.5)


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("name", _PATTERNS)
def test_minus_infinity_hides_a_pair(name: str, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, dtype=_F64).masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    if shape[2] > 1:
        bias[:, :, 5] = -torch.inf
    assert_equal_expected(rows(), _PATTERNS[name], bias)
    assert_equal_expected(rows(), _PATTERNS[name], bias, mask=some_pairs(_BATCH, _HEADS, *_LENGTHS), softcap=1.5)


_SHARED = [
    (1, (1, 1), (1, 1)),
    (40, (3, 3), (49, 49)),
    (37, (2, 1), (16, 64)),
    (1, (1, 1), (1700, 70)),
    (3, (5, 5), (7, 1300)),
]


@pytest.mark.parametrize(("batch", "heads", "lengths"), _SHARED, ids=str)
def test_batch_entries_and_heads_that_share_a_bias(
    batch: int, heads: tuple[int, int], lengths: tuple[int, int]
) -> None:
    for shape in ((1, heads[0], *lengths), (1, 1, *lengths), (batch, 1, *lengths), (1, 1, 1, lengths[1]), (1, 1, 1, 1)):
        assert_equal_expected(rows(lengths, batch, heads), None, torch.randn(shape, dtype=_F64))


@pytest.mark.parametrize("shape", [(1, 2, 1700, 90), (1, 1, 1, 90), (3, 2, 1700, 90), (1, 1, 1700, 1)], ids=str)
def test_the_same_bits_on_any_number_of_threads(threads: Callable[[int], None], shape: tuple[int, ...]) -> None:
    inputs, bias = rows((1700, 90), 3, (2, 2)), torch.randn(shape)
    found: list[list[Tensor]] = []
    for count in (1, 2, 3, 2):
        threads(count)
        own = leaves_of(inputs, bias, torch.float32)
        result = attend(*own[:3], bias=own[3], return_weights="mean", implementation="cpu")
        assert result.weights is not None
        found.append([result.output, result.weights, *gradients([result.output, result.weights], own)])
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(each, found[0], strict=True))


@pytest.mark.parametrize("pattern", [None, Causal("top_left"), Window(30, 9, "top_left")], ids=str)
def test_dropout(pattern: Pattern | None) -> None:
    inputs, bias = rows(), torch.randn(1, _HEADS, *_LENGTHS, dtype=_F64)
    found = []
    for implementation in ("cpu", "reference"):
        own = leaves_of(inputs, bias)
        torch.manual_seed(4)
        output = attend(*own[:3], pattern, bias=own[3], dropout=0.4, implementation=implementation).output
        found.append([output, *gradients([output], own)])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("weights", ["mean", "heads"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_weights_in_the_loss(shape: tuple[int, ...], weights: Any) -> None:
    bias, mask = torch.randn(shape, dtype=_F64), some_pairs(_BATCH, _HEADS, *_LENGTHS)
    bias = bias.masked_fill(torch.rand(shape) < 0.1, -torch.inf) if len(bias.flatten()) > 9 else bias
    for settings in ({}, {"mask": mask, "softcap": 1.5}):
        inputs, found = rows(), []
        for is_ours in (True, False):
            own = leaves_of(inputs, bias)
            if is_ours:
                result = attend(*own[:3], bias=own[3], return_weights=weights, implementation="cpu", **settings)
                assert result.weights is not None
                shown = [result.output, result.weights]
            else:
                output, _, each = expected(own[:3], None, own[3], **settings)
                shown = [output, each.mean(1) if weights == "mean" else each]
            found.append([*shown, *gradients(shown, own), *gradients(shown[1:], [own[0], own[1], own[3]])])
        torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


def test_weights_of_a_bias_by_distance_in_the_loss() -> None:
    inputs, numbers, found = rows((150, 150)), torch.randn(_HEADS, 30, dtype=_F64), []
    for implementation in ("cpu", "reference"):
        own = leaves_of(inputs, numbers)
        bias = RelativeBias(own[3], -12)
        assert explain(*own[:3], bias=bias, implementation=implementation).implementation == implementation
        result = attend(*own[:3], bias=bias, return_weights="mean", implementation=implementation)
        assert result.weights is not None
        shown = [result.output, result.weights]
        found.append([*shown, *gradients(shown, own)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 2, 5, 4), (2, 1, 5, 1), (1, 1, 1, 4), (2, 2, 5, 4), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("pattern", [None, Causal("top_left"), Strided(2, 0, "top_left")], ids=str)
def test_derivatives_to_the_second_order(pattern: Pattern | None, shape: tuple[int, ...]) -> None:
    inputs = [x.requires_grad_() for x in rows((5, 4), 2, (2, 1))]
    bias = torch.randn(shape, dtype=_F64, requires_grad=True)
    mask = torch.rand(5, 4) < 0.8

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        settings: dict[str, Any] = {"mask": mask, "softcap": 2.0, "return_weights": "heads", "implementation": "cpu"}
        result = attend(query, key, value, pattern, bias=bias, **settings)
        assert result.weights is not None
        return result.output, result.weights

    assert torch.autograd.gradcheck(run, (*inputs, bias))
    assert torch.autograd.gradgradcheck(run, (*inputs, bias))


def test_second_derivatives_where_a_pair_is_hidden() -> None:
    inputs = [x.requires_grad_() for x in rows((5, 4), 1, (1, 1))]
    hidden = torch.rand(5, 4) < 0.3
    bias = torch.randn(5, 4, dtype=_F64, requires_grad=True)

    def run(*given: Tensor) -> Tensor:
        return attend(*given[:3], bias=given[3].masked_fill(hidden, -torch.inf), implementation="cpu").output

    assert torch.autograd.gradcheck(run, (*inputs, bias))
    assert torch.autograd.gradgradcheck(run, (*inputs, bias))


def test_an_expanded_bias_and_a_turned_one() -> None:
    inputs = rows()
    for given in (
        torch.randn(1, 1, _LENGTHS[0], 1, dtype=_F64).expand(_BATCH, _HEADS, *_LENGTHS),
        torch.randn(_LENGTHS[1], _LENGTHS[0], dtype=_F64).T,
        torch.randn(_HEADS, _LENGTHS[1], 2, _LENGTHS[0], dtype=_F64)[:, :, 1].transpose(1, 2)[None],
        torch.randn(1, _HEADS, _LENGTHS[0], 2 * _LENGTHS[1], dtype=_F64)[..., ::2],
    ):
        for pattern in (None, Strided(7, 20, "top_left")):
            # The bias itself, as it lies, is what has the gradient.
            found = []
            for bias in (given.detach().requires_grad_(), given.detach().contiguous().requires_grad_()):
                own = [x.clone().requires_grad_() for x in inputs]
                output = attend(*own, pattern, bias=bias, implementation="cpu").output
                found.append([output, *gradients([output], [*own, bias])])
            assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
            assert found[0][-1].shape == given.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, None])
def test_low_precision(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    inputs = [x.to(dtype) for x in rows()]
    bias = torch.randn(1, _HEADS, *_LENGTHS).to(bias_dtype or dtype)
    own = [x.detach().requires_grad_() for x in (*inputs, bias)]
    output = attend(*own[:3], bias=own[3], implementation="cpu").output
    exact = leaves_of(inputs, bias)
    wanted = expected(exact[:3], None, exact[3])[0]
    for one, other, like in zip(
        [output, *gradients([output], own)], [wanted, *gradients([wanted], exact)], [inputs[0], *own], strict=True
    ):
        assert one.dtype == like.dtype
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < 3 * torch.finfo(dtype).eps


class TestNumbersThatAreNotFinite:
    def call(self, bias: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> list[Tensor]:
        own = leaves_of(rows((150, 150)), bias, torch.float32)
        output = attend(*own[:3], pattern, bias=own[3], mask=mask, implementation="cpu").output
        by = torch.randn(output.shape)
        return [output, *torch.autograd.grad(output, own, by.masked_fill(output.isnan(), 0.0))]

    @pytest.mark.parametrize("number", [torch.nan, torch.inf])
    @pytest.mark.parametrize("pattern", [None, Window(30, 9)], ids=str)
    def test_a_hidden_pair_does_not_leak(self, number: float, pattern: Pattern | None) -> None:
        bias, mask = torch.randn(1, _HEADS, 150, 150), torch.rand(150, 150) < 0.7
        shown = self.call(bias.masked_fill(~mask, number), mask, pattern)
        assert all(x.isfinite().all() for x in shown)
        assert (shown[4][:, :, ~mask] == 0).all()

    @pytest.mark.parametrize("number", [torch.nan, torch.inf])
    @pytest.mark.parametrize("pattern", [None, Window(30, 9)], ids=str)
    def test_a_used_one_shows(self, number: float, pattern: Pattern | None) -> None:
        bias = torch.randn(1, _HEADS, 150, 150)
        bias[0, 1, 70, 69] = number
        output, *_, by_bias = self.call(bias, None, pattern)
        touched = torch.zeros(_BATCH, 150, _HEADS, dtype=torch.bool)
        touched[:, 70, 1] = True
        assert output[touched].isnan().all()
        assert output[~touched].isfinite().all()
        other = torch.ones(_HEADS, 150, dtype=torch.bool)
        other[1, 70] = False
        assert by_bias[0][other].isfinite().all()

    def test_a_key_that_no_query_sees(self) -> None:
        query, key, value = rows()
        key[:, 7], value[:, 7] = torch.nan, torch.inf
        bias = torch.randn(1, _HEADS, *_LENGTHS, dtype=_F64)
        bias[..., 7] = -torch.inf
        own = leaves_of((query, key, value), bias)
        output = attend(*own[:3], bias=own[3], implementation="cpu").output
        found = gradients([output], own)
        assert output.isfinite().all()
        assert all(x.isfinite().all() for x in found)
        assert (found[3][..., 7] == 0).all()

    def test_a_row_of_minus_infinity_is_empty(self) -> None:
        bias = torch.full((150, 150), -torch.inf)
        assert all((x == 0).all() for x in self.call(bias))


class TestChoice:
    def test_tiles_take_a_bias_with_a_gradient(self) -> None:
        x = torch.randn(1, 30, 2, 8)
        for bias in (torch.zeros(30, 30, requires_grad=True), torch.zeros(1, 2, 30, 30, requires_grad=True)):
            for pattern in (None, Causal(), Window(2, 2), Strided(5, 2)):
                explanation = explain(x, x, x, pattern, bias=bias)
                assert explanation.implementation == "cpu"
                assert explanation.refusals == ()

    def test_no_gradient_where_none_is_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        needed: list[tuple[bool, ...]] = []

        def record(*fields: Any) -> RunAttentionBackward:
            made = RunAttentionBackward(*fields)
            needed.append(made.needed)
            return made

        monkeypatch.setattr("anyattention.ops.runs.operators.RunAttentionBackward", record)
        x = torch.randn(1, 30, 2, 8, requires_grad=True)
        attend(x, x, x, bias=torch.zeros(30, 30)).output.sum().backward()
        attend(x, x, x, bias=torch.zeros(30, 30, requires_grad=True)).output.sum().backward()
        assert needed == [(True, True, True, False), (True, True, True, True)]

    def test_transforms(self) -> None:
        query, key, value = rows((5, 4), 2, (2, 2))
        bias = torch.randn(2, 5, 4, dtype=_F64)

        def loss(bias: Tensor) -> Tensor:
            return attend(query, key, value, bias=bias[None]).output.square().sum()

        own = bias.clone().requires_grad_()
        (by_bias,) = torch.autograd.grad(loss(own), own)
        torch.testing.assert_close(torch.func.grad(loss)(bias), by_bias)
        many = torch.stack([bias, bias])
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many), torch.stack([by_bias, by_bias]))

    def test_many_derivatives_at_once(self) -> None:
        own = leaves_of(rows((5, 4), 2, (2, 2)), torch.randn(1, 2, 5, 4, dtype=_F64))
        output = attend(*own[:3], bias=own[3], implementation="cpu").output
        by = torch.randn(3, *output.shape, dtype=_F64)
        many = torch.autograd.grad(output, own, by, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(output, own, one, retain_graph=True) for one in by]
        torch.testing.assert_close(many, tuple(torch.stack(x) for x in zip(*each, strict=True)))


@pytest.mark.parametrize("pattern", [None, Causal("top_left"), Strided(4, 1, "top_left")], ids=str)
@pytest.mark.parametrize("weights", [False, "mean"])
def test_compiles_whole(pattern: Pattern | None, weights: Any) -> None:
    torch._dynamo.reset()

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        result = attend(query, key, value, pattern, bias=bias, return_weights=weights, implementation="cpu")
        return (result.output,) if result.weights is None else (result.output, result.weights)

    own = leaves_of(
        rows((9, 7), 2, (2, 1)), torch.randn(1, 2, 9, 7, dtype=_F64).masked_fill(torch.rand(9, 7) < 0.2, -9e9)
    )
    with torch.no_grad():
        own[3][own[3] < -1e9] = -torch.inf
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = [[*shown, *gradients(shown, own)] for shown in (function(*own), compiled(*own))]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 2, 9, 9), (2, 1, 1, 9), (2, 2, 9, 1), (1, 1, 1, 1)], ids=str)
def test_operators(opcheck: Any, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, dtype=_F64, requires_grad=True)
    for parts in (runs_of(Strided(4, 1) & Causal(), 9, 9), runs_of(Window(3, 1), 9, 9)):
        inputs = [x.requires_grad_() for x in rows((9, 9), 2, (2, 1))]
        call = RunAttention(*inputs, None, bias, None, parts, 0.0, False, scale=0.5, softcap=0.0)
        opcheck(run_attention, call)
        plain = [x.detach() for x in inputs]
        call = RunAttention(*plain, None, bias.detach(), None, parts, 0.0, False, scale=0.5, softcap=0.0)
        results = run_attention(call)
        for is_needed in (True, False):
            needed = (True, True, True, is_needed)
            opcheck(_backward, RunAttentionBackward(call, *results, torch.randn_like(results[0]), None, needed))


def test_errors_name_the_bias() -> None:
    query, key, value = rows()
    for pattern in (None, Window(2, 2, "top_left")):
        with pytest.raises(DimensionMismatchError, match=r"bias: expected .*heads=4, query_length=150, key_length=201"):
            attend(query, key, value, pattern, bias=torch.zeros(1, 3, *_LENGTHS, dtype=_F64, requires_grad=True))
        with pytest.raises(DimensionMismatchError, match="bias: expected rank 1, 2 or 4, got rank 3"):
            attend(query, key, value, pattern, bias=torch.zeros(3, *_LENGTHS, dtype=_F64, requires_grad=True))
        with pytest.raises(InvalidInputError, match="bias: expected"):
            attend(query, key, value, pattern, bias=torch.zeros(*_LENGTHS, dtype=torch.int64))
