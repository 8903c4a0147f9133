"""Which submodules do what their class says and nothing else: only of those may a weight be read without a call."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["initialise_projection", "is_bare", "is_method", "is_untouched"]

_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
_OWN_HOOKS = tuple(f"_{hooks}" for hooks in _HOOKS)
_GLOBAL_HOOKS = tuple(f"_global_{hooks}" for hooks in _HOOKS)
_WEIGHTS = (nn.Parameter, Tensor)
# As it was before anybody put another in its place.
_LINEAR_FORWARD = nn.Linear.forward


def is_untouched(module: nn.Module, kind: type[nn.Module], forward: Callable[..., Any]) -> bool:
    """Whether a module is exactly of its kind, with this forward, and nothing watches its calls.

    A parametrised module is of another kind. Hooks count those of all modules too.
    """
    if type(module) is not kind or not is_method(module.forward, forward):
        return False
    if any(getattr(torch_module, hooks) for hooks in _GLOBAL_HOOKS):
        return False
    return not any(getattr(module, hooks) for hooks in _OWN_HOOKS)


def is_method(method: Any, function: Callable[..., Any]) -> bool:
    """Whether a method is this function, bound to an object."""
    # torch.compile follows this, and finds no __func__ by getattr with a default.
    return isinstance(method, MethodType) and method.__func__ is function


def is_bare(projection: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a projection is `x weight' + bias`: an untouched nn.Linear whose weight is a plain tensor.

    One that is quantised, adapted, pruned, sharded or parametrised is not.
    """
    return is_untouched(projection, nn.Linear, _LINEAR_FORWARD) and type(projection.weight) in _WEIGHTS


def initialise_projection(projection: nn.Module, gain: float = 1.0) -> None:
    """Xavier-uniform weights and bias 0; nothing where the projection was replaced, or its weight is made of others."""
    if isinstance(projection, nn.Linear) and "weight" in projection._parameters:
        nn.init.xavier_uniform_(projection.weight, gain=gain)
        if projection._parameters["bias"] is not None:
            nn.init.zeros_(projection.bias)
