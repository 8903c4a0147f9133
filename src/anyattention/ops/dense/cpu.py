"""Dense attention on the compiled tile kernels.

Axes: B batch, L query_length, S key_length, H heads, D head_dim, E value_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from anyattention.ops.dense.call import DenseCall
from anyattention.ops.sparse import Settings, refusal_of_tiles, run_attention

__all__ = ["refusal", "run"]


def refusal(call: DenseCall) -> str | None:
    """Why the kernels cannot run a call."""
    unable = refusal_of_tiles(call.query, call.key, call.value, call.score, call.bias)
    if unable is not None:
        return unable
    if call.needs_weights:
        return "tiles never form the weights; once they are formed, the output is one product away"
    if 0 in (*call.query.shape, call.key.shape[1]):
        return "a size is 0"
    return None


def run(call: DenseCall) -> tuple[Tensor, None, Tensor | None]:
    """Output `(B, L, H, E)` and logsumexp `(B, L, H)`.

    Cost: memory O(B x H x (L + S) x (D + E)). float16 and bfloat16 are computed in float32.
    """
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    bias = None if call.bias is None else call.bias.to(dtype)
    lengths = call.query.shape[1], call.key.shape[1]
    runs = (_runs if torch.compiler.is_compiling() else _kept_runs)(*lengths, call.causal)
    settings = Settings(call.scale, call.softcap or 0.0, call.dropout, is_dense=True)
    output, logsumexp = run_attention(query, key, value, call.allowed, bias, call.seed, runs, settings)
    return output.to(call.value.dtype), None, logsumexp if call.needs_logsumexp else None


def _runs(num_queries: int, num_keys: int, causal: bool) -> tuple[Tensor, ...]:
    """One run of keys for each query, as the kernels read it."""
    empty, begins = torch.empty(0, dtype=torch.int64), torch.zeros(num_queries, dtype=torch.int64)
    ends = (begins + 1).cumsum(0).clamp(max=num_keys) if causal else begins + num_keys
    return empty, empty, torch.arange(num_queries + 1), begins, ends


@lru_cache(maxsize=8)
def _kept_runs(num_queries: int, num_keys: int, causal: bool) -> tuple[Tensor, ...]:
    # Neither inference mode, nor a transform, nor a default device may leave their mark on what later calls find here.
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), torch.device("cpu"):
        return _runs(num_queries, num_keys, causal)
