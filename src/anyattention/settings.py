"""What a setting is: one field of a config, written once.

    name: Annotated[type, "what it means"] = default

with `Within(...)` before the text where a number has bounds. Checks, JSON and help follow from the field; so do the
modules' arguments (`nn.arguments`) and the help of the builders.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from anyattention._checks import keep_all_plain, require_number
from anyattention.errors import InvalidConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Config",
    "Within",
    "config_of",
    "documented",
    "meanings",
    "require_config",
    "require_count",
    "require_defaults",
    "require_usable",
    "setting_names",
    "settings_of",
    "with_meanings",
]

_Kind = TypeVar("_Kind", bound="Config")
_Class = TypeVar("_Class")


class Within(NamedTuple):
    """The bounds of a number."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf


class _Type(NamedTuple):
    kind: Any
    may_be_none: bool
    bounds: Within


class Config:
    """Base of the configs: fields checked by their types, to and from dictionaries and JSON; abstract."""

    def __post_init__(self) -> None:
        keep_all_plain(self)
        for name, expected in _types(type(self)).items():
            _require_type(name, getattr(self, name), expected)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, nested configs as dictionaries; only JSON's types."""
        return {item.name: _to_plain(getattr(self, item.name)) for item in _fields(type(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of a dictionary; fields that are absent keep their default.

        Raises:
            InvalidConfigError: an unknown name, a field without a default that is absent, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise InvalidConfigError(argument=cls.__name__, expected="a dictionary", actual=type(values).__name__)
        known = [item.name for item in _fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidConfigError(
                    argument=cls.__name__,
                    expected="only the fields " + ", ".join(known),
                    actual=repr(name),
                )
        _require_given(cls, values)
        given = dict(values)
        if "base" in given and not isinstance(given["base"], _base_of(cls)):
            given["base"] = _base_of(cls).from_dict(given["base"])
        return cls(**given)

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config of a JSON object.

        Raises:
            InvalidConfigError: not JSON, an unknown name, or a value out of range.
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as fault:
            raise InvalidConfigError(f"{cls.__name__}: not valid JSON ({fault})") from fault
        return cls.from_dict(values)


def documented(kind: type[_Class]) -> type[_Class]:
    """Show a config's fields in its help: what they mean under "Args:", and plain types in the signature."""
    kind.__doc__ = with_meanings(kind.__doc__, kind)
    kind.__init__.__annotations__ = {**get_type_hints(kind), "return": None}
    return kind


def settings_of(config: Config) -> dict[str, Any]:
    """The settings by name, those of the base among them."""
    values = {item.name: getattr(config, item.name) for item in _fields(type(config))}
    base = values.pop("base", None)
    return values if base is None else settings_of(base) | values


def setting_names(kind: type[Config]) -> set[str]:
    """The names of the settings, those of the base among them."""
    names = {item.name for item in _fields(kind)}
    return names - {"base"} | setting_names(_base_of(kind)) if "base" in names else names


def config_of(kind: type[_Kind], settings: Mapping[str, Any]) -> _Kind:
    """The config of settings by name, those of its base among them.

    Raises:
        InvalidConfigError: a setting that it does not have, one that is missing, or a value out of range.
    """
    known = setting_names(kind)
    for name, value in settings.items():
        if name not in known:
            raise InvalidConfigError(argument=name, expected=f"no such setting of {kind.__name__}", actual=repr(value))
    _require_given(kind, settings)
    names = {item.name for item in _fields(kind)}
    own = {name: value for name, value in settings.items() if name in names}
    if "base" in names:
        own["base"] = _base_of(kind)(**{name: value for name, value in settings.items() if name not in names})
    return kind(**own)


def require_config(argument: str, config: object, kind: type[Config]) -> None:
    """Raise `InvalidConfigError` unless the argument is a config of the kind."""
    if not isinstance(config, kind):
        raise InvalidConfigError(argument=argument, expected=kind.__name__, actual=type(config).__name__)


def require_count(name: str, value: object) -> None:
    """Raise `InvalidConfigError` unless the value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise InvalidConfigError(argument=name, expected="an int of at least 1 and below 2^31", actual=repr(value))


def require_defaults(config: Config, names: tuple[str, ...], reason: str) -> None:
    """Raise `InvalidConfigError` when a setting that cannot be used differs from its default."""
    defaults = {item.name: item.default for item in _fields(type(config))}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise InvalidConfigError(
                argument=name,
                expected=f"its default {defaults[name]!r} here",
                actual=repr(getattr(config, name)),
                hint=reason,
            )


def require_usable(config: Config, kind: type) -> None:
    """Raise `InvalidConfigError` when a setting is not at its default that `kind` takes out as unused."""
    for item in _fields(kind):
        if "unused" in item.metadata and hasattr(config, item.name):
            require_defaults(config, (item.name,), item.metadata["unused"])


def meanings(kind: type) -> dict[str, str]:
    """What the arguments of a dataclass mean, by name."""
    hints = _hints(kind)
    return {item.name: hints[item.name].__metadata__[-1] for item in _fields(kind) if item.init}


def with_meanings(text: str | None, kind: type) -> str | None:
    """A docstring with the arguments of a dataclass in place of its line "Args: the fields ..."."""

    def section(line: re.Match[str]) -> str:
        indent = line[1]
        found = [f"{indent}Args:"]
        for name, meaning in meanings(kind).items():
            lines = textwrap.wrap(f"{name}: {meaning}.", 112 - len(indent), break_on_hyphens=False)
            found.append(f"\n{indent}        ".join([f"{indent}    {lines[0]}", *lines[1:]]))
        return "\n".join(found)

    return text and re.sub("^( *)Args: the fields.*$", section, text, count=1, flags=re.MULTILINE)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _base_of(kind: type[Config]) -> type[Config]:
    return get_args(_hints(kind)["base"])[0]


def _fields(kind: type) -> tuple[Field[Any], ...]:
    return fields(kind)


def _to_plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return [_to_plain(each) for each in value] if isinstance(value, tuple) else value


@cache
def _types(kind: type[Config]) -> dict[str, _Type]:
    """What the settings are typed as; one that may be of several types is left to its config."""
    found = {}
    for item in _fields(kind):
        hint = _hints(kind)[item.name]
        if get_origin(hint) is Annotated:
            plain, *metadata = get_args(hint)
            kinds = get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,)
            first, *others = (each for each in kinds if each is not NoneType)
            bounds = next((each for each in metadata if isinstance(each, Within)), Within())
            if not others:
                found[item.name] = _Type(first, NoneType in kinds, bounds)
    return found


def _require_type(name: str, value: object, expected: _Type) -> None:
    kind = expected.kind
    if value is None and expected.may_be_none:
        return
    if kind is bool:
        _require_bool(name, value)
    elif kind is int:
        require_count(name, value)
    elif kind is float:
        require_number(name, value, **expected.bounds._asdict(), error=InvalidConfigError)
    elif get_origin(kind) is Literal:
        _require_choice(name, value, get_args(kind))
    else:
        require_config(name, value, kind)


def _require_given(kind: type[Config], values: Mapping[str, Any]) -> None:
    for item in _fields(kind):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values:
            raise InvalidConfigError(argument=item.name, expected=f"a value, in {kind.__name__}", actual="none")


def _require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidConfigError(argument=name, expected="True or False", actual=repr(value))


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidConfigError(argument=name, expected="one of " + ", ".join(map(repr, choices)), actual=repr(value))
