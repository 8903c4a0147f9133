"""Product-key memory: equal to attention to the best of all n x n slots, each with its own score."""

from typing import Any

import pytest
import torch
from product_keys import all_scores, by_all_slots, leaves
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from anyattention import AttentionResult
from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.ops.product_keys import explain_product_keys, product_key_attention, product_key_search

_F64 = torch.float64


@pytest.fixture(params=["cpu", "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("native")
    return request.param


def gradients(result: AttentionResult, inputs: list[Tensor], by: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    assert result.weights is not None
    return torch.autograd.grad([result.output, result.weights], inputs, [x.to(result.output.dtype) for x in by])


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, _F64])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 4), (3, 2), (5, 25), (7, 11), (11, 60), (150, 5), (131, 40)])
@pytest.mark.parametrize("value_dim", [1, 3, 32, 37])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (5, 2), (29, 3)])
@pytest.mark.parametrize("half_dim", [1, 3, 8])
def test_is_attention_to_the_best_of_all_slots(
    implementation: str, tokens: int, heads: int, half_dim: int, n: int, k: int, value_dim: int, dtype: torch.dtype
) -> None:
    inputs = leaves(tokens, heads, half_dim, n, value_dim, dtype)
    result = product_key_attention(inputs[0], inputs[1], inputs[2], k=k, implementation=implementation)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_all_slots(doubles[0], doubles[1], doubles[2], k)
    assert result.indices is not None
    if dtype is _F64:
        assert torch.equal(result.indices, expected.indices)
    else:
        # Scores that are nearly equal may change places.
        of_slots = all_scores(*(x.detach() for x in doubles[:2]))
        ours, theirs = (of_slots.gather(-1, x) for x in (result.indices, expected.indices))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        if not torch.equal(result.indices, expected.indices):
            return
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype is _F64 else {"rtol": 1e-4, "atol": 1e-4}
    assert result.weights is not None
    assert (result.output.dtype, result.weights.dtype) == (dtype, dtype)
    torch.testing.assert_close(result.output.double(), expected.output, **tolerance)
    torch.testing.assert_close(result.weights.double(), expected.weights, **tolerance)
    by = torch.randn_like(expected.output), torch.randn(tokens, heads, k, dtype=_F64)
    for ours, theirs in zip(gradients(result, inputs, by), gradients(expected, doubles, by), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


def test_the_kernels_run_on_the_cpu(native: Any) -> None:
    query, half_keys, values = leaves(dtype=torch.float32)
    assert explain_product_keys(query, half_keys, values, k=2).implementation == "cpu"
    with torch.device("meta"):
        meta = leaves(dtype=torch.float32)
    explanation = explain_product_keys(meta[0], meta[1], meta[2], k=2)
    assert explanation.implementation == "reference"
    assert "the kernels run on the CPU, and the query is on meta" in str(explanation)


@pytest.mark.parametrize("dtype", [torch.float32, _F64])
@pytest.mark.parametrize(("n", "k"), [(3, 4), (5, 7), (40, 11), (150, 9)])
def test_of_equal_scores_the_lowest_slots_are_taken(implementation: str, dtype: torch.dtype, n: int, k: int) -> None:
    # Whole numbers: every sum is exact, and many are equal.
    query = torch.randint(-1, 2, (13, 2, 4)).to(dtype)
    half_keys = torch.randint(-1, 2, (2, 2, n, 2)).to(dtype)
    values = torch.randn(n * n, 3, dtype=dtype)
    expected = by_all_slots(query, half_keys, values, k)
    result = product_key_attention(query, half_keys, values, k=k, implementation=implementation)
    assert torch.equal(result.indices, expected.indices)  # pyright: ignore[reportArgumentType]  # a selection has them
    scores = all_scores(query, half_keys).sort(-1, descending=True).values
    assert (scores[..., k - 1 : k] == scores[..., k : k + 1]).any()


def test_equal_half_keys_have_equal_scores_wherever_they_stand(implementation: str) -> None:
    query, half_keys, values = leaves(7, 2, 5, 37, 3, torch.float32)
    with torch.no_grad():
        half_keys[:] = half_keys[:, :, :1]
    result = product_key_attention(query, half_keys, values, k=40, implementation=implementation)
    assert torch.equal(result.indices, torch.arange(40).expand(7, 2, 40))  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, _F64])
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, threads: Any) -> None:
    # Few slots: some are used by more entries than a piece of their sum has.
    for n, k in ((3, 9), (40, 7)):
        inputs = leaves(500, 3, 5, n, 19, dtype)
        by = torch.randn(500, 19, dtype=dtype), torch.randn(500, 3, k, dtype=dtype)
        found = []
        for count in (1, 2, 3, 7):
            threads(count)
            result = product_key_attention(inputs[0], inputs[1], inputs[2], k=k, implementation="cpu")
            found.append([*result[:2], result.indices, *gradients(result, inputs, by)])
        for others in found[1:]:
            for one, other in zip(found[0], others, strict=True):
                assert one is not None
                assert other is not None
                assert torch.equal(one, other)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_derivatives(implementation: str, k: int) -> None:
    query, half_keys, values = leaves(3, 2, 2, 3, 2)

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        result = product_key_attention(inputs[0], inputs[1], inputs[2], k=k, scale=0.7, implementation=implementation)
        assert result.weights is not None
        return result.output, result.weights

    assert gradcheck(call, (query, half_keys, values))
    assert gradgradcheck(call, (query, half_keys, values))


