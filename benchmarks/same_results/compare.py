"""Two recordings, number by number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["PACKAGE", "ROUNDINGS", "Difference", "compare", "kind_of"]

ROUNDINGS = 4
PACKAGE = "package"  # the key under which a recording says which package it ran


@dataclass(frozen=True)
class Difference:
    """Two arrays that differ: how, by how many roundings of the largest number, and whether that breaks the rule."""

    key: str
    how: str
    roundings: float
    breaks_rule: bool


def kind_of(key: str) -> str:
    """output, first, second or error."""
    return key.split(" | ")[-2]


def compare(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> list[Difference]:
    """The arrays that differ, or that one side lacks; NaN equals NaN."""
    differences = []
    for key in sorted({*before, *after} - {PACKAGE}):
        if key not in before or key not in after:
            where = "before" if key in before else "after"
            differences.append(Difference(key, f"only {where}", np.inf, True))
            continue
        difference = _difference(key, before[key], after[key])
        if difference is not None:
            differences.append(difference)
    return differences


def _difference(key: str, one: np.ndarray, other: np.ndarray) -> Difference | None:
    if one.dtype.kind == "U" and other.dtype.kind == "U":
        return None if one == other else Difference(key, f"{one} -> {other}", np.inf, True)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        how = f"{one.dtype} {one.shape} -> {other.dtype} {other.shape}"
        return Difference(key, how, np.inf, True)
    if one.dtype.names:
        one, other = (array[one.dtype.names[0]] for array in (one, other))
    is_float = one.dtype.kind == "f"
    same = _bits(one) == _bits(other)
    if is_float:
        same |= np.isnan(one) & np.isnan(other)
    if same.all():
        return None
    if not is_float:
        return Difference(key, f"{(~same).sum()} of {same.size} numbers", np.inf, True)
    finite = np.abs(one[np.isfinite(one)], dtype=np.float64)
    largest = float(finite.max()) if finite.size else 0.0
    with np.errstate(invalid="ignore"):
        gap = np.where(same | (one == other), 0.0, np.abs(one.astype(np.float64) - other)).max()
    roundings = _roundings(float(gap), largest * float(np.finfo(one.dtype).eps))
    how = f"{(~same).sum()} of {same.size} numbers, by {gap:.3g} where the largest is {largest:.3g}"
    return Difference(key, how, roundings, kind_of(key) != "second" or not roundings <= ROUNDINGS)


def _roundings(gap: float, rounding: float) -> float:
    if np.isnan(gap):
        return np.inf
    return gap / rounding if rounding else np.inf if gap else 0.0


def _bits(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "f" else array
