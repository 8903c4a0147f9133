"""Top-k attention: checks the arguments and chooses the implementation."""

from __future__ import annotations

from torch import Tensor

from anyattention._checks import Axes, require_same_kind
from anyattention.errors import UnsupportedError
from anyattention.ops import dispatch
from anyattention.ops.arguments import Arguments, of_pairs, read_pairs, refuse_graph_settings, require_sinks
from anyattention.ops.dispatch import Explanation, Implementation
from anyattention.ops.topk import cpu, reference
from anyattention.ops.topk.operators import TopkIndices, topk_indices
from anyattention.output import AttentionResult
from anyattention.patterns import TopK
from anyattention.scores import Dot

__all__ = ["explain_topk", "topk_attention", "topk_search"]

_TABLE = (
    Implementation("cpu", cpu.run, cpu.refusal),
    Implementation("reference", reference.run, reference.refusal),
)


def topk_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for a selection; see there."""
    call = _check(arguments)
    return dispatch.choose(_TABLE, call, arguments.implementation).run(call)


def explain_topk(arguments: Arguments) -> Explanation:
    """`explain` for a selection."""
    return dispatch.explain(_TABLE, _check(arguments), arguments.implementation)


def topk_search(query: Tensor, key: Tensor, k: int) -> Tensor:
    """The rows `(queries, k)` of the keys whose products with a query are the largest, -1 where there are fewer.

    The largest first, and the first key among equal ones; NaN above all. No gradient.

    Args:
        query: `(queries, width)`, float32.
        key: `(keys, width)`, float32; at least one.
        k: how many.

    Cost: O(queries x keys x width) time; the kernel reads the keys where they lie, and keeps k a query.
    """
    query, key = query.detach()[None, :, None], key.detach()[None, :, None]
    call = Arguments(query, key, key, TopK(k), score=Dot(), scale=1.0)  # a compiler reads no default
    if dispatch.choose(_TABLE, call, None).name == "cpu":
        found = topk_indices(TopkIndices(query, key, None, None, None, None, scale=1.0, k=k))
    else:
        found = reference.chosen(call, query.transpose(1, 2), key.transpose(1, 2)).transpose(1, 2)
    return found[0, :, 0]


def _check(arguments: Arguments) -> Arguments:
    query = arguments.query
    axes = Axes()
    axes.bind("query", query, "batch query_length heads head_dim")
    axes.bind_keys("key", arguments.key, "batch key_length key_heads head_dim")
    axes.bind("value", arguments.value, "batch key_length key_heads value_dim")
    for name, tensor in (("query", query), ("key", arguments.key), ("value", arguments.value)):
        require_same_kind(name, tensor, "query", query)
    if not arguments.score.is_product:
        raise UnsupportedError(f"score={type(arguments.score).__name__}: TopK chooses by Dot()", argument="score")
    require_sinks(arguments, axes)
    refuse_graph_settings(arguments)
    sizes = [axes.sizes[axis] for axis in ("batch", "heads", "query_length", "key_length")]
    return of_pairs(read_pairs(arguments, sizes))
