import pytest
import torch

from anyattention.errors import InvalidInputError
from anyattention.training import accuracy, metric_value, roc_auc


@pytest.mark.parametrize("levels", [2, 3, 1000])
def test_roc_auc_agrees_with_scikit_learn(levels: int, require) -> None:
    scores = torch.randint(levels, (53,)).double()
    labels = torch.randint(2, (53,))
    expected = require("sklearn.metrics").roc_auc_score(labels.numpy(), scores.numpy())
    assert roc_auc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_roc_auc_needs_both_classes() -> None:
    for label in (0, 1):
        with pytest.raises(InvalidInputError, match="labels: expected nodes of both classes"):
            roc_auc(torch.randn(5), torch.full((5,), label))


def test_the_metric_of_logits() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 0.5]])
    labels = torch.tensor([1, 0, 0, 0, 1])
    assert accuracy(logits, labels) == pytest.approx(4 / 5)
    assert metric_value("accuracy", logits, labels) == pytest.approx(4 / 5)
    # Of the six pairs of a node of class 1 and one of class 0, two are in the wrong order.
    assert metric_value("roc_auc", logits, labels) == pytest.approx(4 / 6)
