"""Attention over a sparse pattern of positions."""

from anyattention.ops.sparse.api import explain_sparse, sparse_attention
from anyattention.ops.sparse.autograd import attention as run_attention
from anyattention.ops.sparse.cpu import refusal_of_tiles
from anyattention.ops.sparse.kernels import Settings

__all__ = ["Settings", "explain_sparse", "refusal_of_tiles", "run_attention", "sparse_attention"]
