"""Weights of pairs as sparse matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.ambient import is_mapped
from anyattention.errors import UnsupportedError

__all__ = ["require_unmapped", "weights_at"]


def weights_at(places: Tensor, weights: Tensor, size: tuple[int, ...]) -> Tensor:
    """Weights `(entries,)` at places `(axes, entries)` of a sparse COO tensor, coalesced: equal places are added up."""
    require_unmapped(weights)
    try:
        return torch.sparse_coo_tensor(places, weights, size, device=weights.device, check_invariants=False).coalesce()
    except NotImplementedError as missing:
        raise UnsupportedError(
            "weights as a sparse tensor have no forward derivatives in PyTorch: for jvp, jacfwd and hessian ask for no"
            " weights, or attend over a Graph"
        ) from missing


def require_unmapped(weights: Tensor) -> None:
    """Raise where weights are mapped by a vmap: each entry would be a sparse tensor with places of its own."""
    if is_mapped(weights):
        raise UnsupportedError("weights as a sparse tensor cannot be mapped by vmap: ask for none")
