"""What features are taken for, and what is left of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anyattention.nn.feature_rows import sparse_csr
from anyattention.training import load_tables
from anyattention.training.features import look_at, look_at_sparse, to_sparse


def scattered(rows: int, columns: int, each: int, *, is_binary: bool) -> np.ndarray:
    """A fifth of the rows have so many numbers, the others none."""
    generator = np.random.default_rng(rows + columns)
    found = np.zeros((rows, columns), dtype=np.float32)
    for row in range(0, rows, 5):
        places = generator.choice(columns, each, replace=False)
        found[row, places] = 1 if is_binary else generator.uniform(1, 100, each)
    return found


@pytest.mark.parametrize(
    ("columns", "each", "is_binary", "kind"),
    [
        (1, 1, False, "numbers"),
        (1, 1, True, "words"),
        (3, 1, False, "numbers"),
        (3, 1, True, "words"),
        (11, 2, False, "words"),
        (64, 1, False, "numbers"),
        (65, 1, False, "words"),
    ],
)
def test_single_numbers_are_no_words(columns: int, each: int, is_binary: bool, kind: str) -> None:
    features = scattered(35, columns, each, is_binary=is_binary)
    assert look_at(features).kind == kind
    assert look_at_sparse(to_sparse(features)) == look_at(features)


def test_counts_that_are_mostly_one_are_words() -> None:
    features = scattered(35, 5, 1, is_binary=True)
    features[0] *= 2
    assert look_at(features).kind == "words"


def test_what_is_far_larger_when_dense_stays_sparse() -> None:
    rows = 600_000
    one = to_sparse(np.array([[1.0], [2.0]], dtype=np.float32))
    offsets = torch.cat([one.crow_indices(), torch.full((rows - 2,), 2)])
    large = sparse_csr(offsets, one.col_indices(), one.values(), (rows, 60))
    assert look_at_sparse(large).kind == "words"


def test_a_number_that_is_mostly_zero_keeps_its_size(tmp_path: Path) -> None:
    income = [0, 0, 0, 0, 100, 0, 0, 0, 0, 1] * 4
    lines = "".join(f"n{row},{'poor' if x < 50 else 'rich'},{x}\n" for row, x in enumerate(income))
    (tmp_path / "nodes.csv").write_text("id,label,income\n" + lines)
    (tmp_path / "edges.csv").write_text("source,target\nn0,n1\n")
    data = load_tables(tmp_path)
    assert data.look.reason == "20% of the features are not 0, and most nodes that have any have one number"
    expected = (np.array(income) - np.mean(income)) / np.std(income)
    np.testing.assert_allclose(data.features[:, 0], expected, rtol=1e-5)
