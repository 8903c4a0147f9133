"""Encodings of where a node stands in its graph: features, or a bias, that attention over all nodes lacks."""

from anyattention.encodings.hops import degrees, hop_distances
from anyattention.encodings.laplacian import LaplacianEigenvectors, laplacian_eigenvectors, random_signs
from anyattention.encodings.walks import random_walk_probabilities

__all__ = [
    "LaplacianEigenvectors",
    "degrees",
    "hop_distances",
    "laplacian_eigenvectors",
    "random_signs",
    "random_walk_probabilities",
]
