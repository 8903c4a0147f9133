"""Attention over the edges of a graph."""

from anyattention.ops.graph.api import explain_graph, graph_attention

__all__ = ["explain_graph", "graph_attention"]
