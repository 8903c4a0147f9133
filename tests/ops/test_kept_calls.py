"""What is kept of a small dense call changes nothing: not its result, nor what it is refused for."""

import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses import FakeTensorMode

from anyattention import Causal, Full, attend
from anyattention.errors import AttentionError, DimensionMismatchError
from anyattention.ops import dense
from anyattention.ops.dense import api

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch):
    monkeypatch.setattr(api, "_kept", {})


def rows(dtype: torch.dtype = torch.float64, length: int = 5, key_heads: int = 2) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = (2, 5, 4, 3), (2, length, key_heads, 3), (2, length, key_heads, 7)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def decode(*rows: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor | None:
    """Of rows as `attend` takes them."""
    return dense.decode(*[x.transpose(1, 2) if x.ndim > 2 else x for x in rows], mask, scale, None)


def results(given: list[Tensor], *, keeps: bool, second: bool = False, **settings) -> list[Tensor]:
    """Output, gradients and second derivatives; by a call that is kept, or by one with a setting that is not."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    output = attend(*leaves, **settings, return_logsumexp=not keeps).output
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    cotangent.requires_grad_()
    gradients = torch.autograd.grad(output, leaves, cotangent, create_graph=second)
    found = [output, *gradients]
    if second:
        loss = sum((x.sin().sum() for x in gradients), output.sum())
        found += torch.autograd.grad(loss, [*leaves, cotangent])
    return found


@pytest.mark.parametrize("settings", [{}, {"pattern": Causal()}, {"scale": 0.3}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits(dtype, settings):
    given = rows(dtype)
    wanted = results(given, keeps=False, **settings)
    for _ in range(3):
        assert all(map(torch.equal, results(given, keeps=True, **settings), wanted))
        with torch.no_grad():
            assert torch.equal(attend(*given, **settings).output, wanted[0])
    assert len(api._kept) == 1


@pytest.mark.parametrize("length", [3, 8])
def test_a_causal_mask_from_the_last_key(length):
    """With fewer keys than queries it is a mask, which is kept with the call."""
    given, settings = rows(length=length), {"pattern": Causal(align="bottom_right")}
    wanted = results(given, keeps=False, **settings)
    for _ in range(2):
        assert all(map(torch.equal, results(given, keeps=True, **settings), wanted))


@pytest.mark.parametrize("settings", [{}, {"pattern": Causal()}], ids=str)
def test_second_derivatives(settings):
    given = rows()
    for _ in range(2):
        found = results(given, keeps=True, second=True, **settings)
        assert all(map(torch.equal, found, results(given, keeps=False, second=True, **settings)))


def test_other_numbers_lie_elsewhere():
    first, second = rows(), [2 * x for x in rows()]
    for given in (first, second, first):
        assert torch.equal(attend(*given).output, attend(*given, return_logsumexp=True).output)
    assert len(api._kept) == 1


def test_views_have_calls_of_their_own():
    query, key, value = rows()
    turned = key.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = attend(query, key, value).output
    assert torch.equal(attend(query, turned, value).output, wanted)
    assert torch.equal(attend(query, key[:1].expand_as(key), value).output[0], wanted[0])
    assert len(api._kept) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_that_grows_has_one_call(dtype):
    query, key, value = rows(dtype, length=11)
    query = query[:, :1]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    with torch.no_grad():
        for length in (7, 11, 1, 2):
            for cache in ((key, value), turned, (key, turned[1])):
                seen = [x[:, :length] for x in cache]
                wanted = attend(query, *seen, return_logsumexp=True).output
                for given in (seen, [x.contiguous() for x in seen]):
                    assert torch.equal(attend(query, *given).output, wanted)
                    assert torch.equal(decode(query, *given), wanted)
        assert len(api._kept) == 1
        assert decode(query, key, value, scale=0.5) is None
        with torch.autocast("cpu"):
            assert decode(query, key, value) is None
        for given in (
            (key, value[:, 1:]),
            (key[:, :0], value[:, :0]),
            (key, value[0]),
            (key[0], value[0]),
            (key[:1],) * 2,
        ):
            assert decode(query, *given) is None
            try:
                found = attend(query, *given).output
            except AttentionError:
                continue
            assert not found.any()  # without keys
        with pytest.raises(AttentionError):
            attend(query, key[0, 0, 0], value[0, 0, 0])
        assert len(api._kept) == 1


def test_a_cache_that_grows_may_have_a_mask():
    query, key, value = rows(length=11)
    query = query[:, :1]
    key[0, 1] = value[0, 1] = torch.nan
    whole = torch.rand(2, 4, 1, 11) < 0.7
    whole[0, :, :, 1] = False
    whole[1, 2, :, 5:] = False
    masks = whole, whole[:, :1], whole[:1].logical_and(whole[:1, :1]), whole[0, :1].expand(2, 1, 1, 11)
    with torch.no_grad():
        for length in (7, 11, 2):
            for mask in masks:
                given = query, key[:, :length], value[:, :length]
                seen = mask[..., :length]
                wanted = attend(*given, mask=seen, return_logsumexp=True).output
                for found in (attend(*given, mask=seen).output, decode(*given, mask=seen)):
                    assert found is not None
                    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
                assert not wanted[0].isnan().any()
        assert len(api._kept) == 3
        for mask in (whole[..., :5], whole[:, :2], whole.float(), whole[..., :1, 0], [True] * 11):
            assert not isinstance(mask, Tensor) or decode(query, key, value, mask=mask) is None
            with pytest.raises((AttentionError, TypeError)):
                attend(query, key, value, mask=mask)
        assert len(api._kept) == 3


def test_one_query_with_a_gradient_has_calls_of_its_own():
    for length in (5, 3, 4):
        given = rows(length=length)
        given[0] = given[0][:, :1]
        with torch.no_grad():
            assert torch.equal(attend(*given).output, attend(*given, return_logsumexp=True).output)
        assert decode(given[0].clone().requires_grad_(), *given[1:]) is None
        assert all(map(torch.equal, results(given, keeps=True), results(given, keeps=False)))


@pytest.mark.parametrize("lying", [lambda x: x[..., ::2], lambda x: x.mT.contiguous().mT], ids=["apart", "turned"])
def test_rows_that_are_copied_are_not_kept(lying):
    query, key, value = (torch.randn(2, 5, 4, 6) for _ in range(3))
    query, key, value = lying(query), lying(key), lying(value)
    for _ in range(2):
        found = attend(query, key, value).output
        assert not api._kept
        assert torch.equal(found, attend(query.contiguous(), key.contiguous(), value.contiguous()).output)
        api._kept.clear()


def test_what_does_not_fit_is_refused_after_what_did():
    query, key, value = rows()
    attend(query, key, value)
    for given in (
        (query, key, value[:, 1:]),
        (query, key[:1], value),
        (query[..., 1:], key, value),
        (query, key.float(), value),
        (query, key, None),
        (query, [1.0], value),
        (query[0], key, value),
    ):
        with pytest.raises((AttentionError, TypeError)):
            attend(*given)
    with pytest.raises(DimensionMismatchError):
        attend(query, *rows(length=4)[1:], Causal())


@pytest.mark.parametrize(
    "settings",
    [
        {"mask": torch.tensor([True, False, True, True, True])},
        {"bias": torch.arange(5.0)},
        {"dropout": 0.5},
        {"implementation": "reference"},
        {"return_weights": True},
        {"return_logsumexp": True},
        {"edges": 0},
        {"aggregation": "mean"},
    ],
    ids=str,
)
def test_another_setting_is_not_lost(settings):
    given = rows(torch.float32)
    attend(*given)
    kept = dict(api._kept)
    try:
        found = attend(*given, **settings)
    except AttentionError:
        found = None
    assert api._kept == kept
    if found is not None and found.weights is None and found.logsumexp is None and "implementation" not in settings:
        assert not torch.equal(found.output, attend(*given).output)


def test_modes_transforms_and_derivatives_see_the_call():
    given = rows()
    wanted = attend(*given).output
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = attend(*[mode.from_tensor(x) for x in given]).output
        assert type(fake) is not Tensor
        assert fake.shape == wanted.shape
    mapped = torch.func.vmap(lambda *x: attend(*x).output)(*[torch.stack([x, x]) for x in given])
    torch.testing.assert_close(mapped[1], wanted)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        assert forward_ad.unpack_dual(attend(dual, *given[1:]).output).tangent is not None
    with torch.inference_mode():
        assert attend(*given).output.is_inference()
    leaves = [x.clone().requires_grad_() for x in given]
    many = torch.autograd.grad(attend(*leaves).output, leaves, torch.stack([wanted, 2 * wanted]), is_grads_batched=True)
    (one,) = torch.autograd.grad(attend(*leaves).output, leaves[:1], wanted)
    torch.testing.assert_close(many[0][1], 2 * one)
    assert torch.func.grad(lambda x: attend(x, *given[1:]).output.sum())(given[0]).shape == given[0].shape


def test_what_hooks_and_changes_in_place_do():
    given = [x.requires_grad_() for x in rows()]
    output = attend(*given).output
    output.register_hook(lambda grad: grad[..., :1].expand_as(grad))
    found = torch.autograd.grad(output, given, torch.ones_like(output))
    wanted = torch.autograd.grad(attend(*given).output, given, torch.ones_like(output))
    assert all(map(torch.equal, found, wanted))
    changed = given[1] * 1
    output = attend(given[0], changed, given[2]).output
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_threads_at_once():
    """Each call has a structure of its own."""
    calls = [rows(torch.float32) for _ in range(2)]
    calls[1] = [3 * x for x in calls[1]]
    wanted = [attend(*given).output for given in calls]
    wrong = []

    def many(n: int) -> None:
        for _ in range(300):
            if not torch.equal(attend(*calls[n]).output, wanted[n]):
                wrong.append(n)

    threads = [threading.Thread(target=many, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_more_are_kept_than_a_few_hundred():
    value = torch.randn(1, 600, 1, 2)
    for length in range(1, 600):
        attend(value[:, :1], value[:, :length], value[:, :length])
    assert len(api._kept) <= api._MOST
    assert torch.equal(attend(value, value, value, Full()).output, attend(value, value, value).output)
