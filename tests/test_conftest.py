"""The fixtures themselves: memory that was not written shows, what is missing in CI fails."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_new_floating_memory_is_nan(dtype):
    like = torch.zeros(3, dtype=dtype)
    created = [
        torch.empty(3, dtype=dtype),
        torch.empty(3, dtype=dtype, requires_grad=True).detach(),
        torch.empty_like(like),
        torch.empty_strided((3,), (2,), dtype=dtype),
        like.new_empty(3),
    ]
    for tensor in created:
        assert tensor.isnan().all()


def test_new_integers_are_no_index():
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.empty(3, dtype=torch.bool).all()


def test_algorithms_are_those_of_users():
    assert not torch.are_deterministic_algorithms_enabled()


def test_empty_still_compiles():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def ones(like):
        return torch.empty_like(like).fill_(1) * like.new_empty(3).fill_(1) * torch.empty(3).fill_(1)

    assert torch.equal(ones(torch.zeros(3)), torch.ones(3))


def test_what_is_missing_is_skipped_and_fails_in_ci(require, monkeypatch):
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="cannot import no_such_module"):
        require("no_such_module")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="cannot import no_such_module"):
        require("no_such_module")
