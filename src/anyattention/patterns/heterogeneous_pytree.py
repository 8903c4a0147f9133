"""HeterogeneousGraph for PyTorch's pytrees: its numbers of nodes and tensors, which are its leaves."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree

__all__ = ["register_with_pytree"]


def register_with_pytree(kind: type) -> None:
    """Have PyTorch take a HeterogeneousGraph, of class `kind`, apart into its numbers of nodes and its tensors."""
    _pytree.register_pytree_node(
        kind,
        _flatten,
        lambda children, context: _unflatten(kind, children, context),
        serialized_type_name="anyattention.HeterogeneousGraph",
        to_dumpable_context=list,
        from_dumpable_context=lambda context: (
            tuple(context[0]),
            tuple(map(tuple, context[1])),
            tuple(context[2]),
            context[3],
        ),
        flatten_with_keys_fn=_flatten_with_keys,
    )


def _flatten(graph: Any) -> tuple[list[Any], Any]:
    joined = tuple(graph._joined)
    queries = [] if graph.num_queries is graph.num_nodes else [*graph.num_queries.values()]
    tensors = [*graph.edge_index.values(), *(graph._joined[each] for each in joined)]
    children = [*graph.num_nodes.values(), *tensors, *queries]
    return children, (graph.node_types, graph.relations, joined, graph.num_queries is not graph.num_nodes)


def _flatten_with_keys(graph: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _flatten(graph)
    return [(_pytree.SequenceKey(place), child) for place, child in enumerate(children)], context


def _unflatten(kind: type, children: Any, context: Any) -> Any:
    node_types, relations, joined, has_queries = context
    rest = iter(children)
    counts = dict(zip(node_types, rest, strict=False))
    edges = dict(zip(relations, rest, strict=False))
    known = list(zip(joined, rest, strict=False))
    queries = dict(zip(node_types, rest, strict=True)) if has_queries else None
    graph = kind(counts, edges, queries)
    graph._joined.update(known)
    return graph
