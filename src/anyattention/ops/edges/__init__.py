"""Primitives over the edges of a graph: products, weighted sums, softmax, totals, maximum."""

from anyattention.ops.edges.api import edge_dot, edge_softmax, edge_sum

__all__ = ["edge_dot", "edge_softmax", "edge_sum"]
