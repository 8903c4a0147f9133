"""Top-k attention on the compiled kernels: one chooses the keys, those of graphs attend to them.

Axes: B batch, H heads, G key heads, L query_length, S key_length, D head_dim, C value_dim, k keys chosen.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from anyattention.ops.arguments import Arguments
from anyattention.ops.eager import are_plain
from anyattention.ops.graph import graph_attention, refusal_of_rows
from anyattention.ops.topk.call import TopKCall, at_keys
from anyattention.ops.topk.operators import chosen_keys, graph_of_rows
from anyattention.patterns import Pattern
from anyattention.scores import Dot

__all__ = ["refusal", "run"]


def refusal(call: TopKCall) -> str | None:
    """Why the kernels cannot run a call."""
    unable = refusal_of_rows(call.query, call.key, call.value, call.bias)
    if unable is not None:
        return unable
    if call.key.shape[1] == 0:
        return "there are no keys"
    if call.query.dtype == torch.float64:
        return "keys are chosen in float32, and the query is torch.float64"
    if call.softcap is not None and call.bias is not None:
        return "keys are chosen without softcap, and with a bias it changes their order"
    if call.selection.among is not None and not are_plain(()):
        return "a pattern is read in plain calls: neither compiled nor traced, and under no mode"
    if _intervals_of(call) is None:
        return f"a query of {call.selection.among} sees several runs of keys"
    return None


def run(call: TopKCall) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Output `(B, L, H, C)`, weights `(B, L, H, k)`, logsumexp `(B, L, H)` and indices `(B, L, H, k)`.

    Cost: O(B x H x L x S x D) time; memory O(B x H x L x k + B x G x S) above the results. float16 and bfloat16 are
    computed in float32.
    """
    query, key, value = (x.to(torch.float32) for x in (call.query, call.key, call.value))
    bias = None if call.bias is None else call.bias.to(torch.float32)
    batch, num_queries, heads, head_dim = query.shape
    num_keys, key_heads, value_dim = value.shape[1:]
    k = call.selection.k
    intervals = _intervals_of(call)
    assert intervals is not None
    begins, ends = intervals
    indices = chosen_keys(query, key, begins, ends, call.mask, bias, call.scale, k)
    places = indices.clamp(min=0)
    # Each query and head is a node of one head, and so is each key and head.
    first = torch.arange(batch, device=query.device)[:, None] * (num_keys * key_heads)
    first = first + torch.arange(heads, device=query.device) // (heads // key_heads)
    nodes = first[:, None, :, None] + places * key_heads
    result = graph_attention(
        Arguments(
            query=query.reshape(-1, 1, head_dim),
            key=key.reshape(-1, 1, head_dim),
            value=value.reshape(-1, 1, value_dim),
            pattern=graph_of_rows(nodes.flatten(0, 2), batch * num_keys * key_heads),
            score=Dot(),
            mask=(indices >= 0).flatten(),
            bias=None if bias is None else at_keys(bias, places.transpose(1, 2)).transpose(1, 2).flatten(),
            edges=None,
            scale=call.scale,
            softcap=call.softcap,
            dropout=call.dropout,
            aggregation="sum",
            normalize=True,
            weights="heads" if call.needs_weights else None,
            return_logsumexp=True,
            implementation="cpu",
        )
    )
    assert result.logsumexp is not None
    output = result.output.reshape(batch, num_queries, heads, value_dim).to(call.value.dtype)
    logsumexp = result.logsumexp.reshape(batch, num_queries, heads)
    if result.weights is None:
        return output, None, logsumexp, indices
    return output, result.weights.reshape(indices.shape).to(call.query.dtype), logsumexp, indices


def _intervals_of(call: TopKCall) -> tuple[Tensor | None, Tensor | None] | None:
    """The keys that each query sees, from a begin up to an end, all without a pattern; None for several runs."""
    among = call.selection.among
    return (None, None) if among is None else _intervals(among, call.query.shape[1], call.key.shape[1])


@lru_cache(maxsize=8)
def _intervals(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor] | None:
    # Neither inference mode, nor a transform, nor a default device may leave their mark on what later calls find here.
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), torch.device("cpu"):
        bounds = pattern.spans(num_queries, num_keys, device="cpu").bounds(num_queries)
        if bounds is None:
            return None
        return bounds[0].contiguous(), (bounds[1] + 1).contiguous()
