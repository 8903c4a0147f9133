"""Neighbours by brute force: every pair and every image, in float64, in NumPy alone."""

import itertools
import math

import numpy as np


def brute_force(keys, queries=None, *, key_cloud=None, query_cloud=None, cell=None, periodic=None, reach=0.0):
    """Query, key, shift and distance of all pairs within reach, and more; in order of query, key and shift."""
    keys = np.asarray(keys, dtype=np.float64)
    is_one_set = queries is None
    queries = keys if is_one_set else np.asarray(queries, dtype=np.float64)
    dim = keys.shape[1]
    key_cloud = np.zeros(len(keys), int) if key_cloud is None else np.asarray(key_cloud)
    query_cloud = (
        key_cloud if is_one_set else np.zeros(len(queries), int) if query_cloud is None else np.asarray(query_cloud)
    )
    periodic = (cell is not None,) * dim if periodic is None else periodic
    rows = []
    for cloud in np.unique(np.concatenate([key_cloud, query_cloud])):
        inside, around = np.flatnonzero(key_cloud == cloud), np.flatnonzero(query_cloud == cloud)
        if not len(inside) or not len(around):
            continue
        own = None if cell is None else np.asarray(cell, dtype=np.float64)
        own = own[cloud if len(own) > 1 else 0] if own is not None and own.ndim == 3 else own
        ranges = [range(1)] * dim
        if own is not None and any(periodic):
            ranges = _ranges(own, periodic, keys[inside], queries[around], reach)
        shifts = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, dim)
        for some in np.array_split(shifts, 1 + len(shifts) * len(inside) * len(around) // 1_000_000):
            along = np.zeros((len(some), dim))
            for vector in range(dim if own is not None else 0):
                along = along + some[:, vector, None] * own[vector]
            apart = (keys[inside][None] - queries[around][:, None])[None] + along[:, None, None]
            distance = np.sqrt(sum_of_squares(apart))
            for s, q, k in zip(*np.nonzero(distance <= reach), strict=True):
                if is_one_set and around[q] == inside[k] and not some[s].any():
                    continue
                rows.append((around[q], inside[k], tuple(some[s]), distance[s, q, k]))
    return sorted(rows, key=lambda row: row[:3])


def sum_of_squares(apart):
    total = apart[..., 0] * apart[..., 0]
    for axis in range(1, apart.shape[-1]):
        total = total + apart[..., axis] * apart[..., axis]
    return total


def _ranges(cell, periodic, keys, queries, reach):
    """So many shifts that no image within reach is missed."""
    flags = np.asarray(periodic)
    # |shift_a| height_a <= how far the two points and their images can be apart across the other vectors.
    directions = np.linalg.svd(cell[flags])[2][flags.sum() :]
    whole = cell.copy()
    whole[~flags] = directions
    inverse = np.linalg.inv(whole)
    fractions = (keys[None] - queries[:, None]) @ inverse
    ranges = []
    for vector in range(len(cell)):
        if not flags[vector]:
            ranges.append(range(1))
            continue
        width = reach * np.linalg.norm(inverse[:, vector])
        low, high = fractions[..., vector].min(), fractions[..., vector].max()
        ranges.append(range(math.floor(-width - high) - 1, math.ceil(width - low) + 2))
    return ranges


def first_k(rows, k):
    """The k nearest of each query: by distance, then key, then shift; in order of query, key and shift."""
    found = []
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        nearest = sorted(group, key=lambda row: (row[3], row[1], row[2]))[:k]
        found += sorted(nearest, key=lambda row: row[:3])
    return found
