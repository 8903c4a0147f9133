"""Top-k attention on the compiled kernels: one chooses the keys, those of graphs attend to them.

Axes: B batch, H heads, G key heads, L query_length, S key_length, D head_dim, C value_dim, k keys chosen.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from anyattention.ambient import Moment, moment_of, shielded
from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments
from anyattention.ops.graph import graph_attention
from anyattention.ops.normalizer import with_normalizer
from anyattention.ops.refusals import refusal_of_rows
from anyattention.ops.topk.chosen import at_keys
from anyattention.ops.topk.operators import TopkIndices, topk_indices
from anyattention.output import AttentionResult
from anyattention.patterns import Graph, Pattern, TopK

__all__ = ["refusal", "run"]


def refusal(call: Arguments) -> str | None:
    """Why the kernels cannot run a call."""
    unable = refusal_of_rows(call)
    if unable is not None:
        return unable
    if call.key.shape[1] == 0:
        return "there are no keys"
    if call.query.dtype == torch.float64:
        return "keys are chosen in float32, and the query is torch.float64"
    if call.softcap is not None and call.bias is not None:
        return "keys are chosen without softcap, and with a bias it changes their order"
    among = _selection(call).among
    if among is not None and moment_of(()) is not Moment.PLAIN:
        return "a pattern is read in plain calls: neither compiled nor traced, and under no mode"
    if _intervals_of(call) is None:
        return f"a query of {among} sees several runs of keys"
    return None


def run(call: Arguments) -> AttentionResult:
    """Output `(B, L, H, C)`, weights `(B, L, H, k)`, logsumexp `(B, L, H)` and indices `(B, L, H, k)`.

    Cost: O(B x H x L x S x D) time; memory O(B x H x L x k + B x G x S) above the results. float16 and bfloat16 are
    computed in float32.
    """
    query, key, value = (x.to(torch.float32) for x in (call.query, call.key, call.value))
    assert not isinstance(call.bias, RelativeBias)
    bias = None if call.bias is None else call.bias.to(torch.float32)
    batch, num_queries, heads, head_dim = query.shape
    num_keys, key_heads, value_dim = value.shape[1:]
    intervals = _intervals_of(call)
    assert intervals is not None
    indices = topk_indices(
        TopkIndices(
            query.detach(),
            key.detach(),
            *intervals,
            mask=call.mask,
            bias=None if bias is None else bias.detach(),
            scale=call.scaling.scale,
            k=_selection(call).k,
        )
    )
    places = indices.clamp(min=0)
    # Each query and head is a node of one head, and so is each key and head.
    first = torch.arange(batch, device=query.device)[:, None] * (num_keys * key_heads)
    first = first + torch.arange(heads, device=query.device) // (heads // key_heads)
    nodes = first[:, None, :, None] + places * key_heads
    found = graph_attention(
        call.changed(
            query=query.reshape(-1, 1, head_dim),
            key=key.reshape(-1, 1, head_dim),
            value=value.reshape(-1, 1, value_dim),
            pattern=Graph.from_rows(nodes.flatten(0, 2), batch * num_keys * key_heads),
            mask=(indices >= 0).flatten(),
            bias=None if bias is None else at_keys(bias, places.transpose(1, 2)).transpose(1, 2).flatten(),
            sinks=None,
            return_weights=False if call.weights is None else "heads",
            implementation="cpu",
        )
    )
    result = AttentionResult(
        found.output.reshape(batch, num_queries, heads, value_dim).to(call.results_dtype),
        None if found.weights is None else found.weights.reshape(indices.shape).to(call.results_dtype),
        indices=indices,
    )
    if found.normalizer is None:
        return result
    largest, log_sum = (x.reshape(batch, num_queries, heads) for x in found.normalizer)
    return with_normalizer(result, largest, log_sum)


def _selection(call: Arguments) -> TopK:
    assert isinstance(call.pattern, TopK)
    return call.pattern


def _intervals_of(call: Arguments) -> tuple[Tensor | None, Tensor | None] | None:
    """The keys that each query sees, from a begin up to an end, all without a pattern; None for several runs."""
    among = _selection(call).among
    return (None, None) if among is None else _intervals(among, call.query.shape[1], call.key.shape[1])


@lru_cache(maxsize=8)
def _intervals(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor] | None:
    with shielded():
        bounds = pattern.spans(num_queries, num_keys, device="cpu").bounds(num_queries)
        if bounds is None:
            return None
        return bounds[0].contiguous(), (bounds[1] + 1).contiguous()
