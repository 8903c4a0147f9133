"""Weights from torch.nn.MultiheadAttention and back: the same outputs, and a refusal where they would not be."""

from typing import Any

import pytest
import torch
from torch import nn

from anyattention import Causal
from anyattention.errors import InvalidInputError, UnsupportedError
from anyattention.nn import MultiHeadAttention

SETTINGS = {
    "plain": {},
    "no bias": {"bias": False},
    "other widths": {"kdim": 5, "vdim": 7},
    "other values": {"vdim": 7},
    "dropout": {"dropout": 0.3},
    "length first": {"batch_first": False},
}


def build(**settings: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(12, 3, dtype=torch.float64, **{"batch_first": True, **settings})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_and_weights_are_the_same_both_ways(name: str) -> None:
    theirs = build(**SETTINGS[name])
    ours = MultiHeadAttention.from_torch(theirs)
    assert type(ours) is MultiHeadAttention
    assert not ours.training
    assert ours.config.dropout == theirs.dropout
    inputs = [torch.randn(2, n, w, dtype=torch.float64) for n, w in ((4, 12), (6, theirs.kdim), (6, theirs.vdim))]
    blocked = torch.rand(4, 6) < 0.3
    blocked[:, 0] = False
    given = inputs if theirs.batch_first else [x.transpose(0, 1) for x in inputs]
    output, weights = theirs(*given, attn_mask=blocked)
    found = ours(*inputs, mask=~blocked)
    expected = output if theirs.batch_first else output.transpose(0, 1)
    torch.testing.assert_close(found.output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.weights, weights, rtol=1e-10, atol=1e-10)
    back = ours.to_torch(batch_first=theirs.batch_first)
    assert list(back.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
        # Copies: training one does not change the other.
        assert back.state_dict()[key].data_ptr() != value.data_ptr()
    assert (back.dropout, back.batch_first, back.training) == (theirs.dropout, theirs.batch_first, False)
    assert torch.equal(back(*given, attn_mask=blocked)[0], output)


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_keys_of_its_own_are_refused(settings: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"add_bias_kv and add_zero_attn: .*interop.torch.MultiheadAttention"):
        MultiHeadAttention.from_torch(build(**settings))


def test_what_is_no_weight_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^module: expected a torch.nn.MultiheadAttention, got Linear"):
        MultiHeadAttention.from_torch(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    hooked, adapted, parametrised, own = build(), build(), build(), build()
    hooked.register_forward_hook(lambda *_: None)
    adapted.out_proj = nn.Sequential(adapted.out_proj)  # pyright: ignore[reportAttributeAccessIssue]
    nn.utils.parametrizations.orthogonal(parametrised, "in_proj_weight")
    own.forward = lambda *args, **kwargs: None
    for module in (hooked, adapted, parametrised, own):
        with pytest.raises(UnsupportedError, match=r"what they add is no weight; interop.torch.convert keeps them"):
            MultiHeadAttention.from_torch(module)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_heads": 1},
        {"positions": "rope"},
        {"positions": "learned"},
        {"qk_norm": True},
        {"softcap": 3.0},
        {"scale": 0.3},
        {"causal": True},
        {"check_finite": True},
        {"pattern": Causal()},
    ],
    ids=str,
)
def test_what_theirs_has_not_is_refused(settings: Any) -> None:
    (name,) = settings
    with pytest.raises(UnsupportedError, match=rf"torch.nn.MultiheadAttention has no {name}="):
        MultiHeadAttention(12, 3, **settings).to_torch()


def test_projections_of_other_widths_are_refused() -> None:
    module = MultiHeadAttention(12, 3)
    module.key_projection = nn.Linear(12, 1)
    with pytest.raises(UnsupportedError, match=r"a projection was replaced by one of other widths: .*\(1, 12\)"):
        module.to_torch()


def test_settings_that_change_nothing_are_no_hindrance() -> None:
    module = MultiHeadAttention(12, 3, max_seq_len=7, eps=1e-3, rope_theta=3.0, num_kv_heads=3)
    assert isinstance(module.to_torch(), nn.MultiheadAttention)
    module.key_projection = nn.Sequential(module.key_projection)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UnsupportedError, match=r"key_projection is no plain nn.Linear any more"):
        module.to_torch()
