"""Logistic regression on the words of packages, to compare with."""

from __future__ import annotations

from typing import Any

from anyattention.training.extras import import_demo
from examples.packages.data import Packages
from examples.packages.guesses import sparse_matrix, words_along_links
from examples.packages.inputs import Inputs

__all__ = ["BASELINES", "run_baseline"]

BASELINES = ("words", "words and neighbours' words")
_STRENGTHS = (0.3, 1.0, 3.0, 10.0)


def run_baseline(name: str, packages: Packages, inputs: Inputs) -> dict[str, Any]:
    """Logistic regression, at the strength with the best validation accuracy.

    Args:
        name: "words" for the words of a package, 0 or 1 each; "words and neighbours' words" for these and, by relation,
            the words at the other ends, as the network reads them.
        packages, inputs: the data.

    Returns:
        The accuracy on validation and test packages, and the strength C.
    """
    linear = import_demo("sklearn.linear_model", "the comparison with logistic regression")
    own = inputs.read["package", "depends", "package"]
    x, labels = sparse_matrix(own) if name == "words" else words_along_links(inputs), packages.labels.numpy()
    train, found = packages.train.numpy(), []
    for strength in _STRENGTHS:
        model = linear.LogisticRegression(C=strength, max_iter=100).fit(x[train], labels[train])
        scores = {
            part: float(model.score(x[nodes.numpy()], labels[nodes.numpy()]))
            for part, nodes in (("validation", packages.validation), ("test", packages.test))
        }
        found.append({**scores, "C": strength})
    return max(found, key=lambda scores: scores["validation"])
