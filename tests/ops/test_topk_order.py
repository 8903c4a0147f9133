"""Which keys are chosen where scores are equal, or a softcap makes them so: the same ones by every way to compute."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Global, Pattern, Strided, TopK, Window, attend, explain

QUERIES, KEYS, K = 9, 61, 7
PATTERNS = {
    "all": None,
    "causal": Causal("bottom_right"),
    "window": Window(20, 20, "top_left"),
    "strided": Strided(3, 1, "bottom_right"),
    "window and global": Window(3, 3, "bottom_right") | Global(4, "bottom_right"),
    "strided and causal": Strided(3, 1, "bottom_right") & Causal("bottom_right"),
}


def scores_of(query: Tensor, key: Tensor, level: Tensor) -> Tensor:
    """`query . key` `(B, L, H, S)` in float64, with equal bits for keys of one level, which are copies."""
    first = torch.stack([(level == each).nonzero()[0, 0] for each in level.unique()])
    return torch.einsum("blhd,bshd->blhs", query.double(), key[:, first].double())[..., level]


def first_largest(ranks: list[Tensor], k: int = K) -> Tensor:
    """The oracle: a sort by tuples, the place last."""
    *shape, num_keys = ranks[0].shape
    flat = [x.reshape(-1, num_keys).tolist() for x in ranks]
    rows = [
        sorted((*(-x for x in key), place) for place, key in enumerate(zip(*row, strict=True)))
        for row in zip(*flat, strict=True)
    ]
    chosen = [[-1 if key[0] == torch.inf else key[-1] for key in row[:k]] for row in rows]
    return torch.tensor(chosen).view(*shape, -1)


def repeated(dtype: torch.dtype, heads: int = 2, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys that are copies of six rows, and which."""
    level = torch.randint(6, (KEYS,))
    level[:6] = torch.arange(6)
    key = torch.randn(2, 6, heads, width, dtype=dtype)[:, level]
    return torch.randn(2, QUERIES, heads, width, dtype=dtype), key, level


def hidden(scores: Tensor, among: Pattern | None) -> Tensor:
    if among is None:
        return scores
    return scores.masked_fill(~among.to_dense(QUERIES, KEYS)[None, :, None], -torch.inf)


def choose(query: Tensor, key: Tensor, among: Pattern | None, k: int = K, **settings: Any) -> Tensor:
    indices = attend(query, key, key, TopK(k, among), **settings).indices
    assert indices is not None
    return indices


def compiled(backend: str) -> Callable[..., Tensor]:
    def way(query: Tensor, key: Tensor, among: Pattern | None, **settings: Any) -> Tensor:
        torch._dynamo.reset()
        return torch.compile(choose, fullgraph=True, backend=backend)(query, key, among, **settings)

    return way


def by_kernels(query: Tensor, key: Tensor, among: Pattern | None, **settings: Any) -> Tensor:
    return choose(query, key, among, implementation="cpu", **settings)


def by_reference(query: Tensor, key: Tensor, among: Pattern | None, **settings: Any) -> Tensor:
    return choose(query, key, among, implementation="reference", **settings)


def as_users_call(query: Tensor, key: Tensor, among: Pattern | None, **settings: Any) -> Tensor:
    return choose(query, key, among, **settings)


WAYS: dict[str, Callable[..., Tensor]] = {
    "cpu": by_kernels,
    "reference": by_reference,
    "chosen": as_users_call,
    "traced": compiled("aot_eager"),
    "compiled": compiled("inductor"),
}
EVERY_WAY = [*[*WAYS][:-1], pytest.param("compiled", marks=pytest.mark.exhaustive)]


