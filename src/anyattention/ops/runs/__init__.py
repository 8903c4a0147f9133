"""Attention over runs of neighbouring keys: what dense attention and sparse patterns come to on the tile kernels."""

from anyattention.ops.runs.call import RunAttention, RunAttentionBackward, run_call
from anyattention.ops.runs.composed import at_edges
from anyattention.ops.runs.operators import pairs_in_tiles, run_attention
from anyattention.ops.runs.parts import RunPart, runs_of
from anyattention.ops.runs.weights import run_weights

__all__ = [
    "RunAttention",
    "RunAttentionBackward",
    "RunPart",
    "at_edges",
    "pairs_in_tiles",
    "run_attention",
    "run_call",
    "run_weights",
    "runs_of",
]
