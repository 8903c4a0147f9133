"""Geometry of point sets: tensors in, tensors and index arrays out."""

from anyattention.geometry.encodings import (
    bessel_basis,
    cutoff_envelope,
    gaussian_basis,
    log_cutoff_envelope,
    safe_distance,
)
from anyattention.geometry.pca import PrincipalComponents, principal_components

__all__ = [
    "PrincipalComponents",
    "bessel_basis",
    "cutoff_envelope",
    "gaussian_basis",
    "log_cutoff_envelope",
    "principal_components",
    "safe_distance",
]
