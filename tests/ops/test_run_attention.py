"""The tile kernels of sparse patterns: equal to dense masked attention in float64, without leaks, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import (
    Causal,
    Documents,
    Dynamic,
    Fixed,
    Full,
    Global,
    Pattern,
    RandomBlocks,
    Strided,
    Window,
    attend,
    explain,
)
from anyattention.errors import IndexRangeError, InvalidInputError, UnsupportedError
from anyattention.native import load
from anyattention.ops.runs import RunAttention, pairs_in_tiles, run_attention, runs_of
from anyattention.ops.runs.parts import pairs_of

pytestmark = pytest.mark.usefixtures("native")


def patterns_of(length: int) -> list[Pattern]:
    return [
        Window(3, 2),
        Window(70, 0),
        Strided(4, 1) & Causal(),
        Strided(7, 20),
        Window(2, 2) | Global(2),
        RandomBlocks(2, 1, 4),
        RandomBlocks(1, 1, 64) | Window(5, 5),
        Documents((length // 2, 0, length - length // 2)),
        Fixed(8, 3) & Causal(),
        Full() & Causal(),
        Global((3, 50)),
        Global(0),
    ]


def rows(length: int, heads: int = 3, width: int = 5, *, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, heads, width)


def results(inputs: list[Tensor], pattern: Pattern, dtype: torch.dtype, implementation: str) -> list[Tensor]:
    """Output, logsumexp and the gradients of a random loss on both; "dense" is a mask in float64."""
    own = [x.to(dtype).requires_grad_() for x in inputs]
    given: dict[str, Any] = {"return_logsumexp": True}
    if implementation == "dense":
        mask = pattern.to_dense(own[0].shape[1], own[1].shape[1])
        group = own[0].shape[2] // own[1].shape[2]
        key, value = (x.repeat_interleave(group, dim=2) for x in own[1:])
        result = attend(own[0], key, value, mask=mask, implementation="reference", **given)
    else:
        assert explain(own[0], own[1], own[2], pattern, implementation=implementation).implementation == implementation
        result = attend(own[0], own[1], own[2], pattern, implementation=implementation, **given)
    assert result.logsumexp is not None
    generator = torch.Generator().manual_seed(1)
    found = [result.output, result.logsumexp]
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in found]
    return [*found, *torch.autograd.grad(found, own, cotangents)]


def assert_equals_dense(inputs: list[Tensor], pattern: Pattern, tolerance: float = 2e-5) -> None:
    ours = results(inputs, pattern, torch.float32, "cpu")
    theirs = results(inputs, pattern, torch.float64, "dense")
    for one, other in zip(ours, theirs, strict=True):
        finite = other.detach()[other.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (4, 2)])
@pytest.mark.parametrize("length", [1, 7, 128, 333])
def test_equals_dense_attention(length: int, heads: int, key_heads: int) -> None:
    for pattern in patterns_of(length):
        inputs = [rows(length, heads), rows(length, key_heads), rows(length, key_heads, 7)]
        assert_equals_dense(inputs, pattern)


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 97), (97, 1), (50, 131), (131, 50)])
def test_other_lengths_than_the_keys(num_queries: int, num_keys: int, align: Any) -> None:
    for pattern in (Window(3, 2, align), Strided(7, 20, align), Global(3, align), Fixed(8, 3, align) & Causal(align)):
        assert_equals_dense([rows(num_queries), rows(num_keys), rows(num_keys, width=7)], pattern)


@pytest.mark.parametrize("width", [1, 16, 32, 40, 64, 80])
def test_every_width(width: int) -> None:
    for value_dim in (width, 3):
        inputs = [rows(130, 2, width), rows(130, 2, width), rows(130, 2, value_dim)]
        assert_equals_dense(inputs, Window(40, 9) | Global(1))


@pytest.mark.parametrize("length", [0, 5])
def test_an_empty_sequence_and_rows_without_keys(length: int) -> None:
    query, key = rows(7), rows(length)
    for pattern in (Window(0, 0, "top_left"), Global(0, "top_left")):
        result = attend(query, key, key, pattern, return_logsumexp=True, implementation="cpu")
        is_empty = ~pattern.to_dense(7, length).any(1)
        assert is_empty.any()
        assert result.logsumexp is not None
        assert (result.output[:, is_empty] == 0).all()
        assert (result.logsumexp[:, is_empty] == -torch.inf).all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_hidden_key_does_not_leak_and_a_used_one_shows(number: float) -> None:
    pattern = Window(20, 3)
    for name in ("query", "key", "value"):
        tensors = {each: rows(150) for each in ("query", "key", "value")}
        tensors[name][1, 70, 2, 1] = number
        leaves = [x.requires_grad_() for x in tensors.values()]
        output = attend(leaves[0], leaves[1], leaves[2], pattern, implementation="cpu").output
        sees = pattern.to_dense(150, 150)
        touched = torch.zeros_like(output[..., 0], dtype=torch.bool)
        if name == "query":
            touched[1, 70, 2] = True
        else:
            touched[1, sees[:, 70], 2] = True
        assert output[~touched].isfinite().all()
        if name == "value":
            assert (~output[..., 1][touched].isfinite()).all()
        else:
            assert output[touched].isnan().all()
        cotangent = torch.where(touched[..., None], 0.0, torch.randn(output.shape))
        gradients = torch.autograd.grad(output, leaves, cotangent)
        by_key = torch.zeros_like(touched)  # keys that a touched query sees
        by_key[1, sees[touched[1, :, 2]].any(0), 2] = True
        assert gradients[0][~touched].isfinite().all()
        assert gradients[1][~by_key].isfinite().all()
        assert gradients[2][~by_key].isfinite().all()


def test_the_same_bits_in_every_run_on_any_number_of_threads(threads: Callable[[int], None]) -> None:
    pattern = (Strided(50, 30) | Global(2)) & Causal()
    inputs = [rows(700, 2, batch=1) for _ in range(3)]
    threads(1)
    expected = results(inputs, pattern, torch.float32, "cpu")
    for count in (1, 2, 3, 2):
        threads(count)
        for one, other in zip(results(inputs, pattern, torch.float32, "cpu"), expected, strict=True):
            assert torch.equal(one, other)


def test_second_derivatives() -> None:
    pattern = Window(9, 2) | Global(1)
    inputs = [rows(40, 2) for _ in range(3)]
    shapes = [x.shape for x in inputs]
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [shapes[0], *shapes]]
    found = []
    for dtype in (torch.float32, torch.float64):
        own = [x.to(dtype).requires_grad_() for x in inputs]
        if dtype == torch.float32:
            output = attend(own[0], own[1], own[2], pattern, implementation="cpu").output
        else:
            mask = pattern.to_dense(40, 40)
            output = attend(own[0], own[1], own[2], mask=mask, implementation="reference").output
        first = torch.autograd.grad(output, own, cotangents[0].to(dtype), create_graph=True)
        second = torch.autograd.grad(first, own, [x.to(dtype) for x in cotangents[1:]])
        found.append([x.double() for x in (*first, *second)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    inputs = [rows(130, 2, 16).to(dtype) for _ in range(3)]
    output = attend(inputs[0], inputs[1], inputs[2], Window(30, 30), implementation="cpu").output
    query, key, value = (x.double() for x in inputs)
    exact = attend(query, key, value, mask=Window(30, 30).to_dense(130, 130)).output
    assert output.dtype == dtype
    # Products of bfloat16 take weights that are rounded, too.
    close = {"rtol": 2**-7, "atol": 1e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(output, exact.to(dtype), **close)


def test_operator(opcheck: Any) -> None:
    parts = runs_of(Strided(4, 1) & Causal(), 9, 9)
    assert len(parts) > 1
    inputs = [rows(9, 2, 3).double().requires_grad_() for _ in range(3)]
    mask = torch.rand(2, 1, 9, 9) < 0.7
    bias = torch.randn(2, 17, dtype=torch.float64, requires_grad=True)
    for softcap, *given in ((0.0, None, None, None, parts, 0.0, False), (2.0, mask, bias, None, parts, 0.0, True)):
        opcheck(run_attention, RunAttention(*inputs, *given, scale=0.5, softcap=softcap))


class TestRuns:
    def test_hold_the_pairs_of_the_pattern(self) -> None:
        for pattern in patterns_of(61):
            parts = runs_of(pattern, 61, 61)
            query, key = pairs_of(parts)
            pairs = torch.zeros(61, 61, dtype=torch.int64).index_put_((query, key), torch.tensor(1), accumulate=True)
            assert torch.equal(pairs, pattern.to_dense(61, 61).long())
            assert sum(part.num_pairs for part in parts) == int(pairs.sum())

    def test_of_a_step_take_no_more_tiles_than_their_neighbourhoods(self) -> None:
        # In order of residue a class of 64 is a block of its own.
        (alone, part) = runs_of(Strided(64, 0), 4096, 4096)
        assert alone.num_pairs == 4096
        assert pairs_in_tiles(part, 4096) == 4096 * 64

    def test_are_counted_in_tiles(self) -> None:
        # As many queries at a time as a register holds, with all keys from the first to the last that one of them sees.
        at_once = {"v3": 8, "baseline": 4}.get(str(load.info().level), 16)
        (part,) = runs_of(Window(16, 0), 64, 64)
        keys = [min(last, 16 + at_once) for last in range(at_once, 65, at_once)]
        assert pairs_in_tiles(part, 64) == at_once * sum(keys)
        for pattern in patterns_of(200):
            for part in runs_of(pattern, 200, 200):
                assert part.num_pairs <= pairs_in_tiles(part, 200) <= 16 * 200 * part.offsets.numel()

    def test_of_documents_end_with_them(self) -> None:
        (part,) = runs_of(Documents((64,) * 5), 320, 320)
        assert pairs_in_tiles(part, 320) == 5 * 64 * 64

    def test_are_kept(self) -> None:
        assert runs_of(Window(3, 2), 10, 10) is runs_of(Window(3, 2), 10, 10)


class TestChoice:
    def test_notes_the_parts(self) -> None:
        x = rows(300, 2, 8)
        text = str(explain(x, x, x, Strided(10, 3) & Causal()))
        assert text.startswith(
            "runs: cpu\nStrided(stride=10, local=3, align=None) & Causal(align=None):\n  300 runs of keys in"
        )
        assert "in order of their residue" in text

    def test_other_scores_run_over_edges(self) -> None:
        x, reason = rows(30, 2, 8), "tiles are products, and the score is Dynamic"
        settings: dict[str, Any] = {"score": Dynamic(torch.zeros(2, 8))}
        explanation = explain(x, x, x, Window(2, 2), **settings)
        assert explanation.implementation == "graph"
        assert explanation.refusals == (("cpu", reason),)
        assert explanation.notes == ("Window(left=2, right=2, align=None) as a Graph of 144 edges",)
        with pytest.raises(UnsupportedError, match=reason):
            attend(x, x, x, Window(2, 2), implementation="cpu", **settings)

    def test_scattered_pairs_run_over_edges(self) -> None:
        x = torch.zeros(1, 3000, 1, 8)
        assert explain(x, x, x, RandomBlocks(20, 0, 1)).refusals[0][1].startswith("the pairs are scattered: 60,000 in")


class TestUncheckedArrays:
    """The kernels compare what they are given, however the call came about."""

    def call(self, **changes: Any) -> Tensor:
        x = rows(9, 1, 4)
        part = replace(runs_of(Window(1, 1), 9, 9)[0], **changes)
        record = RunAttention(x, x, x, None, None, None, (part,), 0.0, is_dense=False, scale=1.0, softcap=0.0)
        return run_attention(record)[0]

    def test_runs(self) -> None:
        part = runs_of(Window(1, 1), 9, 9)[0]
        for changes in (
            {"ends": part.ends + 1},
            {"begins": part.begins - 1},
            {"begins": part.ends},
            {"query_order": torch.full((9,), 9)},
            {"key_order": torch.full((9,), -1)},
            {"offsets": part.offsets.flip(0)},
            {"query_order": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7])},
            {"key_order": torch.tensor([8, 1, 2, 3, 4, 5, 6, 7, 8])},
        ):
            with pytest.raises(IndexRangeError, match="run_attention_forward"):
                self.call(**changes)

    def test_sizes(self) -> None:
        part = runs_of(Window(1, 1), 9, 9)[0]
        with pytest.raises(InvalidInputError, match=r"parts\.ends: expected torch\.int64 on cpu, \(num_runs=9\), got"):
            self.call(ends=part.ends[:-1])
        with pytest.raises(
            InvalidInputError, match=r"parts\.offsets: expected torch\.int64 .*\(num_queries=9 \+ 1\), got"
        ):
            self.call(offsets=part.offsets[:-1])
        with pytest.raises(InvalidInputError, match=r"parts\.key_order: expected torch\.int64 .*\(num_keys=9\), got"):
            self.call(key_order=torch.zeros(8, dtype=torch.int64))


def test_nan_of_an_earlier_part_shows_beside_a_part_of_larger_scores() -> None:
    query, key, value = torch.ones(1, 9, 1, 2), torch.zeros(1, 9, 1, 2), torch.ones(1, 9, 1, 2)
    key[0, 6], value[0, 4] = 200.0, torch.nan
    pattern = Strided(3, 1)
    ours, theirs = (
        attend(query, key, value, pattern, scale=1.0, implementation=each).output for each in ("cpu", "reference")
    )
    assert theirs[0, 3].isnan().all()
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_products_that_overflow_are_not_taken_for_hidden() -> None:
    query, key = torch.ones(1, 64, 1, 1), torch.ones(1, 64, 1, 1)
    query[0, 0], key[0, 3] = 1e30, -1e30
    value = torch.randn(1, 64, 1, 2)
    found = [
        attend(query, key, value, Window(64, 64), scale=1.0, implementation=each).output
        for each in ("cpu", "reference")
    ]
    assert found[0][0, 0].isnan().all()
    assert torch.equal(found[0].isnan(), found[1].isnan())


def test_a_transform_or_a_default_device_leaves_no_mark() -> None:
    x = rows(40, 1, 8, batch=1)
    pattern = Window(17, 3)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda y: attend(y, y, y, pattern, implementation="cpu").output.sum())(x)
    with torch.device("meta"):
        runs_of(Window(17, 4), 40, 40)
    for each in (pattern, Window(17, 4)):
        ours = attend(x, x, x, each, implementation="cpu").output
        torch.testing.assert_close(ours, attend(x, x, x, each, implementation="reference").output)
