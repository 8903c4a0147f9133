"""bfloat16 and float16 at every level that this processor runs: nearer to exact numbers than plain PyTorch.

The level "v4-bf16" multiplies bfloat16 numbers two by two, and rounds weights to bfloat16 between its products. The
others widen to float32.
"""

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Pattern, Strided, Window, attend, explain
from anyattention.native import load

pytestmark = pytest.mark.usefixtures("native")

_LEVELS = [level for level in load.info().supported if level in load.info().built]
_BF16, _F16, _F64 = torch.bfloat16, torch.float16, torch.float64

# A query times a key is 0.1, but for a processor that takes subnormal numbers for 0.
_SUBNORMAL = """
import torch
from anyattention import attend
from anyattention.native import load

query, key = torch.full((1, 9, 1, 2), 2.0**-130).bfloat16(), torch.full((1, 1, 1, 2), 2.0**126).bfloat16()
result = attend(query, key, key, scale=1.0, return_logsumexp=True, implementation="cpu")
print(load.info().level, float(result.logsumexp[0, 0, 0]))
"""


@pytest.fixture(params=_LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the kernels of a level."""
    use_level(monkeypatch, request.param)
    return request.param


def use_level(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setattr(load, "_state", load._State())
    monkeypatch.setenv("ANYATTENTION_LEVEL", level)
    assert load.info().level == level


@pytest.mark.parametrize("level", _LEVELS)
def test_which_products_run(level: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _SUBNORMAL],
        env={**os.environ, "ANYATTENTION_LEVEL": level},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    expected = 0.0 if level == "v4-bf16" else 2.0**-3
    assert finished.stdout.split() == [level, str(expected)]


def test_the_level_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("v4-bf16" in load._supported()) == (load._cpu_flags() >= load._FLAGS_V4_BF16)
    monkeypatch.setattr(load, "_cpu_flags", lambda: load._FLAGS_V4)
    assert load._supported() == ["v4", "v3", "baseline"]
    monkeypatch.setattr(load, "_cpu_flags", lambda: load._FLAGS_V4 | {"avx512_bf16"})
    assert load._supported() == ["v4-bf16", "v4", "v3", "baseline"]


class Call(NamedTuple):
    """Arguments in half precision, and a cotangent of the output."""

    rows: list[Tensor]
    pattern: Pattern | None
    allowed: Tensor
    cotangent: Tensor

    def plain(self, *rows: Tensor) -> Tensor:
        """The output in PyTorch, every step rounded to the rows' dtype."""
        query, key, value = rows
        shared = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(shared, 2), value.repeat_interleave(shared, 2)
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~self.allowed, -torch.inf).softmax(-1).masked_fill(~self.allowed, 0)
        return torch.einsum("bhij,bjhd->bihd", weights, value)

    def ours(self, *rows: Tensor) -> Tensor:
        assert explain(*rows, self.pattern).implementation == "cpu"
        return attend(*rows, self.pattern).output

    def results(self, run: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The output and the gradients, run in a dtype."""
        leaves = [x.to(dtype).requires_grad_() for x in self.rows]
        output = run(*leaves)
        grads = torch.autograd.grad(output, leaves, self.cotangent.to(output.dtype))
        found = dict(zip(("output", "query", "key", "value"), (output.detach(), *grads), strict=True))
        return {name: x.double() for name, x in found.items()}


def random_call(seed: int, dtype: torch.dtype) -> Call:
    """Awkward sizes, of one tile and of several; values with a mean, too, which roundings of weights are shares of."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, key_heads, group = draw.choice([1, 2]), draw.choice([1, 2]), draw.choice([1, 2, 3])
    length = draw.choice([1, 2, 3, 7, 17, 63, 65, 100, 129, 200, 300])
    patterns = [
        None,
        None,
        Causal("top_left"),
        Window(3, 2),
        Window(20, 70),
        Strided(5, 4),
        Window(40, 0) & Causal("top_left"),
    ]
    pattern = draw.choice(patterns)
    num_keys = length if pattern else draw.choice([length, 2, 33, 64, 131])
    head_dim, value_dim = draw.choice([1, 7, 13, 16, 40, 64, 65]), draw.choice([1, 3, 7, 16, 40, 64, 66])
    query = torch.randn(batch, length, key_heads * group, head_dim) * draw.choice([0.3, 1.0, 3.0])
    key = torch.randn(batch, num_keys, key_heads, head_dim)
    value = torch.randn(batch, num_keys, key_heads, value_dim) + draw.choice([0.0, 2.0])
    cotangent = torch.randn(batch, length, key_heads * group, value_dim).to(dtype)
    allowed = torch.ones(length, num_keys, dtype=torch.bool) if pattern is None else pattern.to_dense(length, num_keys)
    return Call([query.to(dtype), key.to(dtype), value.to(dtype)], pattern, allowed, cotangent)


@pytest.mark.parametrize("dtype", [_BF16, _F16])
@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 300), marks=pytest.mark.exhaustive)])
def test_errors_beside_those_of_plain_half_precision(level: str, dtype: torch.dtype, seeds: range) -> None:
    """At most twice as large in the output, and three times in gradients, and a rounding of the result."""
    for seed in seeds:
        call = random_call(seed, dtype)
        exact = call.results(call.plain, _F64)
        plain, found = call.results(call.plain, dtype), call.results(call.ours, dtype)
        for name, expected in exact.items():
            theirs, ours = ((x[name] - expected).abs().max() for x in (plain, found))
            rounding = (expected.to(dtype).double() - expected).abs().max()
            # A gradient of 0 is what is left of float32 sums.
            bound = (2 if name == "output" else 3) * theirs + rounding + 1e-4
            assert ours <= bound, (seed, name, ours, theirs, rounding)


