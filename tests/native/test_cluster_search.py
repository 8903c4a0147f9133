"""The search among clusters of keys, by the kernel and by sorting, against loops."""

import itertools

import pytest
import torch
from torch import Tensor

from anyattention.native import clusters as search
from anyattention.native.topk import _by_sorting as sorted_products
from anyattention.native.topk import largest_products


@pytest.fixture(params=[search.largest_in_clusters, search._by_sorting], ids=["kernel", "sorting"])
def largest(request, native):
    return request.param


def by_loops(query: Tensor, key: Tensor, sizes: list[int], probes: Tensor, k: int) -> list[list[int]]:
    bounds = [sum(sizes[:c]) for c in range(len(sizes) + 1)]
    found = []
    for i, own in enumerate(probes.tolist()):
        scores = (key.double() @ query[i].double()).tolist()
        seen = [j for c in own if c >= 0 for j in range(bounds[c], bounds[c + 1])]
        best = sorted(seen, key=lambda j: (-scores[j], j))[:k]
        found.append(best + [-1] * (k - len(best)))
    return found


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def whole_numbers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).float()


def some_probes(queries: int, count: int, num_clusters: int) -> Tensor:
    return torch.rand(queries, num_clusters).argsort(1)[:, :count].contiguous()


@pytest.mark.parametrize(
    ("queries", "width", "sizes", "probed", "k"),
    [
        (1, 1, [1], 1, 1),
        (1, 5, [3, 0, 7], 2, 4),
        (7, 3, [0, 0, 5, 0], 3, 2),
        (131, 11, [97, 1, 0, 200, 33], 3, 17),
        (5, 2, [11, 5], 2, 300),
        (67, 33, [2, 3, 5, 7, 11] * 5, 25, 9),
        (3, 4, [0, 0], 1, 2),
    ],
)
def test_the_best_keys_of_clusters_are_those_of_loops(largest, threads, queries, width, sizes, probed, k):
    query, key = whole_numbers(queries, width), whole_numbers(sum(sizes), width)
    probes = some_probes(queries, probed, len(sizes))
    expected = by_loops(query, key, sizes, probes, k)
    for count in (1, 2, 3):
        threads(count)
        assert largest(query, key, offsets_of(sizes), probes, k).tolist() == expected


def test_no_queries_find_nothing(largest):
    assert largest(torch.zeros(0, 3), torch.randn(5, 3), offsets_of([2, 3]), torch.zeros(0, 1).long(), 4).shape == (
        0,
        4,
    )


def test_queries_are_searched_a_part_at_a_time(largest, monkeypatch):
    monkeypatch.setattr(search, "_CANDIDATES_AT_ONCE", 1)
    monkeypatch.setattr(search, "_SCORES_AT_ONCE", 1)
    query, key, sizes, probes = whole_numbers(150, 3), whole_numbers(30, 3), [11, 19], some_probes(150, 1, 2)
    assert largest(query, key, offsets_of(sizes), probes, 5).tolist() == by_loops(query, key, sizes, probes, 5)


def test_a_probe_may_be_none(largest):
    query, key, sizes = whole_numbers(4, 3), whole_numbers(12, 3), [5, 7]
    probes = torch.tensor([[-1, -1], [1, -1], [-1, 0], [0, 1]])
    expected = by_loops(query, key, sizes, probes, 6)
    assert expected[0] == [-1] * 6
    assert largest(query, key, offsets_of(sizes), probes, 6).tolist() == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_no_number_finds_the_first_keys(largest, value):
    query, key = torch.ones(3, 2), whole_numbers(20, 2).abs() + 1
    query[1, 0] = value
    probes = torch.tensor([[0, 1], [2, 1], [1, 0]])
    expected = by_loops(query.nan_to_num(), key, [4, 5, 11], probes, 3)
    expected[1] = [4, 5, 6]
    assert largest(query, key, offsets_of([4, 5, 11]), probes, 3).tolist() == expected


def test_a_key_that_is_no_number_is_found_first(largest):
    key = torch.tensor([[1.0], [torch.inf], [2.0], [torch.nan], [-torch.inf]])
    assert largest(torch.ones(1, 1), key, offsets_of([5]), torch.zeros(1, 1).long(), 5).tolist() == [[1, 3, 4, 2, 0]]


def test_of_equal_keys_the_first_is_best(largest):
    for dim, count in itertools.product((3, 7, 13, 29, 39), range(5, 60)):
        query, key = torch.randn(5, dim), torch.randn(1, dim).repeat(count, 1)
        found = largest(query, key, torch.tensor([0, 2, count]), torch.tensor([[1, 0]] * 5), 5)
        assert found.tolist() == [[0, 1, 2, 3, 4]] * 5


@pytest.mark.parametrize("queries", [1, 9])
def test_products_that_overflow_are_largest(largest, queries):
    query, key = torch.full((queries, 2), 1e20), torch.tensor([[1.0, 1], [-1e20, -1e20], [2, 2], [1e20, 1e20]])
    found = largest(query, key, torch.tensor([0, 4]), torch.zeros(queries, 1).long(), 4)
    assert found.tolist() == [[1, 3, 2, 0]] * queries


@pytest.mark.parametrize("choose", [largest_products, lambda *arguments: sorted_products(*arguments, None, None)])
def test_products_that_overflow_are_largest_of_all_keys(choose):
    query, key = torch.full((1, 2), 1e20), torch.tensor([[1.0, 1], [-1e20, -1e20], [2, 2], [1e20, 1e20]])
    assert choose(query, key, 4).tolist() == [[1, 3, 2, 0]]
