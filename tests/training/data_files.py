"""Small made-up files of the two formats; the tests of training and of the commands load this file."""

from pathlib import Path
from typing import Any

import numpy as np


def sparse_arrays(num_nodes: int = 13, num_features: int = 20) -> dict[str, Any]:
    """Two classes, told apart by their features; a ring in both directions."""
    random = np.random.default_rng(0)
    dense = random.integers(1, 4, (num_nodes, num_features)) * (random.random((num_nodes, num_features)) < 0.15)
    y = np.arange(num_nodes) % 2
    dense[:, 0] = 3 * y + 1
    rows, columns = dense.nonzero()
    ring = np.stack([np.arange(num_nodes), (np.arange(num_nodes) + 1) % num_nodes])
    return {
        "x_indptr": np.concatenate([[0], np.bincount(rows, minlength=num_nodes).cumsum()]),
        "x_indices": columns.astype(np.int32),
        "x_data": dense[rows, columns].astype(np.float32),
        "x_shape": np.array(dense.shape),
        "edge_index": np.concatenate([ring, ring[::-1]], axis=1).astype(np.int32),
        "y": y,
        "labelled": np.ones(num_nodes, dtype=bool),
        "train": np.arange(4),
        "val": np.arange(4, 8),
        "test": np.arange(8, num_nodes),
    }


def dense_arrays(num_nodes: int = 17, num_features: int = 3, splits: int = 2) -> dict[str, Any]:
    """Two classes, told apart by their features; a ring, each edge once."""
    random = np.random.default_rng(0)
    labels = np.arange(num_nodes) % 2
    features = random.random((num_nodes, num_features)) + labels[:, None]
    parts = np.stack([random.permutation(num_nodes) % 3 for _ in range(splits)])
    # Each part of each split has nodes of both classes.
    parts[:, :6] = np.arange(6) // 2
    return {
        "node_features": features.astype(np.float32),
        "node_labels": labels,
        "edges": np.stack([np.arange(num_nodes), (np.arange(num_nodes) + 1) % num_nodes], axis=1),
        "train_masks": parts == 0,
        "val_masks": parts == 1,
        "test_masks": parts == 2,
    }


def write(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path
