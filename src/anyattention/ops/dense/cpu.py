"""Dense attention on the compiled tile kernels.

Axes: B batch, L query_length, S key_length, H heads, D head_dim, E value_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from anyattention._checks import require_memory
from anyattention.ambient import is_untraced, shielded
from anyattention.ops.arguments import Arguments
from anyattention.ops.normalizer import with_normalizer
from anyattention.ops.refusals import refusal_of_tiles
from anyattention.ops.runs import RunAttention, RunPart, run_attention, run_call, run_weights
from anyattention.output import AttentionResult
from anyattention.patterns import Causal

__all__ = ["record_of", "refusal", "run"]


def refusal(call: Arguments) -> str | None:
    """Why the kernels cannot run a call."""
    unable = refusal_of_tiles(call)
    if unable is not None:
        return unable
    if 0 in call.query.shape or call.key.shape[1] == 0:
        return "a size is 0"
    return None


def run(call: Arguments) -> AttentionResult:
    """Output `(B, L, H, E)`, weights `(B, H, L, S)` or `(B, L, S)` and logsumexp `(B, L, H)`.

    Cost: memory O(B x H x (L + S) x (D + E)) beside the weights, which take one product of three in a forward more.
    float16 and bfloat16 are summed in float32; see "bfloat16" in docs/dense.md.
    """
    lengths = call.query.shape[1], call.key.shape[1]
    if call.weights is not None:
        batch, heads = call.query.shape[0], call.query.shape[2] if call.weights == "heads" else 1
        size = batch * heads * lengths[0] * lengths[1] * call.sums_dtype.itemsize
        require_memory(size, "the matrix of weights", call.query.device)
    record = record_of(call)
    output, largest, log_sum = run_attention(record)
    weights = None
    if call.weights is not None:
        weights = run_weights(record, largest, log_sum, mean=call.weights == "mean").to(call.results_dtype)
    result = AttentionResult(output if output.dtype is call.results_dtype else output.to(call.results_dtype), weights)
    return with_normalizer(result, largest, log_sum) if call.return_logsumexp else result


def record_of(call: Arguments) -> RunAttention:
    """The record of a call, which has one run of keys for each query."""
    lengths = call.query.shape[1], call.key.shape[1]
    offset = call.pattern.offset(*lengths) if isinstance(call.pattern, Causal) else None
    is_kept = is_untraced(call.query)
    part = _kept_run_part(*lengths, offset) if is_kept else _run_part(call.query, *lengths, offset)
    return run_call(call, (part,), is_dense=True)


def _run_part(like: Tensor, num_queries: int, num_keys: int, offset: int | None) -> RunPart:
    """One run of keys for each query, as the kernels read it: query i sees those up to i + offset, or all.

    Tensors of the kind and the device of `like`.
    """
    empty, begins = like.new_empty(0, dtype=torch.int64), like.new_zeros(num_queries, dtype=torch.int64)
    ends = begins + num_keys if offset is None else ((begins + 1).cumsum(0) + offset).clamp(max=num_keys)
    offsets = like.new_ones(num_queries + 1, dtype=torch.int64).cumsum(0) - 1
    return RunPart(empty, empty, offsets, begins, ends)


@lru_cache(maxsize=8)
def _kept_run_part(num_queries: int, num_keys: int, offset: int | None) -> RunPart:
    with shielded():
        return _run_part(torch.empty(0, dtype=torch.float32, device="cpu"), num_queries, num_keys, offset)
