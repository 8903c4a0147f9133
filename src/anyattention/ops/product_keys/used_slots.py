"""The slots that a call uses, each once and in order, and the rows of the values' gradient.

Axes: S slots, E entries (a token, a head and a place among its slots), U used slots, C value_dim.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattention.native import available, large_empty, load
from anyattention.native.structures import structures

__all__ = ["UsedSlots", "slot_rows", "used_slots"]


class _UsedSlots(ctypes.Structure):
    """`anyattention_used_slots`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_used", "num_entries")),
        *((name, ctypes.c_void_p) for name in ("slots", "offsets", "entries")),
    ]


structures["used_slots"] = _UsedSlots


@dataclass(frozen=True, eq=False)
class UsedSlots:
    """Slots that are used, and their entries.

    Attributes:
        slots: `(U,)`, ascending.
        offsets: `(U + 1,)`: the entries of slot u lie from offsets[u] up to offsets[u + 1].
        entries: `(E,)`, of each slot ascending.
    """

    slots: Tensor
    offsets: Tensor
    entries: Tensor

    @property
    def reference(self) -> Any:
        """As C takes it, for as long as this record lives."""
        places = (self.slots.data_ptr(), self.offsets.data_ptr(), self.entries.data_ptr())
        return ctypes.byref(_UsedSlots(len(self.slots), len(self.entries), *places))

    def part(self, first: int, end: int) -> UsedSlots:
        """The slots from the place `first` up to `end`."""
        offsets = self.offsets[first : end + 1]
        begin, last = int(offsets[0]), int(offsets[-1])
        return UsedSlots(self.slots[first:end], offsets - begin, self.entries[begin:last])

    def empty_rows(self, like: Tensor, value_dim: int) -> Tensor:
        """Uninitialised rows `(U, C)` of another tensor's dtype."""
        shape = (len(self.slots), value_dim)
        return large_empty(like, shape) if like.is_cpu and available() else like.new_empty(shape)

    def as_sparse(self, rows: Tensor, num_slots: int) -> Tensor:
        """Rows `(U, C)` as a coalesced COO tensor `(S, C)`."""
        size = (num_slots, rows.shape[1])
        return torch.sparse_coo_tensor(
            self.slots[None], rows, size, device=rows.device, is_coalesced=True, check_invariants=False
        )


def used_slots(indices: Tensor, num_slots: int) -> UsedSlots:
    """The slots that `indices` name, sorted; by the kernel on the CPU, else by PyTorch.

    Cost: O(E) time for each 11 bits of `num_slots`; memory 40 bytes for each entry, of which 24 stay.
    """
    flat = indices.reshape(-1).contiguous()
    if not (flat.is_cpu and available() and num_slots <= 1 << 32):
        ascending, entries = torch.sort(flat, stable=True)
        slots, counts = torch.unique_consecutive(ascending, return_counts=True)
        return UsedSlots(slots, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), entries)
    slots, entries = torch.empty_like(flat), torch.empty_like(flat)
    offsets, count = flat.new_empty(len(flat) + 1), ctypes.c_int64()
    sizes = flat.data_ptr(), len(flat), num_slots
    load.run("sorted_slots", *sizes, slots.data_ptr(), offsets.data_ptr(), entries.data_ptr(), ctypes.addressof(count))
    return UsedSlots(slots[: count.value], offsets[: count.value + 1], entries)


def slot_rows(used: UsedSlots, weights: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient's rows `(U, C)` of used slots: each the sum of its entries' weight times the token's `grad_output`.

    Args:
        used: the slots.
        weights: `(T, H, k)`, contiguous.
        grad_output: `(T, C)`, contiguous, in the same dtype.
    """
    of_token, value_dim = max(weights.shape[1] * weights.shape[2], 1), grad_output.shape[1]
    if weights.is_cpu and available():
        rows = used.empty_rows(grad_output, value_dim)
        load.run(
            "slot_rows",
            weights.data_ptr(),
            grad_output.data_ptr(),
            weights.numel(),
            of_token,
            value_dim,
            used.reference,
            load.num_threads(),
            grad_output.dtype is torch.float64,
            rows.data_ptr(),
        )
        return rows
    own = torch.arange(len(used.slots), device=weights.device).repeat_interleave(used.offsets.diff())
    shares = weights.flatten()[used.entries, None] * grad_output[used.entries // of_token]
    return grad_output.new_zeros(len(used.slots), value_dim).index_add_(0, own, shares)
