"""Geometry of point sets: tensors in, tensors and index arrays out."""

from anyattention.geometry.displacement import edge_displacements
from anyattention.geometry.nearest import nearest_neighbours
from anyattention.geometry.neighbours import Neighbours, radius_neighbours
from anyattention.geometry.pca import PrincipalComponents, principal_components

__all__ = [
    "Neighbours",
    "PrincipalComponents",
    "edge_displacements",
    "nearest_neighbours",
    "principal_components",
    "radius_neighbours",
]
