"""Attention to the keys of the largest scores: equal to dense attention masked to those keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Additive, Causal, Documents, Pattern, TopK, Window, attend, explain
from anyattention.errors import InvalidConfigError, InvalidInputError, InvalidMaskError, UnsupportedError
from anyattention.ops.topk import reference


def leaves(queries: int = 7, keys: int = 11, heads: int = 3, key_heads: int = 3, batch: int = 2) -> list[Tensor]:
    shapes = ((queries, heads, 5), (keys, key_heads, 5), (keys, key_heads, 2))
    return [torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def masked(inputs: list[Tensor], k: int, allowed: Tensor, **settings: Any) -> Any:
    """The oracle: all scores, a plain sort of them, and dense attention under the mask of the k largest."""
    query, key, value = inputs
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    scores = torch.einsum("blhd,bshd->bhls", query, key)
    if "bias" in settings:
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


@pytest.mark.parametrize("among", [None, Causal("bottom_right"), Window(4, 1, "top_left"), Causal("top_left")], ids=str)
@pytest.mark.parametrize(("k", "key_heads"), [(1, 3), (4, 3), (4, 1), (11, 3), (20, 3)])
def test_equals_dense_attention_masked_to_them(k: int, key_heads: int, among: Pattern | None) -> None:
    inputs = leaves(key_heads=key_heads)
    allowed = torch.ones(7, 11, dtype=torch.bool) if among is None else among.to_dense(7, 11)
    result = attend(inputs[0], inputs[1], inputs[2], TopK(k, among), return_weights=True, return_logsumexp=True)
    expected = masked(inputs, k, allowed)
    torch.testing.assert_close(result.output, expected.output)
    torch.testing.assert_close(result.logsumexp, expected.logsumexp)
    assert result.indices is not None
    assert result.weights is not None
    assert result.indices.dtype == torch.int64
    assert result.indices.shape == result.weights.shape == (2, 7, 3, k)
    at = result.indices.transpose(1, 2).clamp(min=0)
    weights = torch.where(result.indices < 0, 0.0, expected.weights.gather(-1, at).transpose(1, 2))
    torch.testing.assert_close(result.weights, weights)
    assert (result.weights.diff(dim=-1) <= 0).all()
    assert torch.equal((result.indices >= 0).sum(-1), allowed.sum(-1).clamp(max=k)[None, :, None].expand(2, 7, 3))
    cotangents = [torch.randn(2, 7, 3, 2, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)]
    found = []
    for output, _, logsumexp, _ in (result, expected):
        assert logsumexp is not None
        first = torch.autograd.grad([output, logsumexp], inputs, cotangents, create_graph=True)
        generator = torch.Generator().manual_seed(0)
        more = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs]
        found.append([*first, *torch.autograd.grad(first, inputs, more)])
    torch.testing.assert_close(found[0], found[1])


def test_mask_bias_and_softcap() -> None:
    inputs = leaves()
    mask = torch.rand(2, 1, 7, 11) < 0.7
    bias = torch.randn(3, 7, 11, dtype=torch.float64)[None]
    result = attend(inputs[0], inputs[1], inputs[2], TopK(3), mask=mask, bias=bias)
    expected = masked(inputs, 3, mask, bias=bias)
    torch.testing.assert_close(result.output, expected.output)
    # A bias for each key alone, and -inf that hides.
    row = torch.randn(11, dtype=torch.float64)
    row[4] = -torch.inf
    result = attend(inputs[0], inputs[1], inputs[2], TopK(3), bias=row)
    assert result.indices is not None
    assert not (result.indices == 4).any()
    allowed = (row != -torch.inf).expand(7, 11)
    expected = masked(inputs, 3, allowed, bias=torch.where(row == -torch.inf, 0.0, row))
    torch.testing.assert_close(result.output, expected.output)
    # A cap keeps the order.
    capped = attend(inputs[0], inputs[1], inputs[2], TopK(3), softcap=2.0)
    plain = attend(inputs[0], inputs[1], inputs[2], TopK(3))
    assert capped.indices is not None
    assert plain.indices is not None
    assert torch.equal(capped.indices, plain.indices)
    assert not torch.allclose(capped.output, plain.output)


def test_keys_are_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = leaves(keys=103)
    whole = attend(inputs[0], inputs[1], inputs[2], Causal("bottom_right") & TopK(4))
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 1)
    pieces = attend(inputs[0], inputs[1], inputs[2], Causal("bottom_right") & TopK(4))
    torch.testing.assert_close(pieces.output, whole.output)
    assert whole.indices is not None
    assert pieces.indices is not None
    assert torch.equal(pieces.indices, whole.indices)


def test_a_query_without_keys_and_no_keys_at_all() -> None:
    for keys, among in ((11, Window(0, 0, "bottom_right")), (0, None)):
        inputs = leaves(queries=13, keys=keys)
        result = attend(inputs[0], inputs[1], inputs[2], TopK(3, among), return_logsumexp=True)
        empty = slice(0, 2) if keys else slice(None)
        assert result.indices is not None
        assert result.logsumexp is not None
        assert (result.indices[:, empty] == -1).all()
        assert (result.output[:, empty] == 0).all()
        assert (result.logsumexp[:, empty] == -torch.inf).all()
        gradients = torch.autograd.grad(result.output.square().sum(), inputs)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_shows_where_it_is_chosen_and_a_hidden_one_does_not_leak() -> None:
    inputs = [x.detach() for x in leaves()]
    inputs[1][0, 9] = torch.nan
    inputs[2][0, 9] = torch.nan
    seen = attend(inputs[0], inputs[1], inputs[2], TopK(3)).output
    assert seen[0].isnan().all()
    assert seen[1].isfinite().all()
    for x in inputs:
        x.requires_grad_()
    hidden = attend(inputs[0], inputs[1], inputs[2], TopK(12), mask=torch.arange(11) != 9).output
    assert hidden.isfinite().all()
    gradients = torch.autograd.grad(hidden.square().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_dropout_is_governed_by_the_seed() -> None:
    inputs = leaves(queries=200)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(attend(inputs[0], inputs[1], torch.ones_like(inputs[2]), TopK(1), dropout=0.3).output)
    assert torch.equal(outputs[0], outputs[1])
    assert set(outputs[0].unique().tolist()) == {0.0, 1 / 0.7}


def test_composition() -> None:
    pattern = Causal() & Documents((3, 4))
    assert pattern & TopK(2) == TopK(2, pattern)
    assert TopK(2) & Causal() == TopK(2, Causal())
    assert Causal() & TopK(2, Documents((3, 4))) == TopK(2, Causal() & Documents((3, 4)))
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for \|"):
        Causal() | TopK(2)  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for &"):
        TopK(2) & 3  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_k_is_at_least_1(k: Any) -> None:
    with pytest.raises(InvalidConfigError, match="k: expected an int >= 1"):
        TopK(k)


def test_bad_input() -> None:
    x = torch.ones(1, 3, 1, 1)
    with pytest.raises(InvalidConfigError, match="among: expected a pattern or None, got 3"):
        TopK(2, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="score=Additive: TopK chooses by Dot"):
        attend(x, x, x, TopK(2), score=Additive())
    with pytest.raises(UnsupportedError, match="the pattern TopK has only aggregation='sum'"):
        attend(x, x, x, TopK(2), aggregation="mean")
    with pytest.raises(InvalidMaskError, match="mask: expected rank 1, 2 or 4, got rank 3"):
        attend(x, x, x, TopK(2), mask=torch.ones(1, 3, 3, dtype=torch.bool))
    with pytest.raises(InvalidInputError, match="implementation: expected one of 'reference', got 'cpu'"):
        attend(x, x, x, TopK(2), implementation="cpu")
    assert explain(x, x, x, TopK(2)).implementation == "reference"
