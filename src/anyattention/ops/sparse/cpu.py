"""Sparse attention on the compiled tile kernels.

Axes: B batch, L query_length, S key_length, H heads, D head_dim, C value_dim, E pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.ops.graph import refusal_of_rows
from anyattention.ops.graph.composed import edge_scores
from anyattention.ops.graph.edge_operators import arrays_of, edge_softmax
from anyattention.ops.graph.kernels import Settings as GraphSettings
from anyattention.ops.random import draw_seed
from anyattention.ops.sparse.autograd import attention
from anyattention.ops.sparse.call import SparseCall, masked_bias
from anyattention.ops.sparse.kernels import Settings, pairs_in_tiles
from anyattention.ops.sparse.runs import runs_of
from anyattention.ops.sparse.traced import constant_when_traced
from anyattention.patterns import Pattern
from anyattention.scores import Dot, Score

__all__ = ["refusal", "refusal_of_tiles", "run"]

# Where tiles compute more pairs than this for each that is allowed, edges are faster.
_WORTH = 8


def refusal(call: SparseCall) -> str | None:
    """Why the kernels cannot run a call."""
    unable = refusal_of_tiles(call.query, call.key, call.value, call.score, call.bias)
    if unable is not None:
        return unable
    pairs, computed, in_order = _pairs(call.pattern, call.query.shape[1], call.key.shape[1])
    if call.dropout > 0 and not in_order:
        return "with dropout tiles take the positions in order, and the pattern has steps"
    if computed > _WORTH * pairs + (1 << 18):
        return f"the pairs are scattered: {pairs:,} in tiles of {computed:,}"
    return None


def refusal_of_tiles(
    query: Tensor, key: Tensor, value: Tensor, score: Score, bias: Tensor | RelativeBias | None
) -> str | None:
    """Why the tile kernels cannot take these, whatever the pairs."""
    numbers = bias.numbers if isinstance(bias, RelativeBias) else bias
    unable = refusal_of_rows(query, key, value, numbers)
    if unable is not None:
        return unable
    if not isinstance(score, Dot):
        return f"tiles are products, and the score is {type(score).__name__}"
    if isinstance(bias, Tensor) and bias.requires_grad and torch.is_grad_enabled():
        return "tiles have no gradient of a bias of pairs; RelativeBias has one"
    return None


@constant_when_traced
def _pairs(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[int, int, bool]:
    """How many pairs a pattern allows, how many its tiles compute, and whether these take the positions in order."""
    parts = runs_of(pattern, num_queries, num_keys)
    pairs, computed = sum(part.num_pairs for part in parts), sum(pairs_in_tiles(part, num_keys) for part in parts)
    return pairs, computed, not any(part.key_order.numel() for part in parts)


@constant_when_traced
def _run_arrays(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[Tensor, ...]:
    """The arrays of a pattern's parts, one part after the other."""
    return tuple(array for part in runs_of(pattern, num_queries, num_keys) for array in part)


def run(call: SparseCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output `(B, L, H, C)`, weights `(B, E, H)` and logsumexp `(B, L, H)`.

    Cost: O(pairs in tiles x H x (D + C)) time; memory O((L + S) x H x (D + C)), for the weights O(E x H). float16 and
    bfloat16 are computed in float32.
    """
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    parts = _run_arrays(call.pattern, query.shape[1], key.shape[1])
    bias = _by_distance(call.bias, query, key) if isinstance(call.bias, RelativeBias) else call.bias
    bias = None if bias is None else bias.to(dtype)
    seed = draw_seed(query.device) if call.dropout > 0 else None
    settings = Settings(call.scale, call.softcap or 0.0, call.dropout)
    output, logsumexp = attention(query, key, value, call.mask, bias, seed, parts, settings)
    weights = _weights(call, query, key, bias).to(call.query.dtype) if call.arguments.weights is not None else None
    return output.to(call.value.dtype), weights, logsumexp


def _by_distance(bias: RelativeBias, query: Tensor, key: Tensor) -> Tensor:
    """The bias `(H | 1, L + S - 1)` of query i and key j at i - j + S - 1."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    places = torch.arange(max(num_queries + num_keys - 1, 0), device=query.device)
    return bias.at(places, places.new_tensor(num_keys - 1), num_queries, num_keys)


def _weights(call: SparseCall, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """The weights, by the primitives of graphs: differentiable."""
    edges = call.graph()
    settings = GraphSettings("Dot", True, call.scale, call.softcap or 0.0, 0.0, 0.0)
    graph = arrays_of(edges)
    added = masked_bias(call.mask, bias, edges, query)
    return edge_softmax(edge_scores(query, key, None, None, added, graph, settings), graph)
