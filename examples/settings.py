"""Settings of an example, each described once: the checks, and the options of the command that change them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import NamedTuple, TypeVar, get_args, get_type_hints

from anyattention.cli.arguments import count, seed
from anyattention.errors import InvalidConfigError

__all__ = ["About", "add_options", "check_settings", "read_settings", "require_divisor"]

# PyTorch's sizes and seeds are 64-bit integers. Beyond any use, and far below what overflows in float32.
_LARGEST_INTEGER, _LARGEST_NUMBER = 2**63, 1e6

Kind = TypeVar("Kind")


class About(NamedTuple):
    """What a setting is, and the least value of an int; every float is above 0."""

    text: str
    least: int = 1


def check_settings(settings: object) -> None:
    """Raise InvalidConfigError unless each setting is a number in its range."""
    for name, (kind, about) in _describe(type(settings)).items():
        value = getattr(settings, name)
        is_number = isinstance(value, kind | int) and not isinstance(value, bool)
        if kind is int and not (is_number and about.least <= value < _LARGEST_INTEGER):
            raise InvalidConfigError(argument=name, expected=f"an int of at least {about.least}", actual=repr(value))
        if kind is float and not (is_number and 0 < value < _LARGEST_NUMBER):
            expected = f"a finite number above 0 and below {_LARGEST_NUMBER:g}"
            raise InvalidConfigError(argument=name, expected=expected, actual=repr(value))


def require_divisor(settings: object, name: str, of: str) -> None:
    """Raise InvalidConfigError unless one setting divides another."""
    whole, part = getattr(settings, of), getattr(settings, name)
    if whole % part:
        raise InvalidConfigError(argument=name, expected=f"a divisor of {of}={whole}", actual=part)


def add_options(parser: ArgumentParser, kind: type) -> None:
    """An option for each setting."""
    for name, (number, about) in _describe(kind).items():
        read = float if number is float else seed if about.least == 0 else count
        text = f"{about.text} (default: {getattr(kind, name)})"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=read, default=getattr(kind, name), metavar="N", help=text
        )


def read_settings(kind: type[Kind], arguments: Namespace) -> Kind:
    """The settings that the options say."""
    return kind(**{name: getattr(arguments, name) for name in _describe(kind)})


def _describe(kind: type) -> dict[str, tuple[type, About]]:
    """The type and the description of each setting, by its name."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: (get_args(hint)[0], get_args(hint)[1]) for name, hint in hints.items()}
