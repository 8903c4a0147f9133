"""Attention over sequences: every pair, or all pairs that a mask or a regular pattern leaves."""

from anyattention.ops.dense.api import decode, dense_attention, explain_dense

__all__ = ["decode", "dense_attention", "explain_dense"]
