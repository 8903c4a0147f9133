"""What a call is made under: compilation, modes, transforms, derivatives, autocast. Seen here and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import Enum
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    is_legacy_batchedtensor,
)
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

# Whether torch.compile or torch.export reads this call. Not in a function of our own: torch.compile would compile that
# by itself where it gives up on the caller, and answer True.
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "Moment",
    "constant_when_compiled",
    "has_outer_derivatives",
    "is_autocast_enabled",
    "is_compiling",
    "is_differentiated_again",
    "is_exported_to_onnx",
    "is_fixed",
    "is_hollow",
    "is_mapped",
    "is_plain",
    "is_plainly_readable",
    "is_readable",
    "is_transformed",
    "is_untraced",
    "lasting",
    "lifted",
    "mapped_at",
    "mapped_last",
    "moment_of",
    "shielded",
    "untraced",
    "values_of",
    "without_autocast",
    "without_tangents",
]

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_add_batch_dim: Any = torch._add_batch_dim  # pyright: ignore[reportPrivateImportUsage]
_remove_batch_dim: Any = torch._remove_batch_dim  # pyright: ignore[reportPrivateImportUsage]
_TYPES = frozenset({Tensor, torch.nn.Parameter})


class Moment(Enum):
    """Who has to see a call before its kernel does."""

    PLAIN = "nobody: plain tensors, and no mode or transform is on"
    BATCHED = "autograd's own vmap, that of is_grads_batched=True and vectorize=True"
    DUAL = "forward-mode derivatives, which plain tensors carry"
    TRANSFORMED = "a transform of torch.func"
    DISPATCHED = "PyTorch's dispatcher: a compiler, a tracer, a mode, a subclass of Tensor, a lazy view"


def moment_of(tensors: Iterable[Any]) -> Moment:
    """What a call of these tensors is made under; None among them does not count."""
    if is_compiling():
        return Moment.DISPATCHED
    is_transformed = torch._C._are_functorch_transforms_active() and not _are_transforms_shut_off()
    if is_transformed or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        others = Moment.TRANSFORMED if is_transformed else Moment.DISPATCHED
        return Moment.BATCHED if any(map(_is_batched, tensors)) else others
    for x in tensors:
        if x is None:
            continue
        # Without memory: of autograd's own vmap, or left over from a transform that has ended. And indices are no views
        # of complex numbers, and no zeros of autograd's.
        is_odd = type(x) not in _TYPES or not torch._C._has_storage(x)
        if is_odd or (x.dtype is not torch.int64 and (x.is_neg() or x._is_zerotensor())):
            return Moment.BATCHED if any(map(_is_batched, tensors)) else Moment.DISPATCHED
    return Moment.DUAL if forward_ad._current_level >= 0 and _has_tangent(tensors) else Moment.PLAIN


def _are_transforms_shut_off() -> bool:
    """Whether `shielded` or `lasting` keeps the transforms of torch.func out, which are active all the same."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)


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


def has_outer_derivatives(gradients: Sequence[Tensor | None]) -> bool:
    """Inside a backward by these that autograd does not record: whether other derivatives are taken of what it gives.

    Those of forward mode, and of any transform of torch.func but vmap.
    """
    if is_grad_enabled() or is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return any(each.key() in (TransformType.Grad, TransformType.Jvp) for each in get_interpreter_stack() or ())
    return forward_ad._current_level >= 0 and _has_tangent(gradients)


def _is_batched(x: Any) -> bool:
    return isinstance(x, Tensor) and is_legacy_batchedtensor(x)


def mapped_last(tensors: Sequence[Tensor | None]) -> tuple[int, int, list[Tensor | None], list[bool]]:
    """Tensors of `Moment.BATCHED`, without the innermost of autograd's own vmaps that any of them is mapped by.

    Returns:
        The map's level, its size, the tensors with the mapped axis first, and which have one.
    """
    # Which level is the current one, PyTorch tells only who enters another.
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    for each in range(level, 0, -1):
        # An axis that is not there comes out with the size that is given, 0.
        found = [_remove_batch_dim(x, each, 0, 0) if x is not None and _is_batched(x) else None for x in tensors]
        mapped = [x is not None and x.shape[0] > 0 for x in found]
        if any(mapped):
            given = [x if is_mapped else old for x, is_mapped, old in zip(found, mapped, tensors, strict=True)]
            size = next(len(x) for x, is_mapped in zip(found, mapped, strict=True) if is_mapped and x is not None)
            return each, size, given, mapped
    raise RuntimeError("a tensor of a vmap that has ended")


