"""The records of attention over runs: a call, and its gradients.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, C value_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.native.structures import Choice, HeadRows, Numbers, Pairs, Seed, Untold
from anyattention.ops.arguments import Arguments, Scaling
from anyattention.ops.dropout import draw_seed
from anyattention.ops.runs.pairs import by_distance
from anyattention.ops.runs.parts import RunPart, runs_of
from anyattention.patterns.spelling import pattern_of

__all__ = [
    "RunAttention",
    "RunAttentionBackward",
    "in_parts",
    "of_rows",
    "run_call",
    "single_parts",
    "widened",
    "with_parts",
    "with_single_parts",
]


@dataclass(frozen=True, eq=False)
class RunAttention(Scaling):
    """Attention by dot products of each query to the keys of its runs.

    Attributes:
        query, key, value: read where they lie, also in half precision; sums are at least float32.
        mask: boolean, each of the axes `(B, H, L, S)` whole or 1; False hides the pair.
        bias: axes as the mask, added to the score, -inf hides the pair; or by distance, as `Pairs` says.
        seed: with dropout.
        parts: the runs, in parts that share no pair.
        dropout: probability with which a weight is dropped.
        is_dense: dropout numbers all pairs (batch, head, query, key), else the allowed ones (batch, pair, head).
        words: of a pattern, in place of `parts`: these are made where the call runs, at its lengths.
    """

    query: Annotated[Tensor, HeadRows("batch num_queries heads head_dim")]
    key: Annotated[Tensor, HeadRows("batch num_keys key_heads head_dim")]
    value: Annotated[Tensor, HeadRows("batch num_keys key_heads value_dim")]
    mask: Annotated[Tensor | None, Choice("batch heads num_queries num_keys")]
    bias: Annotated[Tensor | None, Pairs("batch heads num_queries num_keys")]
    seed: Annotated[Tensor | None, Seed()]
    parts: tuple[RunPart, ...]
    dropout: float
    is_dense: bool
    words: Annotated[str, Untold] = ""


@dataclass(frozen=True, eq=False)
class RunAttentionBackward:
    """The gradients of query, key, value and bias, where needed, in at least float32."""

    call: RunAttention
    output: Annotated[Tensor, Numbers("batch num_queries heads value_dim")]
    largest: Annotated[Tensor, Numbers("batch num_queries heads")]
    log_sum: Annotated[Tensor, Numbers("batch num_queries heads")]
    grad_output: Annotated[Tensor, HeadRows("batch num_queries heads value_dim")]
    grad_log_sum: Annotated[Tensor | None, Numbers("batch num_queries heads")]
    needed: tuple[bool, ...]


def run_call(call: Arguments, parts: tuple[RunPart, ...], *, is_dense: bool, words: str = "") -> RunAttention:
    """The record of a call over these parts, or those of a pattern's words."""
    bias = call.bias
    if isinstance(bias, RelativeBias):
        bias = by_distance(bias, call.query, call.key)
    return RunAttention(
        query=call.query,
        key=call.key,
        value=call.value,
        mask=call.mask,
        bias=None if bias is None else bias.to(call.sums_dtype),
        seed=draw_seed(call.query.device) if call.dropout > 0 else None,
        parts=parts,
        **vars(call.scaling),
        dropout=call.dropout,
        is_dense=is_dense,
        words=words,
    )


def in_parts(call: RunAttention) -> RunAttention:
    """The call with the parts that its words come to, where it has any."""
    if not call.words:
        return call
    lengths = call.query.shape[1], call.key.shape[1]
    return replace(call, parts=runs_of(pattern_of(call.words), *lengths, in_order=call.dropout > 0), words="")


def with_parts(record: Any) -> Any:
    """A record about a call, `in_parts`."""
    return replace(record, call=in_parts(record.call)) if record.call.words else record


def widened(call: RunAttention) -> RunAttention:
    """The call with its rows in the dtype of the sums."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    if call.query.dtype is dtype:
        return call
    return replace(call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def of_rows(call: RunAttention, found: Mapping[str, Tensor | None]) -> Mapping[str, Tensor | None]:
    """Gradients by name, those of rows in their dtype: rows in half precision have them of float32 sums."""
    dtype = call.query.dtype
    if dtype is torch.promote_types(dtype, torch.float32):
        return found
    rows = ("query", "key", "value")
    return {name: x.to(dtype) if x is not None and name in rows else x for name, x in found.items()}


def with_single_parts(record: Any) -> Iterator[Any]:
    """A record about a call, once for each part of the call."""
    for call in single_parts(record.call):
        yield record if call is record.call else replace(record, call=call)


def single_parts(call: RunAttention) -> Iterator[RunAttention]:
    """The call for each of its parts, which a kernel takes one at a time."""
    if len(call.parts) == 1:
        yield call
    else:
        for part in call.parts:
            yield replace(call, parts=(part,))
