"""The choice of keys by their scores, as an operator; it has no gradient.

Axes: B batch, L query_length, S key_length, H heads, G key heads, D head_dim, k keys chosen.
"""

from __future__ import annotations

import torch

from anyattention.native.topk import TopkIndices
from anyattention.ops.operator import Result, operator

__all__ = ["TopkIndices", "topk_indices"]

topk_indices = operator(TopkIndices, [Result("indices", "batch num_queries heads k", dtype=torch.int64)])

topk_indices.c_kernel()
