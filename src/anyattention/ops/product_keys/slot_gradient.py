"""The gradient of a memory's values without its rows: what it is made of, and its rows as they are asked for.

Axes: T tokens, H heads, k slots chosen, S slots, C value_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import require_count
from anyattention.ops.product_keys.used_slots import UsedSlots, slot_rows, used_slots

__all__ = ["SlotGradient", "with_slot_gradient"]


@dataclass(frozen=True, eq=False)
class SlotGradient:
    """The gradient of the values of a product-key memory, in factors.

        row of slot s = sum over the tokens t, heads h and places c with indices[t, h, c] = s of
                        weights[t, h, c] grad_output[t]

    The rows may take a hundred times the memory of these factors, and an optimizer reads each row once: `parts` gives
    some of them at a time.

    Attributes:
        indices: `(T, H, k)` int64, slots.
        weights: `(T, H, k)`, after dropout, float32 or float64.
        grad_output: `(T, C)`, in the same dtype.
        num_slots: how many slots the memory has, S.

    Example:
        >>> import torch
        >>> gradient = SlotGradient(torch.tensor([[[2, 0]]]), torch.tensor([[[0.5, 0.25]]]), torch.tensor([[4.0]]), 4)
        >>> for slots, rows in gradient.parts():
        ...     print(slots, rows)
        tensor([0, 2]) tensor([[1.],
                [2.]])
    """

    indices: Tensor
    weights: Tensor
    grad_output: Tensor
    num_slots: int

    @cached_property
    def _used(self) -> UsedSlots:
        return used_slots(self.indices, self.num_slots)

    def parts(self, max_rows: int = 4096) -> Iterator[tuple[Tensor, Tensor]]:
        """Slots `(rows,)`, ascending, each once, and their rows `(rows, C)`: at most `max_rows` at a time.

        The rows have the same bits for any `max_rows` and any number of threads.

        Raises:
            InvalidInputError: `max_rows` is no int of at least 1.

        Cost: O(T x H x k x C) time for all parts; memory the rows of one part, and some 40 bytes for each weight.
        """
        max_rows = require_count("max_rows", max_rows, at_least=1)
        for first in range(0, len(self._used.slots), max_rows):
            part = self._used.part(first, min(first + max_rows, len(self._used.slots)))
            yield part.slots, slot_rows(part, self.weights.contiguous(), self.grad_output.contiguous())

    def to_sparse(self) -> Tensor:
        """All rows, as the coalesced COO tensor `(S, C)` that `sparse_grad=True` gives."""
        rows = slot_rows(self._used, self.weights.contiguous(), self.grad_output.contiguous())
        return self._used.as_sparse(rows, self.num_slots)

    @torch.no_grad()
    def add_to_(self, values: Tensor, *, alpha: float = 1.0) -> None:
        """`values += alpha gradient`, some rows at a time: with alpha = -lr a step of gradient descent.

        Args:
            values: `(S, C)`, changed in place.
            alpha: the factor.
        """
        for slots, rows in self.parts():
            values.index_add_(0, slots, rows.to(values.dtype), alpha=alpha)


def with_slot_gradient(
    output: Tensor, values: Tensor, factors: tuple[Tensor, Tensor], receive: Callable[[SlotGradient], None]
) -> Tensor:
    """The output, whose backward hands the gradient of the values to `receive`, and none to the values.

    Args:
        output: `(T, C)`, of values without a gradient.
        values: `(S, C)`, which may require one.
        factors: weights after dropout, and slots, `(T, H, k)`.
        receive: called in the backward.
    """
    return _Received.apply(output, values, *[x.detach() for x in factors], receive)


class _Received(torch.autograd.Function):
    """The output itself; values are an input so that it has a gradient where they want one."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, values: Tensor, weights: Tensor, indices: Tensor, receive: Any) -> Tensor:
        ctx.save_for_backward(weights, indices)
        ctx.receive, ctx.num_slots = receive, len(values)
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's type
        ctx: Any, *by: Tensor
    ) -> tuple[Tensor | None, ...]:
        weights, indices = ctx.saved_tensors
        ctx.receive(SlotGradient(indices, weights, by[0].to(weights.dtype), ctx.num_slots))
        return by[0], None, None, None, None
