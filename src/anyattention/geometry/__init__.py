"""Geometry of point sets: tensors in, tensors and index arrays out."""

from anyattention.geometry.displacement import edge_displacements
from anyattention.geometry.encodings import (
    bessel_basis,
    cutoff_envelope,
    gaussian_basis,
    log_cutoff_envelope,
    safe_distance,
)
from anyattention.geometry.nearest import nearest_neighbours
from anyattention.geometry.neighbours import Neighbours, radius_neighbours
from anyattention.geometry.orthogonal import random_orthogonal
from anyattention.geometry.pca import PrincipalComponents, principal_components

__all__ = [
    "Neighbours",
    "PrincipalComponents",
    "bessel_basis",
    "cutoff_envelope",
    "edge_displacements",
    "gaussian_basis",
    "log_cutoff_envelope",
    "nearest_neighbours",
    "principal_components",
    "radius_neighbours",
    "random_orthogonal",
    "safe_distance",
]
