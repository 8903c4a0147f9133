"""Which keys of a batch are real tokens, and several documents in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import describe_shape, plain, require_device, require_mask, to_four_axes
from anyattention.ambient import is_plainly_readable
from anyattention.errors import DimensionMismatchError, InvalidInputError, InvalidMaskError, UnsupportedError
from anyattention.patterns import Documents, Graph, Pattern, TopK
from anyattention.patterns.growing import is_relative

__all__ = ["insert_heads", "of_kept", "packed", "places_in", "refuse_beside", "with_padding", "within"]


def refuse_beside(argument: str, given: dict[str, Any]) -> None:
    """Raise where an argument is given with others that do not go with it."""
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"{name} with {argument}: they do not go together", argument=name)


def with_padding(
    mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    key_mask: Tensor | None,
    pattern: Pattern | TopK | None,
    heads: Sequence[Tensor],
) -> Tensor | None:
    """A module's mask that also hides what is no real token of the keys; heads are `(batch, length, heads, width)`.

    Raises:
        UnsupportedError: the pattern is a Graph, whose mask is of its edges.
        DimensionMismatchError, InvalidInputError, InvalidMaskError: an argument does not fit.
    """
    if lengths is None and key_mask is None:
        return mask
    if isinstance(pattern, Graph):
        raise UnsupportedError(
            "lengths and key_mask over a Graph: its mask is of edges; leave out the edges to padding",
            argument="lengths" if key_mask is None else "key_mask",
        )
    query, key = heads[0], heads[1]
    batch, num_keys = key.shape[:2]
    real = None if lengths is None else _of_lengths(lengths, key)
    if key_mask is not None:
        require_mask("key_mask", key_mask)
        require_device("key_mask", key_mask, key.device, "key")
        if key_mask.shape != (batch, num_keys):
            raise InvalidMaskError(
                argument="key_mask",
                expected=f"(batch={batch}, key_length={num_keys}), True = a real token",
                actual=describe_shape(key_mask),
            )
        real = key_mask if real is None else real & key_mask
    assert real is not None
    real = real[:, None, None]
    if mask is None:
        return real
    require_mask("mask", mask)
    require_device("mask", mask, key.device, "key")
    return to_four_axes("mask", insert_heads(mask), batch, query.shape[2], query.shape[1], num_keys) & real


def insert_heads(tensor: Tensor) -> Tensor:
    """A mask or bias of rank 3, (batch, query_length, key_length) in modules, as rank 4."""
    return tensor[:, None] if tensor.ndim == 3 else tensor


def of_kept(key_mask: Tensor | None, length: int, key: Tensor) -> Tensor | None:
    """The mask of all tokens so far for those that are kept, the last ones, where it is one of all."""
    if not isinstance(key_mask, Tensor) or key_mask.ndim != 2 or key_mask.shape[1] != length:
        return key_mask
    return key_mask[:, length - key.shape[1] :]


def _of_lengths(lengths: Tensor | Sequence[int], key: Tensor) -> Tensor:
    """`(batch, key_length)`, True for the first keys of each sequence."""
    batch, num_keys = key.shape[:2]
    if not isinstance(lengths, Tensor):
        listed = _listed("lengths", lengths)
        if not all(0 <= length <= num_keys for length in listed):
            raise _outside(num_keys, listed)
        lengths = torch.tensor(listed, dtype=torch.int64, device=key.device)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise InvalidInputError(argument="lengths", expected="integers", actual=lengths.dtype)
    require_device("lengths", lengths, key.device, "key")
    if lengths.shape != (batch,):
        raise DimensionMismatchError(argument="lengths", expected=f"(batch={batch},)", actual=describe_shape(lengths))
    lengths = lengths.to(torch.int64)
    if is_plainly_readable(lengths) and batch and not bool(((lengths >= 0) & (lengths <= num_keys)).all()):
        raise _outside(num_keys, lengths.tolist())
    return torch.arange(num_keys, device=key.device) < lengths[:, None]


def _outside(num_keys: int, lengths: list[int]) -> InvalidInputError:
    expected = f"numbers from 0 to key_length={num_keys}"
    return InvalidInputError(argument="lengths", expected=expected, actual=lengths)


def packed(documents: Sequence[Sequence[int]], query: Tensor) -> Documents:
    """The documents of each sequence, all sequences of the batch laid end to end.

    Raises:
        DimensionMismatchError: not a list of lengths for each sequence, or they do not add up to its length.
    """
    batch, length = query.shape[:2]
    if not isinstance(documents, list | tuple) or len(documents) != batch:
        raise DimensionMismatchError(
            argument="documents",
            expected=f"the lengths of the documents of each of {batch} sequences",
            actual=f"{len(documents)} of them" if isinstance(documents, list | tuple) else type(documents).__name__,
        )
    lengths: list[int] = []
    for place, own in enumerate(documents):
        own = Documents(tuple(_listed(f"documents[{place}]", own))).lengths
        if sum(own) != length:
            raise DimensionMismatchError(
                argument=f"documents[{place}]",
                expected=f"lengths that add up to that of the sequence, {length}",
                actual=f"{sum(own)}",
            )
        lengths.extend(own)
    return Documents(tuple(lengths))


def within(documents: Documents, pattern: Pattern | TopK | None) -> Pattern | TopK:
    """The pattern within each document.

    Raises:
        UnsupportedError: a pattern that counts positions from the beginning, or a TopK among such pairs.
    """
    among = pattern.among if isinstance(pattern, TopK) else pattern
    if among is not None and not is_relative(among):
        raise UnsupportedError(
            f"documents with {pattern}: only a pattern of distances, such as Causal, Window or Strided, is the same in "
            "each document",
            argument="documents",
        )
    inside = documents if among is None else documents & among
    return TopK(pattern.k, inside) if isinstance(pattern, TopK) else inside


def places_in(documents: Documents, device: torch.device) -> Tensor:
    """The position of each token in its document, `(tokens,)`."""
    lengths = torch.tensor(documents.lengths, dtype=torch.int64, device=device)
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return torch.arange(begins.numel(), device=device) - begins


def _listed(argument: str, numbers: Any) -> list[int]:
    numbers = numbers.tolist() if isinstance(numbers, Tensor) else plain(numbers)
    is_list = isinstance(numbers, list | tuple | range)
    if not is_list or not all(isinstance(each, int) and not isinstance(each, bool) for each in numbers):
        raise InvalidInputError(argument=argument, expected="a sequence of ints", actual=repr(numbers))
    return list(numbers)
