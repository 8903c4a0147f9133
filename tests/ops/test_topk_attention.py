"""Attention to the keys of the largest scores: equal to dense attention masked to those keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import AttentionResult, Causal, Documents, Full, Pattern, TopK, Window, attend, explain
from anyattention.ops.topk import reference

# The kernels choose in float32; in float64 the reference runs, as it does for users.
_DTYPES = {"cpu": torch.float32, "reference": torch.float64}
PATTERNS = [None, Causal("bottom_right"), Window(4, 1, "top_left"), Causal("top_left")]


@pytest.fixture(params=["cpu", "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("native")
    return request.param


def leaves(
    implementation: str, queries: int = 7, keys: int = 11, heads: int = 3, key_heads: int = 3, batch: int = 2
) -> list[Tensor]:
    shapes = ((queries, heads, 5), (keys, key_heads, 5), (keys, key_heads, 2))
    return [torch.randn(batch, *shape, dtype=_DTYPES[implementation], requires_grad=True) for shape in shapes]


def run(implementation: str, inputs: list[Tensor], pattern: TopK, **settings: Any) -> AttentionResult:
    """The call, with everything returned, by the implementation that is named because it is the first that can."""
    settings = {"return_weights": True, "return_logsumexp": True, **settings}
    assert explain(inputs[0], inputs[1], inputs[2], pattern, **settings).implementation == implementation
    return attend(inputs[0], inputs[1], inputs[2], pattern, **settings)


def close(actual: Any, expected: Any, implementation: str, tolerance: float = 1e-4) -> None:
    if implementation == "cpu":
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
    else:
        torch.testing.assert_close(actual, expected)


def masked(inputs: list[Tensor], k: int, allowed: Tensor, **settings: Any) -> Any:
    """The oracle: all scores in float64, a plain sort of them, and dense attention under the mask of the k largest."""
    query, key, value = (x.double() for x in inputs)
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    scores = torch.einsum("blhd,bshd->bhls", query, key)
    if "bias" in settings:
        settings["bias"] = settings["bias"].double()
        scores = scores / query.shape[-1] ** 0.5 + settings["bias"]
    scores = torch.where(allowed, scores, -torch.inf)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    mask = (rank < k) & allowed
    return attend(
        query,
        key,
        value,
        mask=mask,
        return_weights="heads",
        return_logsumexp=True,
        implementation="reference",
        **settings,
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("among", PATTERNS, ids=str)
@pytest.mark.parametrize(("k", "key_heads"), [(1, 3), (4, 3), (4, 1), (11, 3), (20, 3)])
def test_equals_dense_attention_masked_to_them(
    k: int, key_heads: int, among: Pattern | None, implementation: str
) -> None:
    inputs = leaves(implementation, key_heads=key_heads)
    allowed = torch.ones(7, 11, dtype=torch.bool) if among is None else among.to_dense(7, 11)
    result = run(implementation, inputs, TopK(k, among))
    expected = masked(inputs, k, allowed)
    close(result.output, expected.output, implementation)
    close(result.logsumexp, expected.logsumexp, implementation)
    assert result.indices is not None
    assert result.weights is not None
    assert result.indices.dtype == torch.int64
    assert result.indices.shape == result.weights.shape == (2, 7, 3, k)
    at = result.indices.transpose(1, 2).clamp(min=0)
    weights = torch.where(result.indices < 0, 0.0, expected.weights.gather(-1, at).transpose(1, 2))
    close(result.weights, weights, implementation)
    assert (result.weights.diff(dim=-1) <= 1e-6).all()
    assert torch.equal((result.indices >= 0).sum(-1), allowed.sum(-1).clamp(max=k)[None, :, None].expand(2, 7, 3))
    dtype = inputs[0].dtype
    cotangents = [torch.randn(2, 7, 3, 2, dtype=dtype), torch.randn(2, 7, 3, dtype=dtype)]
    more = [torch.randn(x.shape, dtype=dtype) for x in inputs]
    found = []
    for each in (result, expected):
        assert each.logsumexp is not None
        gradients = [x.to(each.output.dtype) for x in cotangents]
        first = torch.autograd.grad([each.output, each.logsumexp], inputs, gradients, create_graph=True)
        found.append([*first, *torch.autograd.grad(first, inputs, more)])
    close(found[0], found[1], implementation, 1e-3)


def test_weights_have_gradients(implementation: str) -> None:
    inputs = leaves(implementation)
    result = run(implementation, inputs, Causal("bottom_right") & TopK(4))
    plain = [x.detach().double().requires_grad_() for x in inputs]
    expected = attend(plain[0], plain[1], plain[2], Causal("bottom_right") & TopK(4), return_weights=True)
    cotangent = torch.randn(2, 7, 3, 4, dtype=torch.float64)
    assert result.weights is not None
    assert expected.weights is not None
    gradients = torch.autograd.grad(result.weights, inputs[:2], cotangent.to(inputs[0].dtype))
    close(gradients, torch.autograd.grad(expected.weights, plain[:2], cotangent), implementation)


def test_mask_and_bias(implementation: str) -> None:
    inputs = leaves(implementation)
    mask = torch.rand(2, 1, 7, 11) < 0.7
    bias = torch.randn(1, 3, 7, 11, dtype=inputs[0].dtype, requires_grad=True)
    result = run(implementation, inputs, TopK(3), mask=mask, bias=bias)
    expected = masked(inputs, 3, mask, bias=bias)
    close(result.output, expected.output, implementation)
    cotangent = torch.randn(2, 7, 3, 2, dtype=torch.float64)
    (by_bias,) = torch.autograd.grad(result.output, bias, cotangent.to(result.output.dtype))
    close(by_bias, torch.autograd.grad(expected.output, bias, cotangent)[0], implementation)
    # A bias for each key alone, and -inf that hides.
    row = torch.randn(11, dtype=inputs[0].dtype)
    row[4] = -torch.inf
    result = run(implementation, inputs, TopK(3), bias=row)
    assert result.indices is not None
    assert not (result.indices == 4).any()
    allowed = (row != -torch.inf).expand(7, 11)
    expected = masked(inputs, 3, allowed, bias=torch.where(row == -torch.inf, 0.0, row))
    close(result.output, expected.output, implementation)


def test_a_cap_keeps_the_order(implementation: str) -> None:
    inputs = leaves(implementation)
    capped = run(implementation, inputs, TopK(3), softcap=2.0)
    plain = run(implementation, inputs, TopK(3))
    assert capped.indices is not None
    assert plain.indices is not None
    assert torch.equal(capped.indices, plain.indices)
    assert not torch.allclose(capped.output, plain.output)
    rows = [x.double() for x in inputs]
    close(capped.output, attend(rows[0], rows[1], rows[2], TopK(3), softcap=2.0).output, implementation)


def test_a_negative_scale_chooses_the_smallest_products(implementation: str) -> None:
    inputs = leaves(implementation)
    result = run(implementation, inputs, TopK(11), scale=-1.0)
    opposite = run(implementation, inputs, TopK(11), scale=1.0)
    assert result.indices is not None
    assert opposite.indices is not None
    assert torch.equal(result.indices, opposite.indices.flip(-1))


def whole_numbers(*shape: int) -> Tensor:
    """Small integers in float32, whose products are exact and often equal."""
    return torch.randint(-3, 4, shape).float()


def sorted_keys(query: Tensor, key: Tensor, k: int, allowed: Tensor | None = None) -> Tensor:
    """The oracle of whole numbers: a stable sort, so that of equal scores the first key is taken."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("blhd,bshd->blhs", query, key)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    best, indices = scores.sort(dim=-1, descending=True, stable=True)
    return torch.where(best == -torch.inf, -1, indices)[..., :k]


