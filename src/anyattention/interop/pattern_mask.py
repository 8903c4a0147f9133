"""A mask that is a pattern until somebody reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from anyattention.patterns import Pattern

__all__ = ["PatternMask"]


class PatternMask(Tensor):
    """A boolean mask `(batch, 1, queries, keys)`: the pairs of a pattern whose key is no padding.

    It has a mask's shape and dtype, and no numbers until an operator of PyTorch reads it: models may slice a mask, join
    it with others or write into it. From then on it is the matrix that was laid out for the first of these, and the
    attention function takes that. A plain tensor with the pattern as an attribute would lose it there, and hide the
    wrong pairs.

    Args:
        pattern: which pairs exist.
        keys: boolean `(batch, 1, 1, keys)`, False for padding; None for none.
        shape: the mask's.
        device: the mask's.
    """

    pattern: Pattern
    keys: Tensor | None
    matrix: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(  # noqa: D102  # described above
        cls, pattern: Pattern, keys: Tensor | None, shape: tuple[int, ...], device: torch.device | str
    ) -> PatternMask:
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        made = make(cls, shape, dtype=torch.bool, device=device)
        made.pattern, made.keys, made.matrix = pattern, keys, None
        return made

    def laid_out(self) -> Tensor:
        """The matrix, the same at every call, so that what is written into it stays."""
        if self.matrix is None:
            allowed = self.pattern.to_dense(*self.shape[-2:], device=self.device)
            self.matrix = (allowed if self.keys is None else allowed & self.keys).expand(self.shape).contiguous()
        return self.matrix

    @classmethod
    def __torch_dispatch__(
        cls, operator: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What the operator makes of the matrix."""
        args, named = tree_map_only(cls, cls.laid_out, (args, kwargs or {}))
        return operator(*args, **named)
