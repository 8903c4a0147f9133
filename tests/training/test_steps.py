"""Losses and class scores that are no numbers."""

import math

import pytest
import torch

from anyattention.errors import NumericalInstabilityError
from anyattention.training.steps import require_finite_loss, require_finite_scores


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_its_step(loss):
    require_finite_loss(1.0, "step 3")
    with pytest.raises(NumericalInstabilityError, match="loss of step 3: expected a finite number"):
        require_finite_loss(loss, "step 3")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_name_the_first_node(wrong):
    scores = torch.ones(5, 3)
    require_finite_scores(scores, "club", None)
    scores[2, 1] = scores[4, 0] = wrong
    told = "club, class scores: expected finite numbers, got NaN or Inf for 2 of 5 nodes, first for "
    with pytest.raises(NumericalInstabilityError, match=f"{told}2"):
        require_finite_scores(scores, "club", None)
    with pytest.raises(NumericalInstabilityError, match=f"{told}'c'"):
        require_finite_scores(scores, "club", list("abcde"))
