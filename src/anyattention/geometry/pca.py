"""Principal components: the few directions in which points vary most."""

from typing import NamedTuple

import torch
from torch import Tensor

from anyattention._checks import describe_shape, require_count, require_floating
from anyattention.errors import DimensionMismatchError, MatrixOperationError

__all__ = ["PrincipalComponents", "principal_components"]


class PrincipalComponents(NamedTuple):
    """The result of `principal_components`, most important component first.

    Attributes:
        coordinates: `(points, count)`, the points along the directions, around 0.
        directions: `(count, dimensions)`, orthonormal rows.
        mean: `(dimensions,)`, the centre of the points.
        variances: `(count,)`, the variance (over points - 1) along each direction.
    """

    coordinates: Tensor
    directions: Tensor
    mean: Tensor
    variances: Tensor


def principal_components(points: Tensor, count: int) -> PrincipalComponents:
    """The `count` orthogonal directions in which the points vary most, and the points along them.

        points - mean = U S V',   directions = first rows of V',   coordinates = (points - mean) V

    A direction's sign is arbitrary in the mathematics; here its largest entry is positive.

    Args:
        points: `(points, dimensions)`, floating.
        count: number of directions, from 1 to the rank of the centred points.

    Returns:
        PrincipalComponents in the points' dtype.

    Raises:
        MatrixOperationError: `count` is more than the rank, or a point is NaN or infinite.
        DimensionMismatchError: `points` is not a matrix.
        InvalidInputError: `points` is not floating, or `count` is not an int of at least 1.

    Cost: a singular value decomposition in float64, O(points x dimensions x min(points, dimensions)) time.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        >>> principal_components(points, 1).coordinates.flatten()
        tensor([-5.,  0.,  5.])
    """
    require_floating("points", points)
    if points.ndim != 2:
        raise DimensionMismatchError(argument="points", expected="(points, dimensions)", actual=describe_shape(points))
    count = require_count("count", count, 1)
    if not points.isfinite().all():
        raise MatrixOperationError(
            argument="points",
            expected="finite numbers",
            actual=f"{int((~points.isfinite()).sum())} NaN or Inf among {points.numel()}",
        )
    wide = points.double()
    num_points = max(len(points), 1)
    mean = wide.sum(0) / num_points
    centred = wide - mean
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    # Rounding leaves tiny singular values where the rank has ended: of the points' own precision, not float64's.
    tolerance = sizes[:1] * max(points.shape) * torch.finfo(points.dtype).eps
    rank = int((sizes > tolerance).sum())
    if count > rank:
        raise MatrixOperationError(
            argument="count",
            expected=f"at most the rank of the centred points, {rank}",
            actual=count,
        )
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()
    variances = sizes[:count].square() / max(num_points - 1, 1)
    parts = (centred @ directions.T, directions, mean, variances)
    return PrincipalComponents(*(part.to(points.dtype) for part in parts))
