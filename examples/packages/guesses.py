"""Guesses of the sections by logistic regression on words: features of each node that the network reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattention.training.extras import import_demo
from examples.packages.data import Packages
from examples.packages.inputs import Fold, Inputs, Table

__all__ = ["sparse_matrix", "with_guesses", "words_along_links"]

_FOLDS = 5
# The strength and the gradient at which it ends: as accurate on the validation packages as more of either.
_STRENGTH, _TOLERANCE = 3.0, 1e-3


def with_guesses(packages: Packages, inputs: Inputs) -> Inputs:
    """The inputs with guesses of logistic regression on words, those of nodes and those along their links.

    A guess of a package that was learnt from knows the answer, and so may one of a package beside it: a network would
    learn to trust guesses that are worse elsewhere. So the packages to learn from are dealt out to folds, and of each
    fold the network reads guesses that were learnt from the others. Of all other packages it reads guesses learnt from
    all folds.

    Args:
        packages: of whom only the sections of those to learn from are read.
        inputs: that were made of them.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Cost: logistic regression for each fold and for all, a few seconds each.
    """
    x = words_along_links(inputs)
    place = torch.arange(len(packages.train)) % _FOLDS
    folds = [
        Fold(packages.train[place == fold], _guesses(x, packages, inputs, packages.train[place != fold]))
        for fold in range(min(_FOLDS, len(packages.train)))
    ]
    return inputs._replace(guesses=_guesses(x, packages, inputs, packages.train), folds=folds)


def _guesses(x: Any, packages: Packages, inputs: Inputs, known: Tensor) -> dict[str, Tensor]:
    """What is guessed from the sections of some packages; of a source or maintainer the mean of its packages."""
    linear = import_demo("sklearn.linear_model", "guesses of the sections")
    labels = packages.labels[known]
    guesses = torch.zeros(len(packages.labels), len(packages.classes))
    if len(labels.unique()) < 2:
        guesses[:, labels] = 1
    else:
        model = linear.LogisticRegression(C=_STRENGTH, tol=_TOLERANCE, max_iter=1000)
        model.fit(x[known.numpy()], labels.numpy())
        guesses[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(x)).float()
    found = {"package": guesses}
    for relation, table in inputs.links.items():
        if relation[0] != "package":
            members = sparse_matrix(table).T.tocsr()
            counts = torch.from_numpy(members.sum(1)).clamp(min=1)
            found[relation[0]] = (torch.from_numpy(members @ guesses.numpy()) / counts).float()
    return found


def words_along_links(inputs: Inputs) -> Any:
    """`(packages, columns)`: a package's words and, by relation, those at the other ends, as the network reads them."""
    sparse = import_demo("scipy.sparse", "guesses of the sections")
    parts = [sparse_matrix(inputs.own["package"])]
    for relation, table in inputs.links.items():
        parts.append(sparse_matrix(table) @ sparse_matrix(inputs.read[relation]))
    return sparse.hstack(parts).tocsr()


def sparse_matrix(table: Table) -> Any:
    """The table as a matrix of scipy."""
    sparse = import_demo("scipy.sparse", "guesses of the sections")
    shape = (len(table.offsets) - 1, table.num_columns)
    return sparse.csr_matrix((table.values.numpy(), table.columns.numpy(), table.offsets.numpy()), shape)
