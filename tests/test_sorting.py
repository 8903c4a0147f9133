"""Rows of symmetric graphs: the kernel and PyTorch's route give the same, whatever the threads."""

import pytest
import torch

from anyattention.errors import IndexRangeError
from anyattention.native import load
from anyattention.native.compressed_rows import symmetric_rows


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