@pytest.mark.parametrize("missing", range(3))
def test_gradients_of_some_inputs(implementation: str, missing: int) -> None:
    inputs = leaves()
    by = torch.randn(5, 11, dtype=_F64), torch.randn(5, 3, 4, dtype=_F64)
    whole = gradients(
        product_key_attention(inputs[0], inputs[1], inputs[2], k=4, implementation=implementation), inputs, by
    )
    inputs[missing] = inputs[missing].detach()
    some = [x for n, x in enumerate(inputs) if n != missing]
    result = product_key_attention(inputs[0], inputs[1], inputs[2], k=4, implementation=implementation)
    expected = tuple(x for n, x in enumerate(whole) if n != missing)
    assert result.weights is not None
    by_output, by_weights = (
        torch.autograd.grad(each, some, cotangent, retain_graph=True, materialize_grads=True)
        for each, cotangent in zip((result.output, result.weights), by, strict=True)
    )
    # Of each result alone, and of both.
    torch.testing.assert_close(tuple(x + y for x, y in zip(by_output, by_weights, strict=True)), expected)
    torch.testing.assert_close(gradients(result, some, by), expected)


def test_scale_is_a_factor_of_the_scores(implementation: str) -> None:
    query, half_keys, values = leaves()
    ours = product_key_attention(query, half_keys, values, k=4, scale=0.3, implementation=implementation)
    theirs = by_all_slots(query * 0.3, half_keys, values, 4)
    torch.testing.assert_close(ours.output, theirs.output)
    with pytest.raises(InvalidInputError, match="scale: expected a finite number, got inf"):
        product_key_attention(query, half_keys, values, k=4, scale=float("inf"))


def test_search_finds_the_same_slots_and_their_scores(implementation: str) -> None:
    query, half_keys, values = leaves()
    indices, scores = product_key_search(query, half_keys, k=6, implementation=implementation)
    expected = by_all_slots(query, half_keys, values, 6)
    assert torch.equal(indices, expected.indices)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(scores, all_scores(query, half_keys).gather(-1, indices))
    assert not scores.requires_grad


