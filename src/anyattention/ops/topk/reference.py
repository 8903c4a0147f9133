"""Top-k attention in plain PyTorch, on any device: the scores of some keys at a time are in memory, never all.

Axes: B batch, H heads, G key heads, L query_length, S key_length, D head_dim, C value_dim, k keys chosen.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ambient import is_exported_to_onnx, is_plainly_readable
from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.normalizer import normalizer_of, with_normalizer
from anyattention.ops.topk.chosen import at_keys
from anyattention.output import AttentionResult
from anyattention.patterns import TopK

__all__ = ["chosen", "refusal", "run"]

_SCORES_AT_ONCE = 1 << 23
_TILE = 16


def refusal(call: Arguments) -> str | None:
    """None: the reference computes every call."""
    return None


def run(call: Arguments) -> AttentionResult:
    """Output `(B, L, H, C)`, weights `(B, L, H, k)`, logsumexp `(B, L, H)` and indices `(B, L, H, k)`.

    Cost: O(B x H x L x S x D) time; memory O(B x H x L x k x (D + C)), and some 32 MB of scores at once.
    """
    assert not isinstance(call.bias, RelativeBias)
    dtype = call.sums_dtype
    group = call.query.shape[2] // max(call.key.shape[2], 1)
    query = call.query.transpose(1, 2).to(dtype)
    key, value = (x.transpose(1, 2).to(dtype).repeat_interleave(group, dim=1) for x in (call.key, call.value))
    with torch.no_grad():
        indices = chosen(call, query, key)
    is_used = indices >= 0
    places = indices.clamp(min=0)
    if key.shape[2] == 0:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    # An unused slot holds a row that is not attended to, and 0 x NaN is NaN.
    keys, values = (torch.where(is_used.unsqueeze(-1), _rows(x, places), 0.0) for x in (key, value))
    # So does a gradient of 0 through the cap.
    scores = call.scaling.of(torch.where(is_used, (query.unsqueeze(-2) * keys).sum(-1), 0.0))
    if call.bias is not None:
        scores = scores + at_keys(call.bias, places).to(dtype)
    scores = torch.where(is_used, scores, -torch.inf)
    has_keys = is_used.any(-1, keepdim=True)
    weights = torch.where(is_used, torch.where(has_keys, scores, 0.0).softmax(-1), 0.0)
    kept = weights
    if call.dropout > 0:
        batch, heads, num_queries, k = weights.shape
        seed = draw_seed(weights.device)
        kept = weights * keep_factors((batch, num_queries, heads, k), call.dropout, seed, dtype).transpose(1, 2)
    output = (kept.unsqueeze(-1) * values).sum(-2)
    result = AttentionResult(
        output.transpose(1, 2).to(call.results_dtype),
        None if call.weights is None else weights.transpose(1, 2).to(call.results_dtype),
        indices=indices.transpose(1, 2),
    )
    if not call.return_logsumexp:
        return result
    largest, log_sum = normalizer_of(scores)
    return with_normalizer(result, largest.transpose(1, 2), log_sum.transpose(1, 2))


def chosen(call: Arguments, query: Tensor, key: Tensor) -> Tensor:
    """The keys `(B, H, L, k)` that `TopK` ranks first, the first one first; -1 for slots that are not used."""
    assert isinstance(call.pattern, TopK)
    batch, heads, num_queries, head_dim = query.shape
    num_keys, k, among = key.shape[2], call.pattern.k, call.pattern.among
    uncapped, has_bias = replace(call.scaling, softcap=0.0), isinstance(call.bias, Tensor)
    # The first of these decides, and the second where scores are equal.
    best = [query.new_full((batch, heads, num_queries, k), -torch.inf)] * (2 if has_bias and call.softcap else 1)
    indices = torch.full(best[0].shape, -1, dtype=torch.int64, device=query.device)
    numbers = batch * heads * num_queries * (head_dim if query.dtype == torch.float64 else 1)
    size = max(k, _SCORES_AT_ONCE // max(numbers, 1))
    # The keys of an exported call may be any number, and so would be the chunks.
    is_whole = is_exported_to_onnx()
    queries = torch.arange(num_queries, device=query.device)[:, None]
    for first in (0,) if is_whole else range(0, num_keys, size):
        end = num_keys if is_whole else min(first + size, num_keys)
        places = torch.arange(first, end, device=query.device)
        ranks = [uncapped.of(_products(query, key[:, :, first:end]))]
        if isinstance(call.bias, Tensor):
            bias = _at_some(call.bias, first, end).to(query.dtype)
            ranks = [call.scaling.of_scaled(ranks[0]) + bias, ranks[0]][: len(best)]
        if call.mask is not None:
            hidden = ~_at_some(call.mask, first, end)
            ranks = [scores.masked_fill(hidden, -torch.inf) for scores in ranks]
        if among is not None:
            hidden = ~among.allows(queries, places, num_queries, num_keys)
            ranks = [scores.masked_fill(hidden, -torch.inf) for scores in ranks]
        found = torch.cat([indices, places.expand(ranks[0].shape)], dim=-1)
        ranks = [torch.cat(pair, dim=-1) for pair in zip(best, ranks, strict=True)]
        order = _largest_first(ranks, k)
        best, indices = [scores.gather(-1, order) for scores in ranks], found.gather(-1, order)
    return torch.where(best[0] == -torch.inf, -1, indices)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """`query . key` of every pair, `(B, H, L, S)`, with the same bits for equal keys.

    Libraries do not promise this of a matrix product: the last columns, which fill no tile, may be summed in another
    order. float32 has whole tiles here, which float64 does not help.
    """
    num_keys = key.shape[2]
    if query.dtype == torch.float64:
        return (query.unsqueeze(-2) * key.unsqueeze(-3)).sum(-1)
    return (query @ F.pad(key, (0, 0, 0, -num_keys % _TILE)).mT)[..., :num_keys]


def _largest_first(ranks: list[Tensor], k: int) -> Tensor:
    """Where the k largest lie along the last axis: by the first numbers, where these are equal by the next, and then
    as they lie.
    """
    *others, last = ranks
    if not others:
        return _k_largest_first(last, k)
    order = torch.sort(last, dim=-1, descending=True, stable=True).indices
    for numbers in reversed(others):
        step = torch.sort(numbers.gather(-1, order), dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, step)
    return order[..., :k]


def _k_largest_first(numbers: Tensor, k: int) -> Tensor:
    """Where the k largest lie, the first ones of equal numbers first; there are more than k.

    `torch.topk` finds the numbers, but of those that equal the k-th it takes any: where more than k do, a second one
    finds the first of these. A stable sort of whole rows would take several times as long.
    """
    if is_exported_to_onnx():
        # ONNX's own takes the first ones, in order, and it has no stable sort.
        return numbers.topk(k, dim=-1).indices
    found = numbers.topk(k + 1, dim=-1)
    least, next_one = found.values[..., k - 1 : k], found.values[..., k:]
    places = found.indices[..., :k]
    if not is_plainly_readable(numbers) or bool(((least == next_one) & (least > -torch.inf)).any()):
        from_the_end = torch.arange(numbers.shape[-1], 0, -1, dtype=torch.int32, device=numbers.device)
        equals = torch.where(numbers == least, from_the_end, 0).topk(k, dim=-1).indices
        turn = torch.arange(k, device=numbers.device) - (found.values[..., :k] != least).sum(-1, keepdim=True)
        places = torch.where(turn < 0, places, equals.gather(-1, turn.clamp(min=0)))
    places = places.sort(dim=-1).values
    return places.gather(-1, torch.sort(numbers.gather(-1, places), dim=-1, descending=True, stable=True).indices)


def _at_some(pairs: Tensor, first: int, end: int) -> Tensor:
    """The numbers of pairs at some keys."""
    return pairs if pairs.shape[3] == 1 else pairs[..., first:end]


def _rows(rows: Tensor, places: Tensor) -> Tensor:
    """`(B, H, L, k, D)`: the rows `(B, H, S, D)` at the places `(B, H, L, k)`."""
    flat = places.flatten(2).unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1])
    return rows.gather(2, flat).unflatten(2, places.shape[2:])
