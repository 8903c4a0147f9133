"""The inputs of attention over graphs of several types, checked: features and edges by type, or a HeteroData."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anyattention._checks import Axes, Relation, require_dense, require_device, require_floating, require_tensor
from anyattention.config import HeterogeneousGraphAttentionConfig
from anyattention.errors import DimensionMismatchError, InvalidInputError
from anyattention.nn.base import require_parameter_kind
from anyattention.patterns import Graph, HeterogeneousGraph

__all__ = ["checked_edges", "checked_features", "checked_graph", "edges_of", "parts_of"]

_Parts = tuple[Any, Any, Any]


def parts_of(x: Any, graph: Any, edge_attr: Any) -> _Parts:
    """Features, graph and edge features: those of a HeteroData where x is one."""
    if not (hasattr(x, "node_types") and hasattr(x, "edge_types")):
        if graph is None:
            raise InvalidInputError(
                argument="graph", expected="a HeterogeneousGraph or an edge_index by relation", actual="None"
            )
        return x, graph, edge_attr
    data = x
    if graph is None:
        graph = HeterogeneousGraph.from_data(data)
    # PyTorch Geometric raises where no type has any.
    if edge_attr is None and any("edge_attr" in data[relation] for relation in data.edge_types):
        edge_attr = data.edge_attr_dict
    return {node_type: data[node_type].x for node_type in data.node_types if "x" in data[node_type]}, graph, edge_attr


def checked_features(x: Any, module: nn.Module, config: HeterogeneousGraphAttentionConfig) -> dict[str, Tensor]:
    """The features of each type, of the module's widths and node_type."""
    if not isinstance(x, Mapping):
        raise InvalidInputError(
            argument="x", expected="features by type of nodes, a dictionary, or a HeteroData", actual=type(x).__name__
        )
    widths = config.widths
    for node_type, features in x.items():
        name = f"x[{node_type!r}]"
        if node_type not in widths:
            raise InvalidInputError(
                argument="x", expected=f"types among {', '.join(map(repr, widths))}", actual=node_type
            )
        require_tensor(name, features)
        require_floating(name, features)
        if features.layout not in (torch.strided, torch.sparse_csr):
            raise InvalidInputError(
                argument=name, expected="a dense tensor or a sparse CSR matrix", actual=features.layout
            )
        axes = Axes()
        axes.set("features", widths[node_type], "the module")
        axes.bind(name, features, "nodes features")
        require_parameter_kind(name, features, module)
    return dict(x)


def checked_graph(graph: Any, x: Mapping[str, Tensor], config: HeterogeneousGraphAttentionConfig) -> HeterogeneousGraph:
    """The graph, of relations that the module knows, between as many nodes as have features."""
    counts = {node_type: features.shape[0] for node_type, features in x.items()}
    if not isinstance(graph, HeterogeneousGraph):
        if not isinstance(graph, Mapping):
            raise InvalidInputError(
                argument="graph",
                expected="a HeterogeneousGraph or an edge_index by relation",
                actual=type(graph).__name__,
            )
        _require_known(graph, counts, config)
        graph = HeterogeneousGraph.from_edge_index(graph, counts)
    _require_known(graph.edge_index, counts, config)
    for node_type in {end for source, _, target in graph.relations for end in (source, target)}:
        if graph.num_nodes[node_type] != counts[node_type]:
            raise DimensionMismatchError(
                argument="graph",
                expected=f"{counts[node_type]} nodes of type {node_type!r}, as x has",
                actual=f"{graph.num_nodes[node_type]} nodes",
            )
    for edges in graph.edge_index.values():
        require_device("graph", edges, next(iter(x.values())).device, "x")
    return graph


def _require_known(
    edges: Mapping[Any, Any], counts: Mapping[str, int], config: HeterogeneousGraphAttentionConfig
) -> None:
    for relation in edges:
        if relation not in config.relations:
            raise InvalidInputError(
                argument="graph",
                expected="relations among " + ", ".join(map(str, config.relations)),
                actual=str(relation),
            )
        for node_type in (relation[0], relation[2]):
            if node_type not in counts:
                raise InvalidInputError(
                    argument="x",
                    expected=f"features of type {node_type!r}, which {relation} joins",
                    actual="none",
                )


def checked_edges(
    edge_attr: Any, graph: HeterogeneousGraph, module: nn.Module, config: HeterogeneousGraphAttentionConfig
) -> dict[Relation, Tensor]:
    """The edge features of each relation that has an edge_dim."""
    given = {} if edge_attr is None else edge_attr
    if not isinstance(given, Mapping):
        raise InvalidInputError(argument="edge_attr", expected="a dictionary by relation", actual=type(given).__name__)
    found = {}
    widths = dict(zip(config.relations, config.edge_widths, strict=True))
    for relation in given:
        if relation not in graph.edge_index or widths[relation] is None:
            raise InvalidInputError(
                argument="edge_attr",
                expected="relations of the graph that have an edge_dim: "
                + (", ".join(str(each) for each in graph.relations if widths[each] is not None) or "none"),
                actual=str(relation),
            )
    for relation, edges in graph.edge_index.items():
        width, name = widths[relation], f"edge_attr[{relation}]"
        if width is None:
            continue
        if relation not in given:
            raise InvalidInputError(argument=name, expected=f"(edges, edge_dim={width})", actual="None")
        features = given[relation]
        if width == 1 and isinstance(features, Tensor) and features.ndim == 1:
            features = features.unsqueeze(-1)
        require_floating(name, features)
        require_dense(name, features)
        axes = Axes()
        axes.set("edges", edges.shape[1], "the graph")
        axes.set("edge_dim", width, "the module")
        axes.bind(name, features, "edges edge_dim")
        require_parameter_kind(name, features, module)
        found[relation] = features
    return found


def edges_of(adjacency: Mapping[Relation, Any], x: Mapping[str, Tensor]) -> dict[Relation, Tensor]:
    """The edges of an adjacency matrix of each relation, of as many rows and columns as there are nodes."""
    for name, given in (("node_features", x), ("adjacency", adjacency)):
        if not isinstance(given, Mapping):
            raise InvalidInputError(argument=name, expected="a dictionary", actual=type(given).__name__)
    found = {}
    for relation, matrix in adjacency.items():
        graph = Graph.from_adjacency(matrix)
        found[relation] = graph.edge_index
        ends = [node_type for node_type in (relation[2], relation[0]) if node_type in x]
        sizes = [x[node_type].shape[0] for node_type in ends]
        if len(ends) == 2 and sizes != [graph.num_queries, graph.num_keys]:
            raise DimensionMismatchError(
                argument=f"adjacency[{relation}]",
                expected=f"{sizes[0]} rows and {sizes[1]} columns, the nodes of types {ends[0]!r} and {ends[1]!r}",
                actual=f"{graph.num_queries} rows and {graph.num_keys} columns",
            )
    return found
