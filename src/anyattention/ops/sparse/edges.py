"""A sparse pattern's pairs as the edges of a Graph.

Axes: B batch, L query_length, S key_length, H heads, E pairs.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from anyattention.ambient import is_hollow, shielded
from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments
from anyattention.ops.runs.pairs import pairs_at_edges
from anyattention.ops.runs.traced import constant_when_traced, words_when_traced
from anyattention.patterns import Graph, Pattern
from anyattention.patterns.spelling import pattern_of

__all__ = ["graph_of", "over_edges"]

# The fields of a pattern's Graph that it has.
_ARRAYS = tuple([field.name for field in fields(Graph)][:7])


def graph_of(call: Arguments) -> Graph:
    """The pairs of a call's pattern."""
    assert isinstance(call.pattern, Pattern)
    query, lengths = call.query, (call.query.shape[1], call.key.shape[1])
    words = words_when_traced(call.pattern, *lengths)
    if words:
        return Graph(*_pattern_edges(words, *lengths, query.device))
    if is_dynamo_compiling() or not is_hollow(query):
        return Graph(*_graph_fields(call.pattern, *lengths, query.device))
    # Its device has no memory, or need not be there.
    found = _graph_fields(call.pattern, *lengths, torch.device("cpu"))
    moved: list[Any] = [None if x is None else x.to(query.device) for x in found]
    return Graph(*moved)


_library = torch.library.Library("anyattention", "FRAGMENT")
_library.define(
    "pattern_edges(str words, SymInt num_queries, SymInt num_keys, Device device)"
    f" -> ({', '.join(['Tensor'] * len(_ARRAYS))})"
)
_pattern_edges = torch.ops.anyattention.pattern_edges.default


def _made_edges(words: str, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, ...]:
    """The arrays of a Graph, of a pattern's words: of any number of edges, so that no trace knows the lengths."""
    found = _graph_fields(pattern_of(words), num_queries, num_keys, device)
    # What is kept is no compiler's to write to.
    return tuple([x.clone() for x in found[: len(_ARRAYS)] if x is not None])


def _fake_edges(words: str, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, ...]:
    num_edges = torch.library.get_ctx().new_dynamic_size()
    shapes = {"edge_index": (2, num_edges), "query_offsets": (num_queries + 1,), "key_offsets": (num_keys + 1,)}
    made = [shapes.get(name, (num_edges,)) for name in _ARRAYS]
    return tuple([torch.empty(shape, dtype=torch.int64, device=device) for shape in made])


_library.impl("pattern_edges", _made_edges, "CompositeExplicitAutograd")
torch.library.register_fake("anyattention::pattern_edges", _fake_edges, lib=_library)


@constant_when_traced
@lru_cache(maxsize=4)
def _graph_fields(pattern: Pattern, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """The fields of the pattern's Graph; the last few are kept, since the layers of a model share one."""
    with shielded():
        graph = pattern.to_graph(num_queries, num_keys, device=device)
    return tuple(getattr(graph, field.name) for field in fields(graph))


def over_edges(call: Arguments, implementation: str) -> Arguments:
    """The same call over the pattern's Graph; a mask or a bias of pairs is read at the edges."""
    graph, heads = graph_of(call), call.query.shape[2]
    mask = None if call.mask is None else pairs_at_edges(call.mask, graph)
    if isinstance(call.bias, RelativeBias):
        bias = call.bias.at(graph.query_index, graph.key_index, graph.num_queries, graph.num_keys).T[None]
    else:
        bias = None if call.bias is None else pairs_at_edges(call.bias, graph)
    mask, bias = (None if x is None else _as_the_graph_has_it(x, heads) for x in (mask, bias))
    return call.changed(pattern=graph, mask=mask, bias=bias, implementation=implementation)


def _as_the_graph_has_it(edges: Tensor, heads: int) -> Tensor:
    """`(B | 1, E, H | 1)` as `(E,)`, `(E, H)` or `(B, E, H)`."""
    if edges.shape[0] != 1:  # no batch entries, too
        return edges.expand(-1, -1, heads)
    return edges[0].squeeze(-1) if edges.shape[2] == 1 else edges[0]
