"""Dense attention in plain PyTorch: the definition, and the oracle of every other implementation.

Axes: B batch, H heads, L query_length, S key_length, D head_dim, E value_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import require_memory
from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments, of_pairs
from anyattention.ops.dense.heads import with_all_heads
from anyattention.ops.dense.pairs import allowed_pairs
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.normalizer import normalizer_of, with_normalizer
from anyattention.output import AttentionResult

__all__ = ["refusal", "run"]


def refusal(call: Arguments) -> str | None:
    """The reference runs every call."""
    return None


def run(call: Arguments) -> AttentionResult:
    """Output `(B, L, H, E)`, weights `(B, H, L, S)` or `(B, L, S)` and logsumexp `(B, L, H)`.

    Cost: B x H x L x S numbers, several times over; float16 and bfloat16 are computed in float32.
    """
    call, dtype = of_pairs(call), call.sums_dtype
    key, value = with_all_heads(call)
    query, key, value = (x.transpose(1, 2).to(dtype) for x in (call.query, key, value))
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
        weights = scores.softmax(-1)
    else:
        scores = _visible_scores(query, key, pairs, call)
        weights = torch.where(pairs, torch.where(pairs.any(-1, keepdim=True), scores, 0.0).softmax(-1), 0.0)
    kept = weights
    if call.dropout > 0:
        kept = weights * keep_factors(shape, call.dropout, draw_seed(query.device), dtype)
    output = kept @ value if pairs is None else _visible_sums(kept, value, pairs)
    output = output.transpose(1, 2).to(call.results_dtype)
    shown = None
    if call.weights is not None:
        shown = (weights.mean(1) if call.weights == "mean" else weights).to(call.results_dtype)
    result = AttentionResult(output, shown)
    if not call.return_logsumexp:
        return result
    largest, log_sum = normalizer_of(scores)
    return with_normalizer(result, largest.transpose(1, 2), log_sum.transpose(1, 2))


# 0 x NaN is NaN: a slot that is hidden from a query must not reach its sums, nor their gradients. So products take
# finite numbers in the place of others, and NaN is a factor, forward and backward, of just the pairs that use one.


def _visible_scores(query: Tensor, key: Tensor, pairs: Tensor, call: Arguments) -> Tensor:
    """The scores, -inf for hidden pairs; NaN for all visible ones of a query of which one is not finite."""
    raw = call.score.raw_of_pairs(_finite(query), _finite(key), call.scaling.scale)
    scores = _add_bias(call.scaling.of_scaled(raw), call)
    broken = _has_broken(query)[..., :, None] | _has_broken(key)[..., None, :] | ~(raw.isfinite() & scores.isfinite())
    is_broken = (broken & pairs).any(-1, keepdim=True)
    return torch.where(pairs, scores * _nan_where(is_broken & pairs, scores, 1.0), -torch.inf)


def _visible_sums(weights: Tensor, value: Tensor, pairs: Tensor) -> Tensor:
    """`weights @ value` of the visible pairs; NaN in a channel of which a query sees a number that is not finite."""
    is_broken = pairs.expand_as(weights).to(value.dtype) @ (~value.isfinite()).to(value.dtype) > 0
    # Apart from the product, since the gradient of a value has no value in it.
    sums = weights @ _finite(value) + weights.sum(-1, keepdim=True) * _nan_where(is_broken, weights, 0.0)
    # 0 already where nothing is visible; but a broken gradient of such a sum must not reach the values.
    return torch.where(pairs.any(-1, keepdim=True), sums, 0.0)


def _nan_where(broken: Tensor, like: Tensor, other: float) -> Tensor:
    """Factors of a tensor, of its dtype: NaN, or another number."""
    return like.new_full((), other).where(~broken, torch.nan)


def _has_broken(rows: Tensor) -> Tensor:
    """Which rows `(B, H, L)` have a NaN or Inf."""
    return ~rows.isfinite().all(-1)


def _finite(rows: Tensor) -> Tensor:
    """0 for NaN and Inf; where the gradient is NaN, theirs is, too."""
    return rows.nan_to_num(0.0, 0.0, 0.0)


def _add_bias(scores: Tensor, call: Arguments) -> Tensor:
    assert not isinstance(call.bias, RelativeBias)
    return scores if call.bias is None else scores + call.bias.to(scores.dtype)
