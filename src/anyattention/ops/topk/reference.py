"""Top-k attention in plain PyTorch, on any device: the scores of some keys at a time are in memory, never all.

Axes: B batch, H heads, G key heads, L query_length, S key_length, D head_dim, C value_dim, k keys chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.topk.chosen import at_keys
from anyattention.output import AttentionResult
from anyattention.patterns import TopK

__all__ = ["refusal", "run"]

_SCORES_AT_ONCE = 1 << 23


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
        indices = _chosen(call, query, key)
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
    logsumexp = torch.where(has_keys, scores, 0.0).logsumexp(-1)
    logsumexp = torch.where(has_keys.squeeze(-1), logsumexp, -torch.inf)
    return AttentionResult(
        output.transpose(1, 2).to(call.value.dtype),
        None if call.weights is None else weights.transpose(1, 2).to(call.query.dtype),
        logsumexp.transpose(1, 2) if call.return_logsumexp else None,
        indices.transpose(1, 2),
    )


def _chosen(call: Arguments, query: Tensor, key: Tensor) -> Tensor:
    """The keys `(B, H, L, k)` of the largest scores, the largest first; -1 for slots that are not used."""
    assert isinstance(call.pattern, TopK)
    batch, heads, num_queries, _ = query.shape
    num_keys, k, among = key.shape[2], call.pattern.k, call.pattern.among
    best = query.new_full((batch, heads, num_queries, k), -torch.inf)
    indices = torch.full(best.shape, -1, device=query.device)
    size = max(k, _SCORES_AT_ONCE // max(batch * heads * num_queries, 1))
    queries = torch.arange(num_queries, device=query.device)[:, None]
    for first in range(0, num_keys, size):
        end = min(first + size, num_keys)
        places = torch.arange(first, end, device=query.device)
        scores = call.scaling.of(query @ key[:, :, first:end].mT)
        if isinstance(call.bias, Tensor):
            scores = scores + _at_some(call.bias, first, end).to(scores.dtype)
        if call.mask is not None:
            scores = scores.masked_fill(~_at_some(call.mask, first, end), -torch.inf)
        if among is not None:
            allowed = among.allows(queries, places, num_queries, num_keys)
            scores = scores.masked_fill(~allowed, -torch.inf)
        best, order = torch.cat([best, scores], dim=-1).topk(k, dim=-1)
        indices = torch.cat([indices, places.expand(scores.shape)], dim=-1).gather(-1, order)
    return torch.where(best == -torch.inf, -1, indices)


def _at_some(pairs: Tensor, first: int, end: int) -> Tensor:
    """The numbers of pairs at some keys."""
    return pairs if pairs.shape[3] == 1 else pairs[..., first:end]


def _rows(rows: Tensor, places: Tensor) -> Tensor:
    """`(B, H, L, k, D)`: the rows `(B, H, S, D)` at the places `(B, H, L, k)`."""
    flat = places.flatten(2).unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1])
    return rows.gather(2, flat).unflatten(2, places.shape[2:])
