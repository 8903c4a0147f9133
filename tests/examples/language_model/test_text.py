import math

import pytest
import torch

from anyattention.errors import InvalidInputError
from examples.language_model.text import load_source, pair_entropy, split_text, unigram_entropy


def test_the_files_come_in_the_order_of_their_names(tmp_path) -> None:
    (tmp_path / "b.py").write_bytes(b"second\n" * 20)
    (tmp_path / "a.py").write_bytes(b"first\n" * 10)
    (tmp_path / "c.txt").write_bytes(b"no source" * 100)
    train, held_out = load_source(folder=tmp_path)
    assert (len(train), len(held_out)) == (180, 20)
    assert bytes(torch.cat([train, held_out]).tolist()) == b"first\n" * 10 + b"second\n" * 20
    assert bytes(torch.cat(load_source(100, tmp_path)).tolist()) == (b"first\n" * 10 + b"second\n" * 20)[:100]


def test_the_standard_library_is_there() -> None:
    train, held_out = load_source(50_000)
    assert (len(train), len(held_out)) == (45_000, 5_000)
    assert 3 < unigram_entropy(held_out) < 6
    assert torch.equal(load_source(50_000).train, train)


def test_too_little_text_is_named(tmp_path) -> None:
    with pytest.raises(InvalidInputError, match="expected Python files to read, got 0 bytes"):
        load_source(folder=tmp_path)


def test_entropy_of_single_bytes() -> None:
    assert unigram_entropy(torch.tensor([7] * 5)) == 0
    assert unigram_entropy(torch.tensor([1, 2, 3, 4])) == pytest.approx(2)
    assert unigram_entropy(torch.tensor([1, 1, 2])) == pytest.approx(math.log2(3) - 2 / 3)


def test_entropy_of_pairs() -> None:
    train, held_out = split_text(b"ab" * 500)
    # After 449 of each, and a tenth for each of 256 bytes; one "a" more than "ba" pairs.
    expected = -sum(math.log2((n + 0.1) / (n + 25.6)) * share for n, share in ((450, 50), (449, 49))) / 99
    assert pair_entropy(train, held_out) == pytest.approx(expected)
