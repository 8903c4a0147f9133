"""Attention over anything: sequences, graphs, point clouds, sparse patterns and large memories.

>>> import torch, anyattention
>>> graph = anyattention.Graph.from_edge_index(torch.tensor([[0, 1], [2, 2]]), num_nodes=3)
>>> x = torch.ones(3, 1, 4)  # (nodes, heads, head_dim)
>>> anyattention.attend(x, x, x, graph, return_weights="heads").weights.flatten()
tensor([0.5000, 0.5000])
"""

from importlib.metadata import version

from anyattention import errors, interfaces, nn
from anyattention.bias import RelativeBias
from anyattention.builder import AttentionBuilder, GraphAttentionBuilder, SparseAttentionBuilder
from anyattention.config import (
    AttentionConfig,
    GeometricAttentionConfig,
    GraphAttentionConfig,
    SparseAttentionConfig,
)
from anyattention.masks import mask_from_blocked
from anyattention.ops import attend, edge_dot, edge_softmax, edge_sum, explain, merge
from anyattention.output import (
    AttentionCache,
    AttentionGradients,
    AttentionOutput,
    AttentionResult,
    EquivariantOutput,
)
from anyattention.patterns import (
    Blocks,
    Causal,
    Documents,
    Fixed,
    Full,
    Global,
    Graph,
    Pattern,
    RandomBlocks,
    Strided,
    TopK,
    Window,
)
from anyattention.saving import load, save
from anyattention.scores import Additive, Dot, Dynamic, EdgeFeatures

__all__ = [
    "Additive",
    "AttentionBuilder",
    "AttentionCache",
    "AttentionConfig",
    "AttentionGradients",
    "AttentionOutput",
    "AttentionResult",
    "Blocks",
    "Causal",
    "Documents",
    "Dot",
    "Dynamic",
    "EdgeFeatures",
    "EquivariantOutput",
    "Fixed",
    "Full",
    "GeometricAttentionConfig",
    "Global",
    "Graph",
    "GraphAttentionBuilder",
    "GraphAttentionConfig",
    "Pattern",
    "RandomBlocks",
    "RelativeBias",
    "SparseAttentionBuilder",
    "SparseAttentionConfig",
    "Strided",
    "TopK",
    "Window",
    "__version__",
    "attend",
    "edge_dot",
    "edge_softmax",
    "edge_sum",
    "errors",
    "explain",
    "interfaces",
    "load",
    "mask_from_blocked",
    "merge",
    "nn",
    "save",
]

__version__: str = version("anyattention")
