"""Attention over anything: sequences, graphs, point clouds, sparse patterns and large memories.

>>> import torch, anyattention
>>> graph = anyattention.Graph.from_edge_index(torch.tensor([[0, 1], [2, 2]]), num_nodes=3)
>>> x = torch.ones(3, 1, 4)  # (nodes, heads, head_dim)
>>> anyattention.attend(x, x, x, graph, return_weights="heads").weights.flatten()
tensor([0.5000, 0.5000])
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# Each public name is imported at its first use, by `__getattr__`: PyTorch takes a second, which the help of the
# command `anyattention` need not wait for. Type checkers and editors read these lines, and Python reads `_HOMES`.
if TYPE_CHECKING:
    from anyattention import encodings, errors, interfaces, nn
    from anyattention.bias import RelativeBias
    from anyattention.builder import AttentionBuilder, GraphAttentionBuilder, SparseAttentionBuilder
    from anyattention.config import (
        AttentionConfig,
        GeometricAttentionConfig,
        GraphAttentionConfig,
        GraphTransformerConfig,
        HeterogeneousGraphAttentionConfig,
        MemoryAttentionConfig,
        SparseAttentionConfig,
    )
    from anyattention.loader import NeighborLoader
    from anyattention.masks import mask_from_blocked
    from anyattention.ops import attend, edge_dot, edge_softmax, edge_sum, explain, merge
    from anyattention.output import (
        AttentionCache,
        AttentionGradients,
        AttentionOutput,
        AttentionResult,
        EquivariantOutput,
        HeterogeneousOutput,
        MemoryOutput,
        SearchResult,
    )
    from anyattention.patterns import (
        Blocks,
        Causal,
        Documents,
        ExpanderGraph,
        Fixed,
        Full,
        Global,
        Graph,
        HeterogeneousGraph,
        Pattern,
        RandomBlocks,
        SampledGraph,
        SampledHeterogeneousGraph,
        Strided,
        TopK,
        Window,
    )
    from anyattention.saving import load, save
    from anyattention.scores import Additive, Dot, Dynamic, EdgeFeatures

    __version__: str

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
    "ExpanderGraph",
    "Fixed",
    "Full",
    "GeometricAttentionConfig",
    "Global",
    "Graph",
    "GraphAttentionBuilder",
    "GraphAttentionConfig",
    "GraphTransformerConfig",
    "HeterogeneousGraph",
    "HeterogeneousGraphAttentionConfig",
    "HeterogeneousOutput",
    "MemoryAttentionConfig",
    "MemoryOutput",
    "NeighborLoader",
    "Pattern",
    "RandomBlocks",
    "RelativeBias",
    "SampledGraph",
    "SampledHeterogeneousGraph",
    "SearchResult",
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
    "encodings",
    "errors",
    "explain",
    "interfaces",
    "load",
    "mask_from_blocked",
    "merge",
    "nn",
    "save",
]

# The modules in which the public names are; "" where the name is a module.
_HOMES = {
    "": ("encodings", "errors", "interfaces", "nn"),
    "bias": ("RelativeBias",),
    "builder": ("AttentionBuilder", "GraphAttentionBuilder", "SparseAttentionBuilder"),
    "config": (
        *("AttentionConfig", "GeometricAttentionConfig", "GraphAttentionConfig"),
        *("GraphTransformerConfig", "HeterogeneousGraphAttentionConfig", "MemoryAttentionConfig"),
        "SparseAttentionConfig",
    ),
    "loader": ("NeighborLoader",),
    "masks": ("mask_from_blocked",),
    "ops": ("attend", "edge_dot", "edge_softmax", "edge_sum", "explain", "merge"),
    "output": (
        *("AttentionCache", "AttentionGradients", "AttentionOutput", "AttentionResult"),
        *("EquivariantOutput", "HeterogeneousOutput", "MemoryOutput", "SearchResult"),
    ),
    "patterns": (
        *("Blocks", "Causal", "Documents", "ExpanderGraph", "Fixed", "Full", "Global"),
        *("Graph", "HeterogeneousGraph", "Pattern", "RandomBlocks", "SampledGraph", "SampledHeterogeneousGraph"),
        *("Strided", "TopK", "Window"),
    ),
    "saving": ("load", "save"),
    "scores": ("Additive", "Dot", "Dynamic", "EdgeFeatures"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# OpenMP's threads do not survive a fork, which may come before the kernels' first use: `native.load` compares.
_IMPORTED_BY = os.getpid()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A public name, the first time that it is asked for; later ones find it among the module's own."""
        if name == "__version__":
            found = import_module("importlib.metadata").version("anyattention")
        elif name not in _HOME_OF:
            raise AttributeError(f"module 'anyattention' has no attribute {name!r}")
        elif home := _HOME_OF[name]:
            found = getattr(import_module(f"anyattention.{home}"), name)
        else:
            found = import_module(f"anyattention.{name}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
