"""Geometry of point sets: tensors in, tensors and index arrays out."""

from anyattention.geometry.pca import PrincipalComponents, principal_components

__all__ = ["PrincipalComponents", "principal_components"]
