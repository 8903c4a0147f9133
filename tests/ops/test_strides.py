"""Rows are read where they lie: calls of views, and in half precision, have the bits of contiguous numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Full, Pattern, RelativeBias, Strided, Window, attend, native
from anyattention.native import calls
from anyattention.ops.runs import RunAttention, RunPart, run_attention, runs_of

pytestmark = pytest.mark.usefixtures("native")

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_half = pytest.mark.parametrize("dtype", HALVES)


def draw(last: int) -> int:
    return int(torch.randint(last + 1, ()))


def view_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers that lie in any way: axes in any order, cut out of longer ones, or expanded; NaN all around."""
    sizes, cut = [], []
    for axis, size in enumerate(shape):
        # The axis whole, from an offset on, every second, or once for all; the last one mostly whole.
        kind = draw(3) if axis < 3 else (0, 0, 0, 1, 1, 2, 3)[draw(6)]
        sizes.append((size, size + 3, 2 * size, 1)[kind])
        cut.append((slice(None), slice(2, size + 2), slice(1, None, 2), slice(None))[kind])
    order = [*torch.randperm(3).tolist(), 3]
    numbers = torch.full([sizes[axis] for axis in order], torch.nan, dtype=dtype)
    view = numbers.permute(torch.tensor(order).argsort().tolist())[tuple(cut)]
    return view.copy_(torch.randn(view.shape)).expand(shape)


def multiplies_halves(dtype: torch.dtype) -> bool:
    """Whether products take numbers of a dtype as they are, and round in another order than products of floats."""
    return dtype is torch.bfloat16 and native.info().level == "v4-bf16"


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)


def settings_of(
    pattern: Pattern, batch: int, lengths: tuple[int, int], heads: int, dtype: torch.dtype
) -> dict[str, Any]:
    given: dict[str, Any] = {"scale": 0.4}
    if draw(1):
        given["softcap"] = 2.0
    if draw(1):
        given["mask"] = torch.rand(batch, 1, *lengths) < 0.7
    if draw(1):
        given["bias"] = torch.randn(1, heads, *lengths).to(dtype)
    if draw(1) and not isinstance(pattern, Strided):
        given["dropout"] = 0.3
    return given


def results(inputs: list[Tensor], pattern: Pattern, given: dict[str, Any], cotangent: Tensor) -> list[Tensor]:
    """Output, logsumexp and gradients, the output in the dtype of its cotangent."""
    torch.manual_seed(7)
    own = [x.detach().requires_grad_() for x in inputs]
    assert [x.stride() for x in own] == [x.stride() for x in inputs]
    result = attend(*own, pattern, implementation="cpu", return_logsumexp=True, **given)
    assert result.logsumexp is not None
    output = result.output.to(cotangent.dtype)
    by_sum = torch.randn(result.logsumexp.shape, dtype=result.logsumexp.dtype)
    return [output, result.logsumexp, *torch.autograd.grad([output, result.logsumexp], own, [cotangent, by_sum])]


@every_dtype
@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(30, 3), Strided(4, 1)])
@pytest.mark.parametrize("seed", [*range(6), *[pytest.param(n, marks=pytest.mark.exhaustive) for n in range(6, 60)]])
def test_views_have_the_bits_of_contiguous_numbers(dtype: torch.dtype, pattern: Pattern, seed: int) -> None:
    torch.manual_seed(seed)
    batch, heads, length = 1 + draw(2), 4, (1, 7, 66, 140)[draw(3)]
    key_heads = heads if isinstance(pattern, Full | Causal) else (4, 2, 1)[draw(2)]
    keys = length if not isinstance(pattern, Full) else length + draw(9)
    head_dim, value_dim = (1, 5, 16, 32)[draw(3)], (1, 5, 16, 32)[draw(3)]
    query = view_of((batch, length, heads, head_dim), dtype)
    key = view_of((batch, keys, key_heads, head_dim), dtype)
    value = view_of((batch, keys, key_heads, value_dim), dtype)
    cotangent = view_of((batch, length, heads, value_dim), dtype)
    given = settings_of(pattern, batch, (length, keys), heads, dtype)
    ours = results([query, key, value], pattern, given, cotangent)
    lying = torch.Tensor.contiguous if multiplies_halves(dtype) else widened
    theirs = results([lying(x) for x in (query, key, value)], pattern, given, cotangent.contiguous())
    for one, other in zip(ours, theirs, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other.to(one.dtype))


@every_half
@pytest.mark.parametrize("width", [16, 13])
def test_every_number_in_half_precision_is_widened_exactly(dtype: torch.dtype, width: int) -> None:
    # Each query sees one key, and its output is that key's value.
    value = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)[: 65_536 // width * width]
    value = value.reshape(1, -1, 1, width)
    query = torch.zeros(1, value.shape[1], 1, 16)
    empty, places = torch.empty(0, dtype=torch.int64), torch.arange(value.shape[1] + 1)
    part = RunPart(empty, empty, places, places[:-1], places[1:])
    for flushes in (False, True):
        torch.set_flush_denormal(flushes)
        try:
            record = RunAttention(query, query, value, None, None, None, (part,), 0.0, False, scale=1.0, softcap=0.0)
            output, _, _ = run_attention(record)
        finally:
            torch.set_flush_denormal(False)
        # Of bfloat16's subnormals a processor that takes them for 0 makes 0.
        exact = torch.where(value.float().abs() < 2.0**-126, 0.0, value.float()) if flushes else value.float()
        found = torch.where(output.abs() < 2.0**-126, 0.0, output) if flushes else output
        torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)


