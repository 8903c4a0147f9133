"""The learning rate of each step, in each training."""

from __future__ import annotations

import math

__all__ = ["rate_factor"]


def rate_factor(number: int, steps: int, least: float) -> float:
    """What the highest learning rate is multiplied with in step `number`, from 1.

    It rises over the first tenth of the steps and falls along a cosine to `least`.
    """
    rising = max(1, steps // 10)
    if number < rising:
        return number / rising
    return least + (1.0 - least) * (1 + math.cos(math.pi * (number - rising) / max(1, steps - rising))) / 2