def mapped_at(level: int, x: Tensor) -> Tensor:
    """A tensor whose first axis is that of autograd's own vmap of this level."""
    return _add_batch_dim(x, 0, level)


def is_mapped(x: Tensor) -> bool:
    """Whether a vmap, torch.func's or autograd's own, hides what a tensor holds."""
    return _is_batched(x) or is_batchedtensor(_without_derivatives(x))


def is_readable(*tensors: Tensor) -> bool:
    """Whether a decision may rest on what these hold: not compiled, traced, mapped or fake, nor on "meta"."""
    if is_compiling() or torch._C._get_tracing_state():
        return False
    return not any(is_hollow(x) or is_mapped(x) for x in tensors)


def is_fixed(size: int) -> bool:
    """Whether a size is a number for whoever traces the call, not a symbol of any."""
    if not is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def is_exported_to_onnx() -> bool:
    """Whether `torch.onnx.export(dynamo=True)` reads this call, which knows PyTorch's operators and none of ours."""
    return is_compiling() and torch.onnx.is_in_onnx_export()


def is_plainly_readable(x: Tensor) -> bool:
    """Whether what a tensor holds can be read and nobody sees it: no mode, transform or subclass either."""
    return moment_of((x,)) is Moment.PLAIN and is_readable(x)


def is_plain(x: Tensor) -> bool:
    """Whether a tensor's memory holds its numbers: none of a mode, a transform or a subclass, though one may be on.

    It may have a forward derivative.
    """
    is_own = is_untraced(x) and is_readable(x) and torch._C._has_storage(x) and not is_functorch_wrapped_tensor(x)
    return is_own and not x.is_neg()


def values_of(x: Tensor) -> Tensor:
    """What a readable tensor holds, without derivatives of any kind: for what reads its memory under `shielded`."""
    return _without_derivatives(x).detach()


def _without_derivatives(x: Tensor) -> Tensor:
    while is_gradtrackingtensor(x):
        x = get_unwrapped(x)
    return x


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for the device; PyTorch's own question fails for "meta"."""
    name = device.type
    return name != "meta" and torch.is_autocast_enabled(name)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where every operation keeps its tensors' dtypes; PyTorch has no autocast to switch off for "meta"."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def is_untraced(x: Tensor) -> bool:
    """Whether a call of this tensor takes tensors made under `shielded` as they are: nothing traces it."""
    return type(x) in _TYPES and not is_compiling() and not torch._C._len_torch_dispatch_stack()


@contextmanager
def lasting(*made_of: Tensor) -> Iterator[None]:
    """For what outlives the moment and is made of tensors: marked by no inference mode, and by no transform but theirs.

    PyTorch's modes go on, which may be tracing the tensors.
    """
    with ExitStack() as left:
        if not is_compiling() and torch.is_inference_mode_enabled():
            left.enter_context(torch.inference_mode(False))
            left.enter_context(torch.no_grad())
        if torch._C._are_functorch_transforms_active() and not any(map(is_functorch_wrapped_tensor, made_of)):
            left.enter_context(torch._C._DisableFuncTorch())
        yield


def constant_when_compiled(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Marks a function whose answer torch.compile takes as a constant, without tracing it.

    As `torch.compiler.assume_constant_result` does, which imports the whole compiler for it, in over a second.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def untraced(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """The function as torch.compile does not trace it, not even after a break of the graph; kept with the function."""
    if "torch._dynamo" not in sys.modules:
        return function
    kept = vars(function)
    if "_untraced" not in kept:
        disable: Any = torch.compiler.disable
        kept["_untraced"] = disable(function)
    return kept["_untraced"]


@contextmanager
def shielded() -> Iterator[None]:
    """For what is kept for later calls: made on the CPU, marked by no mode, transform or default device."""
    with _disable_current_modes(), torch.inference_mode(False), torch._C._DisableFuncTorch(), torch.device("cpu"):
        yield


def lifted(x: Tensor) -> Tensor:
    """A tensor made under `shielded` as the modes of the moment take it: as a fake one, as a constant of a trace."""
    return torch.ops.aten.lift_fresh.default(x) if torch._C._len_torch_dispatch_stack() else x


def is_hollow(x: Tensor) -> bool:
    """Whether a tensor is its shape alone: on "meta", or fake."""
    return x.is_meta or is_fake(x)
