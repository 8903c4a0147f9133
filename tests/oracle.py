"""`attend` written out, one query after the other, for every pattern: what the tests compare with."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention import Additive, Dot, Graph, TopK


class Expected(NamedTuple):
    """What a call should give; weights are those of the pairs, `(batch, pairs, heads)`."""

    output: Tensor
    weights: Tensor
    logsumexp: Tensor


def pairs_of(pattern: Any, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """Query and key of each pair that there is: a Graph's in the caller's order, others by query, then key."""
    if isinstance(pattern, Graph):
        return pattern.query_index, pattern.key_index
    pattern = pattern.among if isinstance(pattern, TopK) else pattern
    allowed = torch.ones(num_queries, num_keys) if pattern is None else pattern.to_dense(num_queries, num_keys)
    query, key = allowed.nonzero().unbind(1)
    return query, key


def expected(arguments: Mapping[str, Any], kept: Tensor | float = 1.0) -> Expected:
    """What `attend(**arguments)` should give; `kept` are dropout's factors, `(batch, pairs, heads)`."""
    defaults = {"pattern": None, "score": Dot(), "mask": None, "bias": None, "edges": None, "scale": None}
    defaults |= {"softcap": None, "sinks": None, "aggregation": "sum", "normalize": True}
    call = SimpleNamespace(**{**defaults, **arguments})
    has_batch = call.query.ndim == 4
    query, key, value = (each if has_batch else each[None] for each in (call.query, call.key, call.value))
    if 0 < key.shape[2] < query.shape[2]:
        key, value = (each.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for each in (key, value))
    i, j = pairs_of(call.pattern, query.shape[1], key.shape[1])
    keys, values = key[:, j], value[:, j]
    if call.edges is not None and call.edges.key_weight is not None:
        keys = keys + torch.einsum("hcf,ef->ehc", call.edges.key_weight, call.edges.features)
    if call.edges is not None and call.edges.value_weight is not None:
        values = values + torch.einsum("hcf,ef->ehc", call.edges.value_weight, call.edges.features)
    scores = _scores(call, query[:, i], keys, i, j)
    outputs, logs, weights = (
        [value[:, :0].sum(1, keepdim=True)[:, :0]],
        [query[:, :0, :, :0].sum(-1)],
        torch.zeros_like(scores),
    )
    for row in range(query.shape[1]):
        own = (i == row).nonzero().flatten()
        shares, log = _shares(call, scores[:, own])
        factors = kept[:, own] if isinstance(kept, Tensor) else kept
        hidden = scores[:, own] == -math.inf
        outputs.append(_aggregate(call.aggregation, shares * factors, values[:, own], hidden)[:, None])
        logs.append(log[:, None])
        weights = weights.index_copy(1, own, shares)
    found = torch.cat(outputs, 1), weights, torch.cat(logs, 1)
    return Expected(*(each if has_batch else each[0] for each in found))


def _scores(call: SimpleNamespace, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The score of each pair, `(batch, pairs, heads)`; -inf where it is hidden."""
    scale = 1.0
    if isinstance(call.score, Dot):
        raw, scale = (query * key).sum(-1), max(query.shape[-1], 1) ** -0.5
    else:
        total = query + key
        rectified = torch.where(total > 0, total, call.score.negative_slope * total)
        raw = (rectified if isinstance(call.score, Additive) else call.score.vector * rectified).sum(-1)
    raw = raw * (scale if call.scale is None else call.scale)
    raw = raw if call.softcap is None else call.softcap * torch.tanh(raw / call.softcap)
    lengths = call.query.shape[-3], call.key.shape[-3]

    def at_pairs(table: Tensor) -> Tensor:
        """A mask or a bias as `(batch, pairs, heads)`."""
        if isinstance(call.pattern, Graph):
            return (table[:, None] if table.ndim == 1 else table).expand_as(raw)
        return table.expand(raw.shape[0], raw.shape[2], *lengths)[:, :, i, j].transpose(1, 2)

    if isinstance(call.bias, Tensor):
        raw = raw + at_pairs(call.bias)
    elif call.bias is not None:
        # The number of the distance from query to key; beyond the table's ends the one at that end.
        offset = lengths[1] - lengths[0] if call.bias.align == "bottom_right" else 0
        distance = (j - i - offset - call.bias.first).clamp(0, call.bias.numbers.shape[1] - 1)
        raw = raw + call.bias.numbers[:, distance].T
    return raw if call.mask is None else raw.masked_fill(~at_pairs(call.mask), -math.inf)


def _shares(call: SimpleNamespace, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of one query's pairs, and their logsumexp."""
    if isinstance(call.pattern, TopK):
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        scores = scores.masked_fill(rank >= call.pattern.k, -math.inf)
    hidden = scores == -math.inf
    logits = scores
    if call.sinks is not None:
        # One key more, of which only the part in the denominator stays.
        logits = torch.cat([scores, call.sinks.expand(scores.shape[0], 1, -1)], 1)
    is_empty = (logits == -math.inf).all(1, keepdim=True)
    shown = logits.masked_fill(is_empty, 0.0)
    log = shown.exp().sum(1).log().masked_fill(is_empty[:, 0], -math.inf)
    shares = shown.softmax(1)[:, : scores.shape[1]] if call.normalize else scores.sigmoid()
    return shares.masked_fill(hidden, 0.0), log


def _aggregate(aggregation: str, shares: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    messages = shares[..., None] * values
    if aggregation == "sum":
        return messages.sum(1)
    if aggregation == "mean":
        return messages.sum(1) / (~hidden).sum(1).clamp(min=1)[..., None]
    best, is_found = messages.new_zeros(messages[:, :0].sum(1).shape), hidden[:, :0].any(1)
    for pair in range(messages.shape[1]):
        better = ~hidden[:, pair, :, None] & (~is_found[..., None] | (messages[:, pair] > best))
        best, is_found = torch.where(better, messages[:, pair], best), is_found | ~hidden[:, pair]
    return best
