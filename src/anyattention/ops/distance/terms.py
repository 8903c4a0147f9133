"""The distance score and the gates of displacements: a compiled kernel, and plain PyTorch in chunks.

Axes: R rows (edges), X coordinates, H heads, O outputs (the heads' scores first), K radial functions.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import _native
from anyattention.geometry import bessel_basis, gaussian_basis, log_cutoff_envelope, safe_distance
from anyattention.ops.distance.chunks import gradients_in_chunks, in_chunks
from anyattention.ops.eager import are_plain, are_transformed
from anyattention.ops.graph.kernels import pointer, require_numbers

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


class _DistanceCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "dim", "heads", "outputs", "num_radial", "num_threads")),
        *((name, ctypes.c_double) for name in ("radius", "radial_range", "eps")),
        ("is_double", ctypes.c_int32),
    ]


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
    has_kernel = _native.available() and (radial_weight is None or settings.radial_basis == "gaussian")
    if has_kernel and are_plain((displacement, *shared)) and not are_transformed(displacement, *shared):
        return _Kernel.apply(settings, displacement, *shared)
    return in_chunks(partial(reference, settings), displacement, *shared)[0]


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


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: DistanceSettings, displacement: Tensor, *shared: Tensor) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(displacement, *shared)
        call, pointers = _prepare(settings, displacement, *shared)
        terms = displacement.new_empty(call.rows, call.outputs)
        _native.run("distance_terms", ctypes.byref(call), *pointers, terms.data_ptr())
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        displacement, *shared = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Derivatives are to be taken of what comes out.
            function = partial(reference, ctx.settings)
            return None, *gradients_in_chunks(function, displacement, shared, gradients)
        call, pointers = _prepare(ctx.settings, displacement, *shared)
        by_terms = gradients[0].contiguous()
        require_numbers("gradient", by_terms, (call.rows, call.outputs), displacement.dtype)
        wanted = ctx.needs_input_grad[1:]
        found = [torch.empty_like(x) if want else None for x, want in zip(ctx.saved_tensors, wanted, strict=True)]
        results = [pointer(x) for x in found] + [None] * (3 - len(found))
        _native.run("distance_gradients", ctypes.byref(call), *pointers, by_terms.data_ptr(), *results)
        return None, *found


def _prepare(
    settings: DistanceSettings, displacement: Tensor, decay: Tensor, radial_weight: Tensor | None = None
) -> tuple[_DistanceCall, list[int | None]]:
    """A call, and the pointers of its inputs, whose shapes and dtypes are what they are read with."""
    (rows, dim), heads = displacement.shape, decay.shape[0]
    outputs, num_radial = (heads, 0) if radial_weight is None else radial_weight.shape
    dtype = displacement.dtype
    require_numbers("displacement", displacement, (rows, dim), dtype)
    require_numbers("decay", decay, (heads,), dtype)
    if radial_weight is not None:
        require_numbers("radial_weight", radial_weight, (outputs, num_radial), dtype)
    call = _DistanceCall(
        rows,
        dim,
        heads,
        outputs,
        num_radial,
        _native.num_threads(),
        settings.radius or 0.0,
        settings.radial_range or 1.0,
        settings.eps,
        dtype == torch.float64,
    )
    return call, [pointer(x) for x in (displacement, decay, radial_weight)]