def test_equal_values_are_their_mean(level: str) -> None:
    """Outputs are relative to the sum of the weights as they are multiplied, so that their rounding does not show."""
    # Most weights are exp(1.5) relative to the first tile's, and 0.3 % from bfloat16.
    query, key = torch.ones(1, 150, 1, 1), torch.full((1, 400, 1, 1), 1.5)
    key[:, :64] = 0
    value = torch.ones(1, 400, 1, 7).bfloat16()
    for pattern in (None, Window(200, 200, align="top_left")):
        output = attend(query.bfloat16(), key.bfloat16(), value, pattern, scale=1.0).output
        torch.testing.assert_close(output, torch.ones_like(output), rtol=0, atol=0)


def test_which_numbers_a_broken_one_reaches(level: str) -> None:
    """Also beside a hidden key or query that shares a pair of products with it."""
    for which, place, broken in itertools.product(range(3), (4, 5, 66), (torch.nan, torch.inf, -torch.inf)):
        rows = broken_rows(which, place, broken)
        cotangent = rows.pop()
        ours, theirs = (gradients(rows, cotangent, name, pattern=Causal()) for name in ("cpu", "reference"))
        for found, expected in zip(ours, theirs, strict=True):
            assert torch.equal(found.isfinite(), expected.isfinite()), (which, place, broken)


def test_which_gradients_a_broken_one_reaches(level: str) -> None:
    for place in (4, 5, 66):
        *rows, cotangent = broken_rows(3, place, torch.nan)
        _, *grads = gradients(rows, cotangent, "cpu", pattern=Causal())
        reached = [(~grad.isfinite()).nonzero()[:, 1].unique().tolist() for grad in grads]
        assert reached == [[place], list(range(place + 1)), list(range(place + 1))]


def broken_rows(which: int, place: int, broken: float) -> list[Tensor]:
    """Query, key, value and a cotangent, one of them with one broken number."""
    tensors = [torch.randn(1, 67, 2, width).bfloat16() for width in (7, 7, 4, 4)]
    tensors[which][0, place, 1, 2] = broken
    return tensors


def gradients(rows: list[Tensor], cotangent: Tensor, implementation: str, **settings: Any) -> list[Tensor]:
    """The output and the gradients of the rows."""
    leaves = [x.detach().requires_grad_() for x in rows]
    torch.manual_seed(5)
    output = attend(*leaves, implementation=implementation, **settings).output
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


