"""Dense weights from the tile kernels: those of the reference, with gradients of any order, and the mean by itself."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from anyattention import Causal, Strided, attend, explain
from anyattention.errors import InvalidInputError
from anyattention.ops.runs import RunAttention, run_attention, run_weights, runs_of
from anyattention.ops.runs.weights import (
    RunAttentionWeights,
    RunAttentionWeightsBackward,
    _backward,
    run_attention_weights,
)

pytestmark = pytest.mark.usefixtures("native")

_F64 = torch.float64
# Neither is a multiple of a tile, 128 queries or 64 keys; there are several tiles of both.
_LENGTHS = (150, 201)


def rows(lengths: tuple[int, int] = _LENGTHS, *, batch: int = 2, heads: int = 3, width: int = 5) -> list[Tensor]:
    shapes = [(lengths[0], width), (lengths[1], width), (lengths[1], 4)]
    return [torch.randn(batch, length, heads, each, dtype=_F64) for length, each in shapes]


def some_pairs(*shape: int) -> Tensor:
    """Half of the pairs; query 3 has no key, and key 2 no query."""
    pairs = torch.rand(*shape) < 0.5
    pairs[..., 3, :] = False
    pairs[..., :, 2] = False
    return pairs


def settings_of(name: str, lengths: tuple[int, int] = _LENGTHS) -> dict[str, Any]:
    return {
        "full": {},
        "causal": {"pattern": Causal("top_left")},
        "bottom right": {"pattern": Causal("bottom_right")},
        "mask of keys": {"mask": torch.rand(lengths[1]) < 0.6},
        "mask of heads": {"mask": some_pairs(2, 3, *lengths)},
        "causal, mask": {"pattern": Causal("top_left"), "mask": some_pairs(*lengths)},
        "bias": {"bias": torch.randn(1, 3, *lengths)},
        "bias that hides": {"bias": torch.randn(lengths).masked_fill(~some_pairs(*lengths), -torch.inf)},
        "softcap": {"softcap": 0.7, "scale": 0.9},
        "softcap, mask, bias": {"softcap": 1.5, "mask": some_pairs(2, 1, *lengths), "bias": torch.randn(lengths)},
        "dropout": {"dropout": 0.4},
        "dropout, mask": {"dropout": 0.4, "mask": some_pairs(*lengths)},
    }[name]


NAMES = [
    "full", "causal", "bottom right", "mask of keys", "mask of heads", "causal, mask", "bias", "bias that hides",
    "softcap", "softcap, mask, bias", "dropout", "dropout, mask",
]  # fmt: skip


def results(
    inputs: list[Tensor],
    dtype: torch.dtype,
    implementation: str,
    *,
    alone: bool,
    create_graph: bool = False,
    **settings: Any,
) -> list[Tensor]:
    """Output, weights and gradients of a random loss on both, or on the weights alone."""
    own = [x.to(dtype).requires_grad_() for x in inputs]
    query, key, value = own
    assert explain(query, key, value, **settings, implementation=implementation).implementation == implementation
    torch.manual_seed(3)  # of dropout
    result = attend(query, key, value, **settings, implementation=implementation)
    assert result.weights is not None
    assert result.weights.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    found = [result.output, result.weights]
    by = [torch.randn(x.shape, generator=generator, dtype=_F64).to(dtype) for x in found]
    used = slice(1, 2) if alone else slice(0, 2)
    gradients = torch.autograd.grad(found[used], own, by[used], create_graph=create_graph, materialize_grads=True)
    return [x.detach() for x in (*found, *gradients)]


@pytest.mark.parametrize("alone", [False, True], ids=["with the output", "alone"])
@pytest.mark.parametrize("weights", ["heads", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_the_reference(name: str, weights: str, alone: bool) -> None:
    inputs, settings = rows(), settings_of(name) | {"return_weights": weights}
    expected = results(inputs, _F64, "reference", alone=alone, **settings)
    for dtype, tolerance in ((_F64, 1e-13), (torch.float32, 5e-6)):
        found = results(inputs, dtype, "cpu", alone=alone, **settings)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.to(_F64), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    differentiable = results(inputs, _F64, "cpu", alone=alone, create_graph=True, **settings)
    for one, other in zip(differentiable, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(expected[1] == 0, found[1] == 0)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (129, 65), (128, 64), (300, 1)])
def test_other_lengths(lengths: tuple[int, int]) -> None:
    for weights in ("heads", "mean"):
        inputs = rows(lengths)
        expected = results(inputs, _F64, "reference", alone=False, return_weights=weights)
        for one, other in zip(results(inputs, _F64, "cpu", alone=False, return_weights=weights), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_many_keys_are_summed_up_in_blocks() -> None:
    # More than 16 tiles of keys.
    inputs = rows((5, 1300), batch=1)
    expected = results(inputs, _F64, "reference", alone=True, return_weights="heads")
    for one, other in zip(results(inputs, _F64, "cpu", alone=True, return_weights="heads"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weights", ["heads", "mean"])
@pytest.mark.parametrize("name", ["full", "causal", "mask of heads", "softcap, mask, bias"])
def test_gradcheck_and_gradgradcheck(name: str, weights: str) -> None:
    lengths = (5, 4)
    inputs = [x.requires_grad_() for x in rows(lengths, width=3)]
    settings: Any = settings_of(name, lengths) | {"return_weights": weights, "implementation": "cpu"}

    def function(*inputs: Tensor) -> Any:
        result = attend(inputs[0], inputs[1], inputs[2], **settings)
        return result.output, result.weights

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x)[1], inputs)


@pytest.mark.parametrize("weights", ["heads", "mean"])
def test_rows_without_keys_and_hidden_pairs_are_exactly_zero(weights: str) -> None:
    inputs = [x.float().requires_grad_() for x in rows()]
    pairs = some_pairs(2, 1, *_LENGTHS)
    found = attend(inputs[0], inputs[1], inputs[2], mask=pairs, return_weights=weights, implementation="cpu").weights
    assert found is not None
    hidden = ~(pairs if weights == "heads" else pairs[:, 0]).expand_as(found)
    assert (found[hidden] == 0).all()
    assert not found[..., 3, :].any()
    by_query, by_key = torch.autograd.grad(found, inputs[:2], torch.randn_like(found))
    assert not by_query[:, 3].any()
    assert not by_key[:, 2].any()
    assert by_query.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, _F64])
@pytest.mark.parametrize("weights", ["heads", "mean"])
@pytest.mark.parametrize("name", ["full", "causal", "mask of heads"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, "gradient"], ids=["query", "key", "gradient"])
def test_a_broken_number_spoils_what_it_spoils_in_the_reference(
    place: Any, number: float, name: str, weights: str, dtype: torch.dtype
) -> None:
    settings: Any = settings_of(name) | {"return_weights": weights}
    inputs = rows()
    for position in (2, 3, 60, 140):
        found = []
        for implementation in ("cpu", "reference"):
            own = [x.to(dtype, copy=True) for x in inputs]
            if place != "gradient":
                own[place][1, position, 1, 2] = number
            for x in own[:2]:
                x.requires_grad_()
            shown = attend(own[0], own[1], own[2], **settings, implementation=implementation).weights
            assert shown is not None
            by = torch.randn(shown.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
            if place == "gradient":
                by[1, ..., position, 40] = number
            found.append([~x.isfinite() for x in (shown, *torch.autograd.grad(shown, own[:2], by))])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other), position
            assert not one.all()


def test_the_same_bits_in_every_run_on_any_number_of_threads(threads: Callable[[int], None]) -> None:
    inputs = rows((700, 333), heads=2)
    for weights in ("heads", "mean"):
        settings = {"alone": True, "return_weights": weights, "mask": torch.rand(2, 2, 700, 333) < 0.7}
        threads(1)
        expected = results(inputs, torch.float32, "cpu", **settings)
        for count in (1, 2, 3, 2):
            threads(count)
            for one, other in zip(results(inputs, torch.float32, "cpu", **settings), expected, strict=True):
                assert torch.equal(one, other)


def test_the_output_is_the_same_bits_with_weights_and_without() -> None:
    query, key, value = (x.float() for x in rows())
    for settings in ({}, {"mask": some_pairs(*_LENGTHS)}):
        one, other = (
            attend(query, key, value, **settings, return_weights=weights, implementation="cpu").output
            for weights in (False, True)
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("weights", ["heads", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, weights: str) -> None:
    query, key, value = (x.to(dtype) for x in rows())
    found = attend(query, key, value, Causal("top_left"), return_weights=weights, implementation="cpu").weights
    exact = attend(query.double(), key.double(), value.double(), Causal("top_left"), return_weights=weights).weights
    assert found is not None
    assert exact is not None
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype))


def test_autocast_casts_once() -> None:
    query, key, value = (x.float() for x in rows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(query, key, value, return_weights=True, implementation="cpu").weights
    cast = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), return_weights=True, implementation="cpu").weights
    assert found is not None
    assert cast is not None
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, cast)


@pytest.mark.parametrize("weights", ["heads", "mean"])
def test_compiles_whole_with_dynamic_lengths(weights: str) -> None:
    torch._dynamo.reset()

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        pattern = Causal("bottom_right")
        result = attend(query, key, value, pattern, return_weights=weights, implementation="cpu")
        return result.output, result.weights

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((5, 7), (3, 11)):
        inputs = [x.requires_grad_() for x in rows(lengths)]
        expected, actual = function(*inputs), compiled(*inputs)
        by = [torch.randn_like(x) for x in expected]
        gradients = [torch.autograd.grad(x, inputs, by) for x in (expected, actual)]
        for one, other in zip([*expected, *gradients[0]], [*actual, *gradients[1]], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def of_parts(*, weight_heads: int) -> RunAttentionWeights:
    """Two parts, one of which has orders, mask and bias by distance; two heads share a key head."""
    query, key, value = (torch.randn(2, 9, heads, 3, dtype=_F64, requires_grad=True) for heads in (4, 2, 2))
    mask, bias = torch.rand(2, 1, 9, 9) < 0.7, torch.randn(4, 17, dtype=_F64)
    parts = runs_of(Strided(4, 1) & Causal(), 9, 9)
    assert len(parts) == 2
    call = RunAttention(query, key, value, mask, bias, None, parts, 0.0, False, scale=0.5, softcap=2.0)
    _, largest, log_sum = run_attention(call)
    return RunAttentionWeights(call, largest, log_sum, weight_heads)


@pytest.mark.parametrize("weight_heads", [1, 4])
def test_operator(opcheck: Any, weight_heads: int) -> None:
    record = of_parts(weight_heads=weight_heads)
    own = replace(record, largest=record.largest.detach(), log_sum=record.log_sum.detach().requires_grad_())
    opcheck(run_attention_weights, own)
    call = replace(record.call, **{name: getattr(record.call, name).detach() for name in ("query", "key", "value")})
    by = torch.randn(2, weight_heads, 9, 9, dtype=_F64)
    for needed in ((True,) * 4, (True, True, True, False)):
        opcheck(_backward, RunAttentionWeightsBackward(call, own.largest, own.log_sum.detach(), by, needed))


@pytest.mark.parametrize("mean", [False, True])
def test_several_parts_and_shared_key_heads(mean: bool) -> None:
    call = of_parts(weight_heads=1).call
    assert call.bias is not None
    call = replace(call, bias=call.bias.requires_grad_())
    places = torch.arange(9)[:, None] - torch.arange(9) + 8
    key, value = (x.repeat_interleave(2, dim=2) for x in (call.key, call.value))
    bias = call.bias[:, places][None]
    pairs = (Strided(4, 1) & Causal()).to_dense(9, 9) & call.mask
    shown = {"return_weights": "mean" if mean else "heads", "implementation": "reference"}
    dense: Any = {"mask": pairs, "bias": bias, "scale": 0.5, "softcap": 2.0, **shown}
    expected = attend(call.query, key, value, **dense).weights
    _, largest, log_sum = run_attention(call)
    found = run_weights(call, largest, log_sum, mean=mean)
    torch.testing.assert_close(found, expected)
    by, leaves = torch.randn_like(found), [call.query, call.key, call.bias]
    for one, other in zip(*[torch.autograd.grad(x, leaves, by) for x in (found, expected)], strict=True):
        torch.testing.assert_close(one, other)


def test_a_trace_has_the_gradient_by_a_bias_of_distances() -> None:
    call = of_parts(weight_heads=1).call
    rows = torch.zeros(2, 9, 4, dtype=_F64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        names = ("query", "key", "value", "mask", "bias")
        fakes = {name: mode.from_tensor(getattr(call, name).detach()) for name in names}
        bias = fakes["bias"].requires_grad_()
        found = run_weights(replace(call, **fakes), mode.from_tensor(rows), mode.from_tensor(rows), mean=True)
        (by_bias,) = torch.autograd.grad(found, bias, torch.ones(2, 9, 9, dtype=_F64))
        assert by_bias.shape == bias.shape


def test_unchecked_sizes() -> None:
    record = of_parts(weight_heads=1)
    with pytest.raises(InvalidInputError, match="run_attention_weights: invalid argument"):
        run_attention_weights(replace(record, weight_heads=3))
