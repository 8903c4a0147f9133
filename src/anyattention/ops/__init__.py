"""Operations: tensors in, tensors out; one folder each, with its implementations side by side."""

from anyattention.ops.attend import attend, explain
from anyattention.ops.edges import edge_dot, edge_softmax, edge_sum
from anyattention.ops.merge import merge

__all__ = ["attend", "edge_dot", "edge_softmax", "edge_sum", "explain", "merge"]
