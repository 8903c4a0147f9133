"""Symmetry as a check: a function of points that are turned, mirrored, moved or numbered anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.geometry.orthogonal import random_orthogonal

__all__ = ["assert_equivariant"]

Kind = Literal["scalar", "position", "vector", "total"]
Symmetry = Literal["rotation", "reflection", "translation", "permutation"]

_KINDS = ("scalar", "position", "vector", "total")
_SYMMETRIES = ("rotation", "reflection", "translation", "permutation")
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def assert_equivariant(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    takes: Sequence[Kind],
    returns: Sequence[Kind],
    symmetries: Sequence[Symmetry] = _SYMMETRIES,
    draws: int = 100,
    tolerance: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Check that a function of points commutes with motions and renumberings of the points.

        error = max |f(T x) - T f(x)| / max(1, max |T f(x)|)

    over the results, for each symmetry by itself: a rotation, a reflection (an orthogonal matrix of determinant -1), a
    translation, and a permutation of the points, drawn anew `draws` times.

    Args:
        function: takes the inputs, returns a tensor or a tuple of them.
        inputs: floating-point tensors whose first axis is that of the points.
        takes: the kind of each input: "position" `(points, ..., dim)`, turned and moved; "vector" `(points, ..., dim)`,
            turned; "scalar" `(points, ...)`, only numbered anew; "total", without an axis of points, left as it is.
        returns: the kind of each result.
        symmetries: which are checked.
        draws: how many of each.
        tolerance: the largest error allowed; None is 1e-9 in float64 and 1e-4 in float32.
        seed: of the draws.

    Returns:
        The largest error found, by symmetry.

    Raises:
        AssertionError: names the symmetry, the result, its kind and the error.
        InvalidInputError: no position or vector among the inputs, another kind, or kinds that do not fit.

    Cost: one call, and `draws` for each symmetry.

    Example:
        >>> points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], dtype=torch.float64)
        >>> sorted(assert_equivariant(lambda x: x - x.mean(0), [points], takes=["position"], returns=["vector"]))
        ['permutation', 'reflection', 'rotation', 'translation']
        >>> assert_equivariant(lambda x: x * x, [points], takes=["position"], returns=["vector"])
        Traceback (most recent call last):
        AssertionError: rotation: result 0 (vector) is off by 1.7e+00, more than 1.0e-09 allows
    """
    _check(inputs, takes, returns, symmetries)
    sample = inputs[next(n for n, kind in enumerate(takes) if kind in ("position", "vector"))]
    points, dim = sample.shape[0], sample.shape[-1]
    allowed = _TOLERANCES.get(sample.dtype) if tolerance is None else tolerance
    if allowed is None:
        raise InvalidInputError(argument="tolerance", expected=f"a number for {sample.dtype}", actual=None)
    generator = torch.Generator().manual_seed(seed)
    plain = _results(function, inputs, returns)
    worst = dict.fromkeys(map(str, symmetries), 0.0)
    for symmetry in symmetries:
        for _ in range(draws):
            change = _draw(symmetry, points, dim, generator, sample)
            moved = _results(
                function, [_apply(x, kind, change) for x, kind in zip(inputs, takes, strict=True)], returns
            )
            for place, (kind, before, after) in enumerate(zip(returns, plain, moved, strict=True)):
                expected = _apply(before, kind, change)
                error = _error(after, expected)
                # Written so that NaN fails, too.
                if not error <= allowed:
                    raise AssertionError(
                        f"{symmetry}: result {place} ({kind}) is off by {error:.1e}, more than {allowed:.1e} allows"
                    )
                worst[symmetry] = max(worst[symmetry], error)
    return worst


def _check(inputs: Sequence[Tensor], takes: Sequence[str], returns: Sequence[str], symmetries: Sequence[str]) -> None:
    for argument, names, known in (
        ("takes", takes, _KINDS),
        ("returns", returns, _KINDS),
        ("symmetries", symmetries, _SYMMETRIES),
    ):
        for name in names:
            if name not in known:
                raise InvalidInputError(argument=argument, expected="among " + ", ".join(known), actual=repr(name))
    if len(takes) != len(inputs):
        raise InvalidInputError(argument="takes", expected=f"a kind for each of {len(inputs)} inputs", actual=takes)
    if not {"position", "vector"} & set(takes):
        raise InvalidInputError(argument="takes", expected="a position or a vector among them", actual=takes)


def _results(function: Callable[..., Any], inputs: Sequence[Tensor], returns: Sequence[str]) -> list[Tensor]:
    results = function(*inputs)
    results = [results] if isinstance(results, Tensor) else list(results)
    if len(results) != len(returns):
        raise InvalidInputError(
            argument="returns", expected=f"a kind for each of {len(results)} results", actual=returns
        )
    return [result.detach() for result in results]


def _draw(
    symmetry: str, points: int, dim: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A matrix `(dim, dim)`, a shift `(dim,)` and an order `(points,)`; None for what stays."""
    if symmetry == "permutation":
        return None, None, torch.randperm(points, generator=generator, device="cpu").to(like.device)
    if symmetry == "translation":
        shift = torch.randn(dim, generator=generator, dtype=torch.float64, device="cpu")
        return None, shift.to(like), None
    matrix = random_orthogonal(1, dim, generator=generator)[0]
    wanted = -1.0 if symmetry == "reflection" else 1.0
    if torch.linalg.det(matrix) * wanted < 0:
        matrix = torch.cat([-matrix[:1], matrix[1:]])
    return matrix.to(like), None, None


def _apply(x: Tensor, kind: str, change: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Tensor:
    matrix, shift, order = change
    if matrix is not None and kind in ("position", "vector"):
        return x @ matrix.T
    if shift is not None and kind == "position":
        return x + shift
    if order is not None and kind != "total":
        return x[order]
    return x


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    return float(difference)
