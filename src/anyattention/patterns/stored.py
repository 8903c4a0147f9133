"""Patterns as JSON, over a closed set of names, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from anyattention.errors import InvalidConfigError, UnsupportedError
from anyattention.patterns.base import Pattern
from anyattention.patterns.blocks import RandomBlocks
from anyattention.patterns.composed import Intersection, Union
from anyattention.patterns.sequence import Causal, Documents, Fixed, Full, Global, Strided, Window
from anyattention.patterns.topk import TopK

__all__ = ["pattern_from_dict", "pattern_to_dict"]

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Causal, Documents, Fixed, Full, Global, Intersection, RandomBlocks, Strided, TopK, Union, Window
    )
}  # fmt: skip
_DEEPEST = 32


def pattern_to_dict(pattern: Pattern | TopK, *, deepest: int = _DEEPEST) -> dict[str, Any]:
    """A pattern of numbers as its kind and its settings by name; only JSON's types.

    Raises:
        UnsupportedError: a pattern that holds tensors, as a Graph and Blocks do, of another class, or nested too deep.
    """
    if deepest == 0:
        raise UnsupportedError(
            f"a pattern of more than {_DEEPEST} in one another is not kept in a file", argument="pattern"
        )
    if type(pattern) not in _KINDS.values():
        raise UnsupportedError(
            f"{type(pattern).__name__} is not kept in a file: of patterns those of numbers are: {', '.join(_KINDS)}",
            argument="pattern",
        )
    known: Any = pattern
    named = {field.name: _plain(getattr(pattern, field.name), deepest - 1) for field in fields(known)}
    return {"kind": type(pattern).__name__, **named}


def pattern_from_dict(settings: object, *, deepest: int = _DEEPEST) -> Any:
    """The pattern of `pattern_to_dict`.

    Raises:
        InvalidConfigError: an unknown kind or name, a setting that is missing or out of range, or nested too deep.
    """
    if not isinstance(settings, Mapping) or settings.get("kind") not in tuple(_KINDS):
        actual = repr(settings.get("kind")) if isinstance(settings, Mapping) else type(settings).__name__
        raise InvalidConfigError(argument="pattern", expected="a kind, one of " + ", ".join(_KINDS), actual=actual)
    if deepest == 0:
        raise InvalidConfigError(argument="pattern", expected=f"at most {_DEEPEST} patterns in another", actual="more")
    kind = _KINDS[settings["kind"]]
    given = {name: value for name, value in settings.items() if name != "kind"}
    names = [field.name for field in fields(kind)]
    for name, value in given.items():
        if name not in names:
            raise InvalidConfigError(
                argument="pattern", expected=f"only the settings {', '.join(names)} of {kind.__name__}", actual=name
            )
        if isinstance(value, Mapping):
            given[name] = pattern_from_dict(value, deepest=deepest - 1)
        elif isinstance(value, list):
            given[name] = tuple(value)
    try:
        return kind(**given)
    except (TypeError, AttributeError) as fault:
        raise InvalidConfigError(
            argument="pattern",
            expected=f"the settings of {kind.__name__}",
            actual=repr(dict(settings)),
            hint=str(fault),
        ) from fault


def _plain(value: Any, deepest: int) -> Any:
    if isinstance(value, Pattern | TopK):
        return pattern_to_dict(value, deepest=deepest)
    return list(value) if isinstance(value, tuple) else value
