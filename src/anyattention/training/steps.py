"""What trainings share: the checks of a step's loss, and of class scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from anyattention.errors import NumericalInstabilityError

__all__ = ["require_finite_loss", "require_finite_scores"]


def require_finite_loss(loss: float, step: str) -> None:
    """Raise NumericalInstabilityError, which names the step, where the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise NumericalInstabilityError(
            argument=f"loss of {step}",
            expected="a finite number",
            actual=loss,
            hint="a smaller learning rate may help",
        )


def require_finite_scores(scores: Tensor, name: str, ids: Sequence[str] | None) -> None:
    """Raise NumericalInstabilityError, which names the first such node, where scores `(nodes, classes)` are NaN or
    infinite: the largest of them would be no answer.
    """
    is_finite = scores.isfinite().all(1)
    if not bool(is_finite.all()):
        node = int(is_finite.to(scores.dtype).argmin())
        count = int((~is_finite).sum())
        raise NumericalInstabilityError(
            argument=f"{name}, class scores",
            expected="finite numbers",
            actual=f"NaN or Inf for {count:,} of {len(scores):,} nodes, first for {repr(ids[node]) if ids else node}",
            hint="features far outside of those of the training do this, and too large a learning rate",
        )
