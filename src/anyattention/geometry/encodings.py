"""Functions of the distance between two points: radial bases, and an envelope that ends smoothly at a radius.

All are finite at distance 0, with finite derivatives of any order, when the distance comes from `safe_distance`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyattention._checks import require_count, require_floating, require_number

__all__ = ["bessel_basis", "cutoff_envelope", "gaussian_basis", "log_cutoff_envelope", "safe_distance"]

# The factor of (1 - x)^3 in the envelope of DimeNet with p = 6: the first terms of (1 - x)^-3.
_ENVELOPE_FACTOR = (1.0, 3.0, 6.0, 10.0, 15.0, 21.0)


def safe_distance(squared: Tensor, eps: float) -> Tensor:
    """The square root of squared distances, with a derivative everywhere.

        distance = sqrt(max(squared, eps^2))

    Within `eps` of each other two points count as `eps` apart: there the distance is constant, and all its derivatives
    are 0. Beyond, its second derivative by the displacement is at most 1 / eps.

    Args:
        squared: squared distances of any shape, in the square of the positions' unit.
        eps: in the positions' unit, above 0.

    Returns:
        Distances of that shape, in the positions' unit.

    Raises:
        InvalidInputError: `squared` is not floating, or `eps` is out of range.

    Example:
        >>> safe_distance(torch.tensor([0.0, 9.0]), 0.5)
        tensor([0.5000, 3.0000])
    """
    require_floating("squared", squared)
    eps = require_number("eps", eps, above=0.0)
    return squared.clamp(min=eps**2).sqrt()


def gaussian_basis(distance: Tensor, radius: float, count: int) -> Tensor:
    """Gaussian bumps at evenly spaced distances.

        basis_k(d) = exp(-(d - c_k)^2 / (2 w^2)),   c_k = k radius / (count - 1),   w = radius / (count - 1)

    k from 0; a single bump stands at 0 with w = radius.

    Args:
        distance: distances of any shape.
        radius: the distance of the last bump, in the distances' unit.
        count: how many, at least 1.

    Returns:
        `(..., count)`, without unit, in (0, 1].

    Raises:
        InvalidInputError: `distance` is not floating, or a number is out of range.

    Cost: O(distances x count) time and memory.

    Source: Schuett et al., 2017 (SchNet), section 3; here the width is the spacing.

    Example:
        >>> gaussian_basis(torch.tensor([0.0, 2.0]), 2.0, 2)
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]])
    """
    radius, count = _check(distance, radius, count)
    width = radius / max(count - 1, 1)
    # As multiples of the width, from which the centres are whole numbers.
    steps = torch.arange(count, dtype=distance.dtype, device=distance.device)
    return torch.exp(-0.5 * (distance[..., None] / width - steps).square())


def bessel_basis(distance: Tensor, radius: float, count: int) -> Tensor:
    """Spherical Bessel functions of order 0 that are 0 at the radius.

        basis_n(d) = sqrt(2 / radius) sin(n pi d / radius) / d,   n = 1 .. count

    Args:
        distance: distances of any shape, above 0: see `safe_distance`.
        radius: where all are 0, in the distances' unit.
        count: how many, at least 1.

    Returns:
        `(..., count)`, in the distances' unit to the power -3/2; together with weight d^2 they are orthonormal.

    Raises:
        InvalidInputError: `distance` is not floating, or a number is out of range.

    Cost: O(distances x count) time and memory.

    Source: Gasteiger et al., 2020 (DimeNet), equation 7; here the frequencies are fixed.

    Example:
        >>> bessel_basis(torch.tensor([1.0]), 2.0, 2).round(decimals=4).abs()
        tensor([[1., 0.]])
    """
    radius, count = _check(distance, radius, count)
    frequency = torch.arange(1, count + 1, dtype=distance.dtype, device=distance.device) * (math.pi / radius)
    away = distance[..., None]
    return math.sqrt(2.0 / radius) * torch.sin(away * frequency) / away


def cutoff_envelope(distance: Tensor, radius: float) -> Tensor:
    """A factor that falls from 1 at distance 0 to 0 at the radius, with two continuous derivatives.

        u(x) = 1 - 28 x^6 + 48 x^7 - 21 x^8 = (1 - x)^3 (1 + 3 x + 6 x^2 + 10 x^3 + 15 x^4 + 21 x^5),   x = d / radius

    and 0 beyond. The product is what is computed: the sum loses all its digits near the radius.

    Args:
        distance: distances of any shape.
        radius: in the distances' unit, above 0.

    Returns:
        Factors of that shape, without unit.

    Raises:
        InvalidInputError: `distance` is not floating, or `radius` is out of range.

    Source: Gasteiger et al., 2020 (DimeNet), equation 8, with p = 6.

    Example:
        >>> cutoff_envelope(torch.tensor([0.0, 1.0, 2.0, 3.0]), 2.0)
        tensor([1.0000, 0.8555, 0.0000, 0.0000])
    """
    left, factor = _envelope_parts(distance, radius)
    return left.clamp(min=0.0) ** 3 * factor


def log_cutoff_envelope(distance: Tensor, radius: float) -> Tensor:
    """The natural logarithm of `cutoff_envelope`: -inf from the radius on, where its gradient is 0.

    Added to a score, it multiplies the exponential by the envelope.

    Args:
        distance: distances of any shape.
        radius: in the distances' unit, above 0.

    Returns:
        Logarithms of that shape, at most 0 but for rounding.

    Raises:
        InvalidInputError: `distance` is not floating, or `radius` is out of range.

    Example:
        >>> log_cutoff_envelope(torch.tensor([0.0, 2.0]), 2.0)
        tensor([0., -inf])
    """
    left, factor = _envelope_parts(distance, radius)
    is_inside = left > 0
    logarithm = 3.0 * torch.where(is_inside, left, 1.0).log() + factor.log()
    return torch.where(is_inside, logarithm, -torch.inf)


def _envelope_parts(distance: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """`1 - x`, and what (1 - x)^3 is multiplied with; the latter's x is at most 1."""
    require_floating("distance", distance)
    radius = require_number("radius", radius, above=0.0)
    x = distance / radius
    left = 1.0 - x
    x = x.clamp(max=1.0)
    factor = torch.full_like(x, _ENVELOPE_FACTOR[-1])
    for coefficient in reversed(_ENVELOPE_FACTOR[:-1]):
        factor = factor * x + coefficient
    return left, factor


def _check(distance: Tensor, radius: float, count: int) -> tuple[float, int]:
    """The radius and the count as plain numbers."""
    require_floating("distance", distance)
    return require_number("radius", radius, above=0.0), require_count("count", count, 1)
