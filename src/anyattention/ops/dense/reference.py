"""Dense attention in plain PyTorch: the definition, and the oracle of every other implementation.

Axes: B batch, H heads, L query_length, S key_length, D head_dim, E value_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import require_memory
from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments
from anyattention.ops.dense.pairs import allowed_pairs
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.normalizer import normalizer_of, with_normalizer
from anyattention.output import AttentionResult

__all__ = ["refusal", "run"]


def refusal(call: Arguments) -> str | None:
    """The reference runs every call."""
    return None


def run(call: Arguments) -> AttentionResult:
    """Output `(B, L, H, E)`, weights `(B, H, L, S)` and logsumexp `(B, L, H)`.

    Cost: B x H x L x S numbers, several times over; float16 and bfloat16 are computed in float32.
    """
    dtype = call.sums_dtype
    query, key, value = (x.transpose(1, 2).to(dtype) for x in (call.query, call.key, call.value))
    batch, heads, query_length, _ = query.shape
    shape = (batch, heads, query_length, key.shape[2])
    require_memory(
        batch * heads * query_length * key.shape[2] * dtype.itemsize,
        "the matrix of scores (batch x heads x query_length x key_length)",
        query.device,
    )
    pairs = allowed_pairs(call)
    if pairs is None:
        raw = call.score.raw_of_pairs(query, key, call.scaling.scale)
        scores = _add_bias(call.scaling.of_shown(raw), call)
        has_pairs = broken_outputs = broken_scores = None
    else:
        # 0 x NaN is NaN: a slot that is hidden from a query must not reach its sums, nor their gradients, so
        # non-finite rows are taken out, and NaN is put back exactly where a pair uses them.
        query, broken_queries = _take_out_broken_rows(query)
        key, broken_keys = _take_out_broken_rows(key)
        broken_values = ~value.isfinite()
        value = value.masked_fill(broken_values, 0.0)
        broken_pairs = broken_queries[..., :, None] | broken_keys[..., None, :]
        raw = call.score.raw_of_pairs(query, key, call.scaling.scale)
        broken_pairs = broken_pairs | ~raw.isfinite()
        scores = call.scaling.of_scaled(raw).masked_fill(broken_pairs, torch.nan)
        scores = torch.where(pairs, _add_bias(scores, call), -torch.inf)
        broken_scores = (scores.isnan() | (scores == torch.inf)).any(-1, keepdim=True)
        # Only the channels of a value that are broken themselves.
        visible = pairs.expand(*pairs.shape[:2], *shape[2:]).to(dtype)
        broken_outputs = broken_scores | (visible @ broken_values.to(dtype) > 0)
        has_pairs = pairs.any(-1, keepdim=True)
        scores = torch.where(has_pairs & ~broken_scores, scores, 0.0)

    weights = scores.softmax(-1)
    if pairs is not None:
        weights = torch.where(pairs, weights, 0.0)
    kept = weights
    if call.dropout > 0:
        kept = weights * keep_factors(shape, call.dropout, draw_seed(query.device), dtype)
    output = kept @ value
    if has_pairs is not None and broken_outputs is not None:
        # 0 already; but 0 x NaN is NaN, and a broken gradient of an empty row must not reach the values.
        output = torch.where(has_pairs, output, 0.0)
        output = output.masked_fill(broken_outputs, torch.nan)
    if pairs is not None and broken_scores is not None and call.weights is not None:
        weights = weights.masked_fill(broken_scores & pairs, torch.nan)

    output = output.transpose(1, 2).to(call.value.dtype)
    result = AttentionResult(output, None if call.weights is None else weights.to(call.query.dtype))
    if not call.return_logsumexp:
        return result
    largest, log_sum = normalizer_of(scores)
    if has_pairs is not None and broken_scores is not None:
        largest = torch.where(has_pairs.squeeze(-1), largest, -torch.inf)
        log_sum = torch.where(has_pairs.squeeze(-1), log_sum, 0.0)
        log_sum = log_sum.masked_fill(broken_scores.squeeze(-1), torch.nan)
    return with_normalizer(result, largest.transpose(1, 2), log_sum.transpose(1, 2))


def _add_bias(scores: Tensor, call: Arguments) -> Tensor:
    assert not isinstance(call.bias, RelativeBias)
    return scores if call.bias is None else scores + call.bias.to(scores.dtype)


def _take_out_broken_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(B, H, L, D)` with every row that has a NaN or Inf set to 0, and which ones `(B, H, L)`."""
    broken = ~rows.isfinite().all(-1)
    return rows.masked_fill(broken[..., None], 0.0), broken
