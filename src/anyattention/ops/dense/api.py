"""Dense attention: checks the arguments and chooses the implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattention._checks import Axes, require_same_kind
from anyattention.ambient import Moment, is_autocast_enabled, is_compiling, moment_of
from anyattention.ops import dispatch
from anyattention.ops.arguments import Arguments, read_pairs, refuse_graph_settings, require_sinks
from anyattention.ops.dense import cpu, reference, torch_fused
from anyattention.ops.dense.kept import KeptCall, decoding_key, key_of
from anyattention.ops.dispatch import Explanation, Implementation
from anyattention.output import AttentionResult
from anyattention.patterns import Causal, Full, Pattern

__all__ = ["decode", "dense_attention", "explain_dense"]

_TABLE = (
    Implementation("cpu", cpu.run, cpu.refusal),
    Implementation("torch", torch_fused.run, torch_fused.refusal),
    Implementation("reference", reference.run, reference.refusal),
)


_CPU = torch.device("cpu")
_MOST = 256
_kept: dict[tuple[Any, ...] | None, KeptCall] = {}


def dense_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for patterns without edges; see there."""
    key = None if is_compiling() else key_of(arguments)
    # Not asked for None: what torch.compile sees of a dict, the compiled code is bound to.
    found = None if key is None else _kept.get(key)
    if found is not None:
        return found.run(arguments)
    call = _check(arguments)
    chosen = dispatch.choose(_TABLE, call, arguments.implementation)
    if key is None or chosen.name != "cpu":
        return chosen.run(call)
    if len(_kept) >= _MOST:
        _kept.clear()
    found = _kept[key] = KeptCall(cpu.record_of(call), is_decoding=key[0])
    return found.run(arguments)


def decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor | None:
    """One query over all keys, where such a call of `attend` was kept; None elsewhere.

    It spares a layer that is called for each token the way through the arguments of `attend`.

    Args:
        query: `(batch, heads, 1, head_dim)`; key and value have heads before positions too.
        mask, scale, softcap: as in `attend`.

    Returns:
        The output of `attend`, `(batch, 1, heads, value_dim)`.
    """
    if moment_of((query, key, value, mask)) is not Moment.PLAIN or is_autocast_enabled(_CPU):
        return None
    found = _kept.get(decoding_key(query, key, value, mask, scale, softcap, place=2))
    if found is None:
        return None
    output = found.decode(query, key, value, mask, place=2)
    return output if output.dtype is query.dtype else output.to(query.dtype)


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
    """The arguments over Full(), or Causal() where every query sees a key; any other pattern goes into the mask."""
    query, key, value = arguments.query, arguments.key, arguments.value
    axes = Axes()
    axes.bind("query", query, "batch query_length heads head_dim")
    axes.bind_keys("key", key, "batch key_length key_heads head_dim")
    axes.bind("value", value, "batch key_length key_heads value_dim")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_same_kind(name, tensor, "query", query)
    arguments.score.check(axes, query)
    require_sinks(arguments, axes)
    refuse_graph_settings(arguments)
    sizes = [axes.sizes[axis] for axis in ("batch", "heads", "query_length", "key_length")]

    call = read_pairs(arguments, sizes)
    pattern, lengths = call.pattern, sizes[2:]
    assert isinstance(pattern, Pattern)
    if isinstance(pattern, Full) or (isinstance(pattern, Causal) and pattern.offset(*lengths) >= 0):
        return call
    pairs = pattern.to_dense(*lengths, device=query.device)[None, None]
    return call.changed(pattern=Full(), mask=pairs if call.mask is None else pairs & call.mask)