@pytest.mark.parametrize("width", [1, 7, 64, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (3, 16, 40))])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "k"),
    [
        (1, 1, 1, 1, 1),
        (1, 300, 2, 1, 5),
        (5, 97, 6, 3, 97),
        (70, 193, 2, 2, 1),
        (300, 130, 3, 1, 40),
        (3, 20_000, 4, 2, 7),
        (90, 9_000, 1, 1, 3),
    ],
)
def test_the_kernel_chooses_as_a_stable_sort_does(
    queries: int, keys: int, heads: int, key_heads: int, k: int, width: int, native: ModuleType
) -> None:
    query, key = whole_numbers(2, queries, heads, width), whole_numbers(2, keys, key_heads, width)
    result = run("cpu", [query, key, key], TopK(k))
    assert result.indices is not None
    assert torch.equal(result.indices, sorted_keys(query, key, k))


@pytest.mark.parametrize(
    "among",
    [
        Full(),
        Causal("bottom_right"),
        Causal("top_left"),
        Window(70, 20, "top_left"),
        Window(0, 0, "bottom_right"),
        Documents((50, 0, 100, 130)) & Causal(),
    ],
    ids=str,
)
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 2)])
def test_the_kernel_keeps_to_a_pattern(among: Pattern, heads: int, key_heads: int, native: ModuleType) -> None:
    lengths = (280, 280) if "Documents" in str(among) else (280, 500)
    query, key = whole_numbers(1, lengths[0], heads, 5), whole_numbers(1, lengths[1], key_heads, 5)
    result = run("cpu", [query, key, key], among & TopK(9))
    assert result.indices is not None
    allowed = among.to_dense(*lengths)[None, :, None]
    assert torch.equal(result.indices, sorted_keys(query, key, 9, allowed))


