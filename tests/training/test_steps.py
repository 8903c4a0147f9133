"""The learning rate of each step, and losses that are no numbers."""

import itertools
import math

import pytest

from anyattention.errors import NumericalInstabilityError
from anyattention.training.steps import rate_factor, require_finite_loss


def test_the_rate_rises_and_falls():
    factors = [rate_factor(number, 100, 0.05) for number in range(1, 101)]
    assert factors[:10] == pytest.approx([number / 10 for number in range(1, 11)])
    assert factors[54] == pytest.approx(0.05 + 0.95 / 2)
    assert factors[-1] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[9:]))
    assert rate_factor(1, 1, 0.02) == 1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_its_step(loss):
    require_finite_loss(1.0, "step 3")
    with pytest.raises(NumericalInstabilityError, match="loss of step 3: expected a finite number"):
        require_finite_loss(loss, "step 3")
