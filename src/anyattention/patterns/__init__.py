"""Who may attend to whom: patterns are data, without arithmetic."""

from anyattention.patterns.base import Pattern
from anyattention.patterns.blocks import Blocks, RandomBlocks
from anyattention.patterns.composed import Intersection, Union
from anyattention.patterns.expander import ExpanderGraph
from anyattention.patterns.graph import Graph
from anyattention.patterns.heterogeneous import HeterogeneousGraph
from anyattention.patterns.sampled import SampledGraph
from anyattention.patterns.sampled_heterogeneous import SampledHeterogeneousGraph
from anyattention.patterns.sequence import Causal, Documents, Fixed, Full, Global, Strided, Window
from anyattention.patterns.topk import TopK

__all__ = [
    "Blocks",
    "Causal",
    "Documents",
    "ExpanderGraph",
    "Fixed",
    "Full",
    "Global",
    "Graph",
    "HeterogeneousGraph",
    "Intersection",
    "Pattern",
    "RandomBlocks",
    "SampledGraph",
    "SampledHeterogeneousGraph",
    "Strided",
    "TopK",
    "Union",
    "Window",
]
