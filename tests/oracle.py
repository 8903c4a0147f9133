"""`attend` written out, one query after the other, for every pattern: what the tests compare with."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anyattention import Graph, TopK
from cases import Call


class Expected(NamedTuple):
    """What a call should give; weights are those of the pairs, `(batch, pairs, heads)`."""

    output: Tensor
    weights: Tensor
    logsumexp: Tensor


def pairs_of(call: Call) -> tuple[Tensor, Tensor]:
    """Query and key of each pair that the pattern has: a Graph's in the caller's order, others by query, then key."""
    pattern = call.pattern.among if isinstance(call.pattern, TopK) else call.pattern
    if isinstance(pattern, Graph):
        return pattern.edge_index[1], pattern.edge_index[0]
    lengths = call["query"].shape[-3], call["key"].shape[-3]
    allowed = torch.ones(lengths) if pattern is None else pattern.to_dense(*lengths)
    query, key = allowed.nonzero().unbind(1)
    return query, key


def expected(call: Call, kept: Tensor | float = 1.0) -> Expected:
    """Output, weights of the pairs and logsumexp; `kept` are dropout's factors, `(batch, pairs, heads)`."""
    has_batch = call["query"].ndim == 4
    query, key, value = (call[name] if has_batch else call[name][None] for name in ("query", "key", "value"))
    key, value = (each.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for each in (key, value))
    i, j = pairs_of(call)
    scores = _scores(call, query[:, i], _with_features(call, "key", key[:, j]))
    values = _with_features(call, "value", value[:, j])
    outputs, logs, weights = [], [], torch.zeros_like(scores)
    for row in range(query.shape[1]):
        own = (i == row).nonzero().flatten()
        shares, log = _shares(call, scores[:, own])
        factors = kept[:, own] if isinstance(kept, Tensor) else kept
        outputs.append(_aggregate(call, shares * factors, values[:, own], scores[:, own] == -math.inf))
        logs.append(log)
        weights = weights.index_copy(1, own, shares)
    output = torch.stack(outputs, 1) if outputs else value[:, :0]
    logsumexp = torch.stack(logs, 1) if logs else query[:, :0, :, 0]
    return Expected(*(each if has_batch else each[0] for each in (output, weights, logsumexp)))


def _scores(call: Call, query: Tensor, key: Tensor) -> Tensor:
    """The score of each pair, `(batch, pairs, heads)`; -inf where it is hidden."""
    if call.score == "dot":
        raw = (query * key).sum(-1)
    else:
        total = query + key
        vector = call["vector"] if call.score == "dynamic" else 1.0
        raw = (torch.where(total > 0, total, call.slope * total) * vector).sum(-1)
    scale, softcap = call.settings.get("scale"), call.settings.get("softcap")
    raw = raw * ((query.shape[-1] ** -0.5 if call.score == "dot" else 1.0) if scale is None else scale)
    raw = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    bias, mask = call.arguments().get("bias"), call.settings.get("mask")
    if isinstance(bias, Tensor):
        raw = raw + _at_pairs(call, bias, raw)
    elif bias is not None:
        # The number of the distance from query to key; beyond the table's ends that at the end.
        query_index, key_index = pairs_of(call)
        offset = call["key"].shape[1] - call["query"].shape[1] if bias.align == "bottom_right" else 0
        distance = key_index - query_index - offset - bias.first
        raw = raw + bias.numbers[:, distance.clamp(0, bias.numbers.shape[1] - 1)].T
    return raw if mask is None else raw.masked_fill(~_at_pairs(call, mask, raw), -math.inf)


def _at_pairs(call: Call, table: Tensor, like: Tensor) -> Tensor:
    """A mask or a bias as `(batch, pairs, heads)`."""
    if isinstance(call.pattern, Graph):
        return (table[:, None] if table.ndim == 1 else table).expand_as(like)
    shape = (like.shape[0], like.shape[2], call["query"].shape[1], call["key"].shape[1])
    query, key = pairs_of(call)
    return table.expand(shape)[:, :, query, key].transpose(1, 2)


def _with_features(call: Call, name: str, rows: Tensor) -> Tensor:
    weight = call.tensors.get(f"{name}_weight")
    return rows if weight is None else rows + torch.einsum("hcf,ef->ehc", weight, call["features"])


def _shares(call: Call, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of one query's pairs, and their logsumexp."""
    if isinstance(call.pattern, TopK):
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        scores = scores.masked_fill(rank >= call.pattern.k, -math.inf)
    hidden = scores == -math.inf
    is_empty = hidden.all(1, keepdim=True)
    log = scores.masked_fill(is_empty, 0.0).exp().sum(1).log().masked_fill(is_empty[:, 0], -math.inf)
    if call.settings.get("normalize", True):
        return scores.masked_fill(is_empty, 0.0).softmax(1).masked_fill(hidden, 0.0), log
    return scores.sigmoid().masked_fill(hidden, 0.0), log


def _aggregate(call: Call, shares: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    messages, aggregation = shares[..., None] * values, call.settings.get("aggregation", "sum")
    if aggregation != "max":
        total = messages.sum(1)
        return total if aggregation == "sum" else total / (~hidden).sum(1).clamp(min=1)[..., None]
    best, found = torch.zeros_like(values[:, :1]).sum(1), torch.zeros_like(hidden[:, :1]).any(1)
    for pair in range(messages.shape[1]):
        shown = ~hidden[:, pair]
        better = shown[..., None] & (~found[..., None] | (messages[:, pair] > best))
        best, found = torch.where(better, messages[:, pair], best), found | shown
    return best
