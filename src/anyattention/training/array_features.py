"""Features that come as an array: sparse words, numbers to be standardised, or the structure in their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.files import most_memory
from anyattention.patterns import Graph
from anyattention.training.features import FeatureKind, Look, look_at, look_at_sparse, rows_normalised, to_sparse
from anyattention.training.reading import HOMOGENEOUS_RELATION, HOMOGENEOUS_TYPE, NodeReading, Reading
from anyattention.training.structure import structure_features

__all__ = ["ArrayFeatures", "read_array_features", "reading_of_arrays", "require_array_reading"]


class ArrayFeatures(NamedTuple):
    """Features for a network: what they are, and whether it standardises them."""

    features: Tensor
    look: Look
    standardise: bool


def read_array_features(
    features: Tensor, kind: FeatureKind | None, graph: Graph, names: Sequence[str]
) -> ArrayFeatures:
    """The features of nodes for a network, by what they are and not by how they are stored.

    Args:
        features: `(nodes, in_features)` float32, dense or sparse CSR.
        kind: what those of the training were, which these are then too; None asks the features themselves.
        graph: over the nodes, for their structure.
        names: of the nodes.

    Raises:
        InvalidInputError: the kind is numbers, and a sparse matrix would be far larger with all of its zeros.
    """
    is_sparse = features.layout == torch.sparse_csr
    if kind is not None:
        look = Look(kind, "those of the training are")
    else:
        look = look_at_sparse(features) if is_sparse else look_at(features.numpy())
    if look.kind == "structure":
        return ArrayFeatures(structure_features(graph, names), look, False)
    if look.kind == "words":
        return ArrayFeatures(rows_normalised(features if is_sparse else to_sparse(features.numpy())), look, False)
    if is_sparse and 4 * features.numel() > most_memory(8 * len(features.values())):
        raise InvalidInputError(
            argument="features", expected="numbers, as in the training", actual="few numbers in a large matrix"
        )
    return ArrayFeatures(features.to_dense(), look, True)


def reading_of_arrays(classes: tuple[str, ...], kind: FeatureKind) -> Reading:
    """How data of one type with features as an array were read."""
    nodes = {HOMOGENEOUS_TYPE: NodeReading(kind)}
    return Reading(classes, directed=True, nodes=nodes, edges={HOMOGENEOUS_RELATION: ()})


def require_array_reading(path: Path, reading: Reading | None) -> None:
    """Raise InvalidInputError where a training's features were not an array."""
    if reading is None:
        return
    own = reading.nodes.get(HOMOGENEOUS_TYPE)
    if not reading.is_homogeneous or own is None or own.columns or reading.edges[HOMOGENEOUS_RELATION]:
        raise InvalidInputError(
            argument=str(path),
            expected="tables with the columns that the network was trained on",
            actual="a file with arrays, which have no names",
        )
