"""Vectors beside features: channels mixed, lengths taken, long ones shortened."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["mix", "shortened", "squares"]


def mix(projection: nn.Linear, vectors: Tensor) -> Tensor:
    """A map of channels: `(..., C', dim)` from `(..., C, dim)`."""
    return projection(vectors.transpose(-1, -2)).transpose(-1, -2)


def squares(vectors: Tensor, length: float) -> Tensor:
    """Squared lengths of `(..., dim)`, in units of `length`."""
    return vectors.square().sum(-1) / length**2


def shortened(vectors: Tensor, length: float) -> Tensor:
    """Vectors `(..., dim)` of the same direction; those far above `length` have the square root of their length."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return (wide * (1.0 + squares(wide, length))[..., None] ** -0.25).to(vectors.dtype)
