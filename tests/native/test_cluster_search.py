"""The search among clusters: the kernel and PyTorch's sorting against every product."""

import itertools

import pytest
import torch

from anyattention.native import clusters
from anyattention.native.topk import _by_sorting as sorted_products
from anyattention.native.topk import largest_products

WAYS = (clusters.largest_in_clusters, clusters._by_sorting)


@pytest.mark.parametrize("search", WAYS)
@pytest.mark.parametrize("k", [1, 7, 70])
def test_finds_the_largest_products_of_the_clusters(search, k):
    for _ in range(20):
        query, key = torch.randint(-3, 4, (5, 11)).float(), torch.randint(-3, 4, (53, 11)).float()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 54, (6,)).sort().values])
        key = key[: offsets[-1]]
        probes = torch.stack([torch.randperm(6)[:3] for _ in query])
        found = search(query, key, offsets, probes, k)
        for row, looked_into, best in zip(query, probes.tolist(), found, strict=True):
            places = torch.cat([torch.arange(int(offsets[c]), int(offsets[c + 1])) for c in sorted(looked_into)])
            order = (key[places] @ row).sort(descending=True, stable=True).indices[:k]
            assert best[best >= 0].equal(places[order])
            assert (best[len(order) :] == -1).all()


@pytest.mark.parametrize("search", WAYS)
def test_of_equal_keys_the_first_is_best(search):
    for dim, count in itertools.product((3, 7, 13, 29, 39), range(5, 60)):
        query, key = torch.randn(5, dim), torch.randn(1, dim).repeat(count, 1)
        found = search(query, key, torch.tensor([0, 2, count]), torch.tensor([[1, 0]] * 5), 5)
        assert found.tolist() == [[0, 1, 2, 3, 4]] * 5


@pytest.mark.parametrize("search", WAYS)
def test_products_that_overflow_are_largest(search):
    query, key = torch.full((1, 2), 1e20), torch.tensor([[1.0, 1], [-1e20, -1e20], [2, 2], [1e20, 1e20]])
    assert search(query, key, torch.tensor([0, 4]), torch.tensor([[0]]), 4).tolist() == [[1, 3, 2, 0]]


@pytest.mark.parametrize("search", [largest_products, lambda *arguments: sorted_products(*arguments, None, None)])
def test_products_that_overflow_are_largest_of_all_keys(search):
    query, key = torch.full((1, 2), 1e20), torch.tensor([[1.0, 1], [-1e20, -1e20], [2, 2], [1e20, 1e20]])
    assert search(query, key, 4).tolist() == [[1, 3, 2, 0]]
