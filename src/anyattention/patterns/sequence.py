"""Patterns over sequences: every pair, the past, neighbours, strides, summaries, global tokens, documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyattention._checks import keep_plain, plain
from anyattention.ambient import is_exported_to_onnx
from anyattention.errors import DimensionMismatchError, InvalidConfigError
from anyattention.patterns.base import Align, Pattern, check_align, diagonal_offset, keep_int, require_int
from anyattention.patterns.spans import Spans, concatenate

__all__ = ["Causal", "Documents", "Fixed", "Full", "Global", "Strided", "Window"]


@dataclass(frozen=True)
class Full(Pattern):
    """Every query may attend to every key.

    Example:
        >>> Full().to_dense(1, 2)
        tensor([[True, True]])
    """

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True everywhere."""
        shape = torch.broadcast_shapes(query.shape, key.shape)
        return torch.ones(shape, dtype=torch.bool, device=query.device)

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """One run for each query."""
        query = torch.arange(num_queries, device=device)
        return Spans.of(query, 0, num_keys - 1)


class _Positional(Pattern):
    """A pattern of positions: query i stands at key i + offset."""

    def __post_init__(self) -> None:
        check_align(self.align)

    def offset(self, num_queries: int, num_keys: int) -> int:
        """The position of query 0 among the keys.

        Raises:
            DimensionMismatchError: the lengths differ and `align` is None.
        """
        return diagonal_offset(type(self).__name__, self.align, num_queries, num_keys)

    def _positions(self, num_queries: int, num_keys: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Each query and its position."""
        query = torch.arange(num_queries, device=device)
        return query, query + self.offset(num_queries, num_keys)


@dataclass(frozen=True)
class Causal(_Positional):
    """A query may attend to the keys up to its own position.

    Args:
        align: which corner of the (query, key) matrix the diagonal starts from when the lengths differ.
            "top_left": query i sees keys 0 to i. "bottom_right": the last query sees every key. None raises
            when the lengths differ.

    Raises:
        InvalidConfigError: for another `align`.
        DimensionMismatchError: when the lengths differ and `align` is None.

    Example:
        >>> Causal(align="bottom_right").to_dense(2, 3)
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """

    align: Align | None = None

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where `key <= query + offset`; the offset is 0 at the top left."""
        return key <= query + self.offset(num_queries, num_keys)

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """One run for each query, from key 0."""
        query, position = self._positions(num_queries, num_keys, device)
        return Spans.of(query, 0, position.clamp(max=num_keys - 1))


@dataclass(frozen=True)
class Window(_Positional):
    """A query may attend to the keys near its own position, itself included: sliding-window attention.

    Args:
        left: how many keys before it.
        right: how many keys after it.
        align: as in `Causal`.

    Raises:
        InvalidConfigError: a negative width, or another `align`.
        DimensionMismatchError: when the lengths differ and `align` is None.

    Source: Beltagy et al., 2020 (Longformer), section 3.1.

    Example:
        >>> Window(1, 0).to_dense(3, 3)
        tensor([[ True, False, False],
                [ True,  True, False],
                [False,  True,  True]])
    """

    left: int
    right: int
    align: Align | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_int(self, "left", 0)
        keep_int(self, "right", 0)

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where `-left <= key - position <= right`."""
        ahead = key - (query + self.offset(num_queries, num_keys))
        return (ahead >= -self.left) & (ahead <= self.right)

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """One run for each query."""
        query, position = self._positions(num_queries, num_keys, device)
        return Spans.of(query, (position - self.left).clamp(min=0), (position + self.right).clamp(max=num_keys - 1))


@dataclass(frozen=True)
class Strided(_Positional):
    """A query may attend to its neighbours and to every `stride`-th key, counted from itself both ways.

    Args:
        stride: distance between the keys, at least 1.
        local: how many neighbours on either side.
        align: as in `Causal`. `Strided(n, n) & Causal()` is the pattern of the source.

    Raises:
        InvalidConfigError: a stride below 1, a negative `local`, or another `align`.
        DimensionMismatchError: when the lengths differ and `align` is None.

    Source: Child et al., 2019 (Sparse Transformer), section 4.3, both heads' patterns in one.

    Example:
        >>> Strided(2, 0).to_dense(3, 3)
        tensor([[ True, False,  True],
                [False,  True, False],
                [ True, False,  True]])
    """

    stride: int
    local: int
    align: Align | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_int(self, "stride", 1)
        keep_int(self, "local", 0)

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where `|key - position| <= local` or `key = position mod stride`."""
        ahead = key - (query + self.offset(num_queries, num_keys))
        return (ahead.abs() <= self.local) | (ahead % self.stride == 0)

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """The neighbours, and the progressions on either side of them."""
        query, position = self._positions(num_queries, num_keys, device)
        residue, end = position % self.stride, num_keys - 1
        beyond = position + self.stride * (self.local // self.stride + 1)
        before = (position - self.local - 1).clamp(max=end)
        return concatenate(
            [
                Spans.of(query, (position - self.local).clamp(min=0), (position + self.local).clamp(max=end)),
                Spans.of(query, residue, before, self.stride),
                Spans.of(query, torch.maximum(beyond, residue), end, self.stride),
            ]
        )


@dataclass(frozen=True)
class Fixed(_Positional):
    """A query may attend to its own block of positions, and to the last positions of every block.

    Args:
        block: number of positions in a block, at least 1.
        summary: how many of a block's last positions all queries see, at most `block`.
        align: as in `Causal`. `Fixed(n, c) & Causal()` is the pattern of the source.

    Raises:
        InvalidConfigError: a number out of its range, or another `align`.
        DimensionMismatchError: when the lengths differ and `align` is None.

    Source: Child et al., 2019 (Sparse Transformer), section 4.3, both heads' patterns in one.

    Example:
        >>> Fixed(2, 1).to_dense(4, 4)
        tensor([[ True,  True, False,  True],
                [ True,  True, False,  True],
                [False,  True,  True,  True],
                [False,  True,  True,  True]])
    """

    block: int
    summary: int
    align: Align | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_int(self, "block", 1)
        keep_int(self, "summary", 0)
        if self.summary > self.block:
            raise InvalidConfigError(argument="summary", expected=f"at most block={self.block}", actual=self.summary)

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True in the query's own block, and where `key mod block >= block - summary`."""
        position = query + self.offset(num_queries, num_keys)
        is_own = torch.div(position, self.block, rounding_mode="floor") == key // self.block
        return is_own | (key % self.block >= self.block - self.summary)

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """The own block, and for each place of a summary the progressions before and after it."""
        query, position = self._positions(num_queries, num_keys, device)
        begin, end = position - position % self.block, num_keys - 1
        parts = [Spans.of(query, begin.clamp(min=0), (begin + self.block - 1).clamp(max=end))]
        if self.summary == self.block:
            return Spans.of(query, 0, end)
        for place in range(self.block - self.summary, min(self.block, num_keys)):
            parts.append(Spans.of(query, place, (begin - 1).clamp(max=end), self.block))
            parts.append(Spans.of(query, (begin + self.block).clamp(min=0) + place, end, self.block))
        return concatenate(parts)


@dataclass(frozen=True)
class Global(_Positional):
    """Some positions attend to every key, and every query attends to them.

    Args:
        tokens: how many first positions these are, or the positions; those beyond a sequence's end are not there.
        align: as in `Causal`.

    Raises:
        InvalidConfigError: a negative number or position, or another `align`.
        DimensionMismatchError: when the lengths differ and `align` is None.

    Source: Beltagy et al., 2020 (Longformer), section 3.1.

    Example:
        >>> Global(1).to_dense(3, 3)
        tensor([[ True,  True,  True],
                [ True, False, False],
                [ True, False, False]])
    """

    tokens: int | tuple[int, ...]
    align: Align | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_plain(self, "tokens")
        if isinstance(self.tokens, int):
            keep_int(self, "tokens", 0)
        else:
            object.__setattr__(self, "tokens", tuple(sorted(set(_integers("tokens", self.tokens)))))

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where the key, or the query's position, is one of the tokens."""
        return self._are_tokens(key) | self._are_tokens(query + self.offset(num_queries, num_keys))

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """Every key for the tokens' queries, the runs of tokens for the others."""
        query, position = self._positions(num_queries, num_keys, device)
        is_token = self._are_tokens(position)
        others = query[~is_token]
        runs = [Spans.of(others, first, min(last, num_keys - 1)) for first, last in self._runs()]
        return concatenate([Spans.of(query[is_token], 0, num_keys - 1), *runs])

    def _are_tokens(self, position: Tensor) -> Tensor:
        if isinstance(self.tokens, int):
            return (position >= 0) & (position < self.tokens)
        tokens = torch.tensor(self.tokens, dtype=torch.int64, device=position.device)
        # ONNX has no isin.
        return (position[..., None] == tokens).any(-1) if is_exported_to_onnx() else torch.isin(position, tokens)

    def _runs(self) -> list[tuple[int, int]]:
        """First and last of each run of neighbouring tokens."""
        if isinstance(self.tokens, int):
            return [(0, self.tokens - 1)] if self.tokens else []
        runs: list[tuple[int, int]] = []
        for token in self.tokens:
            if runs and runs[-1][1] == token - 1:
                runs[-1] = (runs[-1][0], token)
            else:
                runs.append((token, token))
        return runs


@dataclass(frozen=True)
class Documents(Pattern):
    """Several sequences packed into one: a query may attend to the keys of its own document.

    Args:
        lengths: of the documents, in order; they add up to the length of the sequence.

    Raises:
        InvalidConfigError: a negative length.
        DimensionMismatchError: the lengths do not add up to a call's.

    Example:
        >>> Documents((1, 2)).to_dense(3, 3)
        tensor([[ True, False, False],
                [False,  True,  True],
                [False,  True,  True]])
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(_integers("lengths", self.lengths)))

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True where query and key lie in one document."""
        document = self._documents(num_queries, num_keys, query.device)
        return document[query] == document[key]

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """One run for each query."""
        document = self._documents(num_queries, num_keys, device)
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        end = lengths.cumsum(0)
        query = torch.arange(num_queries, device=device)
        return Spans.of(query, (end - lengths)[document], end[document] - 1)

    def _documents(self, num_queries: int, num_keys: int, device: torch.device | str) -> Tensor:
        """The document of each position."""
        whole = sum(self.lengths)
        if (num_queries, num_keys) != (whole, whole):
            raise DimensionMismatchError(
                argument="Documents",
                expected=f"{whole} queries and keys, the sum of the documents' lengths",
                actual=f"{num_queries} queries and {num_keys} keys",
            )
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        return torch.arange(len(self.lengths), device=device).repeat_interleave(lengths)


def _integers(argument: str, numbers: Sequence[int] | Tensor) -> list[int]:
    """The numbers, none of them negative."""
    listed = numbers.tolist() if isinstance(numbers, Tensor) else plain(numbers)
    if not isinstance(listed, list | tuple | range):
        raise InvalidConfigError(argument=argument, expected="a sequence of ints", actual=repr(numbers))
    for place, number in enumerate(listed):
        require_int(f"{argument}[{place}]", number, 0)
    return list(listed)