@pytest.mark.parametrize("which", [1, 2])
def test_hidden_keys_do_not_leak(level: str, which: int) -> None:
    mask = torch.rand(65, 70) < 0.5
    mask[:, 3] = mask[:, 68] = False
    rows = [torch.randn(1, length, 2, 16).bfloat16() for length in (65, 70, 70)]
    cotangent = torch.randn(1, 65, 2, 16).bfloat16()
    clean = gradients(rows, cotangent, "cpu", mask=mask)
    rows[which][:, [3, 68]] = torch.nan
    # A tile with NaN goes pair by pair, where weights are not rounded.
    torch.testing.assert_close(gradients(rows, cotangent, "cpu", mask=mask), clean, rtol=0.02, atol=0.02)


def test_no_bit_depends_on_the_threads(level: str, threads: Callable[[int], None]) -> None:
    for seed in range(6):
        call = random_call(seed, _BF16)
        threads(1)
        one = call.results(call.ours, _BF16)
        for number in (2, 3):
            threads(number)
            many = call.results(call.ours, _BF16)
            assert all(torch.equal(one[name], many[name]) for name in one), seed


def test_rows_are_read_where_they_lie(level: str) -> None:
    """Rows that begin at an odd number, or lie an odd number apart."""
    for head_dim in (6, 7, 16):
        rows = [torch.randn(2, 70, 3, head_dim).bfloat16() for _ in range(3)]
        odd = [torch.zeros(2, 70, 3 * head_dim + 5, dtype=_BF16) for _ in rows]
        for x, wide in zip(rows, odd, strict=True):
            wide[..., 3 : 3 + 3 * head_dim] = x.flatten(2)
        views = [wide[..., 3 : 3 + 3 * head_dim].unflatten(2, (3, head_dim)) for wide in odd]
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in rows]
        leaves = [[x.detach().requires_grad_() for x in each] for each in (rows, views, turned)]
        outputs = [attend(*each, Causal()).output for each in leaves]
        cotangent = torch.randn_like(outputs[0])
        grads = [torch.autograd.grad(output, each, cotangent) for output, each in zip(outputs, leaves, strict=True)]
        for other in (1, 2):
            assert torch.equal(outputs[0], outputs[other])
            assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[other], strict=True))


def test_logsumexp_is_as_in_float32(level: str) -> None:
    query, key, value = (torch.randn(2, 300, 2, 40).bfloat16() for _ in range(3))
    found = attend(query, key, value, Causal(), return_logsumexp=True).logsumexp
    assert found is not None
    exact = attend(query.double(), key.double(), value.double(), Causal(), return_logsumexp=True).logsumexp
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=3e-6)


def test_weights_are_those_of_the_output(level: str) -> None:
    query, key = (torch.randn(2, 130, 2, 40).bfloat16() for _ in range(2))
    value = torch.eye(130)[None, :, None].expand(2, 130, 2, 130).bfloat16()
    result = attend(query, key, value, Causal(), return_weights="heads")
    assert result.weights is not None
    torch.testing.assert_close(result.weights.float().sum(-1), torch.ones(2, 2, 130), rtol=0, atol=0.01)
    torch.testing.assert_close(result.output.transpose(1, 2), result.weights, rtol=0.01, atol=1e-4)


SETTINGS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.7},
    "mask": {"mask": torch.rand(3, 131, 70, generator=torch.Generator().manual_seed(1))[None] < 0.5},
    "bias": {"bias": torch.randn(131, 70, generator=torch.Generator().manual_seed(2))},
    "dropout": {"dropout": 0.4},
    "all": {"softcap": 1.5, "dropout": 0.2, "bias": torch.randn(70), "mask": torch.arange(131)[:, None] % 3 > 0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(level: str, name: str) -> None:
    rows = [torch.randn(2, length, 3, 13).bfloat16() for length in (131, 70, 70)]
    cotangent = torch.randn(2, 131, 3, 13).bfloat16()
    found = gradients(rows, cotangent, "cpu", **SETTINGS[name])
    exact = gradients([x.double() for x in rows], cotangent.double(), "reference", **SETTINGS[name])
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.01, atol=0.01 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, _F64, _F16])
def test_other_dtypes_have_the_bits_of_v4(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    found: dict[int, dict[str, Tensor]] = {}
    for level, seed in itertools.product([level for level in _LEVELS if level.startswith("v4")], range(12)):
        use_level(monkeypatch, level)
        call = random_call(seed, dtype)
        results = call.results(call.ours, dtype)
        for name, expected in found.setdefault(seed, results).items():
            assert torch.equal(results[name], expected), (level, seed, name)
