"""Tokens that come one after the other give what the full pass over all of them gives."""

import copy
import dataclasses
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Fixed, Global, Graph, RelativeBias, Strided, TopK, Window
from anyattention.errors import (
    DimensionMismatchError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    UnsupportedError,
)
from anyattention.nn import KeyValueCache, MultiHeadAttention

LENGTH = 23
# Prefill, single steps, several at once, and more than the smallest room of a cache.
PARTS = {"one by one": [1] * LENGTH, "prefill": [5, 1, 1, 7, 1, 8], "at once": [LENGTH], "none": [0, 4, 0, 19, 0]}
PATTERNS = {
    "causal": None,
    "window": Window(3, 0),
    "causal window": Window(4, 4) & Causal(),
    "strided": Strided(3, 1) & Causal(),
    "strided window": Strided(2, 0) & Window(5, 0),
    "fixed": Fixed(4, 1) & Causal(),
    "global": (Window(2, 2) | Global(2)) & Causal(),
    "two windows": Window(1, 0) | Window(3, 0),
    "chosen": TopK(3, among=Causal()),
    "chosen of a window": TopK(2, among=Window(5, 0)),
    "bottom right": Causal(align="bottom_right"),
}
POSITIONS = ("none", "sinusoidal", "learned", "rope", "alibi")


def build(pattern: Any = None, **settings: Any) -> MultiHeadAttention:
    given = {"pattern": pattern} if pattern is not None else {"causal": True}
    return MultiHeadAttention(24, 6, dropout=0.0, dtype=torch.float64, **given, **settings)


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, 24, dtype=torch.float64)


def in_parts(module: MultiHeadAttention, x: Tensor, parts: list[int], cache: KeyValueCache, **more: Any) -> Tensor:
    outputs, begin = [], 0
    for count in parts:
        assert cache.length == begin
        outputs.append(module(x[:, begin : begin + count], past=cache, **more).output)
        begin += count
    assert cache.length == begin
    return torch.cat(outputs, 1)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.pairwise
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("key_heads", [None, 2])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_parts_are_the_full_pass(
    parts: str, positions: Any, name: str, key_heads: int | None, has_gradients: bool
) -> None:
    module = build(PATTERNS[name], positions=positions, num_kv_heads=key_heads, qk_norm=key_heads is None)
    x, cache = tokens(), KeyValueCache()
    expected = module(x, return_weights=False).output
    with torch.set_grad_enabled(has_gradients):
        found = in_parts(module, x, PARTS[parts], cache, return_weights=False)
    assert_close(found, expected)
    assert cache.num_kept == LENGTH


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["window", "causal window", "strided window", "two windows", "chosen of a window"])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_window_needs_no_more_than_it_sees(name: str, positions: Any, has_gradients: bool) -> None:
    reach = {"window": 3, "causal window": 4, "two windows": 3}.get(name, 5)
    module, x = build(PATTERNS[name], positions=positions, max_seq_len=200), tokens(200)
    expected = module(x).output
    for window in (reach, reach + 2):
        for parts in ([1] * 200, [90, 1, 1, 3, 60, *[1] * 45], [200]):
            cache = KeyValueCache(window=window)
            with torch.set_grad_enabled(has_gradients):
                assert_close(in_parts(module, x, parts, cache), expected)
            assert cache.num_kept == window
            # Never more than a call's own tokens, or the least room.
            assert cache.nbytes <= 2 * 2 * 24 * 8 * max(2 * window + 1, 16)


def test_memory_grows_by_doubling() -> None:
    module, cache = build(), KeyValueCache()
    sizes = []
    with torch.no_grad():
        for _ in range(300):
            module(tokens(1), past=cache, return_weights=False)
            sizes.append(cache.nbytes)
    assert len(set(sizes)) <= 6
    assert all(size >= 2 * 2 * 24 * 8 * count for count, size in enumerate(sizes, 1))
    assert sizes[-1] <= 2 * 2 * 2 * 24 * 8 * 300


def test_gradients_of_parts_are_those_of_the_full_pass() -> None:
    module, x = build(positions="rope"), tokens().requires_grad_()
    cotangent = torch.randn(2, LENGTH, 24, dtype=torch.float64)
    sources = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x).output, sources, cotangent)
    found = torch.autograd.grad(in_parts(module, x, [5, 1, 17], KeyValueCache()), sources, cotangent)
    assert_close(found, expected)


