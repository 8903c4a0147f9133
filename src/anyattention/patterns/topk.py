"""A selection: the keys of the largest scores, among those that a pattern allows."""

from __future__ import annotations

from dataclasses import dataclass

from anyattention._checks import conversion_of
from anyattention.ambient import shielded
from anyattention.errors import InvalidConfigError
from anyattention.patterns.base import Pattern, keep_int
from anyattention.patterns.composed import require_simple
from anyattention.patterns.sequence import Full

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK:
    """Each query attends, in each head, to the k keys of its largest scores.

    Not a pattern, since the scores decide: it has no `to_graph`. `pattern & TopK(k)` is `TopK(k, among=pattern)`.

    Without a bias keys are ranked by `scale query . key`, the score before the softcap, which would only make scores
    equal where it saturates. With a bias they are ranked by the score, `softcap(scale query . key) + bias`, and under a
    softcap keys of equal scores by `scale query . key`. Of keys that are equal then, the first ones win. NaN is the
    largest score. Every implementation keeps to this, with its own rounding of the scores, in float32 or, where the
    query is, in float64.

    Args:
        k: how many keys, at least 1; where fewer are allowed, all of these.
        among: the pairs to choose from; None is every pair.

    Raises:
        InvalidConfigError: k is no int of at least 1, or `among` is no pattern.
        GraphStructureError: `among` is a Graph in which an edge is repeated.

    Source: Gupta et al., 2021, "Memory-efficient Transformers via Top-k Attention".

    Example:
        >>> from anyattention import Causal
        >>> Causal() & TopK(4)
        TopK(k=4, among=Causal(align=None))
    """

    k: int
    among: Pattern | None = None

    def __post_init__(self) -> None:
        keep_int(self, "k", 1)
        if self.among is not None and not isinstance(self.among, Pattern):
            raise InvalidConfigError(
                argument="among",
                expected="a pattern or None",
                actual=repr(self.among),
                hint=conversion_of(self.among),
            )
        if self.among is not None:
            require_simple(self.among)

    def density(self, num_queries: int, num_keys: int | None = None) -> float:
        """The chosen part of all pairs, in each head; 0 without pairs. num_keys is num_queries where not given.

        Example:
            >>> TopK(2).density(8)
            0.25
        """
        counts = self._counts(num_queries, num_keys)
        pairs = num_queries * (num_queries if num_keys is None else num_keys)
        return sum(counts) / pairs if pairs else 0.0

    def max_attended(self, num_queries: int, num_keys: int | None = None) -> int:
        """The most keys that any query attends to, in each head. num_keys is num_queries where not given."""
        counts = self._counts(num_queries, num_keys)
        return max(counts, default=0)

    def _counts(self, num_queries: int, num_keys: int | None) -> list[int]:
        """How many keys each query chooses."""
        among = Full() if self.among is None else self.among
        num_keys = num_queries if num_keys is None else num_keys
        with shielded():
            return among.spans(num_queries, num_keys).counts(num_queries).clamp(max=self.k).tolist()

    def __rand__(self, pattern: Pattern) -> TopK:
        if not isinstance(pattern, Pattern):
            return NotImplemented
        return TopK(self.k, pattern if self.among is None else pattern & self.among)

    def __and__(self, pattern: Pattern) -> TopK:
        return self.__rand__(pattern)
