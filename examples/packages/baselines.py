"""Logistic regression on the words of packages, to compare with."""

from __future__ import annotations

from typing import Any

import torch

from anyattention.training.extras import import_demo
from examples.packages.data import Packages
from examples.packages.inputs import Inputs, Table

__all__ = ["BASELINES", "run_baseline"]

BASELINES = ("words", "words and neighbours' words")
_STRENGTHS = (0.3, 1.0, 3.0, 10.0)


def run_baseline(name: str, packages: Packages, inputs: Inputs) -> dict[str, Any]:
    """Logistic regression, at the strength with the best validation accuracy.

    Args:
        name: "words" for the words of a package, 0 or 1 each; "words and neighbours' words" for these and, by relation,
            the mean of the words at the other ends (along sources and maintainers: of their other packages too).
        packages, inputs: the data.

    Returns:
        The accuracy on validation and test packages, and the strength C.
    """
    linear = import_demo("sklearn.linear_model", "the comparison with logistic regression")
    sparse = import_demo("scipy.sparse", "the comparison with logistic regression")
    words = _matrix(sparse, inputs.read["package", "depends", "package"])
    parts = [words]
    for relation, table in inputs.links.items() if name != "words" else ():
        links = _matrix(sparse, table._replace(values=torch.ones_like(table.values)))
        of_sources = words if relation[0] == "package" else _means(sparse, links.T.tocsr()) @ words
        parts.append(_means(sparse, links) @ of_sources)
    x, labels = sparse.hstack(parts).tocsr(), packages.labels.numpy()
    train, found = packages.train.numpy(), []
    for strength in _STRENGTHS:
        model = linear.LogisticRegression(C=strength, max_iter=100).fit(x[train], labels[train])
        scores = {
            part: float(model.score(x[nodes.numpy()], labels[nodes.numpy()]))
            for part, nodes in (("validation", packages.validation), ("test", packages.test))
        }
        found.append({**scores, "C": strength})
    return max(found, key=lambda scores: scores["validation"])


def _matrix(sparse: Any, table: Table) -> Any:
    shape = (len(table.offsets) - 1, table.num_columns)
    return sparse.csr_matrix((table.values.numpy(), table.columns.numpy(), table.offsets.numpy()), shape)


def _means(sparse: Any, links: Any) -> Any:
    """Rows that take the mean of what they link to."""
    counts = torch.from_numpy(links.sum(1)).flatten().clamp(min=1)
    return sparse.diags(counts.reciprocal().numpy()) @ links