def test_weights_are_the_rows_of_the_full_ones() -> None:
    module, x, cache = build(), tokens(), KeyValueCache()
    expected = module(x, return_weights="heads").weights
    module(x[:, :9], past=cache)
    assert_close(module(x[:, 9:], past=cache, return_weights="heads").weights, expected[:, :, 9:])


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_sequences_padded_at_the_left(positions: Any) -> None:
    module, x = build(positions=positions), tokens()
    is_real = torch.ones(2, LENGTH, dtype=torch.bool)
    is_real[1, :4] = False
    cache, outputs = KeyValueCache(), []
    with torch.no_grad():
        for begin, end in itertools.pairwise([0, 7, 8, 9, LENGTH]):
            outputs.append(module(x[:, begin:end], past=cache, key_mask=is_real[:, :end]).output)
        alone = module(x[1:, 4:]).output
    # Both kinds of positions count distances alone.
    assert_close(torch.cat(outputs, 1)[1:, 4:], alone)


def test_inference_mode_before_training() -> None:
    module, x, cache = build(), tokens(), KeyValueCache()
    expected = module(x).output
    with torch.inference_mode():
        first = in_parts(module, x[:, :12], [5, 1, 6], cache)
    with torch.no_grad():
        second = module(x[:, 12:13], past=cache).output
    third = module(x[:, 13:], past=cache).output
    third.sum().backward()
    assert_close(torch.cat([first, second, third], 1), expected)
    assert module.query_projection.weight.grad is not None


def test_copies_and_orders_of_one_mode_go_on_in_another() -> None:
    module, x = build(), tokens()
    expected = module(x).output[:, 9:]

    def filled() -> KeyValueCache:
        cache = KeyValueCache()
        module(x[:, :9], past=cache)
        return cache

    with torch.inference_mode():
        copied, ordered = copy.deepcopy(filled()), filled()
        ordered.reorder(torch.tensor([0, 1]))
    with torch.no_grad():
        module(x[:, :0], past=ordered)
        for cache in (copied, ordered):
            assert_close(module(x[:, 9:], past=cache).output, expected)
    cache = KeyValueCache()
    output = module(x[:, :9], past=cache).output
    with torch.no_grad():
        module(x[:, :0], past=cache)
        module(x[:, 9:], past=cache)
    output.sum().backward()


def test_a_bias_by_distance_counts_from_the_last_key() -> None:
    module, x, cache = build(), tokens(), KeyValueCache()
    bias = RelativeBias(torch.randn(6, 9, dtype=torch.float64), first=-8)
    expected = module(x, bias=bias).output
    assert_close(in_parts(module, x, [5, 1, 17], cache, bias=bias), expected)
    with pytest.raises(InvalidConfigError, match=r"^bias.align: expected None or 'bottom_right' with a cache"):
        module(x, past=KeyValueCache(), bias=dataclasses.replace(bias, align="top_left"))


def test_a_mask_of_all_tokens_so_far_beside_a_window() -> None:
    module, x = build(Window(4, 0), positions="rope"), tokens()
    is_real = torch.rand(2, LENGTH) < 0.7
    expected = module(x, key_mask=is_real).output
    for cache in (KeyValueCache(), KeyValueCache(window=4)):
        with torch.no_grad():
            for begin, end in itertools.pairwise([0, 7, 8, 9, LENGTH]):
                found = module(x[:, begin:end], past=cache, key_mask=is_real[:, :end]).output
                assert_close(found, expected[:, begin:end])


def test_under_vmap() -> None:
    module, x, cache = build(), tokens(), KeyValueCache()
    many = torch.randn(3, 2, 1, 24, dtype=torch.float64)
    with torch.no_grad():
        module(x[:, :9], past=cache)
        module(x[:, 9:10], past=cache)

        def step(token: Tensor) -> Tensor:
            return module(token, past=copy.copy(cache), return_weights=False).output

        found = torch.func.vmap(step)(many)
        assert_close(found, torch.stack([step(token) for token in many]))


