"""Patterns of positions as words, which an operator takes where it makes what they come to at each call's lengths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from typing import Any

from anyattention.errors import InvalidInputError
from anyattention.patterns.base import Pattern
from anyattention.patterns.blocks import RandomBlocks
from anyattention.patterns.composed import Intersection, Union
from anyattention.patterns.sequence import Causal, Fixed, Full, Global, Strided, Window

__all__ = ["pattern_of", "words_of"]

# Closed, and without the patterns of one length: Documents, Blocks and Graph.
_KINDS = {
    kind.__name__: kind for kind in (Full, Causal, Window, Strided, Fixed, Global, RandomBlocks, Intersection, Union)
}


def words_of(pattern: Pattern) -> str:
    """The name of a pattern's class and the words of its fields, with spaces between them; none for other patterns.

    Example:
        >>> from anyattention import Causal, Window
        >>> words_of(Window(2, 0) & Causal("top_left"))
        'Intersection Window 2 0 null Causal "top_left"'
    """
    kind = type(pattern)
    if _KINDS.get(kind.__name__) is not kind:
        return ""
    words = [kind.__name__]
    for field in fields(kind):  # pyright: ignore[reportArgumentType]  # all of them are dataclasses
        value = getattr(pattern, field.name)
        inside = words_of(value) if isinstance(value, Pattern) else json.dumps(value, separators=(",", ":"))
        if not inside:
            return ""
        words.append(inside)
    return " ".join(words)


@lru_cache(maxsize=64)
def pattern_of(words: str) -> Pattern:
    """The pattern of `words_of`.

    Raises:
        InvalidInputError: the words are not those of a pattern.
        InvalidConfigError: nor are their numbers.
    """
    rest = iter(words.split(" "))
    try:
        pattern = _read(rest)
    except (StopIteration, ValueError, TypeError, AttributeError, RecursionError) as fault:
        raise _misspelt(words) from fault
    if not isinstance(pattern, Pattern) or next(rest, None) is not None:
        raise _misspelt(words)
    return pattern


def _read(words: Iterator[str]) -> Any:
    word = next(words)
    kind = _KINDS.get(word)
    if kind is not None:
        return kind(*[_read(words) for _ in fields(kind)])  # pyright: ignore[reportArgumentType]  # as above
    value = json.loads(word)
    return tuple(value) if isinstance(value, list) else value


def _misspelt(words: str) -> InvalidInputError:
    return InvalidInputError(argument="pattern", expected="the words of a pattern of positions", actual=words)
