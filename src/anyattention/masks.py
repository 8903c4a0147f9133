"""Masks of other conventions, converted into ours (boolean, True = may attend)."""

import torch
from torch import Tensor

from anyattention.errors import InvalidMaskError

__all__ = ["mask_from_blocked"]


def mask_from_blocked(blocked: Tensor) -> Tensor:
    """A mask in which True or 1 means 'masked out', as torch.nn.MultiheadAttention has it, into ours.

    Args:
        blocked: boolean, or any dtype with only the values 0 and 1; any shape.

    Returns:
        Boolean, of the same shape, True where `blocked` is 0.

    Raises:
        InvalidMaskError: not a tensor, or a value other than 0 and 1 (a float mask of 0 and -inf is a `bias`).

    Example:
        >>> mask_from_blocked(torch.tensor([0, 0, 1]))
        tensor([ True,  True, False])
    """
    if not isinstance(blocked, Tensor):
        raise InvalidMaskError(argument="blocked", expected="a torch.Tensor", actual=type(blocked).__name__)
    if blocked.dtype == torch.bool:
        return ~blocked
    if not ((blocked == 0) | (blocked == 1)).all():
        raise InvalidMaskError(
            argument="blocked",
            expected="only the values 0 and 1",
            actual=f"others, in a {blocked.dtype} tensor",
            hint="a float mask of 0 and -inf is passed as bias=",
        )
    return blocked == 0
