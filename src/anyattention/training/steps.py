"""What trainings share: the check of a step's loss."""

from __future__ import annotations

import math

from anyattention.errors import NumericalInstabilityError

__all__ = ["require_finite_loss"]


def require_finite_loss(loss: float, step: str) -> None:
    """Raise NumericalInstabilityError, which names the step, where the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise NumericalInstabilityError(
            argument=f"loss of {step}",
            expected="a finite number",
            actual=loss,
            hint="a smaller learning rate may help",
        )
