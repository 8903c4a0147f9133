"""Attention modules: projections, and one call of an operation each."""

from anyattention.nn.base import AttentionModule
from anyattention.nn.dense import MultiHeadAttention, ScaledDotProductAttention
from anyattention.nn.graph import GraphAttention

__all__ = [
    "AttentionModule",
    "GraphAttention",
    "MultiHeadAttention",
    "ScaledDotProductAttention",
]
