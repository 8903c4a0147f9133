"""What a pattern comes to, for compilers and modes: not traced itself.

At lengths that are numbers it is a constant of the trace, at any lengths it is made of the pattern's words where the
call runs.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from anyattention.ambient import (
    Moment,
    constant_when_compiled,
    is_compiling,
    is_fixed,
    lifted,
    moment_of,
    shielded,
    untraced,
)
from anyattention.patterns import Pattern
from anyattention.patterns.spelling import words_of

__all__ = ["constant_when_traced", "words_when_traced"]


def constant_when_traced(compute: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`compute(pattern, num_queries, num_keys, ...)`, whose results are constants of a traced call.

    Another length, or another number in the pattern's settings, is another trace. The pattern may be made inside the
    traced function, anew in each call.
    """

    @constant_when_compiled
    def constant(settings: tuple[Any, ...], *sizes: Any) -> tuple[Any, ...]:
        return compute(_made_of(settings), *sizes)

    @functools.wraps(compute)
    def call(pattern: Pattern, num_queries: int, num_keys: int, *more: Any) -> tuple[Any, ...]:
        if is_dynamo_compiling():
            found = constant(_settings_of(pattern), _fixed(num_queries), _fixed(num_keys), *more)
            # torch.compile does not know the shape of a tensor in a constant, but that of its alias.
            return tuple([x.detach() if isinstance(x, Tensor) else x for x in found])
        # After a break of the graph this is called as it is, and must not be traced either.
        if moment_of(()) is Moment.PLAIN:
            return untraced(compute)(pattern, num_queries, num_keys, *more)
        with shielded():
            found = untraced(compute)(pattern, _fixed(num_queries), _fixed(num_keys), *more)
        return tuple([lifted(x) if isinstance(x, Tensor) else x for x in found])

    return call


def words_when_traced(pattern: Pattern, num_queries: int, num_keys: int) -> str:
    """A pattern's words where a compiler traces a call of any length; none where it cannot, and elsewhere."""
    if not is_compiling() or (is_fixed(num_queries) and is_fixed(num_keys)):
        return ""
    return _words(_settings_of(pattern)) if is_dynamo_compiling() else words_of(pattern)


@constant_when_compiled
def _words(settings: tuple[Any, ...]) -> str:
    return words_of(_made_of(settings))


def _settings_of(pattern: Pattern) -> tuple[Any, ...]:
    """A pattern as its type and its fields by name; a traced pattern itself may be there in the trace alone."""
    named = {field.name: getattr(pattern, field.name) for field in fields(pattern)} if is_dataclass(pattern) else None
    if named is None or any(isinstance(value, Tensor) for value in named.values()):
        # torch.compile traces no error of our own, and shows this one's text.
        raise NotImplementedError(
            f"pattern: expected a pattern of numbers under torch.compile, got {type(pattern).__name__}."
            " Give pattern.to_graph(num_queries, num_keys), made outside"
        )
    return (type(pattern), *[(name, isinstance(value, Pattern), _fixed(value)) for name, value in named.items()])


def _fixed(value: Any) -> Any:
    """A setting as a constant of the trace, in which a number may be a symbol."""
    if isinstance(value, Pattern):
        return _settings_of(value)
    if isinstance(value, tuple):
        return tuple([_fixed(each) for each in value])
    return operator.index(value) if isinstance(value, int | torch.SymInt) else value


def _made_of(settings: tuple[Any, ...]) -> Pattern:
    """The pattern of `_settings_of`."""
    kind, *named = settings
    return kind(**{name: _made_of(value) if is_pattern else value for name, is_pattern, value in named})
