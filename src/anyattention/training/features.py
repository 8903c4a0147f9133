"""What features are: words (few of many are there), numbers, or none but the structure of the graph."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention.nn.feature_rows import sparse_csr

__all__ = ["FeatureKind", "Look", "look_at", "look_at_sparse", "rows_normalised", "to_sparse"]

FeatureKind = Literal["words", "numbers", "structure"]

# At most this share of the numbers of words is not zero.
_FEW = 0.25


class Look(NamedTuple):
    """What features are, and the reason in words, as what follows "since "."""

    kind: FeatureKind
    reason: str


def look_at(features: np.ndarray) -> Look:
    """What dense features `(nodes, in_features)` are."""
    if not features.size or bool((features == features[:1]).all()):
        return Look("structure", "no feature tells one node from another")
    return _look_at_share(np.count_nonzero(features) / features.size)


def look_at_sparse(features: Tensor) -> Look:
    """What features `(nodes, in_features)` in sparse CSR are."""
    stored = int(torch.count_nonzero(features.values()))
    if not stored:
        return Look("structure", "all features are 0")
    look = _look_at_share(stored / features.numel())
    # Only then a dense copy is no larger than a few times the sparse one.
    return look_at(features.to_dense().numpy()) if look.kind == "numbers" else look


def _look_at_share(share: float) -> Look:
    if share <= _FEW:
        return Look("words", f"only {share:.2%} of the features are not 0, as with words")
    return Look("numbers", f"{share:.0%} of the features are not 0")


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