@every_dtype
def test_a_token_over_a_cache_does_not_copy_it(dtype: torch.dtype) -> None:
    # 2^40 bytes, in the size of the cache that a copy would have.
    length = 2**40 // (64 * dtype.itemsize)
    query, row = torch.randn(1, 1, 2, 64, dtype=dtype), torch.randn(1, 1, 1, 64, dtype=dtype)
    key = row.expand(1, length, 2, 64)
    assert key.numel() * dtype.itemsize >= 2**40
    pattern = Window(3, 0, align="bottom_right")
    found = attend(query, key, key, pattern, implementation="cpu").output
    torch.testing.assert_close(found, row.expand_as(found))


def test_what_is_read_where_it_lies() -> None:
    (part,) = runs_of(Window(3, 2), 9, 9)
    whole = torch.randn(2, 4, 9, 8).transpose(1, 2)
    record = RunAttention(whole, whole, whole, None, None, None, (part,), 0.0, False, scale=1.0, softcap=0.0)
    for x in (
        whole,
        whole[:, ::2, 1:, 3:7].repeat(1, 2, 2, 1)[:, :9, :4],
        whole[:1].expand(2, 9, 4, 8),
        whole.bfloat16(),
    ):
        bound = calls.bind(replace(record, key=x[..., : x.shape[-1]], query=x, value=x))
        assert not bound.copies
        rows = bound.structure.key
        assert (rows.numbers, rows.batch_stride, rows.row_stride, rows.head_stride) == (x.data_ptr(), *x.stride()[:3])
    # Numbers apart within a row are copied.
    apart = torch.randn(2, 9, 4, 16)[..., ::2]
    bound = calls.bind(replace(record, key=apart))
    assert torch.equal(bound.copies[0], apart)
    assert bound.structure.key.numbers == bound.copies[0].data_ptr()


def views(dtype: torch.dtype, *, needs_grad: bool = True) -> list[Tensor]:
    """Query, key and value as views: heads first, of a longer cache, expanded over the batch."""
    query = torch.randn(2, 4, 9, 3, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, 14, 4, 3, dtype=dtype)[:, 2:11], torch.randn(1, 9, 4, 5, dtype=dtype).expand(2, 9, 4, 5)
    return [x.requires_grad_(needs_grad) for x in (query, key, value)]


@every_dtype
@pytest.mark.parametrize("pattern", [Causal(), Strided(4, 1) & Causal()])
class TestTransforms:
    def test_opcheck(self, opcheck: Callable[..., None], dtype: torch.dtype, pattern: Pattern) -> None:
        parts = runs_of(pattern if isinstance(pattern, Strided) else Window(9, 0), 9, 9)
        opcheck(run_attention, RunAttention(*views(dtype), None, None, None, parts, 0.0, True, scale=0.5, softcap=0.0))

    def test_batched_gradients(self, dtype: torch.dtype, pattern: Pattern) -> None:
        inputs = views(dtype)
        output = attend(*inputs, pattern, implementation="cpu").output
        cotangents = torch.randn(3, *output.shape).to(dtype)
        ours = torch.autograd.grad(output, inputs, cotangents, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(output, inputs, one, retain_graph=True) for one in cotangents]
        for one, others in zip(ours, zip(*each, strict=True), strict=True):
            assert one.dtype is dtype
            assert torch.equal(one, torch.stack(others))

    def test_second_derivatives(self, dtype: torch.dtype, pattern: Pattern) -> None:
        tolerance = 0.1 if dtype in HALVES else 1e-4
        inputs = views(dtype)
        cotangent = torch.randn(2, 9, 4, 5).to(dtype)
        found = []
        for given, how in ((inputs, "cpu"), ([x.detach().double().requires_grad_() for x in inputs], "reference")):
            output = attend(*given, pattern, implementation=how).output
            first = torch.autograd.grad(output, given, cotangent.to(output.dtype), create_graph=True)
            assert all(x.dtype is each.dtype for x, each in zip(first, given, strict=True))
            loss = sum(x.square().sum() for x in first)
            assert isinstance(loss, Tensor)
            found.append([x.detach() for x in (*first, *torch.autograd.grad(loss, given))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.exhaustive
@every_dtype
@pytest.mark.parametrize("pattern", [Causal(), Window(4, 0)])
def test_compiled_whole(dtype: torch.dtype, pattern: Pattern) -> None:
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Views that are made in the graph, whose strides the compiler chooses.
        return attend(query.transpose(1, 2), key[:, 2:11], value.expand(2, 9, 4, 5), pattern).output

    inputs = [
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 4, 9, 3), (2, 14, 4, 3), (1, 9, 4, 5))
    ]
    cotangent = torch.randn(2, 9, 4, 5).to(dtype)
    found = []
    for call in (step, torch.compile(step, fullgraph=True)):
        output = call(*inputs)
        found.append([output, *torch.autograd.grad(output, inputs, cotangent)])
    for one, other in zip(*found, strict=True):
        assert one.dtype is dtype
        # The compiler sums over an expanded axis in float32.
        tolerance = 0.02 if dtype in HALVES else 1e-5
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@every_half
def test_a_bias_by_distance_beside_half_precision(dtype: torch.dtype) -> None:
    numbers = torch.randn(4, 9, requires_grad=True)
    inputs = views(dtype)
    ours = attend(*inputs, Window(4, 4), bias=RelativeBias(numbers, first=-4), implementation="cpu").output
    wide = [x.detach().float().requires_grad_() for x in inputs]
    theirs = attend(*wide, Window(4, 4), bias=RelativeBias(numbers, first=-4), implementation="cpu").output.to(dtype)
    cotangent = torch.randn(ours.shape).to(dtype)
    (one,), (other,) = (torch.autograd.grad(x, [numbers], cotangent) for x in (ours, theirs))
    if multiplies_halves(dtype):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-1)
        return
    assert torch.equal(ours, theirs)
    assert torch.equal(one, other)
