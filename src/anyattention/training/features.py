"""What features are: words (few of many are there), numbers, or none but the structure of the graph."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention.files import most_memory
from anyattention.nn.feature_rows import sparse_csr

__all__ = ["FeatureKind", "Look", "look_at", "look_at_sparse", "rows_normalised", "to_sparse"]

FeatureKind = Literal["words", "numbers", "structure"]

# At most this share of the numbers of words is not zero.
_FEW = 0.25

# So many columns may be numbers however few of these are not zero.
_NARROW = 64


class Look(NamedTuple):
    """What features are, and the reason in words, as what follows "since "."""

    kind: FeatureKind
    reason: str


def look_at(features: np.ndarray) -> Look:
    """What dense features `(nodes, in_features)` are."""
    if not features.size or bool((features == features[:1]).all()):
        return Look("structure", "no feature tells one node from another")
    return _look_at_stored(features[features != 0], np.count_nonzero(features, axis=1), features.shape[1])


def look_at_sparse(features: Tensor) -> Look:
    """What features `(nodes, in_features)` in sparse CSR are."""
    values, offsets = features.values().numpy(), features.crow_indices().numpy()
    if not values.any():
        return Look("structure", "all features are 0")
    if 4 * features.numel() > most_memory(8 * len(values)):
        return _words(np.count_nonzero(values) / features.numel())
    before = np.concatenate([[0], (values != 0).cumsum()])[offsets]
    look = _look_at_stored(values[values != 0], np.diff(before), features.shape[1])
    return look_at(features.to_dense().numpy()) if look.kind == "numbers" else look


def _look_at_stored(values: np.ndarray, counts: np.ndarray, columns: int) -> Look:
    """What features are of which these values are not zero, so many in each row."""
    share = len(values) / (len(counts) * columns)
    if share > _FEW:
        return Look("numbers", f"{share:.0%} of the features are not 0")
    # A row of words is divided by the sum of its magnitudes, which of a single number leaves the sign alone.
    is_single = columns <= _NARROW and 2 * np.count_nonzero(counts == 1) > np.count_nonzero(counts)
    if is_single and 2 * np.unique(np.abs(values), return_counts=True)[1].max() <= len(values):
        return Look("numbers", f"{share:.0%} of the features are not 0, and most nodes that have any have one number")
    return _words(share)


def _words(share: float) -> Look:
    return Look("words", f"only {share:.2%} of the features are not 0, as with words")


def to_sparse(features: np.ndarray) -> Tensor:
    """Dense features in sparse CSR."""
    rows, columns = features.nonzero()
    offsets = np.concatenate([[0], np.bincount(rows, minlength=len(features)).cumsum()])
    values = torch.from_numpy(np.ascontiguousarray(features[rows, columns], dtype=np.float32))
    shape = (features.shape[0], features.shape[1])
    return sparse_csr(torch.from_numpy(offsets), torch.from_numpy(columns), values, shape)


def rows_normalised(features: Tensor) -> Tensor:
    """Features in sparse CSR, each row divided by the sum of its magnitudes; a row of zeros stays as it is."""
    offsets, values = features.crow_indices().numpy(), features.values().numpy()
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    sums = np.bincount(rows, weights=np.abs(values), minlength=len(offsets) - 1)
    factors = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums != 0)
    scaled = torch.from_numpy((values * factors[rows]).astype(np.float32))
    shape = (features.shape[0], features.shape[1])
    return sparse_csr(features.crow_indices(), features.col_indices(), scaled, shape)
