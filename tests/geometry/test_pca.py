import numpy as np
import pytest
import torch

from anyattention.errors import DimensionMismatchError, InvalidInputError, MatrixOperationError
from anyattention.geometry import principal_components


def points_of_rank(rank: int, *, rows: int = 13, columns: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(rows, rank, dtype=dtype) @ torch.randn(rank, columns, dtype=dtype)) + 3.0


def test_agrees_with_the_eigenvectors_of_the_covariance() -> None:
    points = points_of_rank(7)
    found = principal_components(points, 5)
    values, vectors = np.linalg.eigh(np.cov(points.numpy(), rowvar=False))
    values, vectors = values[::-1][:5], vectors[:, ::-1][:, :5]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(5)])
    centred = points.numpy() - points.numpy().mean(0)
    np.testing.assert_allclose(found.variances.numpy(), values, rtol=1e-10)
    np.testing.assert_allclose(found.directions.numpy(), vectors.T, atol=1e-9)
    np.testing.assert_allclose(found.coordinates.numpy(), centred @ vectors, atol=1e-9)
    np.testing.assert_allclose(found.mean.numpy(), points.numpy().mean(0), rtol=1e-12)


def test_agrees_with_scikit_learn(require) -> None:
    points = points_of_rank(7)
    theirs = require("sklearn.decomposition").PCA(n_components=3).fit(points.numpy())
    found = principal_components(points, 3)
    np.testing.assert_allclose(found.variances.numpy(), theirs.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(np.abs(found.directions.numpy()), np.abs(theirs.components_), atol=1e-9)


@pytest.mark.parametrize("rows", [3, 5])
def test_more_dimensions_than_points(rows: int) -> None:
    points = torch.randn(rows, 11, dtype=torch.float64)
    found = principal_components(points, rows - 1)
    centred = points - points.mean(0)
    torch.testing.assert_close(found.coordinates @ found.directions, centred, atol=1e-12, rtol=0)
    with pytest.raises(MatrixOperationError, match=f"at most the rank of the centred points, {rows - 1}, got {rows}"):
        principal_components(points, rows)


def test_the_sign_is_fixed_by_the_largest_entry() -> None:
    points = points_of_rank(5)
    found, turned = principal_components(points, 3), principal_components(-points, 3)
    torch.testing.assert_close(found.directions, turned.directions, atol=1e-10, rtol=0)
    largest = found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_is_that_of_the_points_precision(dtype: torch.dtype) -> None:
    points = points_of_rank(2, dtype=dtype)
    found = principal_components(points, 2)
    assert found.coordinates.dtype == dtype
    with pytest.raises(MatrixOperationError, match="at most the rank of the centred points, 2, got 3"):
        principal_components(points, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_points(bad: float) -> None:
    points = points_of_rank(5)
    points[2, 3] = bad
    with pytest.raises(MatrixOperationError, match="points: expected finite numbers, got 1 NaN or Inf among 91"):
        principal_components(points, 2)


def test_equal_points_have_no_direction() -> None:
    with pytest.raises(MatrixOperationError, match="at most the rank of the centred points, 0"):
        principal_components(torch.ones(5, 3), 1)


def test_no_points_have_no_direction() -> None:
    with pytest.raises(MatrixOperationError, match="at most the rank of the centred points, 0"):
        principal_components(torch.ones(0, 3), 1)


def test_arguments_are_checked() -> None:
    with pytest.raises(DimensionMismatchError, match=r"points: expected \(points, dimensions\), got \(5,\)"):
        principal_components(torch.ones(5), 1)
    with pytest.raises(InvalidInputError, match="points: expected a floating-point dtype"):
        principal_components(torch.ones(5, 3, dtype=torch.int64), 1)
    for count in (0, True, 1.0):
        with pytest.raises(InvalidInputError, match="count: expected an int of at least 1"):
            principal_components(torch.ones(5, 3), count)  # pyright: ignore[reportArgumentType]
