"""Random orthogonal matrices: rotations and reflections of points."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_orthogonal"]


def random_orthogonal(count: int, dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Orthogonal matrices, uniformly distributed (Haar's measure), `(count, dim, dim)` float64.

    Half of them are rotations, the others reflect too.

    Source: Mezzadri, 2007: the QR decomposition alone is not uniform until the signs of R's diagonal are taken away.
    """
    device = "cpu" if generator is None else generator.device
    drawn = torch.randn(count, dim, dim, dtype=torch.float64, device=device, generator=generator)
    matrices, triangles = torch.linalg.qr(drawn)
    return matrices * torch.where(triangles.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None]
