"""Dense attention whose key heads serve several heads of the query, against the same heads written out."""

import pytest
import torch
from torch import Tensor

from anyattention import Additive, Causal, Full, attend, explain, native
from anyattention.errors import DimensionMismatchError

IMPLEMENTATIONS = ("cpu", "torch", "reference") if native.available() else ("torch", "reference")
HEADS, QUERIES, KEYS = 6, 9, 7


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def tensors(key_heads: int, num_keys: int = KEYS) -> list[Tensor]:
    shapes = (2, QUERIES, HEADS, 5), (2, num_keys, key_heads, 5), (2, num_keys, key_heads, 3)
    return [numbers(*shape).requires_grad_() for shape in shapes]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """A row of the key and the value for each head: head h of the query reads key head h // (heads / key_heads)."""
    group = query.shape[2] // key.shape[2]
    own = [h // group for h in range(query.shape[2])]
    return [query, key[:, :, own], value[:, :, own]]


def results(given: list[Tensor], leaves: list[Tensor], pattern, **settings) -> list[Tensor]:
    """What a call returns, and the gradients of the leaves."""
    torch.manual_seed(3)
    found = [x for x in attend(*given, pattern, **settings)[:3] if x is not None]
    loss = torch.stack([(x * numbers(*x.shape))[x > -torch.inf].sum() for x in found]).sum()
    return [*found, *torch.autograd.grad(loss, leaves)]


SETTINGS = {
    "nothing": {},
    "logsumexp": {"return_logsumexp": True},
    "mask": {"mask": numbers(2, HEADS, QUERIES, KEYS) > 0.3, "return_logsumexp": True},
    "no pairs": {"mask": torch.arange(QUERIES)[:, None].repeat(1, KEYS) % 3 > 0},
    "bias": {"bias": numbers(HEADS, QUERIES, KEYS)[None]},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout": 0.4},
    "weights": {"return_weights": "heads"},
    "mean weights": {"return_weights": True, "mask": numbers(QUERIES, KEYS) > 0},
}
LACKING = {"cpu": {"weights", "mean weights"}, "torch": {"softcap", "dropout", "weights", "mean weights"}}
CALLS = [(x, name) for x in IMPLEMENTATIONS for name in SETTINGS if name not in LACKING.get(x, set())]


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
@pytest.mark.parametrize(("implementation", "name"), CALLS)
def test_agree_with_heads_written_out(implementation, name, key_heads):
    given = tensors(key_heads)
    found = results(given, given, Full(), implementation=implementation, **SETTINGS[name])
    expected = results(written_out(*given), given, Full(), implementation="reference", **SETTINGS[name])
    assert [x.shape for x in found[-3:]] == [x.shape for x in given]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("key_heads", [1, 2, 3])
@pytest.mark.parametrize("mask", [None, numbers(QUERIES, QUERIES) > -0.5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal(implementation, mask, key_heads):
    given = tensors(key_heads, QUERIES)
    found = results(given, given, Causal(), mask=mask, implementation=implementation)
    expected = results(written_out(*given), given, Causal(), mask=mask, implementation="reference")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivatives(implementation):
    given = [numbers(1, 3, 4, 2), numbers(1, 2, 2, 2), numbers(1, 2, 2, 1)]

    def output(*rows: Tensor) -> Tensor:
        return attend(*rows, implementation=implementation).output

    leaves = [x.requires_grad_() for x in given]
    assert torch.autograd.gradcheck(output, leaves)
    assert torch.autograd.gradgradcheck(output, leaves)


def test_other_scores():
    query, key, value = numbers(2, 4, 6, 1), numbers(2, 5, 3, 1), numbers(2, 5, 3, 2)
    found = attend(query, key, value, score=Additive()).output
    torch.testing.assert_close(found, attend(*written_out(query, key, value), score=Additive()).output)


def test_the_kernels_run_them():
    if native.available():
        assert explain(*tensors(2)).implementation == "cpu"


def test_groups_must_be_whole():
    query, key, value = tensors(4)
    with pytest.raises(DimensionMismatchError, match="key: expected a number of key_heads that divides heads=6"):
        attend(query, key, value)
    with pytest.raises(DimensionMismatchError, match="value"):
        attend(query, tensors(3)[1], tensors(2)[2])
