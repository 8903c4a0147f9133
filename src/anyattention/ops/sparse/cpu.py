"""Sparse attention on the compiled tile kernels."""

import torch
from torch import Tensor

from anyattention.ops.graph import refusal_of_rows
from anyattention.ops.sparse.autograd import attention
from anyattention.ops.sparse.call import SparseCall
from anyattention.ops.sparse.kernels import pairs_in_tiles
from anyattention.ops.sparse.runs import runs_of
from anyattention.ops.sparse.traced import constant_when_traced
from anyattention.patterns import Pattern
from anyattention.scores import Dot

__all__ = ["refusal", "run"]

# Where tiles hold more hidden pairs than this for each that is allowed, edges are faster.
_WORTH = 16


def refusal(call: SparseCall) -> str | None:
    """Why the kernels cannot run a call."""
    arguments = call.arguments
    query, key = arguments.query, arguments.key
    unable = refusal_of_rows(query, arguments.value)
    if unable is not None:
        return unable
    if not isinstance(arguments.score, Dot):
        return f"tiles are products, and the score is {type(arguments.score).__name__}"
    for name in ("mask", "bias", "softcap"):
        if getattr(arguments, name) is not None:
            return f"tiles have no {name}"
    if arguments.dropout > 0:
        return "tiles have no dropout"
    if arguments.weights is not None:
        return "tiles return no weights"
    if query.dtype == torch.float64:
        return "tiles are float32, and the query is torch.float64"
    pairs, computed = _pairs(call.pattern, query.shape[1], key.shape[1])
    if computed > _WORTH * pairs + (1 << 20):
        return f"the pairs are scattered: {pairs:,} in tiles of {computed:,}"
    return None


@constant_when_traced
def _pairs(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[int, int]:
    """How many pairs a pattern allows, and how many its tiles hold."""
    parts = runs_of(pattern, num_queries, num_keys)
    return sum(part.num_pairs for part in parts), sum(pairs_in_tiles(part, num_keys) for part in parts)


@constant_when_traced
def _run_arrays(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[Tensor, ...]:
    """The arrays of a pattern's parts, one part after the other."""
    return tuple(array for part in runs_of(pattern, num_queries, num_keys) for array in part)


def run(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    """Output `(B, L, H, C)` and logsumexp `(B, L, H)`.

    Cost: O(pairs in tiles x H x (D + C)) time; memory O((L + S) x H x (D + C)). float16 and bfloat16 are computed in
    float32.
    """
    arguments = call.arguments
    query, key, value = (x.to(torch.float32) for x in (arguments.query, arguments.key, arguments.value))
    arrays = _run_arrays(call.pattern, query.shape[1], key.shape[1])
    output, logsumexp = attention(query, key, value, arrays, call.scale)
    return output.to(arguments.value.dtype), logsumexp if arguments.return_logsumexp else None
