"""A selection: the keys of the largest scores, among those that a pattern allows."""

from __future__ import annotations

from dataclasses import dataclass

from anyattention.errors import InvalidConfigError
from anyattention.patterns.base import Pattern, require_int

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK:
    """Each query attends, in each head, to the k keys of its largest scores.

    Not a pattern, since the scores decide: it has no `to_graph`. `pattern & TopK(k)` is `TopK(k, among=pattern)`.

    Args:
        k: how many keys, at least 1; where fewer are allowed, all of these.
        among: the pairs to choose from; None is every pair.

    Raises:
        InvalidConfigError: k is no int of at least 1, or `among` is no pattern.

    Source: Gupta et al., 2021, "Memory-efficient Transformers via Top-k Attention".

    Example:
        >>> from anyattention import Causal
        >>> Causal() & TopK(4)
        TopK(k=4, among=Causal(align=None))
    """

    k: int
    among: Pattern | None = None

    def __post_init__(self) -> None:
        require_int("k", self.k, 1)
        if self.among is not None and not isinstance(self.among, Pattern):
            raise InvalidConfigError(argument="among", expected="a pattern or None", actual=repr(self.among))

    def __rand__(self, pattern: Pattern) -> TopK:
        if not isinstance(pattern, Pattern):
            return NotImplemented
        return TopK(self.k, pattern if self.among is None else pattern & self.among)

    def __and__(self, pattern: Pattern) -> TopK:
        return self.__rand__(pattern)