@pytest.mark.parametrize("axes", [(2, 4, 70, 200), (1, 4, 1, 200), (2, 1, 70, 1), (1, 1, 1, 200)])
def test_the_kernel_reads_masks_and_biases_of_any_axes(axes: tuple[int, ...], native: ModuleType) -> None:
    query, key = whole_numbers(2, 70, 4, 3), whole_numbers(2, 200, 2, 3)
    mask = torch.rand(axes) < 0.5
    result = run("cpu", [query, key, key], TopK(6), mask=mask, bias=torch.zeros(axes))
    assert result.indices is not None
    assert torch.equal(result.indices, sorted_keys(query, key, 6, mask.transpose(1, 2)))
    # A bias that puts the keys in order, whatever the products.
    rank = torch.rand(axes).argsort(-1) * 1000.0
    result = run("cpu", [query, key, key], TopK(6), bias=rank)
    assert result.indices is not None
    scores = torch.einsum("blhd,bshd->bhls", query, key.repeat_interleave(2, dim=2)) / 3**0.5 + rank
    assert torch.equal(result.indices, scores.sort(dim=-1, descending=True, stable=True)[1][..., :6].transpose(1, 2))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_same_bits_on_any_number_of_threads(native: ModuleType) -> None:
    for queries, keys in ((2, 20_000), (300, 300)):
        query, key = torch.randn(1, queries, 4, 8), torch.randn(1, keys, 2, 8)
        found = []
        for count in (1, 2, 3):
            with threads(count):
                found.append(run("cpu", [query, key, key], TopK(5)))
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0][:4], other[:4], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, native: ModuleType) -> None:
    inputs = [x.detach().to(dtype) for x in leaves("cpu", key_heads=1)]
    result = run("cpu", inputs, TopK(3), bias=torch.randn(11, dtype=dtype))
    assert result.logsumexp is not None
    assert result.weights is not None
    assert (result.output.dtype, result.weights.dtype, result.logsumexp.dtype) == (dtype, dtype, torch.float32)
    whole = run("cpu", [x.float() for x in inputs], TopK(3))
    low = run("cpu", inputs, TopK(3))
    assert torch.equal(low.output, whole.output.to(dtype))


def test_rows_that_do_not_lie_side_by_side(implementation: str) -> None:
    inputs = [x.detach() for x in leaves(implementation)]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    expected, result = (run(implementation, x, TopK(3)) for x in (inputs, apart))
    assert all(torch.equal(x, y) for x, y in zip(expected[:4], result[:4], strict=True))


def test_keys_are_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = leaves("reference", keys=103)
    whole = run("reference", inputs, Causal("bottom_right") & TopK(4))
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 1)
    pieces = run("reference", inputs, Causal("bottom_right") & TopK(4))
    torch.testing.assert_close(pieces.output, whole.output)
    assert whole.indices is not None
    assert pieces.indices is not None
    assert torch.equal(pieces.indices, whole.indices)


