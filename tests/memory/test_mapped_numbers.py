"""Attention over a file whose numbers are far apart, huge, tiny or infinite, by any scale, and under autocast."""

import pytest
import torch

from anyattention.memory import attend_file, write_memory

_MEASURES = ("dot", "cosine", "euclidean")


def _numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def written(tmp_path):
    def write(keys, values):
        write_memory(tmp_path / "memory.safetensors", [(keys, values)])
        return tmp_path / "memory.safetensors"

    return write


def _scores(query, keys, measure):
    """By the definition, in float64."""
    query, keys = query.double(), keys.double()
    if measure == "euclidean":
        return -(query.unsqueeze(1) - keys).square().sum(-1)
    if measure == "cosine":
        query, keys = (x / x.norm(dim=1, keepdim=True) for x in (query, keys))
    return query @ keys.T


@pytest.mark.parametrize("measure", _MEASURES)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.7])
@pytest.mark.parametrize("part_size", [7, 100, 1000])
def test_the_best_are_those_of_the_largest_scores(written, measure, scale, part_size):
    keys, values, query = _numbers(211, 11), _numbers(211, 3, seed=1), _numbers(5, 11, seed=2)
    found = attend_file(query, written(keys, values), k=6, measure=measure, scale=scale, part_size=part_size)
    scores, rows = (_scores(query, keys, measure) * scale).sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.indices, rows[:, :6])
    torch.testing.assert_close(found.weights, scores[:, :6].softmax(1).float())


@pytest.mark.parametrize("k", [None, 5])
def test_a_first_key_far_from_the_others_costs_no_digits(written, k):
    keys, values, query = _numbers(300, 11) + 1000, _numbers(300, 3, seed=1), _numbers(5, 11, seed=2) + 1000
    keys[0] = 0
    scores = _scores(query, keys, "euclidean")
    best = scores.topk(300 if k is None else k)
    expected = (best.values.softmax(1).unsqueeze(-1) * values.double()[best.indices]).sum(1)
    found = attend_file(query, written(keys, values), k=k, measure="euclidean")
    torch.testing.assert_close(found.output, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-40, 1e-25, 1e25])
def test_cosines_of_tiny_and_huge_vectors(written, factor):
    keys, values, query = _numbers(60, 11), _numbers(60, 3, seed=1), _numbers(5, 11, seed=2)
    expected = _scores(query, keys * factor, "cosine").float()
    query = (query * factor).requires_grad_(factor > 1e-30)
    found = attend_file(query, written(keys * factor, values), k=60, measure="cosine")
    torch.testing.assert_close(found.weights.detach(), expected.softmax(1).gather(1, found.indices), rtol=1e-4, atol=0)
    if query.requires_grad:
        by = _numbers(5, 3, seed=3)
        (gradient,) = torch.autograd.grad(found.output, query, by)
        plain = query.detach().double().requires_grad_()
        weights = _scores(plain, keys.double() * factor, "cosine").softmax(1)
        (exact,) = torch.autograd.grad(weights @ values.double(), plain, by.double())
        torch.testing.assert_close(gradient.double() * factor, exact * factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("measure", _MEASURES)
@pytest.mark.parametrize("k", [None, 4, 30])
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("part_size", [7, 100])
@pytest.mark.parametrize("row", [0, 17])
def test_a_number_that_is_none_shows_whatever_the_parts(written, measure, k, number, part_size, row):
    keys, values, query = _numbers(30, 3), _numbers(30, 2, seed=1), _numbers(5, 3, seed=2).abs()
    keys[row, 1] = number
    found = attend_file(query, written(keys, values), k=k, measure=measure, part_size=part_size)
    assert found.output.isnan().all()
    if k is not None:
        assert (found.indices[:, 0] == row).all()
        others = [j for j in range(30) if j != row]
        best = _scores(query, keys[others], measure).topk(3).indices
        assert torch.equal(found.indices[:, 1:4], torch.tensor(others)[best])


@pytest.mark.parametrize("measure", _MEASURES)
@pytest.mark.parametrize("k", [None, 4])
def test_a_backward_under_autocast_has_the_same_bits(written, measure, k):
    memory = written(_numbers(50, 3), _numbers(50, 2, seed=1))
    query, by = _numbers(5, 3, seed=2).requires_grad_(), _numbers(5, 2, seed=3)
    (expected,) = torch.autograd.grad(attend_file(query, memory, k=k, measure=measure).output, query, by)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attend_file(query, memory, k=k, measure=measure).output
        (found,) = torch.autograd.grad(output, query, by)
    assert torch.equal(found, expected)
