"""Attention of queries to memories that were chosen for them, with gradients to query, keys and values.

Axes: n queries, H heads, M memories, k memories of a query and head, U different ones among those, D key_dim,
C value_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anyattention.ambient import Moment, lasting, moment_of, without_autocast
from anyattention.errors import UnsupportedError
from anyattention.memory.measures import Measure, alike, centre_of, rows_of_keys, rows_of_queries
from anyattention.native import available, large_empty
from anyattention.ops.arguments import Arguments
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.graph import graph_attention
from anyattention.patterns import Graph

__all__ = ["ChosenMemories", "attend_to_chosen"]

_LARGEST_ERROR = 2**-10  # of a score


@dataclass(frozen=True, eq=False)
class ChosenMemories:
    """What `attend_to_chosen` takes.

    Attributes:
        query: `(n, H, D)`.
        keys: `(M, D)`, of the query's dtype.
        values: `(M, C)`, of the query's dtype.
        rows: int64 `(n, H, k)`, the memories of each query and head; -1 is none.
        measure: how alike a query and a key are.
        scale: the factor of the measure.
        dropout: the probability with which a weight is dropped.
        sparse_grad: whether keys, and whether values, get sparse gradients.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor
    measure: Measure
    scale: float
    dropout: float = 0.0
    sparse_grad: tuple[bool, bool] = (False, False)


def attend_to_chosen(call: ChosenMemories) -> tuple[Tensor, Tensor]:
    """The sum over heads and memories of weight times value, `(n, C)`, and the weights before dropout `(n, H, k)`.

    The weights are a softmax over the memories of a query and head. Without a memory they are 0, as the output is and
    all gradients are.

    Cost: O(n x H x k x (D + C)) time, and memory for the different ones among the chosen memories. Dense gradients of
    keys and values take the time of writing M rows of zeros. Under a compiler or a transform of torch.func, and where
    distances are tiny beside those of all chosen keys to their mean, the keys and values of each query are gathered:
    memory O(n x H x k x (D + C)).
    """
    is_plain = moment_of((call.query, call.keys, call.values, call.rows)) is Moment.PLAIN
    with without_autocast(call.query.device):
        return _over_edges(call) if is_plain and call.rows.numel() else _gathered(call)


def _over_edges(call: ChosenMemories) -> tuple[Tensor, Tensor]:
    """On the kernels of graphs: a key for each memory that anybody chose."""
    n, heads, k = call.rows.shape
    with lasting(call.rows):
        is_used = call.rows >= 0
        has_unused = not bool(is_used.all())
        chosen, places = (call.rows[is_used] if has_unused else call.rows).unique(return_inverse=True)
        slots = places.view(n * heads, k) if not has_unused else torch.full_like(call.rows, len(chosen))
        if has_unused:  # an unused slot has a key of its own, that nobody attends to
            slots[is_used] = places
            slots = slots.view(n * heads, k)
    pairs = zip((call.keys, call.values), call.sparse_grad, strict=True)
    taken, values = (_taken(x, chosen, sparse_grad) for x, sparse_grad in pairs)
    dtype = call.query.dtype
    if call.measure != "dot":  # lengths and their squares have too few digits in half precision
        dtype = torch.promote_types(dtype, torch.float32)
    query, keys = _comparable(call.query.to(dtype), taken.to(dtype), call.measure)
    if call.measure == "euclidean" and _cancels(query, keys, call.scale):
        rows = torch.where(is_used, slots.view(call.rows.shape), -1)
        return _gathered(replace(call, keys=taken, values=values, rows=rows))
    values = values.to(dtype)
    if has_unused:
        keys, values = (torch.cat([x, x.new_zeros(1, x.shape[1])]) for x in (keys, values))
    found = graph_attention(
        Arguments(
            query.reshape(n * heads, 1, query.shape[-1]),
            keys.unsqueeze(1),
            values.unsqueeze(1),
            Graph.from_rows(slots, len(keys)),
            mask=is_used.flatten() if has_unused else None,
            scale=call.scale,
            dropout=call.dropout,
            return_weights="heads",
        )
    )
    assert found.weights is not None
    output = found.output.view(n, heads, -1).sum(1).to(call.query.dtype)
    return output, found.weights.view(n, heads, k).to(call.query.dtype)


def _cancels(query: Tensor, keys: Tensor, scale: float) -> bool:
    """Whether rows of `_comparable` are so far from their centre that the squares have no digits for the distances."""
    with torch.no_grad():
        largest = max(float(keys[:, -1].max()), float(query[..., :-1].square().sum(-1).max()) / 4)
    return _LARGEST_ERROR < abs(scale) * largest * torch.finfo(keys.dtype).eps < torch.inf  # an infinity is to show


def _comparable(query: Tensor, keys: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """Queries and keys whose dot product is the measure, but for a number that all keys of a query share."""
    # Any would do, but far from the origin no digits would be left.
    centre = centre_of(keys) if measure == "euclidean" else None
    return rows_of_queries(query, measure, centre), rows_of_keys(keys, measure, centre)


def _gathered(call: ChosenMemories) -> tuple[Tensor, Tensor]:
    """In plain PyTorch, which compilers and transforms read: the key and value of each slot."""
    is_used = call.rows >= 0
    places = call.rows.clamp(min=0)
    # An unused slot may stand for a row that is not attended to, and 0 x NaN is NaN.
    taken = [x.index_select(0, places.flatten()).view(*places.shape, -1) for x in (call.keys, call.values)]
    keys, values = (torch.where(is_used.unsqueeze(-1), x, 0.0) for x in taken)
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    scores = alike(call.query.to(dtype), keys.to(dtype), call.measure) * call.scale
    scores = torch.where(is_used, scores, -torch.inf)
    has_any = is_used.any(-1, keepdim=True)
    weights = torch.where(is_used, torch.where(has_any, scores, 0.0).softmax(-1), 0.0)
    kept = weights
    if call.dropout > 0:
        seed = draw_seed(weights.device)
        kept = weights * keep_factors(tuple(weights.shape), call.dropout, seed, dtype)
    output = (kept.unsqueeze(-1) * values.to(dtype)).sum((-3, -2))
    return output.to(call.query.dtype), weights.to(call.query.dtype)


def _taken(x: Tensor, rows: Tensor, sparse_grad: bool) -> Tensor:
    """Some rows, all of them different and ascending."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.index_select(0, rows)
    return _Taken.apply(x, rows, sparse_grad)


class _Taken(torch.autograd.Function):
    """Rows of a matrix; the gradient is one of zeros but for these rows, or a sparse one of these rows alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, sparse_grad: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.sparse_grad = x.shape, sparse_grad
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rows,) = ctx.saved_tensors
        if ctx.sparse_grad:
            if torch.is_grad_enabled():
                raise UnsupportedError(
                    "sparse_grad=True: sparse gradients are not differentiated again; build the module without it",
                    argument="sparse_grad",
                )
            shape = tuple(ctx.shape)
            made = torch.sparse_coo_tensor(
                rows[None], grad, shape, device=grad.device, is_coalesced=True, check_invariants=False
            )
            return made, None, None
        if torch.is_grad_enabled() or moment_of((grad,)) is not Moment.PLAIN:
            return grad.new_zeros(ctx.shape).index_copy(0, rows, grad), None, None
        whole = large_empty(grad, ctx.shape) if grad.is_cpu and available() else grad.new_empty(ctx.shape)
        return whole.zero_().index_copy_(0, rows, grad), None, None