def runs(way: str, query: Tensor, key: Tensor, among: Pattern | None, **settings: Any) -> bool:
    names = explain(query, key, key, TopK(K, among), **settings).refusals
    return way != "cpu" or "cpu" not in dict(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", EVERY_WAY)
def test_of_equal_keys_the_first_are_chosen(way: str, pattern: str, dtype: torch.dtype, native: ModuleType) -> None:
    among = PATTERNS[pattern]
    for width in (5,) if way in ("traced", "compiled") else (1, 5, 32, 37):
        query, key, level = repeated(dtype, width=width)
        if not runs(way, query, key, among):
            return
        expected = first_largest([hidden(scores_of(query, key, level), among)])
        assert torch.equal(WAYS[way](query, key, among), expected)


@pytest.mark.parametrize("settings", [{}, {"softcap": 1e-3}, {"scale": 3.0}, {"scale": 1e-3, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", ["cpu", "reference", "chosen"])
def test_scale_and_softcap_change_no_order(
    way: str, pattern: str, sign: float, settings: dict[str, Any], native: ModuleType
) -> None:
    among = PATTERNS[pattern]
    query, key, level = repeated(torch.float32)
    settings = {**settings, "scale": sign * settings.get("scale", 1.0)}
    if not runs(way, query, key, among, **settings):
        return
    expected = first_largest([hidden(sign * scores_of(query, key, level), among)])
    assert torch.equal(WAYS[way](query, key, among, **settings), expected)


@pytest.mark.parametrize("way", EVERY_WAY[1:])
def test_a_saturated_cap_with_a_bias_leaves_the_choice_to_the_scores_before_it(way: str) -> None:
    query, key, level = repeated(torch.float64)
    scores = 100.0 + scores_of(query, key, level)
    # A product of 100 more for each key, so that tanh gives 1 for all of them.
    query = torch.cat([query, torch.full_like(query[..., :1], 10.0)], dim=-1)
    key = torch.cat([key, torch.full_like(key[..., :1], 10.0)], dim=-1)
    bias = torch.randint(3, (KEYS,)).double()
    settings = {"scale": 1.0, "softcap": 1.0, "bias": bias}
    expected = first_largest([bias.expand_as(scores), scores])
    assert torch.equal(WAYS[way](query, key, None, **settings), expected)


@pytest.mark.parametrize("among", [None, Strided(3, 1, "bottom_right")], ids=str)
@pytest.mark.parametrize("softcap", [None, 1e-3])
def test_a_bias_of_zeros_and_a_mask_choose_as_no_bias_does(among: Pattern | None, softcap: float | None) -> None:
    query, key, _ = repeated(torch.float32)
    plain = choose(query, key, among, softcap=softcap)
    assert torch.equal(choose(query, key, among, softcap=softcap, bias=torch.zeros(KEYS)), plain)
    mask = torch.rand(QUERIES, KEYS) < 0.7
    bias = torch.zeros(QUERIES, KEYS).masked_fill(~mask, -torch.inf)
    masked = choose(query, key, among, softcap=softcap, mask=mask)
    assert torch.equal(choose(query, key, among, softcap=softcap, bias=bias), masked)


@pytest.mark.parametrize("way", ["cpu", "reference"])
def test_nan_is_the_largest_and_the_first_nan_the_first(way: str, native: ModuleType) -> None:
    query, key, level = repeated(torch.float32)
    scores = scores_of(query, key, level)
    broken = torch.rand(KEYS) < 0.1
    key = torch.where(broken[:, None, None], torch.nan, key)
    expected = first_largest([torch.where(broken, 1e9, scores)], 20)
    assert torch.equal(WAYS[way](query, key, None, k=20), expected)


def test_keys_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference keeps the scores of some keys at a time; where it cuts decides nothing."""
    for dtype in (torch.float32, torch.float64):
        query, key, level = repeated(dtype)
        expected = first_largest([scores_of(query, key, level)])
        for scores_at_once in (1, 300, 5_000):
            monkeypatch.setattr("anyattention.ops.topk.reference._SCORES_AT_ONCE", scores_at_once)
            assert torch.equal(by_reference(query, key, None), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["cpu", "reference"])
def test_equal_keys_of_any_number_and_width(way: str, dtype: torch.dtype, native: ModuleType) -> None:
    for seed in range(300):
        torch.manual_seed(seed)
        queries, keys, width, heads = (int(torch.randint(1, most, ())) for most in (90, 300, 90, 4))
        query = torch.randn(1, queries, heads, width, dtype=dtype)
        key = torch.randn(1, 1, heads, width, dtype=dtype).expand(1, keys, heads, width).contiguous()
        if way == "cpu" and dtype == torch.float64:
            return
        k = min(keys, 20)
        assert torch.equal(WAYS[way](query, key, None, k=k), torch.arange(k).expand(1, queries, heads, k))
