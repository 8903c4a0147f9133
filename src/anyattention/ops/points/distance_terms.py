"""The distance score and the gates of displacements: a compiled kernel, and plain PyTorch in chunks.

Axes: R rows (edges), X coordinates, H heads, O outputs (the heads' scores first), K radial functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from anyattention.ambient import Moment, is_differentiated_again, moment_of
from anyattention.geometry import bessel_basis, gaussian_basis, log_cutoff_envelope, safe_distance
from anyattention.native.structures import Numbers
from anyattention.ops.operator import Result, operator
from anyattention.ops.points.chunks import gradients_in_chunks, in_chunks
from anyattention.ops.refusals import refusal_of_device

__all__ = ["DistanceSettings", "distance_terms"]


class DistanceSettings(NamedTuple):
    """Which functions of the distance there are.

    Attributes:
        radius: of the envelope; None for none.
        radial_range: of the radial functions, where there are any.
        radial_basis: "gaussian" or "bessel".
        eps: nearer than this, points count as this far apart.
    """

    radius: float | None
    radial_range: float | None
    radial_basis: str
    eps: float


@dataclass(frozen=True, eq=False)
class DistanceTerms:
    """`reference` of Gaussian bumps.

    Attributes:
        displacement, decay: `(R, X)`, `(H,)`.
        radial_weight: `(O, K)`; None for no radial functions.
        radius: of the envelope; 0 for none.
        radial_range, eps: as in `DistanceSettings`.
    """

    displacement: Annotated[Tensor, Numbers("rows dim")]
    decay: Annotated[Tensor, Numbers("heads")]
    radial_weight: Annotated[Tensor | None, Numbers("outputs num_radial")]
    radius: float
    radial_range: float
    eps: float

    @property
    def outputs(self) -> int:
        """How many terms there are of a row."""
        return (self.decay if self.radial_weight is None else self.radial_weight).shape[0]


@dataclass(frozen=True, eq=False)
class DistanceTermsBackward:
    """The gradients of displacement, decay and radial_weight, where needed."""

    call: DistanceTerms
    grad_terms: Annotated[Tensor, Numbers("rows outputs")]
    needed: tuple[bool, ...]


def distance_terms(
    displacement: Tensor, decay: Tensor, radial_weight: Tensor | None, settings: DistanceSettings
) -> Tensor:
    """`(R, O)`: what `reference` computes; differentiable to any order.

    The kernel runs Gaussian bumps of float32 and float64 on the CPU, and their first derivative. Everything else, and
    derivatives of higher order, are PyTorch's, in chunks of rows.

    Args:
        displacement: `(R, X)`.
        decay: `(H,)`.
        radial_weight: `(O, K)`; None for no radial functions, and O = H.
        settings: which functions there are.
    """
    shared = [decay] if radial_weight is None else [decay, radial_weight]
    # Before the kernel's own function, which is to keep what derivatives are taken by.
    displacement, *shared = (x.contiguous() for x in (displacement, *shared))
    if refusal(displacement, settings) is None and moment_of((displacement, *shared)) is Moment.PLAIN:
        numbers = (settings.radius or 0.0, settings.radial_range or 1.0, settings.eps)
        weight = None if radial_weight is None else shared[1]
        return _distance_terms(DistanceTerms(displacement, shared[0], weight, *numbers))
    return in_chunks(partial(reference, settings), displacement, *shared)[0]


def refusal(rows: Tensor, settings: DistanceSettings) -> str | None:
    """Why the kernel cannot run on the rows' device, or cannot have these functions; None where it can."""
    if settings.radial_range is not None and settings.radial_basis != "gaussian":
        return f"the kernel has no {settings.radial_basis} basis"
    return refusal_of_device(rows, "positions are")


def reference(
    settings: DistanceSettings, displacement: Tensor, decay: Tensor, radial_weight: Tensor | None = None
) -> tuple[Tensor]:
    """The definition, `(R, O)`.

    terms_o = sum over k of radial_weight_ok basis_k(d),   and for the heads  - decay_h d^2 + log u(d / radius)
    """
    squared = displacement.square().sum(-1)
    score = -squared[:, None] * decay
    distance = safe_distance(squared, settings.eps)
    if settings.radius is not None:
        score = score + log_cutoff_envelope(distance, settings.radius)[:, None]
    if radial_weight is None or settings.radial_range is None:
        return (score,)
    basis = gaussian_basis if settings.radial_basis == "gaussian" else bessel_basis
    radial = F.linear(basis(distance, settings.radial_range, radial_weight.shape[1]), radial_weight)
    return (radial + F.pad(score, (0, radial.shape[1] - score.shape[1])),)


def _gradient(
    call: DistanceTerms, _: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    names = ("displacement", "decay", "radial_weight")
    (grad_terms,) = by
    assert grad_terms is not None
    if not is_differentiated_again():
        needed = tuple([name in needs for name in names])
        return dict(zip(names, _backward(DistanceTermsBackward(call, grad_terms, needed)), strict=True))
    radial_range = None if call.radial_weight is None else call.radial_range
    settings = DistanceSettings(call.radius or None, radial_range, "gaussian", call.eps)
    shared = [call.decay] if call.radial_weight is None else [call.decay, call.radial_weight]
    found = gradients_in_chunks(partial(reference, settings), call.displacement, shared, (grad_terms,))
    return dict(zip(names, found, strict=False))


_distance_terms = operator(DistanceTerms, [Result("terms", "rows outputs")], gradient=_gradient)
_backward = operator(
    DistanceTermsBackward,
    [Result(f"grad_{name}", like=f"call.{name}") for name in ("displacement", "decay", "radial_weight")],
)


_distance_terms.c_kernel()
_backward.c_kernel()
