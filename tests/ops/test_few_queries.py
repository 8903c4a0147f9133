"""Calls of few queries, as decoding makes them: keys in pieces, read once for the heads that share them."""

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Full, Global, Pattern, Strided, Window, attend, explain
from tests.oracle import expected

pytestmark = pytest.mark.usefixtures("native")

LAST = {"align": "bottom_right"}
PATTERNS = [
    Full(),
    Causal(**LAST),
    Window(5, 0, **LAST),
    Strided(3, 2, **LAST),
    Window(70, 0, **LAST) | Global(3, **LAST),
]


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def rows(queries: int, keys: int, heads: int = 2, key_heads: int = 1, dtype=torch.float64) -> dict[str, Tensor]:
    """Queries, keys and values of a batch of 2; widths that are no whole vectors."""
    return {
        "query": numbers(2, queries, heads, 13, dtype=dtype),
        "key": numbers(2, keys, key_heads, 13, dtype=dtype),
        "value": numbers(2, keys, key_heads, 7, dtype=dtype),
    }


def check(given: dict, **settings) -> None:
    found = attend(**given, **settings, return_logsumexp=True, implementation="cpu")
    wide = {name: x.double() for name, x in given.items()}
    wanted = expected({**wide, **settings})
    close = {"rtol": 1e-10, "atol": 1e-12} if given["query"].dtype is torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(found.output, wanted.output.to(found.output.dtype), **close)
    torch.testing.assert_close(found.logsumexp, wanted.logsumexp.to(found.output.dtype), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "heads", "key_heads"), [(1, 2, 2), (1, 6, 1), (3, 4, 2), (8, 1, 1), (5, 2, 1)])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_agrees_with_the_definition(pattern: Pattern, queries, heads, key_heads, dtype):
    check(rows(queries, 150, heads, key_heads, dtype), pattern=pattern)


@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65, 1024, 1025, 2500])
@pytest.mark.parametrize("width", [16, 64, 40])
def test_any_number_of_keys(keys, width):
    given = {
        "query": numbers(1, 1, 2, width),
        "key": numbers(1, keys, 2, width),
        "value": numbers(1, keys, 2, width),
    }
    check(given)
    check({name: x.float() for name, x in given.items()})


@pytest.mark.parametrize("queries", [1, 3])
def test_masks_biases_and_softcaps(queries):
    given = rows(queries, 1100, 4, 2)
    mask = numbers(2, 4, queries, 1100) > 0.3
    mask[0, 1] = False  # nothing to attend to
    mask[1, 2, :, 64:1088] = False
    bias = numbers(1, 4, 1, 1100)
    check(given, mask=mask)
    check(given, mask=mask, bias=bias, softcap=0.7)
    check(given, mask=mask[:, :1, :1], bias=bias, scale=3.0)
    result = attend(**given, mask=mask, return_logsumexp=True)
    assert (result.output[0, :, 1] == 0).all()
    assert result.logsumexp is not None
    assert (result.logsumexp[0, :, 1] == -torch.inf).all()


def test_hidden_numbers_do_not_leak_and_seen_ones_show():
    given = rows(2, 1200, 4, 2)
    given["key"][:, 70], given["value"][:, 71] = torch.nan, torch.nan
    given["value"][:, 1100] = torch.inf
    mask = torch.ones(2, 4, 2, 1200, dtype=torch.bool)
    mask[:, :, :, [70, 71, 1100]] = False
    mask[1, 3, 1, 71] = True
    found = attend(**given, mask=mask).output
    broken = ~found.isfinite()
    assert broken[1, 1, 3].all()
    assert broken.sum() == found.shape[-1]
    assert not attend(**given).output.isfinite().any()


def test_a_score_that_is_not_finite_shows():
    given = rows(1, 100)
    given["key"][:, 50] = -torch.inf
    assert attend(**given).output.isnan().all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_threads_do_not_matter(pattern: Pattern):
    given = rows(3, 3000, 4, 2, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attend(**given, pattern=pattern, return_logsumexp=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.output, found[0].output)
        assert torch.equal(other.logsumexp, found[0].logsumexp)


def test_a_long_row_keeps_its_digits():
    """A mean of 100,000 values far from 0."""
    given = {"query": torch.zeros(1, 1, 1, 16), "key": torch.randn(1, 100_000, 1, 16)}
    value = 100 + torch.randn(1, 100_000, 1, 16)
    found = attend(**given, value=value).output
    torch.testing.assert_close(found.double(), value.double().mean(1, keepdim=True), rtol=3e-7, atol=0)


@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("implementation", ["cpu", "torch", "reference"])
def test_causal_with_a_past(implementation, offset):
    """New queries at the end of older keys see the same as through a mask, and no mask is made."""
    given = {name: x.requires_grad_() for name, x in rows(130, 130 + offset).items()}
    settings = {"implementation": implementation, "return_logsumexp": True}
    found = attend(**given, pattern=Causal(**LAST), **settings)
    wanted = expected({**given, "pattern": Causal(**LAST)})
    torch.testing.assert_close(found.output, wanted.output)
    torch.testing.assert_close(found.logsumexp, wanted.logsumexp)
    cotangent = numbers(*found.output.shape)
    leaves = list(given.values())
    gradients = torch.autograd.grad(found.output, leaves, cotangent)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted.output, leaves, cotangent))
    assert explain(**given, pattern=Causal(**LAST)).implementation == "cpu"


def test_queries_before_all_keys_are_empty():
    given = rows(9, 4)
    check(given, pattern=Causal(**LAST))
    check(given, pattern=Causal(align="top_left"))


@pytest.mark.parametrize("pattern", [Full(), Causal(**LAST), Window(1500, 0, **LAST), Window(3, 0, **LAST)], ids=str)
def test_dropout_drops_what_the_reference_drops(pattern: Pattern):
    given = rows(2, 2200, 4, 2)
    mask = numbers(2, 4, 1, 2200) > -0.5
    found = []
    for implementation in ("cpu", "reference"):
        torch.manual_seed(5)
        found.append(attend(**given, pattern=pattern, mask=mask, dropout=0.4, implementation=implementation).output)
    torch.testing.assert_close(*found)
