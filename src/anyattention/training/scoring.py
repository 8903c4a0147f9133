"""How well class scores fit labels."""

from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.training.data import Metric

__all__ = ["accuracy", "metric_value", "roc_auc"]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the nodes whose highest score is their label's.

    Args:
        logits: `(nodes, num_classes)`.
        labels: `(nodes,)` int64.
    """
    return float((logits.argmax(1) == labels).double().mean())


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a node of class 1 scores higher than one of class 0; a tie counts one half.

    Args:
        scores: `(nodes,)`, higher for class 1.
        labels: `(nodes,)`, 0 or 1, both present.

    Raises:
        InvalidInputError: only one class is there.

    Cost: a sort, O(nodes log nodes).

    Example:
        >>> import torch
        >>> roc_auc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0, 0, 1, 1]))
        0.875
    """
    positives = int((labels == 1).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise InvalidInputError(argument="labels", expected="nodes of both classes", actual=f"{positives} of class 1")
    _, level, ties = scores.unique(return_inverse=True, return_counts=True)
    # Ranks from 1; equal scores share the mean of theirs.
    last = ties.cumsum(0).double()
    ranks = (last - (ties.double() - 1) / 2)[level]
    wins = float(ranks[labels == 1].sum()) - positives * (positives + 1) / 2
    return wins / (positives * negatives)


def metric_value(metric: Metric, logits: Tensor, labels: Tensor) -> float:
    """The metric of class scores `(nodes, num_classes)`."""
    if metric == "roc_auc":
        return roc_auc(logits[:, 1] - logits[:, 0], labels)
    return accuracy(logits, labels)
