"""merge: results over parts of the keys are the result over all of them."""

import pytest
import torch

from anyattention import AttentionResult, Graph, attend, merge
from anyattention.errors import DimensionMismatchError, InvalidInputError


def parts_of(sizes: list[int], dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], list[AttentionResult]]:
    query = torch.randn(2, 5, 3, 4, dtype=dtype, requires_grad=True)
    key = torch.randn(2, sum(sizes), 3, 4, dtype=dtype, requires_grad=True)
    value = torch.randn(2, sum(sizes), 3, 7, dtype=dtype, requires_grad=True)
    pieces = zip(key.split(sizes, dim=1), value.split(sizes, dim=1), strict=True)
    results = [attend(query, k, v, return_logsumexp=True, implementation="reference") for k, v in pieces]
    return [query, key, value], results


@pytest.mark.parametrize("sizes", [[11], [3, 8], [1, 0, 7, 3], [0, 0, 11]])
def test_parts_are_the_whole_with_both_derivatives(sizes: list[int]) -> None:
    leaves, parts = parts_of(sizes)
    merged = merge(parts)
    whole = attend(leaves[0], leaves[1], leaves[2], return_logsumexp=True, implementation="reference")
    torch.testing.assert_close((merged.output, *merged.normalizer), (whole.output, *whole.normalizer))  # pyright: ignore[reportOptionalIterable]
    shapes = (whole.output.shape, whole.output.shape[:3])
    cotangents = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    more = [torch.randn(leaf.shape, dtype=torch.float64) for leaf in leaves]
    found = []
    for each in (merged, whole):
        assert each.logsumexp is not None
        first = torch.autograd.grad([each.output, each.logsumexp], leaves, cotangents, create_graph=True)
        found.append([*first, *torch.autograd.grad(first, leaves, more)])
    torch.testing.assert_close(found[0], found[1])


def test_any_order_and_grouping() -> None:
    _, parts = parts_of([3, 1, 0, 7])
    expected = merge(parts)
    torch.testing.assert_close(merge(parts[::-1]), expected)
    torch.testing.assert_close(merge([merge(parts[:2]), merge(parts[2:])]), expected)


def test_a_query_without_keys_in_any_part() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0], [1]]), num_queries=3, num_keys=2)
    query = torch.randn(3, 2, 4, requires_grad=True)
    rows = torch.randn(2, 2, 4)
    part = attend(query, rows, rows, graph, return_logsumexp=True)
    merged = merge([part, part])
    assert merged.logsumexp is not None
    assert torch.equal(merged.output[[0, 2]], torch.zeros(2, 2, 4))
    assert (merged.logsumexp[[0, 2]] == -torch.inf).all()
    torch.testing.assert_close(merged.logsumexp[1], part.logsumexp[1] + torch.log(torch.tensor(2.0)))  # pyright: ignore[reportOptionalSubscript]
    (gradient,) = torch.autograd.grad(merged.output.square().sum(), query)
    assert gradient.isfinite().all()


def test_scores_too_large_for_an_exponential() -> None:
    output = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1, 1)
    largest, log_sum = torch.full((1, 1, 1), 1000.0), torch.zeros(1, 1, 1)
    merged = merge([AttentionResult(x, normalizer=(largest, log_sum)) for x in output])
    assert merged.output.item() == 2.0
    assert merged.logsumexp is not None
    torch.testing.assert_close(merged.logsumexp.flatten(), torch.tensor([1000.0]) + torch.log(torch.tensor(2.0)))


def test_low_precision_keeps_its_dtype() -> None:
    _, parts = parts_of([3, 8], torch.bfloat16)
    merged = merge(parts)
    assert merged.output.dtype == torch.bfloat16
    assert merged.logsumexp is not None
    assert merged.logsumexp.dtype == torch.float32


def test_bad_input() -> None:
    _, parts = parts_of([3, 8])
    with pytest.raises(InvalidInputError, match="parts: expected a list of AttentionResults, at least one, got \\[\\]"):
        merge([])
    with pytest.raises(InvalidInputError, match=r"parts\[1\]: expected an AttentionResult, got Tensor"):
        merge([parts[0], parts[0].output])  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        InvalidInputError, match=r"parts\[0\].normalizer: expected a pair of tensors, got None. .*return_logsumexp"
    ):
        merge([AttentionResult(parts[0].output)])
    with pytest.raises(DimensionMismatchError, match=r"parts\[1\].output: expected .*queries=5"):
        merge([parts[0], parts[1]._replace(output=parts[1].output[:, :4])])
    with pytest.raises(InvalidInputError, match=r"parts\[1\].output"):
        merge([parts[0], parts[1]._replace(output=parts[1].output.float())])


def test_parts_of_different_ranks_and_a_boolean_normalizer() -> None:
    _, parts = parts_of([3, 8])
    assert parts[1].normalizer is not None
    largest, log_sum = parts[1].normalizer
    lower = AttentionResult(parts[1].output[0], normalizer=(largest[0], log_sum[0]))
    with pytest.raises(DimensionMismatchError, match=r"parts\[1\].output"):
        merge([parts[0], lower])
    with pytest.raises(InvalidInputError, match=r"parts\[1\].normalizer\[0\]: expected a floating"):
        merge([parts[0], parts[1]._replace(normalizer=(largest > 0, log_sum))])
