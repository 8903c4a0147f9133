"""Dense attention: checks the arguments and chooses the implementation."""

from dataclasses import replace

from torch import Tensor

from anyattention import _dispatch
from anyattention._checks import (
    Axes,
    require_same_kind,
)
from anyattention._dispatch import Explanation, Implementation
from anyattention.ops.arguments import Arguments, check_score, default_scale, read_pairs, refuse_graph_settings
from anyattention.ops.dense import cpu, reference, torch_fused
from anyattention.ops.dense.call import DenseCall
from anyattention.ops.random import draw_seed
from anyattention.output import AttentionResult
from anyattention.patterns import Causal, Full, Pattern, TopK

__all__ = ["dense_attention", "explain_dense"]

_TABLE = (
    Implementation("cpu", cpu.run, cpu.refusal),
    Implementation("torch", torch_fused.run, torch_fused.refusal),
    Implementation("reference", reference.run, reference.refusal),
)


def dense_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for patterns without edges; see there."""
    call = _check(arguments)
    if call.dropout > 0:
        # Not in the checks: `explain` makes them too, and draws nothing.
        call = replace(call, seed=draw_seed(call.query.device))
    run = _dispatch.choose(_TABLE, call, arguments.implementation).run
    output, weights, logsumexp = run(call)
    if weights is not None and arguments.weights == "mean":
        weights = weights.mean(1)
    return AttentionResult(output, weights, logsumexp)


def explain_dense(arguments: Arguments) -> Explanation:
    """`explain` for patterns without edges."""
    call = _check(arguments)
    explanation = _dispatch.explain(_TABLE, call, arguments.implementation)
    hides_pairs = call.causal or call.allowed is not None
    if explanation.implementation != "torch" or not hides_pairs:
        return explanation
    return Explanation("torch", explanation.refusals, (torch_fused.NOTE,))


def _check(arguments: Arguments) -> DenseCall:
    query, key, value = arguments.query, arguments.key, arguments.value
    axes = Axes()
    axes.bind("query", query, "batch query_length heads head_dim")
    axes.bind("key", key, "batch key_length heads head_dim")
    axes.bind("value", value, "batch key_length heads value_dim")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_same_kind(name, tensor, "query", query)
    check_score(arguments.score, axes, query)
    refuse_graph_settings(arguments)
    sizes = [axes.sizes[axis] for axis in ("batch", "heads", "query_length", "key_length")]

    causal, allowed = _read_pattern(arguments.pattern, query, *sizes[2:])
    mask, bias = read_pairs(arguments, sizes)
    if mask is not None:
        allowed = mask if allowed is None else allowed & mask
    return DenseCall(
        query=query,
        key=key,
        value=value,
        score=arguments.score,
        allowed=allowed,
        causal=causal,
        bias=bias,
        scale=default_scale(arguments, axes.sizes["head_dim"]),
        softcap=arguments.softcap,
        dropout=arguments.dropout,
        seed=None,
        needs_weights=arguments.weights is not None,
        needs_logsumexp=arguments.return_logsumexp,
    )


def _read_pattern(
    pattern: Pattern | TopK, query: Tensor, query_length: int, key_length: int
) -> tuple[bool, Tensor | None]:
    assert isinstance(pattern, Pattern)
    if isinstance(pattern, Full):
        return False, None
    if isinstance(pattern, Causal) and pattern.offset(query_length, key_length) == 0:
        return True, None
    return False, pattern.to_dense(query_length, key_length, device=query.device)[None, None]
