"""Attention over the edges of a graph."""

from anyattention.ops.graph.api import explain_graph, graph_attention
from anyattention.ops.graph.cpu import refusal_of_rows
from anyattention.ops.graph.primitives import edge_dot, edge_softmax, edge_sum

__all__ = ["edge_dot", "edge_softmax", "edge_sum", "explain_graph", "graph_attention", "refusal_of_rows"]