def test_what_a_caller_does_to_the_tokens_later_changes_nothing() -> None:
    module, x, cache = build(), tokens(), KeyValueCache()
    module.key_projection = module.value_projection = torch.nn.Identity()
    expected = module(x).output
    for has_gradients in (False, True):
        cache.reset()
        with torch.set_grad_enabled(has_gradients):
            begin = x[:, :9].clone()
            module(begin, past=cache)
            with torch.no_grad():
                begin.fill_(torch.nan)
            assert_close(module(x[:, 9:], past=cache).output, expected[:, 9:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision(dtype: torch.dtype) -> None:
    module, x = build(positions="rope").to(dtype), tokens().to(dtype)
    cache = KeyValueCache()
    with torch.no_grad():
        found, expected = in_parts(module, x, [9, 1, 13], cache), module(x).output
    torch.testing.assert_close(found, expected, rtol=0, atol={torch.float32: 1e-6}.get(dtype, 2e-2))


def test_a_failing_call_leaves_the_cache_as_it_was() -> None:
    module, x, cache = build(), tokens(), KeyValueCache()
    with torch.no_grad():
        module(x[:, :9], past=cache)
        with pytest.raises(InvalidMaskError):
            module(x[:, 9:11], past=cache, mask=torch.ones(2, 3))
        assert (cache.length, cache.num_kept) == (9, 9)
        assert_close(module(x[:, 9:], past=cache).output, module(x).output[:, 9:])


def test_beams_are_taken_in_place_of_others() -> None:
    module, x, cache = build(), tokens(), KeyValueCache()
    with torch.no_grad():
        module(x[:, :9], past=cache)
        cache.reorder(torch.tensor([1, 1]))
        taken = torch.cat([x[[1, 1], :9], x[:, 9:]], 1)
        assert_close(module(x[:, 9:], past=cache).output, module(taken).output[:, 9:])
        for wrong in (torch.tensor([2, 0]), torch.tensor([-1, 0])):
            with pytest.raises(InvalidInputError, match=r"^indices: expected numbers from 0 to 1, got"):
                cache.reorder(wrong)
        with pytest.raises(InvalidInputError, match=r"^indices: expected int64 \(batch,\), got torch.float32"):
            cache.reorder(torch.ones(2))
        with pytest.raises(InvalidInputError, match=r"^indices: expected int64"):
            cache.reorder([0, 1])  # pyright: ignore[reportArgumentType]


def test_a_copy_goes_on_by_itself() -> None:
    module, x, cache = build(), tokens(), KeyValueCache()
    with torch.no_grad():
        module(x[:, :9], past=cache)
        twins = [copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))]
        module(x[:, :3], past=cache)
        for twin in twins:
            assert (cache.length, twin.length) == (12, 9)
            assert_close(module(x[:, 9:], past=twin).output, module(x).output[:, 9:])
    cache.reset()
    assert (cache.length, cache.num_kept, cache.nbytes) == (0, 0, 0)
    assert repr(cache) == "KeyValueCache(length=0, num_kept=0)"
    assert repr(KeyValueCache(window=3)) == "KeyValueCache(window=3, length=0, num_kept=0)"


def test_each_module_has_a_cache_of_its_own() -> None:
    cache = KeyValueCache()
    build()(tokens(3), past=cache)
    with pytest.raises(InvalidInputError, match=r"^past: expected a cache of this module, got one that another module"):
        build()(tokens(3), past=cache)


@pytest.mark.parametrize(
    ("pattern", "error", "text"),
    [
        (Window(2, 2), InvalidConfigError, r"pattern: expected one that hides the future.*got Window.*causal=True"),
        (Strided(2, 1), InvalidConfigError, r"pattern: expected one that hides the future"),
        (Causal() | Global(1), InvalidConfigError, r"pattern: expected one that hides the future"),
        (TopK(2), InvalidConfigError, r"pattern: expected one that hides the future"),
        (Causal(align="top_left"), InvalidConfigError, r"align: expected None or 'bottom_right' with a cache"),
        (
            Causal() & Graph.from_adjacency(torch.ones(3, 3)),
            UnsupportedError,
            r"it belongs to sequences of one length, and those with a cache grow",
        ),
    ],
)
def test_patterns_that_cannot_grow(pattern: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build(pattern)(tokens(3), past=KeyValueCache())


def test_bad_caches() -> None:
    module = build()
    with pytest.raises(InvalidConfigError, match=r"pattern: expected one that hides the future"):
        MultiHeadAttention(24, 6)(tokens(3).float(), past=KeyValueCache())
    with pytest.raises(InvalidInputError, match=r"^past: expected a KeyValueCache or None, got list"):
        module(tokens(3), past=[])
    with pytest.raises(InvalidInputError, match=r"^window: expected an int of at least 1, got 0"):
        KeyValueCache(window=0)
    for arguments in ({"key": tokens(3)}, {"value": tokens(3)}, {"position_offset": 3}, {"lengths": [3, 2]}):
        with pytest.raises(UnsupportedError, match=r"with past: they do not go together"):
            module(tokens(3), past=KeyValueCache(), **arguments)
    for pattern, wanted in ((None, r"KeyValueCache\(\)"), (Window(4, 0), r"KeyValueCache\(window=4\)")):
        with pytest.raises(InvalidConfigError, match=rf"^past: expected .*: {wanted}, got one of the last 3 tokens"):
            build(pattern)(tokens(3), past=KeyValueCache(window=3))
    cache = KeyValueCache()
    module(tokens(3), past=cache)
    with pytest.raises(DimensionMismatchError, match=r"^past: expected a cache of 1 sequences, .* got one of 2"):
        module(tokens(3)[:1], past=cache)
    module.to(torch.float32)
    with pytest.raises(
        InvalidInputError, match=r"^key: expected torch.float64 on cpu, as the cache, got torch.float32"
    ):
        module(tokens(3).float(), past=cache)
    learned, cache = build(positions="learned", max_seq_len=5), KeyValueCache()
    with pytest.raises(DimensionMismatchError, match=r"at most max_seq_len=5"):
        in_parts(learned, tokens(6), [1] * 6, cache)
