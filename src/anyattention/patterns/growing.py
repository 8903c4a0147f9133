"""Patterns of a sequence that grows, as a model decodes it: the last query stands at the last key."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

from anyattention.errors import InvalidConfigError, UnsupportedError
from anyattention.patterns.base import Pattern
from anyattention.patterns.composed import Intersection, Union
from anyattention.patterns.sequence import Causal, Full, Strided, Window
from anyattention.patterns.topk import TopK

__all__ = ["is_relative", "of_growing", "reach_back"]


def of_growing(pattern: Pattern | TopK) -> Pattern | TopK:
    """The pattern, which must hide the future, with its last query at the last key.

    Raises:
        InvalidConfigError: a query may see keys after it, which are not there yet; or `align` is "top_left".
        UnsupportedError: the pattern belongs to a length, as a Graph does.
    """
    if not _hides_the_future(pattern):
        raise InvalidConfigError(
            argument="pattern",
            expected="one that hides the future, for tokens that come one after the other",
            actual=str(pattern),
            hint="build the module with causal=True, or with pattern & Causal()",
        )
    return _at_the_end(pattern)


def reach_back(pattern: Pattern | TopK) -> int | None:
    """How many keys before its own a query sees at most, wherever it stands; None where the length decides."""
    if isinstance(pattern, TopK):
        return None if pattern.among is None else reach_back(pattern.among)
    return _left(pattern) if is_relative(pattern) else None


def _hides_the_future(pattern: Pattern | TopK | None) -> bool:
    if isinstance(pattern, TopK):
        return _hides_the_future(pattern.among)
    if isinstance(pattern, Intersection):
        return _hides_the_future(pattern.first) or _hides_the_future(pattern.second)
    if isinstance(pattern, Union):
        return _hides_the_future(pattern.first) and _hides_the_future(pattern.second)
    return isinstance(pattern, Causal) or (isinstance(pattern, Window) and pattern.right == 0)


def _at_the_end(pattern: Pattern | TopK) -> Pattern | TopK:
    if isinstance(pattern, TopK):
        among = None if pattern.among is None else _at_the_end(pattern.among)
        assert not isinstance(among, TopK)
        return TopK(pattern.k, among)
    if isinstance(pattern, Intersection | Union):
        first, second = _at_the_end(pattern.first), _at_the_end(pattern.second)
        assert isinstance(first, Pattern)
        assert isinstance(second, Pattern)
        return type(pattern)(first, second)
    if isinstance(pattern, Full):
        return pattern
    if not is_dataclass(pattern) or "align" not in [field.name for field in fields(pattern)]:
        raise UnsupportedError(
            f"{pattern}: it belongs to sequences of one length, and those with a cache grow", argument="pattern"
        )
    if pattern.align == "top_left":
        raise InvalidConfigError(
            argument="align",
            expected="None or 'bottom_right' with a cache: the last query stands at the last key",
            actual="'top_left'",
        )
    return replace(pattern, align="bottom_right")


def is_relative(pattern: Pattern) -> bool:
    """Whether a pair is allowed by the distance of its query and key alone."""
    if isinstance(pattern, Intersection | Union):
        return is_relative(pattern.first) and is_relative(pattern.second)
    return type(pattern) in (Full, Causal, Window, Strided)


def _left(pattern: Pattern) -> int | None:
    if isinstance(pattern, Intersection):
        known = [each for each in (_left(pattern.first), _left(pattern.second)) if each is not None]
        return min(known, default=None)
    if isinstance(pattern, Union):
        both = _left(pattern.first), _left(pattern.second)
        return None if both[0] is None or both[1] is None else max(both[0], both[1])
    return pattern.left if isinstance(pattern, Window) else None
