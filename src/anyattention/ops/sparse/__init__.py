"""Attention over a sparse pattern of positions."""

from anyattention.ops.sparse.api import explain_sparse, sparse_attention

__all__ = ["explain_sparse", "sparse_attention"]
