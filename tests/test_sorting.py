"""Rows of symmetric graphs, and rows sorted by numbers: kernel and PyTorch give the same, whatever the threads."""

import numpy as np
import pytest
import torch

from anyattention.errors import IndexRangeError
from anyattention.native import load
from anyattention.native.compressed_rows import compressed_rows, sort_rows, symmetric_rows


def random_pairs(count, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(rows, (count, 2), generator=generator)
    return pairs[pairs[:, 0] != pairs[:, 1]]


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (0, 3), (1, 2), (40, 7), (3_000, 11), (80_000, 5_000)])
def test_the_kernel_agrees_with_pytorch(native, monkeypatch, count, rows):
    pairs = random_pairs(count, rows, count) if rows else torch.empty(0, 2, dtype=torch.int64)
    found = symmetric_rows(pairs, rows)
    columns, of_row = found.edge_index
    assert torch.equal(found.offsets.diff(), torch.bincount(pairs.flatten(), minlength=rows))
    order = of_row * max(rows, 1) + columns
    assert (order.diff() >= 0).all()
    assert torch.equal(found.edge_index[:, found.reverse], found.edge_index.flip(0))
    assert torch.equal(found.reverse[found.reverse], torch.arange(2 * len(pairs)))
    monkeypatch.setattr(load, "library", lambda: None)
    for ours, plain in zip(found, symmetric_rows(pairs, rows), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("rows", [1_000, 70_000])
def test_threads_do_not_change_the_result(native, monkeypatch, rows):
    pairs = random_pairs(200_000, rows, 3)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(load, "num_threads", lambda threads=threads: threads)
        results.append(symmetric_rows(pairs, rows))
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_a_row_out_of_range_is_refused(native):
    for row in (-1, 3, 2**40):
        with pytest.raises(IndexRangeError, match="symmetric_rows"):
            symmetric_rows(torch.tensor([[0, 1], [2, row]]), 3)


def test_long_rows_are_sorted_by_every_byte_of_their_columns(native):
    """Rows of more columns than are shifted one by one, which differ in their third byte alone, in two, or in none."""
    hubs = [torch.arange(1, 200) * 65_536, torch.randint(1, 10_000_000, (500,)), torch.full((60,), 7), torch.arange(3)]
    pairs = torch.cat([torch.stack([torch.full_like(far, hub), far + 4], 1) for hub, far in enumerate(hubs)])
    pairs = pairs[torch.randperm(len(pairs))]
    found = symmetric_rows(pairs, 14_000_000)
    for hub, far in enumerate(hubs):
        slots = slice(*found.offsets[hub : hub + 2].tolist())
        assert found.edge_index[0, slots].tolist() == sorted((far + 4).tolist())
    assert torch.equal(found.edge_index[:, found.reverse], found.edge_index.flip(0))


def numbers_of(kind, count):
    generator = torch.Generator().manual_seed(count)

    def integers(low, high):
        return torch.randint(low, high, (count,), generator=generator)

    return {
        "few": [integers(-2, 3)],
        "equal": [torch.full((count,), 5), torch.full((count,), -5)],
        "key and shifts": [integers(0, 50), *integers(-3, 4)[:, None].repeat(1, 3).unbind(1)],
        "floats": [torch.rand(count, generator=generator, dtype=torch.float64).mul(9).round().view(torch.int64)],
        "floats and keys": [integers(0, 3).double().sqrt().view(torch.int64), integers(0, 40), integers(-1, 2)],
        # Together, and one alone, wider than a number.
        "wide": [integers(0, 2) * 2**62 - 2**61, integers(0, 2) * 2**62, integers(-(2**63), 2**63 - 1)],
        "extreme": [integers(0, 2) * (2**63 - 1) - (2**63 - 1) * integers(0, 2), integers(0, 3)],
        "many columns": [integers(0, 2) for _ in range(12)],
    }[kind]


KINDS = ("few", "equal", "key and shifts", "floats", "floats and keys", "wide", "extreme", "many columns")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "rows"), [(0, 0), (0, 3), (1, 2), (90, 7), (3_000, 11), (60_000, 4_000)])
def test_rows_are_sorted_by_numbers(native, monkeypatch, kind, count, rows):
    row = torch.randint(max(rows, 1), (count,), generator=torch.Generator().manual_seed(1))
    numbers = numbers_of(kind, count)
    offsets, _, given = compressed_rows(row, row, rows, rows)
    expected = np.lexsort([np.arange(count), *[column.numpy() for column in reversed(numbers)], row.numpy()])
    for threads in (1, 3):
        monkeypatch.setattr(load, "num_threads", lambda threads=threads: threads)
        # As the columns of a matrix.
        into = torch.empty(count, len(numbers), dtype=torch.int64).unbind(1)
        edges = given.clone()
        sort_rows(offsets, edges, torch.stack(numbers, dim=1).unbind(1), into)
        assert edges.tolist() == expected.tolist()
        for column, found in zip(numbers, into, strict=True):
            assert torch.equal(found, column[edges])
    edges = given.clone()
    sort_rows(offsets, edges, numbers)
    assert edges.tolist() == expected.tolist()
    monkeypatch.setattr(load, "library", lambda: None)
    plain, into = given.clone(), [torch.empty_like(column) for column in numbers]
    sort_rows(offsets, plain, numbers, into)
    assert torch.equal(plain, edges)
    assert all(torch.equal(found, column[edges]) for column, found in zip(numbers, into, strict=True))


@pytest.mark.parametrize(
    ("offsets", "edges"),
    [([0, 2, 4], [0, 1, 2, 4]), ([0, 2, 4], [0, -1, 2, 3]), ([0, 5, 4], [0, 1, 2, 3]), ([0, 2, 3], [0, 1, 2, 3])],
)
def test_rows_of_places_that_are_not_there_are_refused(native, offsets, edges):
    with pytest.raises(IndexError, match="sorted_rows"):
        sort_rows(torch.tensor(offsets), torch.tensor(edges), [torch.arange(4)])
