"""Attention over a sparse pattern: checks the arguments and hands the pattern's pairs to the graph kernels as edges."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from anyattention._checks import Axes, require_device, require_mask, require_same_kind, to_four_axes
from anyattention._dispatch import Explanation
from anyattention.ops.arguments import Arguments, read_bias, refuse_graph_settings
from anyattention.ops.graph import explain_graph, graph_attention
from anyattention.output import AttentionResult
from anyattention.patterns import Graph, Pattern

__all__ = ["explain_sparse", "sparse_attention"]


def sparse_attention(arguments: Arguments) -> AttentionResult:
    """`attend` for sparse patterns; see there."""
    return graph_attention(_with_edges(arguments))


def explain_sparse(arguments: Arguments) -> Explanation:
    """`explain` for sparse patterns."""
    over_edges = _with_edges(arguments)
    graph = over_edges.pattern
    assert isinstance(graph, Graph)
    note = f"{arguments.pattern} as a Graph of {graph.num_edges:,} edges"
    explanation = explain_graph(over_edges)
    return replace(explanation, notes=(*explanation.notes, note))


def _with_edges(arguments: Arguments) -> Arguments:
    """The same call over the pattern's Graph; a mask or a bias of pairs is read at the edges."""
    query, key, value = arguments.query, arguments.key, arguments.value
    axes = Axes()
    axes.bind("query", query, "batch query_length heads head_dim")
    axes.bind_keys("key", key, "batch key_length key_heads head_dim")
    axes.bind("value", value, "batch key_length key_heads value_dim")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_same_kind(name, tensor, "query", query)
    sizes = [axes.sizes[axis] for axis in ("batch", "heads", "query_length", "key_length")]
    refuse_graph_settings(arguments)
    graph = _graph_of(arguments.pattern, sizes[2], sizes[3], query.device)
    mask, bias = arguments.mask, arguments.bias
    if mask is not None:
        require_mask("mask", mask)
        require_device("mask", mask, query.device, "query")
        mask = _at_edges(to_four_axes("mask", mask, *sizes), graph, *sizes[:2])
    if bias is not None:
        bias = _at_edges(to_four_axes("bias", read_bias(bias, query), *sizes), graph, *sizes[:2])
    return replace(arguments, pattern=graph, mask=mask, bias=bias)


@lru_cache(maxsize=4)
def _graph_of(pattern: Pattern, num_queries: int, num_keys: int, device: torch.device) -> Graph:
    """The pattern's Graph; the last few are kept, since the layers of a model share one."""
    # A tensor made in inference mode could not serve a later call that is differentiated.
    with torch.inference_mode(False):
        return pattern.to_graph(num_queries, num_keys, device=device)


def _at_edges(pairs: Tensor, graph: Graph, batch: int, heads: int) -> Tensor:
    """`(B | 1, H | 1, L | 1, S | 1)` at the edges: `(E,)`, `(E, H)` or `(B, E, H)`."""
    query = graph.query_index if pairs.shape[2] > 1 else 0
    key = graph.key_index if pairs.shape[3] > 1 else 0
    edges = pairs[:, :, query, key]
    if edges.ndim == 2:
        edges = edges.unsqueeze(-1).expand(-1, -1, graph.num_edges)
    edges = edges.transpose(1, 2)
    if batch > 1 and edges.shape[0] == batch:
        return edges.expand(-1, -1, heads)
    return edges[0].squeeze(-1) if edges.shape[2] == 1 else edges[0]
