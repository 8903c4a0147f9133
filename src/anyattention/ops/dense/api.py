"""Dense attention: checks the arguments and chooses the implementation."""

from __future__ import annotations

from torch import Tensor

from anyattention._checks import Axes, require_same_kind
from anyattention.ops import dispatch
from anyattention.ops.arguments import Arguments, read_pairs, refuse_graph_settings
from anyattention.ops.dense import cpu, reference, torch_fused
from anyattention.ops.dispatch import Explanation, Implementation
from anyattention.output import AttentionResult
from anyattention.patterns import Causal, Full, Pattern

__all__ = ["dense_attention", "explain_dense"]

_TABLE = (
    Implementation("cpu", cpu.run, cpu.refusal),
    Implementation("torch", torch_fused.run, torch_fused.refusal),
    Implementation("reference", reference.run, reference.refusal),
)


def dense_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for patterns without edges; see there."""
    call = _check(arguments)
    return dispatch.choose(_TABLE, call, arguments.implementation).run(call)


def explain_dense(arguments: Arguments) -> Explanation:
    """`explain` for patterns without edges."""
    call = _check(arguments)
    explanation = dispatch.explain(_TABLE, call, arguments.implementation)
    if explanation.implementation != "torch":
        return explanation
    hides_pairs = isinstance(call.pattern, Causal) or call.mask is not None or isinstance(call.bias, Tensor)
    notes = (torch_fused.LEAK, torch_fused.ROUNDING) if hides_pairs else (torch_fused.ROUNDING,)
    return Explanation("torch", explanation.refusals, notes)


def _check(arguments: Arguments) -> Arguments:
    """The arguments over Full(), or Causal() where query i sees keys 0 to i; any other offset goes into the mask."""
    query, key, value = arguments.query, arguments.key, arguments.value
    axes = Axes()
    axes.bind("query", query, "batch query_length heads head_dim")
    axes.bind_keys("key", key, "batch key_length key_heads head_dim")
    axes.bind("value", value, "batch key_length key_heads value_dim")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_same_kind(name, tensor, "query", query)
    arguments.score.check(axes, query)
    refuse_graph_settings(arguments)
    sizes = [axes.sizes[axis] for axis in ("batch", "heads", "query_length", "key_length")]

    call = read_pairs(arguments, sizes)
    pattern, lengths = call.pattern, sizes[2:]
    assert isinstance(pattern, Pattern)
    if isinstance(pattern, Full) or (isinstance(pattern, Causal) and pattern.offset(*lengths) == 0):
        return call
    pairs = pattern.to_dense(*lengths, device=query.device)[None, None]
    return call.changed(pattern=Full(), mask=pairs if call.mask is None else pairs & call.mask)
