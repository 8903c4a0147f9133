"""What trainings share: the learning rate of a step, and the check of its loss."""

from __future__ import annotations

import math

from anyattention.errors import NumericalInstabilityError

__all__ = ["rate_factor", "require_finite_loss"]


def rate_factor(number: int, steps: int, least: float) -> float:
    """What the highest learning rate is multiplied with in step `number`, from 1.

    It rises over the first tenth of the steps and falls along a cosine to `least`.
    """
    rising = max(1, steps // 10)
    if number < rising:
        return number / rising
    return least + (1.0 - least) * (1 + math.cos(math.pi * (number - rising) / max(1, steps - rising))) / 2


def require_finite_loss(loss: float, step: str) -> None:
    """Raise NumericalInstabilityError, which names the step, where the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise NumericalInstabilityError(
            argument=f"loss of {step}",
            expected="a finite number",
            actual=loss,
            hint="a smaller learning rate may help",
        )
