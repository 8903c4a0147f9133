"""Settings of the modules: frozen, checked when made, and kept as JSON over a closed set of names."""

from anyattention.config.attention import AttentionConfig, GraphBase, PointBase, Positions
from anyattention.config.geometric import GeometricAttentionConfig
from anyattention.config.graph import Aggregation, GraphAttentionConfig, GraphScore
from anyattention.config.graph_transformer import Activation, AttentionOver, GraphTransformerConfig
from anyattention.config.heterogeneous import HeterogeneousGraphAttentionConfig, SoftmaxOver
from anyattention.config.memory import IndexDtype, IndexKind, MeasureName, MemoryAttentionConfig, MemoryBase
from anyattention.config.sparse import SparseAttentionConfig, SparsityPattern
from anyattention.settings import Config, require_config, require_defaults

__all__ = [
    "Activation",
    "Aggregation",
    "AttentionConfig",
    "AttentionOver",
    "Config",
    "GeometricAttentionConfig",
    "GraphAttentionConfig",
    "GraphBase",
    "GraphScore",
    "GraphTransformerConfig",
    "HeterogeneousGraphAttentionConfig",
    "IndexDtype",
    "IndexKind",
    "MeasureName",
    "MemoryAttentionConfig",
    "MemoryBase",
    "PointBase",
    "Positions",
    "SoftmaxOver",
    "SparseAttentionConfig",
    "SparsityPattern",
    "require_config",
    "require_defaults",
]
