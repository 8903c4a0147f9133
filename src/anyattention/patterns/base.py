"""What every pattern offers: the pairs it allows, as a matrix, a Graph, blocks, numbers and a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from anyattention._checks import keep_plain, plain
from anyattention.ambient import lasting, shielded
from anyattention.errors import DimensionMismatchError, InvalidConfigError, MissingExtraError

if TYPE_CHECKING:
    from anyattention.patterns.graph import Graph
    from anyattention.patterns.spans import Spans

__all__ = ["Align", "Pattern"]

Align = Literal["top_left", "bottom_right"]


class Pattern(ABC):
    """Says which (query, key) pairs exist. Data only; not tied to a length unless it is a Graph.

    `a & b` allows the pairs that both allow, `a | b` those that either does.

    A subclass has `allows` and `spans`, never changes once it is made, and can be hashed, since `attend` keeps what a
    pattern comes to: a `@dataclass(frozen=True)` of numbers, tuples and patterns is all of that.

    Example:
        >>> from anyattention import Causal, Window
        >>> isinstance(Causal(), Pattern), Causal().to_graph(2, 2).num_edges
        (True, 3)
        >>> (Causal() & Window(1, 1)).to_dense(3, 3)
        tensor([[ True, False, False],
                [ True,  True, False],
                [False,  True,  True]])
    """

    align: Align | None = None

    @abstractmethod
    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """Whether each query may attend to each key.

        Args:
            query, key: indices, int64, that broadcast.
            num_queries, num_keys: the lengths they are indices of.

        Returns:
            Boolean, of the broadcast shape.
        """

    @abstractmethod
    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """The pairs as progressions of keys. Cost: O(spans), never num_queries x num_keys."""

    def to_dense(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Tensor:
        """The pairs as a boolean matrix `(num_queries, num_keys)`, True where the query may attend.

        Cost: num_queries x num_keys bytes.
        """
        query, key = torch.arange(num_queries, device=device), torch.arange(num_keys, device=device)
        return self.allows(query[:, None], key[None, :], num_queries, num_keys)

    def to_graph(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Graph:
        """The pairs as a Graph, ordered by query, then key. Cost: O(pairs), 48 bytes each."""
        from anyattention.patterns.graph import Graph

        with lasting():
            query, key = self.spans(num_queries, num_keys, device=device).pairs()
            return Graph.of_known(torch.stack([key, query]), num_queries, num_keys)

    def to_blocks(self, size: int, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Tensor:
        """Which blocks of `size` x `size` pairs hold an allowed one, boolean `(query blocks, key blocks)`.

        The last blocks may be cut off by the lengths. Cost: O(spans + blocks) memory, and time but for steps longer
        than a block, which are gone one by one.

        Example:
            >>> from anyattention import Window
            >>> Window(1, 1).to_blocks(2, 6, 6)
            tensor([[ True,  True, False],
                    [ True,  True,  True],
                    [False,  True,  True]])
        """
        size = require_int("size", size, 1)
        spans = self.spans(num_queries, num_keys, device=device)
        rows, columns = -(-num_queries // size), -(-num_keys // size)
        is_dense = spans.step <= size  # steps over no block
        edges = torch.zeros(rows, columns + 1, dtype=torch.int64, device=device)
        row = spans.query // size
        for column, change in ((spans.start // size, 1), (spans.last // size + 1, -1)):
            at = (row[is_dense], column[is_dense])
            edges.index_put_(at, torch.tensor(change, dtype=torch.int64, device=device), accumulate=True)
        blocks = edges[:, :-1].cumsum(1) > 0
        stepped = spans.where(~is_dense)
        stepped = stepped.where(torch.argsort(stepped.count, descending=True))
        row, key = stepped.query // size * columns, stepped.start.clone()
        # The first keys of all spans, then the second ones of those that have two, and so on.
        for ended in stepped.count.bincount().cumsum(0)[:-1].tolist():
            some = slice(0, key.numel() - ended)
            blocks.view(-1).index_fill_(0, row[some] + key[some] // size, True)
            key[some] += stepped.step[some]
        return blocks

    def density(self, num_queries: int, num_keys: int | None = None) -> float:
        """The allowed part of all pairs, from 0 to 1; 0 without pairs. num_keys is num_queries where not given.

        Example:
            >>> from anyattention import Causal
            >>> Causal().density(3)
            0.6666666666666666
        """
        num_keys = num_queries if num_keys is None else num_keys
        pairs = num_queries * num_keys
        with shielded():
            return self.spans(num_queries, num_keys).num_pairs / pairs if pairs else 0.0

    def max_attended(self, num_queries: int, num_keys: int | None = None) -> int:
        """The largest number of keys of any query. num_keys is num_queries where not given.

        Example:
            >>> from anyattention import Window
            >>> Window(2, 0).max_attended(100)
            3
        """
        with shielded():
            counts = self.spans(num_queries, num_queries if num_keys is None else num_keys).counts(num_queries)
            return int(counts.max()) if num_queries else 0

    def draw(self, num_queries: int, num_keys: int | None = None, *, axes: Any = None) -> Any:
        """Draw the pairs, a dark square for each that is allowed; queries downwards, keys to the right.

        Args:
            num_queries, num_keys: lengths; num_keys is num_queries where not given. Above 512 a square stands for a
                block, dark where it holds an allowed pair.
            axes: matplotlib axes to draw on; None makes a figure.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as missing:
            raise MissingExtraError(
                "drawing a pattern needs matplotlib: pip install anyattention[viz]", argument="axes"
            ) from missing
        num_keys = num_queries if num_keys is None else num_keys
        size = -(-max(num_queries, num_keys, 1) // 512)
        blocks = self.to_blocks(size, num_queries, num_keys)
        if axes is None:
            _, axes = pyplot.subplots(figsize=(4.5, 4.5), layout="constrained")
        axes.imshow(
            blocks.numpy(), cmap="Greys", vmin=0, vmax=1.3, extent=(0, num_keys, num_queries, 0), interpolation="none"
        )
        axes.set(xlabel="key", ylabel="query", title=f"{self}\n{self.density(num_queries, num_keys):.1%} of all pairs")
        return axes

    def __and__(self, other: Pattern) -> Pattern:
        from anyattention.patterns.composed import Intersection

        return Intersection(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        from anyattention.patterns.composed import Union

        return Union(self, other) if isinstance(other, Pattern) else NotImplemented


def check_align(align: Align | None) -> None:
    """Raise unless `align` is one of the two corners, or None."""
    if align not in (None, "top_left", "bottom_right"):
        raise InvalidConfigError(argument="align", expected="'top_left', 'bottom_right' or None", actual=repr(align))


def keep_int(pattern: object, name: str, at_least: int) -> None:
    """Raise unless a field of a frozen dataclass is an int in its range; a plain one from now on."""
    require_int(name, keep_plain(pattern, name), at_least)


def require_int(argument: str, number: Any, at_least: int) -> int:
    """The setting as a plain int; raise unless it is one in its range, which ends at 2^59."""
    number = plain(number)
    # Above 2^59 the sums of a position and some settings are no int64.
    if isinstance(number, bool) or not isinstance(number, int) or not at_least <= number <= 2**59:
        raise InvalidConfigError(argument=argument, expected=f"an int >= {at_least}, up to 2^59", actual=repr(number))
    return number


def diagonal_offset(argument: str, align: Align | None, num_queries: int, num_keys: int) -> int:
    """By how much query i's own position is ahead of key i: query i stands at key i + offset."""
    if num_queries == num_keys or align == "top_left":
        return 0
    if align == "bottom_right":
        return num_keys - num_queries
    raise DimensionMismatchError(
        argument=argument,
        expected="as many queries as keys, or an alignment",
        actual=f"{num_queries} queries and {num_keys} keys",
        hint="give align='top_left' (query i stands at key i) or align='bottom_right' (the last query at the last key)",
    )
