"""Attention over a sparse pattern: checks the arguments and chooses the tile kernels, or the graph's over its pairs."""

from dataclasses import replace

import torch
from torch import Tensor

from anyattention import _dispatch
from anyattention._checks import Axes, require_same_kind
from anyattention._dispatch import Explanation, Implementation
from anyattention.bias import RelativeBias
from anyattention.errors import InvalidInputError
from anyattention.ops.arguments import (
    Arguments,
    check_score,
    default_scale,
    read_pairs,
    refuse_graph_settings,
    require_relative,
)
from anyattention.ops.graph import graph_attention, refusal_of_rows
from anyattention.ops.sparse import cpu
from anyattention.ops.sparse.call import SparseCall, bias_at_edges, pairs_at_edges
from anyattention.ops.sparse.kernels import pairs_in_tiles
from anyattention.ops.sparse.runs import runs_of
from anyattention.output import AttentionResult
from anyattention.patterns import Pattern

__all__ = ["explain_sparse", "sparse_attention"]

_TABLE = (
    Implementation("cpu", lambda call: _in_tiles(call), cpu.refusal),
    Implementation(
        "graph",
        lambda call: _over_edges(call, "cpu"),
        lambda call: refusal_of_rows(call.query, call.key, call.value),
    ),
    Implementation("reference", lambda call: _over_edges(call, "reference"), lambda call: None),
)


def sparse_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for sparse patterns; see there."""
    call = _check(arguments)
    return _dispatch.choose(_TABLE, call, arguments.implementation).run(call)


def explain_sparse(arguments: Arguments) -> Explanation:
    """`explain` for sparse patterns."""
    call = _check(arguments)
    explanation = _dispatch.explain(_TABLE, call, arguments.implementation)
    lengths = arguments.query.shape[1], arguments.key.shape[1]
    if explanation.implementation != "cpu":
        pairs = call.pattern.spans(*lengths).num_pairs
        return replace(explanation, notes=(f"{call.pattern} as a Graph of {pairs:,} edges",))
    notes = [f"{call.pattern}:"]
    for part in runs_of(call.pattern, *lengths):
        computed = pairs_in_tiles(part, lengths[1])
        order = "in order of their residue" if part.key_order.numel() else "in order"
        notes.append(
            f"  {part.begins.numel():,} runs of keys {order}, {part.num_pairs:,} pairs in tiles of {computed:,}"
        )
    return replace(explanation, notes=tuple(notes))


def _check(arguments: Arguments) -> SparseCall:
    assert isinstance(arguments.pattern, Pattern)
    _require_hashable(arguments.pattern)
    query, key, value = arguments.query, arguments.key, arguments.value
    axes = Axes()
    axes.bind("query", query, "batch query_length heads head_dim")
    axes.bind_keys("key", key, "batch key_length key_heads head_dim")
    axes.bind("value", value, "batch key_length key_heads value_dim")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_same_kind(name, tensor, "query", query)
    check_score(arguments.score, axes, query)
    refuse_graph_settings(arguments)
    sizes = [axes.sizes[axis] for axis in ("batch", "heads", "query_length", "key_length")]
    bias: Tensor | RelativeBias | None
    if isinstance(arguments.bias, RelativeBias):
        require_relative(arguments.bias, query, axes.sizes["heads"])
        mask, bias = read_pairs(replace(arguments, bias=None), sizes)[0], arguments.bias
    else:
        mask, bias = read_pairs(arguments, sizes)
    return SparseCall(
        arguments=arguments,
        query=query,
        key=key,
        value=value,
        pattern=arguments.pattern,
        score=arguments.score,
        mask=mask,
        bias=bias,
        scale=default_scale(arguments, axes.sizes["head_dim"]),
        softcap=arguments.softcap,
        dropout=arguments.dropout,
    )


def _require_hashable(pattern: Pattern) -> None:
    """Raise unless what the pattern comes to can be kept for the next call."""
    if torch.compiler.is_compiling():
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


def _in_tiles(call: SparseCall) -> AttentionResult:
    arguments = call.arguments
    output, weights, logsumexp = cpu.run(call)
    if weights is not None and arguments.weights == "mean":
        weights = weights.mean(-1)
    return AttentionResult(output, weights, logsumexp if arguments.return_logsumexp else None)


def _over_edges(call: SparseCall, implementation: str) -> AttentionResult:
    """The same call over the pattern's Graph; a mask or a bias of pairs is read at the edges."""
    graph = call.graph()
    mask = None if call.mask is None else pairs_at_edges(call.mask, graph)
    bias = bias_at_edges(call, graph)
    heads = call.query.shape[2]
    mask, bias = (None if x is None else _as_the_graph_has_it(x, heads) for x in (mask, bias))
    return graph_attention(replace(call.arguments, pattern=graph, mask=mask, bias=bias, implementation=implementation))


def _as_the_graph_has_it(edges: Tensor, heads: int) -> Tensor:
    """`(B | 1, E, H | 1)` as `(E,)`, `(E, H)` or `(B, E, H)`."""
    if edges.shape[0] > 1:
        return edges.expand(-1, -1, heads)
    return edges[0].squeeze(-1) if edges.shape[2] == 1 else edges[0]
