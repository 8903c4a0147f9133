"""Losses that are no numbers."""

import math

import pytest

from anyattention.errors import NumericalInstabilityError
from anyattention.training.steps import require_finite_loss


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_its_step(loss):
    require_finite_loss(1.0, "step 3")
    with pytest.raises(NumericalInstabilityError, match="loss of step 3: expected a finite number"):
        require_finite_loss(loss, "step 3")
