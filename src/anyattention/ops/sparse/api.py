"""Attention over a sparse pattern: checks the arguments and chooses the tile kernels, or the graph's over its pairs."""

from dataclasses import fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from anyattention import _dispatch
from anyattention._checks import Axes, require_device, require_mask, require_same_kind, to_four_axes
from anyattention._dispatch import Explanation, Implementation
from anyattention.errors import InvalidInputError
from anyattention.ops.arguments import Arguments, check_score, default_scale, read_bias, refuse_graph_settings
from anyattention.ops.graph import graph_attention, refusal_of_rows
from anyattention.ops.sparse import cpu
from anyattention.ops.sparse.call import SparseCall
from anyattention.ops.sparse.kernels import pairs_in_tiles
from anyattention.ops.sparse.runs import runs_of
from anyattention.ops.sparse.traced import constant_when_traced
from anyattention.output import AttentionResult
from anyattention.patterns import Graph, Pattern

__all__ = ["explain_sparse", "sparse_attention"]


_TABLE = (
    Implementation("cpu", cpu.run, cpu.refusal),
    Implementation(
        "graph",
        lambda call: _over_edges(call, "cpu"),
        lambda call: refusal_of_rows(call.arguments.query, call.arguments.value),
    ),
    Implementation("reference", lambda call: _over_edges(call, "reference"), lambda call: None),
)


def sparse_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for sparse patterns; see there."""
    call = _check(arguments)
    result = _dispatch.choose(_TABLE, call, arguments.implementation).run(call)
    return result if isinstance(result, AttentionResult) else AttentionResult(result[0], None, result[1])


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


def _over_edges(call: SparseCall, implementation: str) -> AttentionResult:
    return graph_attention(replace(_with_edges(call), implementation=implementation))


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
    sizes = [axes.sizes[axis] for axis in ("batch", "heads", "query_length", "key_length")]
    if arguments.mask is not None:
        require_mask("mask", arguments.mask)
        require_device("mask", arguments.mask, query.device, "query")
        to_four_axes("mask", arguments.mask, *sizes)
    if arguments.bias is not None:
        to_four_axes("bias", read_bias(arguments.bias, query), *sizes)
    refuse_graph_settings(arguments)
    return SparseCall(arguments, arguments.pattern, default_scale(arguments, axes.sizes["head_dim"]))


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


def _with_edges(call: SparseCall) -> Arguments:
    """The same call over the pattern's Graph; a mask or a bias of pairs is read at the edges."""
    arguments = call.arguments
    query, key, mask, bias = arguments.query, arguments.key, arguments.mask, arguments.bias
    sizes = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    graph = Graph(*_graph_fields(call.pattern, *sizes[2:], query.device))
    if mask is not None:
        mask = _at_edges(to_four_axes("mask", mask, *sizes), graph, *sizes[:2])
    if bias is not None:
        bias = _at_edges(to_four_axes("bias", read_bias(bias, query), *sizes), graph, *sizes[:2])
    return replace(arguments, pattern=graph, mask=mask, bias=bias)


@constant_when_traced
@lru_cache(maxsize=4)
def _graph_fields(pattern: Pattern, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """The fields of the pattern's Graph; the last few are kept, since the layers of a model share one."""
    # Neither inference mode nor a transform may leave its mark on what later calls find here.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        graph = pattern.to_graph(num_queries, num_keys, device=device)
    return tuple(getattr(graph, field.name) for field in fields(graph))


def _at_edges(pairs: Tensor, graph: Graph, batch: int, heads: int) -> Tensor:
    """`(B | 1, H | 1, L | 1, S | 1)` at the edges: `(E,)`, `(E, H)` or `(B, E, H)`."""
    query = graph.query_index if pairs.shape[2] > 1 else 0
    key = graph.key_index if pairs.shape[3] > 1 else 0
    edges = pairs[:, :, query, key]
    if edges.ndim == 2:
        edges = edges.unsqueeze(-1).expand(-1, -1, graph.num_edges)
    edges = edges.transpose(1, 2)
    if batch != 1 and edges.shape[0] == batch:
        return edges.expand(-1, -1, heads)
    return edges[0].squeeze(-1) if edges.shape[2] == 1 else edges[0]
