"""What a call is made under: compilation, modes, transforms, derivatives, autocast. Seen here and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad

# Whether torch.compile or torch.export reads this call. Not in a function of our own: torch.compile would compile that
# by itself where it gives up on the caller, and answer True.
from torch.compiler import is_compiling

__all__ = [
    "Moment",
    "constant_when_compiled",
    "is_autocast_enabled",
    "is_compiling",
    "is_differentiated_again",
    "is_transformed",
    "moment_of",
    "shielded",
    "untraced",
    "without_tangents",
]

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_TYPES = frozenset({Tensor, torch.nn.Parameter})


class Moment(Enum):
    """Who has to see a call before its kernel does."""

    PLAIN = "nobody: plain tensors, and no mode or transform is on"
    DUAL = "forward-mode derivatives, which plain tensors carry"
    TRANSFORMED = "a transform of torch.func"
    DISPATCHED = "PyTorch's dispatcher: a compiler, a tracer, a mode, a subclass of Tensor, a lazy view"


def moment_of(tensors: Iterable[Any]) -> Moment:
    """What a call of these tensors is made under; None among them does not count."""
    if is_compiling():
        return Moment.DISPATCHED
    if torch._C._are_functorch_transforms_active():
        return Moment.TRANSFORMED
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return Moment.DISPATCHED
    for x in tensors:
        if x is None:
            continue
        # Without memory: of autograd's own vmap, or left over from a transform that has ended.
        if type(x) not in _TYPES or not torch._C._has_storage(x):
            return Moment.DISPATCHED
        # Indices are no views of complex numbers, and no zeros of autograd's.
        if x.dtype is not torch.int64 and (x.is_neg() or x._is_zerotensor()):
            return Moment.DISPATCHED
    return Moment.DUAL if forward_ad._current_level >= 0 and _has_tangent(tensors) else Moment.PLAIN


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether forward derivatives are taken of one of these, or a transform of torch.func is on."""
    return torch._C._are_functorch_transforms_active() or (forward_ad._current_level >= 0 and _has_tangent(tensors))


@contextmanager
def without_tangents(tensors: Iterable[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """Inside a forward derivative: the tensors, of which only transforms further out take derivatives.

    PyTorch switches those off here, and a derivative of the derivative would be 0.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield [None if x is None else forward_ad.unpack_dual(x).primal for x in tensors]


def _has_tangent(tensors: Iterable[Any]) -> bool:
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_differentiated_again() -> bool:
    """Inside a backward: whether derivatives are to be taken of the gradients. Never under torch.compile."""
    return is_grad_enabled() and not is_compiling()


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for the device; PyTorch's own question fails for "meta"."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def constant_when_compiled(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Marks a function whose answer torch.compile takes as a constant, without tracing it.

    As `torch.compiler.assume_constant_result` does, which imports the whole compiler for it, in over a second.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def untraced(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """The function as torch.compile does not trace it, not even after a break of the graph."""
    disable: Any = torch.compiler.disable
    return disable(function) if "torch._dynamo" in sys.modules else function


@contextmanager
def shielded() -> Iterator[None]:
    """For what is kept for later calls: made on the CPU, marked by no inference mode, transform or default device."""
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), torch.device("cpu"):
        yield
