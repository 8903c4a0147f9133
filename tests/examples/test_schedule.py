"""The learning rate of each step."""

import itertools

import pytest

from examples.schedule import rate_factor


def test_the_rate_rises_and_falls():
    factors = [rate_factor(number, 100, 0.05) for number in range(1, 101)]
    assert factors[:10] == pytest.approx([number / 10 for number in range(1, 11)])
    assert factors[54] == pytest.approx(0.05 + 0.95 / 2)
    assert factors[-1] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[9:]))
    assert rate_factor(1, 1, 0.02) == 1.0
