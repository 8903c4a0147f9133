"""Memories: keys and values with ids, indexes that search them, and attention over what was found."""

from anyattention.memory.exact import ExactIndex
from anyattention.memory.measures import Measure

__all__ = ["ExactIndex", "Measure"]
