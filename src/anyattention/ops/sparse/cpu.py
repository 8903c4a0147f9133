"""Sparse attention on the compiled tile kernels."""

import torch
from torch import Tensor

from anyattention.ops.graph import refusal_of_rows
from anyattention.ops.sparse.autograd import attention
from anyattention.ops.sparse.call import SparseCall
from anyattention.ops.sparse.kernels import pairs_in_tiles
from anyattention.ops.sparse.runs import runs_of
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
    lengths = query.shape[1], key.shape[1]
    parts = runs_of(call.pattern, *lengths)
    pairs, computed = sum(part.num_pairs for part in parts), sum(pairs_in_tiles(part, lengths[1]) for part in parts)
    if computed > _WORTH * pairs + (1 << 20):
        return f"the pairs are scattered: {pairs:,} in tiles of {computed:,}"
    return None


def run(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    """Output `(B, L, H, C)` and logsumexp `(B, L, H)`.

    Cost: O(pairs in tiles x H x (D + C)) time; memory O((L + S) x H x (D + C)). float16 and bfloat16 are computed in
    float32.
    """
    arguments = call.arguments
    query, key, value = (x.to(torch.float32) for x in (arguments.query, arguments.key, arguments.value))
    parts = runs_of(call.pattern, query.shape[1], key.shape[1])
    output, logsumexp = attention(query, key, value, parts, call.scale)
    return output.to(arguments.value.dtype), logsumexp if arguments.return_logsumexp else None
