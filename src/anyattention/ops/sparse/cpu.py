"""Sparse attention on the compiled tile kernels.

Axes: B batch, L query_length, S key_length, H heads, D head_dim, C value_dim, E pairs.
"""

from __future__ import annotations

from torch import Tensor

from anyattention.ops.arguments import Arguments
from anyattention.ops.edges.operators import edge_softmax
from anyattention.ops.normalizer import with_normalizer
from anyattention.ops.refusals import refusal_of_tiles
from anyattention.ops.runs import RunAttention, RunPart, at_edges, pairs_in_tiles, run_attention, run_call, runs_of
from anyattention.ops.runs.traced import constant_when_traced, words_when_traced
from anyattention.ops.sparse.edges import graph_of
from anyattention.output import AttentionResult
from anyattention.patterns import Pattern

__all__ = ["refusal", "run"]

# Where tiles compute more pairs than this for each that is allowed, edges are faster.
_WORTH = 8
# At which length that is judged in a trace for any.
_USUAL = 2048


def refusal(call: Arguments) -> str | None:
    """Why the kernels cannot run a call."""
    unable = refusal_of_tiles(call)
    if unable is not None:
        return unable
    words, lengths = _words_and_lengths(call)
    pairs, computed, in_order = _pairs(call.pattern, *((_USUAL, _USUAL) if words else lengths))
    if call.dropout > 0 and not in_order:
        return "with dropout tiles take the positions in order, and the pattern has steps"
    if computed > _WORTH * pairs + (1 << 18):
        return f"the pairs are scattered: {pairs:,} in tiles of {computed:,}"
    return None


def _words_and_lengths(call: Arguments) -> tuple[str, tuple[int, int]]:
    """The pattern's words, where the lengths may be any, and these."""
    assert isinstance(call.pattern, Pattern)
    lengths = call.query.shape[1], call.key.shape[1]
    return words_when_traced(call.pattern, *lengths), lengths


@constant_when_traced
def _pairs(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[int, int, bool]:
    """How many pairs a pattern allows, how many its tiles compute, and whether these take the positions in order."""
    parts = runs_of(pattern, num_queries, num_keys)
    pairs, computed = sum(part.num_pairs for part in parts), sum(pairs_in_tiles(part, num_keys) for part in parts)
    return pairs, computed, not any(part.key_order.numel() for part in parts)


@constant_when_traced
def _run_arrays(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[Tensor, ...]:
    """The arrays of a pattern's parts, one part after the other."""
    return tuple(array for part in runs_of(pattern, num_queries, num_keys) for array in part.arrays)


def run(call: Arguments) -> AttentionResult:
    """Output `(B, L, H, C)`, weights `(B, E, H)` and logsumexp `(B, L, H)`.

    Cost: O(pairs in tiles x H x (D + C)) time; memory O((L + S) x H x (D + C)), for the weights O(E x H). float16 and
    bfloat16 are summed in float32.
    """
    words, lengths = _words_and_lengths(call)
    arrays = () if words else _run_arrays(call.pattern, *lengths)
    parts = tuple([RunPart(*arrays[first : first + 5]) for first in range(0, len(arrays), 5)])
    record = run_call(call, parts, is_dense=False, words=words)
    output, largest, log_sum = run_attention(record)
    weights = None if call.weights is None else _weights(call, record).to(call.results_dtype)
    result = AttentionResult(output.to(call.results_dtype), weights)
    return with_normalizer(result, largest, log_sum) if call.return_logsumexp else result


def _weights(call: Arguments, record: RunAttention) -> Tensor:
    """The weights, by the primitives of graphs: differentiable."""
    attention = at_edges(record, graph_of(call), None)
    return edge_softmax(attention.scores(), attention.graph)