def test_a_query_without_keys(implementation: str) -> None:
    inputs = leaves(implementation, queries=13)
    result = run(implementation, inputs, Window(0, 0, "bottom_right") & TopK(3))
    assert result.indices is not None
    assert result.logsumexp is not None
    assert (result.indices[:, :2] == -1).all()
    assert (result.output[:, :2] == 0).all()
    assert (result.logsumexp[:, :2] == -torch.inf).all()
    gradients = torch.autograd.grad(result.output.square().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_no_keys_and_no_queries(implementation: str) -> None:
    inputs = leaves(implementation, keys=0)
    result = run("reference", inputs, TopK(3))
    assert result.indices is not None
    assert (result.indices == -1).all()
    assert (result.output == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(result.output.sum(), inputs))
    for sizes in ({"queries": 0}, {"batch": 0}):
        inputs = leaves(implementation, **sizes)
        result = run(implementation, inputs, TopK(3))
        assert result.output.shape == (*inputs[0].shape[:3], 2)
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(result.output.sum(), inputs))


@pytest.mark.parametrize("pattern", [TopK(2), Causal("top_left") & TopK(2)])
def test_no_heads(pattern: TopK) -> None:
    none = torch.ones(2, 5, 0, 4, requires_grad=True)
    result = attend(none, none, none, pattern, return_weights="heads", return_logsumexp=True)
    assert result.output.shape == (2, 5, 0, 4)
    assert result.weights is not None
    assert result.weights.shape == (2, 5, 0, 2)
    assert result.logsumexp is not None
    assert result.logsumexp.shape == (2, 5, 0)
    result.output.sum().backward()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nan_shows_where_it_is_chosen(wrong: float, implementation: str) -> None:
    inputs = [x.detach() for x in leaves(implementation)]
    inputs[1][0, 9] = wrong
    inputs[2][0, 9] = wrong
    result = run(implementation, inputs, TopK(3))
    assert result.indices is not None
    assert (result.indices[0, ..., 0] == 9).all()
    assert result.output[0].isnan().all()
    assert result.output[1].isfinite().all()


@pytest.mark.parametrize("place", [0, 9])
def test_a_hidden_nan_does_not_leak(place: int, implementation: str) -> None:
    inputs = [x.detach() for x in leaves(implementation)]
    inputs[1][0, place] = torch.nan
    inputs[2][0, place] = torch.nan
    for x in inputs:
        x.requires_grad_()
    # Some slots stay unused, whatever row they hold.
    hidden = run(implementation, inputs, TopK(12), mask=torch.arange(11) != place).output
    assert hidden.isfinite().all()
    gradients = torch.autograd.grad(hidden.square().sum(), inputs, create_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    more = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)
    assert all(gradient.isfinite().all() for gradient in more)


def test_dropout_is_governed_by_the_seed(implementation: str) -> None:
    inputs = leaves(implementation, queries=200)
    inputs[2] = torch.ones_like(inputs[2])
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(run(implementation, inputs, TopK(1), dropout=0.3).output)
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0].unique(), torch.tensor([0.0, 1 / 0.7], dtype=outputs[0].dtype))


def test_both_drop_the_same_weights(native: ModuleType) -> None:
    inputs = leaves("cpu", queries=20, heads=6)
    found = []
    for implementation in ("cpu", "reference"):
        torch.manual_seed(5)
        result = attend(inputs[0], inputs[1], inputs[2], TopK(4), dropout=0.4, implementation=implementation)
        found.append([result.output, *torch.autograd.grad(result.output.square().sum(), inputs)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_composition() -> None:
    pattern = Causal() & Documents((3, 4))
    assert pattern & TopK(2) == TopK(2, pattern)
    assert TopK(2) & Causal() == TopK(2, Causal())
    assert Causal() & TopK(2, Documents((3, 4))) == TopK(2, Causal() & Documents((3, 4)))
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for \|"):
        Causal() | TopK(2)  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for &"):
        TopK(2) & 3  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_score_that_overflows_shows(native, implementation: str) -> None:
    """-inf would pass for a hidden pair, and no key would be chosen."""
    query, key, value = torch.ones(2, 1, 1, 1), torch.ones(2, 5, 1, 1), torch.randn(2, 5, 1, 3)
    query[1], key[1] = 1e19, -1e19
    result = attend(query, key, value, TopK(2), scale=10.0, implementation=implementation)
    assert result.indices is not None
    assert (result.indices >= 0).all()
    assert result.output[0].isfinite().all()
    assert result.output[1].isnan().all()
