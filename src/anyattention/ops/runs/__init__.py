"""Attention over runs of neighbouring keys: what dense attention and sparse patterns come to on the tile kernels."""

from anyattention.ops.runs.operators import (
    RunAttention,
    RunAttentionBackward,
    at_edges,
    pairs_in_tiles,
    run_attention,
    run_call,
)
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
