"""Masks of other conventions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyattention import attend, mask_from_blocked
from anyattention.errors import InvalidMaskError

_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", _DTYPES)
def test_one_means_masked_out(dtype):
    allowed = mask_from_blocked(torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=dtype))
    assert allowed.dtype == torch.bool
    assert allowed.tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 0), (2, 3, 5, 7)])
def test_shape_is_kept(shape):
    assert mask_from_blocked(torch.zeros(shape)).shape == shape


@given(st.lists(st.booleans()))
def test_converting_twice_changes_nothing(blocked):
    mask = torch.tensor(blocked, dtype=torch.bool)
    assert mask_from_blocked(mask_from_blocked(mask)).tolist() == blocked


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, torch.nan, torch.inf, -torch.inf])
def test_other_values_are_refused(value):
    with pytest.raises(InvalidMaskError, match=r"blocked: .*only the values 0 and 1, .*torch\.float32.*bias="):
        mask_from_blocked(torch.tensor([0.0, 1.0, value]))


@pytest.mark.parametrize("value", [None, [True], True])
def test_only_tensors_are_converted(value):
    with pytest.raises(InvalidMaskError, match=f"blocked: expected a torch.Tensor, got {type(value).__name__}"):
        mask_from_blocked(value)


def test_padding_mask_of_torch_hides_the_same_keys():
    module = torch.nn.MultiheadAttention(6, 3, batch_first=True, dtype=torch.float64)
    x, padding = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 1]]).bool()
    expected = module(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    query, key, _ = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    heads = [part.unflatten(-1, (3, 2)) for part in (query, key)]
    mask = mask_from_blocked(padding)[:, None, None, :]
    weights = attend(*heads, heads[1], mask=mask, return_weights="heads").weights
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
