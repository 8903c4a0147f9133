"""Top-k attention: checks the arguments and chooses the implementation."""

from anyattention import _dispatch
from anyattention._checks import Axes, require_same_kind
from anyattention._dispatch import Explanation, Implementation
from anyattention.errors import UnsupportedError
from anyattention.ops.arguments import Arguments, default_scale, read_pairs, refuse_graph_settings
from anyattention.ops.topk import cpu, reference
from anyattention.ops.topk.call import TopKCall
from anyattention.output import AttentionResult
from anyattention.patterns import TopK
from anyattention.scores import Dot

__all__ = ["explain_topk", "topk_attention"]

_TABLE = (
    Implementation("cpu", cpu.run, cpu.refusal),
    Implementation("reference", reference.run, reference.refusal),
)


def topk_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for a selection; see there."""
    call = _check(arguments)
    output, weights, logsumexp, indices = _dispatch.choose(_TABLE, call, arguments.implementation).run(call)
    return AttentionResult(
        output,
        weights if arguments.weights is not None else None,
        logsumexp if arguments.return_logsumexp else None,
        indices,
    )


def explain_topk(arguments: Arguments) -> Explanation:
    """`explain` for a selection."""
    return _dispatch.explain(_TABLE, _check(arguments), arguments.implementation)


def _check(arguments: Arguments) -> TopKCall:
    selection, query = arguments.pattern, arguments.query
    assert isinstance(selection, TopK)
    axes = Axes()
    axes.bind("query", query, "batch query_length heads head_dim")
    axes.bind_keys("key", arguments.key, "batch key_length key_heads head_dim")
    axes.bind("value", arguments.value, "batch key_length key_heads value_dim")
    for name, tensor in (("query", query), ("key", arguments.key), ("value", arguments.value)):
        require_same_kind(name, tensor, "query", query)
    if not isinstance(arguments.score, Dot):
        raise UnsupportedError(f"score={type(arguments.score).__name__}: TopK chooses by Dot()", argument="score")
    refuse_graph_settings(arguments)
    sizes = [axes.sizes[axis] for axis in ("batch", "heads", "query_length", "key_length")]
    mask, bias = read_pairs(arguments, sizes)
    return TopKCall(
        query=query,
        key=arguments.key,
        value=arguments.value,
        selection=selection,
        mask=mask,
        bias=bias,
        scale=default_scale(arguments, axes.sizes["head_dim"]),
        softcap=arguments.softcap,
        dropout=arguments.dropout,
        needs_weights=arguments.weights is not None,
    )