class TestNumbersThatAreNotFinite:
    @pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
    def test_a_query_s_own_stay_with_its_token(self, implementation: str, odd: float) -> None:
        query, half_keys, values = leaves(dtype=torch.float32)
        clean = product_key_attention(query, half_keys, values, k=4, implementation=implementation)
        with torch.no_grad():
            query[2, 1, 3] = odd
        result = product_key_attention(query, half_keys, values, k=4, implementation=implementation)
        assert result.weights is not None
        assert clean.weights is not None
        assert result.output[2].isnan().all()
        assert result.weights[2, 1].isnan().all()
        others = torch.arange(5) != 2
        assert torch.equal(result.output[others], clean.output[others])
        assert torch.equal(result.weights[2, ::2], clean.weights[2, ::2])

    @pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
    def test_a_half_key_s_are_chosen_and_show(self, implementation: str, odd: float) -> None:
        query, half_keys, values = leaves(dtype=torch.float32)
        with torch.no_grad():
            half_keys[1, 0, 6, 0] = odd
        result = product_key_attention(query, half_keys, values, k=4, implementation=implementation)
        assert result.indices is not None
        assert result.weights is not None
        assert (result.indices[:, 0] % 7 == 6).all()
        assert not (result.indices[:, 1:] % 7 == 6).all()
        assert result.output.isnan().all()
        assert result.weights[:, 0].isnan().all()
        assert result.weights[:, 1:].isfinite().all()

    def test_a_value_s_show_where_it_is_used_and_nowhere_else(self, implementation: str) -> None:
        query, half_keys, values = leaves(dtype=torch.float32)
        clean = product_key_attention(query, half_keys, values, k=4, implementation=implementation)
        assert clean.indices is not None
        slot = int(clean.indices[2, 1, 0])
        users = (clean.indices == slot).flatten(1).any(1)
        assert users.any()
        assert not users.all()
        with torch.no_grad():
            values[slot, 5] = torch.nan
        result = product_key_attention(query, half_keys, values, k=4, implementation=implementation)
        assert torch.equal(result.output[:, 5].isnan(), users)
        assert torch.equal(result.output[~users], clean.output[~users])
        unused = torch.ones(49, dtype=torch.bool)
        unused[clean.indices.flatten()] = False
        with torch.no_grad():
            values[slot, 5] = 0.0
            values[unused] = torch.nan
        result = product_key_attention(query, half_keys, values, k=4, implementation=implementation)
        found = torch.autograd.grad(result.output, [query, half_keys, values], torch.randn(5, 11))
        assert unused.any()
        assert all(x.isfinite().all() for x in (result.output, *found))
        assert (found[2][unused] == 0).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"query": torch.ones(5, 3, 3)}, r"query: expected \(tokens, heads, key_dim\) with an even key_dim"),
            ({"query": torch.ones(5, 3, 0)}, r"query: expected \(tokens, heads, key_dim\) with an even key_dim"),
            ({"query": torch.ones(5, 4)}, r"query: expected \(tokens, heads, key_dim\), got \(5, 4\)"),
            ({"half_keys": torch.ones(3, 3, 7, 2)}, r"half_keys: expected \(halves=2, .* halves is 2 in product keys"),
            ({"half_keys": torch.ones(2, 3, 7, 4)}, r"half_dim is 2 in half of the query's key_dim"),
            ({"half_keys": torch.ones(2, 2, 7, 2)}, r"heads is 3 in query"),
            ({"values": torch.ones(48, 11)}, r"values: .* slots is 49 in the square of the number of half keys"),
        ],
    )
    def test_shapes(self, changed: dict[str, Tensor], message: str) -> None:
        query, half_keys, values = leaves(dtype=torch.float32)
        given = {"query": query, "half_keys": half_keys, "values": values, **changed}
        with pytest.raises(DimensionMismatchError, match=message):
            product_key_attention(given["query"], given["half_keys"], given["values"])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"k": 50}, "k: expected at most the 7 x 7 = 49 slots, got 50"),
            ({"k": 0}, "k: expected an int of at least 1, got 0"),
            ({"k": 2, "dropout": 1.0}, r"dropout: expected a finite number at least 0 and below 1, got 1\.0"),
            ({"k": 2, "implementation": "torch"}, "implementation: expected one of 'cpu', 'reference', got 'torch'"),
            ({"k": 2, "sparse_grad": True, "slot_gradient": print}, "sparse_grad: expected False with slot_gradient"),
        ],
    )
    def test_settings(self, settings: Any, message: str) -> None:
        query, half_keys, values = leaves()
        with pytest.raises(InvalidInputError, match=message):
            product_key_attention(query, half_keys, values, **settings)

    def test_dtypes(self) -> None:
        query, half_keys, values = leaves()
        with pytest.raises(
            InvalidInputError, match=r"half_keys: expected torch\.float64, as query, got torch\.float32"
        ):
            product_key_attention(query, half_keys.float(), values)
        with pytest.raises(InvalidInputError, match=r"values: expected torch\.float64, as query, got torch\.float16"):
            product_key_attention(query, half_keys, values.half())
        with pytest.raises(InvalidInputError, match="query: expected a floating-point dtype"):
            product_key_attention(query.long(), half_keys, values)

    def test_no_slots(self) -> None:
        with pytest.raises(InvalidInputError, match="k: expected at most the 0 x 0 = 0 slots, got 1"):
            product_key_attention(torch.ones(1, 1, 2), torch.ones(2, 1, 0, 1), torch.ones(0, 3), k=1)

    def test_more_half_keys_than_slots_can_be_numbered(self, native: Any) -> None:
        query, half_keys = torch.ones(1, 1, 2), torch.ones(2, 1, 65_537, 1)
        with pytest.raises(UnsupportedError, match="the kernels have at most 65536 half keys in a half"):
            product_key_search(query, half_keys, k=1, implementation="cpu")


@pytest.mark.parametrize(("tokens", "heads", "value_dim"), [(0, 3, 11), (5, 3, 0), (5, 0, 11), (0, 0, 0)])
def test_sizes_of_0(implementation: str, tokens: int, heads: int, value_dim: int) -> None:
    inputs = leaves(tokens, heads, 2, 7, value_dim)
    result = product_key_attention(inputs[0], inputs[1], inputs[2], k=4, implementation=implementation)
    assert result.weights is not None
    assert result.indices is not None
    assert (result.output.shape, result.weights.shape) == ((tokens, value_dim), (tokens, heads, 4))
    assert (result.output == 0).all() or heads
    found = gradients(result, inputs, (torch.randn(tokens, value_dim), torch.randn(tokens, heads, 4)))
    assert [x.shape for x in found] == [x.shape for x in inputs]
    assert tokens * heads or all((x == 0).all() for x in found)
    sparse = product_key_attention(
        inputs[0], inputs[1], inputs[2], k=4, sparse_grad=True, implementation=implementation
    )
    (rows,) = torch.autograd.grad(sparse.output, inputs[2], torch.randn_like(sparse.output))
    assert rows.is_coalesced()
    assert rows.shape == inputs[2].shape
