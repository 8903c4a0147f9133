"""The modules' arguments, made of the settings' fields: constructors, what `from_config` passes on, and `print`.

A class of arguments inherits a config, the part of the config's base that the module takes, and what stands beside
them. It is never built: it is there so that `help`, `inspect` and type checkers see each argument. `field(init=False)`
takes an inherited field out, with the reason as `metadata` where the module cannot use the setting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar, get_type_hints

import torch

from anyattention.patterns import Pattern, TopK
from anyattention.settings import Config, config_of, require_config, require_usable, setting_names, settings_of

__all__ = ["ImplementationArgument", "ParameterArguments", "PatternArgument", "arguments_of", "shown_settings", "takes"]

_Fields = ParamSpec("_Fields")
_Module = TypeVar("_Module")

_SIZES = ("d_model", "num_heads")


@dataclass(frozen=True, kw_only=True)
class ParameterArguments:
    """What modules with parameters take beside their settings; the settings of a base stand for the base."""

    base: Any = field(init=False)
    device: Annotated[torch.device | str | None, "of the parameters"] = None
    dtype: Annotated[torch.dtype | None, "of the parameters"] = None


@dataclass(frozen=True, kw_only=True)
class PatternArgument:
    """What modules over any pattern take beside their settings."""

    pattern: Annotated[
        Pattern | TopK | None,
        'which pairs exist, or TopK, joined by `causal` with "and"; None is every pair. It is no setting of the '
        "config: `clone` and `save` keep it, and `from_config` takes it beside the config",
    ] = None


@dataclass(frozen=True, kw_only=True)
class ImplementationArgument:
    """What modules take that hand on the choice of an implementation."""

    implementation: Annotated[
        str | None,
        'forces one, such as "reference"; None takes the first that can run a call. It is no setting of the config: '
        "`save` leaves it out",
    ] = None


def takes(
    arguments: Callable[_Fields, object],
) -> Callable[[Callable[Concatenate[_Module, ...], None]], Callable[Concatenate[_Module, _Fields], None]]:
    """Have an `__init__(self, config, **beside)` called with the fields of a class: sizes, and the rest by keyword.

    Args:
        arguments: the class. The first config among its bases is what the settings are made to.
    """

    def decorate(build: Callable[..., None]) -> Callable[..., None]:
        kind, expected = _kind_of(arguments), _signature_of(arguments)
        settings = setting_names(kind)

        @wraps(build)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                bound = expected.bind(self, *args, **kwargs)
            except TypeError as fault:
                raise TypeError(f"{build.__qualname__}() {fault}") from None
            bound.apply_defaults()
            _, *given = bound.arguments.items()
            config = config_of(kind, {name: value for name, value in given if name in settings})
            build(self, config, **{name: value for name, value in given if name not in settings})

        init.__annotations__ = {name: each.annotation for name, each in expected.parameters.items() if name != "self"}
        vars(init).update(__signature__=expected, arguments=arguments)
        return init

    return decorate  # pyright: ignore[reportReturnType]  # `init` takes what the class's constructor takes


def arguments_of(config: Config, arguments: Any) -> dict[str, Any]:
    """A config's settings as the arguments of a module.

    Raises:
        InvalidConfigError: a config of another kind, or one with a setting that the module cannot use.
    """
    require_config("config", config, _kind_of(arguments))
    require_usable(config, arguments)
    taken_out = [item.name for item in fields(arguments) if not item.init]
    return {name: value for name, value in settings_of(config).items() if name not in taken_out}


def shown_settings(config: Config, *names: str) -> str:
    """The sizes, and the settings of the names, for `print(module)`."""
    settings = settings_of(config)
    sizes = [repr(settings[name]) for name in _SIZES]
    return ", ".join([*sizes, *(f"{name}={settings[name]!r}" for name in names)])


def _kind_of(arguments: Any) -> type[Config]:
    return next(base for base in arguments.__bases__ if issubclass(base, Config))


def _signature_of(arguments: Any) -> Signature:
    """That of the `__init__` with these arguments."""
    types = get_type_hints(arguments)
    parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)]
    for name, parameter in signature(arguments).parameters.items():
        kind = Parameter.POSITIONAL_OR_KEYWORD if name in _SIZES else Parameter.KEYWORD_ONLY
        parameters.append(parameter.replace(kind=kind, annotation=types[name]))
    return Signature(parameters, return_annotation=None)
