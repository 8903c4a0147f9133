"""What a call is made under: whether it may go to its kernel straight, and whether transforms are on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

__all__ = ["are_plain", "are_transformed"]

_TYPES = (Tensor, torch.nn.Parameter)


def are_plain(arguments: Sequence[Any]) -> bool:
    """Whether nothing would stand between the dispatcher and the CPU kernel: no tracing, no mode, no transform."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for argument in arguments:
        if isinstance(argument, list):
            if not all(type(item) is bool or (type(item) is Tensor and item.is_cpu) for item in argument):
                return False
        elif isinstance(argument, Tensor) and not (type(argument) in _TYPES and argument.is_cpu):
            return False
        elif isinstance(argument, Tensor) and (argument.is_neg() or argument._is_zerotensor()):
            return False  # what is in memory is not what the numbers are
    return True


def are_transformed(*tensors: Tensor | None) -> bool:
    """Whether forward derivatives are taken of one of these, or a transform of torch.func is on."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and unpack_dual(x).tangent is not None for x in tensors)
