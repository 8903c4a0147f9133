"""Attention modules: projections, and one call of an operation each."""

from anyattention.nn.base import AttentionModule
from anyattention.nn.dense import MultiHeadAttention, ScaledDotProductAttention
from anyattention.nn.distance import DistanceAttention
from anyattention.nn.equivariant import EquivariantAttention
from anyattention.nn.graph import GraphAttention
from anyattention.nn.graph_transformer import GraphTransformerLayer
from anyattention.nn.heterogeneous import HeterogeneousGraphAttention
from anyattention.nn.key_value_cache import KeyValueCache
from anyattention.nn.memory import MemoryAttention
from anyattention.nn.sparse import SparseAttention

__all__ = [
    "AttentionModule",
    "DistanceAttention",
    "EquivariantAttention",
    "GraphAttention",
    "GraphTransformerLayer",
    "HeterogeneousGraphAttention",
    "KeyValueCache",
    "MemoryAttention",
    "MultiHeadAttention",
    "ScaledDotProductAttention",
    "SparseAttention",
]
