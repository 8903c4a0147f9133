"""Attention over a sparse pattern: checks the arguments and chooses the tile kernels, or the graph's over its pairs."""

from __future__ import annotations

from dataclasses import replace

from anyattention._checks import Axes, require_same_kind
from anyattention.ambient import is_compiling, is_exported_to_onnx, shielded
from anyattention.errors import InvalidInputError
from anyattention.ops import dispatch
from anyattention.ops.arguments import Arguments, read_pairs, refuse_graph_settings, require_sinks
from anyattention.ops.dispatch import Explanation, Implementation
from anyattention.ops.graph import graph_attention
from anyattention.ops.refusals import refusal_of_rows
from anyattention.ops.runs import pairs_in_tiles, runs_of
from anyattention.ops.sparse import cpu
from anyattention.ops.sparse.edges import over_edges
from anyattention.ops.sparse.pairs import over_pairs
from anyattention.output import AttentionResult
from anyattention.patterns import Pattern

__all__ = ["explain_sparse", "sparse_attention"]


def _in_tiles(call: Arguments) -> AttentionResult:
    result = cpu.run(call)
    if result.weights is not None and call.weights == "mean":
        return result._replace(weights=result.weights.mean(-1))
    return result


def _plainly(call: Arguments) -> AttentionResult:
    return over_pairs(call) if is_exported_to_onnx() else graph_attention(over_edges(call, "reference"))


_TABLE = (
    Implementation("cpu", _in_tiles, cpu.refusal),
    Implementation("graph", lambda call: graph_attention(over_edges(call, "cpu")), refusal_of_rows),
    Implementation("reference", _plainly, lambda call: None),
)


def sparse_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for sparse patterns; see there."""
    call = _check(arguments)
    return dispatch.choose(_TABLE, call, arguments.implementation).run(call)


def explain_sparse(arguments: Arguments) -> Explanation:
    """`explain` for sparse patterns."""
    call = _check(arguments)
    assert isinstance(call.pattern, Pattern)
    explanation = dispatch.explain(_TABLE, call, arguments.implementation)
    lengths = int(arguments.query.shape[1]), int(arguments.key.shape[1])
    with shielded():
        notes = _notes(call.pattern, *lengths, in_tiles=explanation.implementation == "cpu")
    return replace(explanation, notes=tuple(notes))


def _notes(pattern: Pattern, num_queries: int, num_keys: int, *, in_tiles: bool) -> list[str]:
    """What a pattern comes to, in words."""
    if not in_tiles:
        pairs = pattern.spans(num_queries, num_keys).num_pairs
        return [f"{pattern} as a Graph of {pairs:,} edges"]
    notes = [f"{pattern}:"]
    for part in runs_of(pattern, num_queries, num_keys):
        computed = pairs_in_tiles(part, num_keys)
        order = "in order of their residue" if part.key_order.numel() else "in order"
        notes.append(
            f"  {part.begins.numel():,} runs of keys {order}, {part.num_pairs:,} pairs in tiles of {computed:,}"
        )
    return notes


def _check(arguments: Arguments) -> Arguments:
    assert isinstance(arguments.pattern, Pattern)
    _require_hashable(arguments.pattern)
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
    return read_pairs(arguments, sizes)


def _require_hashable(pattern: Pattern) -> None:
    """Raise unless what the pattern comes to can be kept for the next call."""
    if is_compiling():
        return
    try:
        hash(pattern)
    except TypeError as fault:
        raise InvalidInputError(
            argument="pattern",
            expected="a pattern that can be hashed",
            actual=f"{type(pattern).__name__} ({fault})",
            hint="make its class a @dataclass(frozen=True) of numbers, tuples and patterns",
        ) from fault
