"""Attention over runs of neighbouring keys: what dense attention and sparse patterns come to on the tile kernels."""

from anyattention.ops.runs.operators import RunAttention, pairs_in_tiles, run_attention
from anyattention.ops.runs.parts import RunPart, runs_of

__all__ = ["RunAttention", "RunPart", "pairs_in_tiles", "run_attention", "runs_of"]
