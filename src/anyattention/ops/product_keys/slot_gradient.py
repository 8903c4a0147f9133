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

from anyattention._checks import Axes, require_count, require_dense, require_device, require_same_kind
from anyattention.errors import InvalidInputError
from anyattention.ops.product_keys.used_slots import UsedSlots, slot_rows, used_slots

__all__ = ["Handover", "SlotGradient"]


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

    Raises:
        InvalidInputError: indices are no int64, weights and grad_output are not both float32 or both float64, or they
            are on different devices.
        DimensionMismatchError: the shapes do not fit.

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

    def __post_init__(self) -> None:
        # Kernels read these by each other's sizes.
        for name, x, dtypes in (
            ("indices", self.indices, (torch.int64,)),
            ("weights", self.weights, (torch.float32, torch.float64)),
        ):
            require_dense(name, x)
            if x.dtype not in dtypes:
                raise InvalidInputError(argument=name, expected=" or ".join(map(str, dtypes)), actual=x.dtype)
        axes = Axes()
        axes.bind("weights", self.weights, "tokens heads k")
        axes.bind("indices", self.indices, "tokens heads k")
        axes.bind("grad_output", self.grad_output, "tokens value_dim")
        require_device("indices", self.indices, self.weights.device, "the weights")
        require_same_kind("grad_output", self.grad_output, "weights", self.weights)

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


@dataclass(eq=False)
class Handover:
    """What the backward of one call hands to a function.

    Attributes:
        receive: the function.
        weights, indices: `(T, H, k)`, weights after dropout, and slots: known after the forward.
        grad_output: `(T, C)`, known on the way back.
    """

    receive: Callable[[SlotGradient], None]
    weights: Tensor | None = None
    indices: Tensor | None = None
    grad_output: Tensor | None = None

    def values(self, values: Tensor) -> Tensor:
        """The values, whose gradient is received in place of theirs, once all that reads them backward is done."""
        return _Received.apply(values, self)

    def output(self, output: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """The output of the call; notes its gradient."""
        self.weights, self.indices = weights.detach(), indices
        return _Noted.apply(output, self)


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, handover: Handover) -> Tensor:
        ctx.handover, ctx.num_slots = handover, len(values)
        ctx.set_materialize_grads(False)
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's type
        ctx: Any, *by: Tensor
    ) -> tuple[None, None]:
        given = ctx.handover
        by_output, given.grad_output = given.grad_output, None
        # None: this backward came by the weights alone, and what is noted is of one that left the values out.
        if by[0] is not None and by_output is not None:
            weights = given.weights
            given.receive(SlotGradient(given.indices, weights, by_output.to(weights.dtype), ctx.num_slots))
        return None, None


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, handover: Handover) -> Tensor:
        ctx.handover = handover
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's type
        ctx: Any, *by: Tensor
    ) -> tuple[Tensor, None]:
        ctx.handover.grad_output = by[0]
        return by[0], None
