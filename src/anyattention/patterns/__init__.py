"""Who may attend to whom: patterns are data, without arithmetic."""

from anyattention.patterns.base import Pattern
from anyattention.patterns.graph import Graph
from anyattention.patterns.sequence import Causal, Full

__all__ = ["Causal", "Full", "Graph", "Pattern"]
